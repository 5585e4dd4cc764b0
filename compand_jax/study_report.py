"""A study's report from its records: tables, pictures, and the copy that is kept.

results.csv has a row for each parent, control and cell, summary.csv means and standard deviations
over the seeds, report.md the comparison, every mean, mu of every layer, and what failed. Pictures
are accuracy.png, differences.png and, by network, mu-*.png and levels-*.png.
"""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compand_jax.run_directory import read_json, write_text
from compand_jax.study_plots import (
    plot_accuracy,
    plot_differences,
    plot_levels,
    plot_mu,
    title_of,
)
from compand_jax.study_tables import (
    SUMMARY,
    markdown,
    read_csv,
    summary,
    summary_text,
    to_csv,
    with_controls,
)

Record = Mapping[str, Any]


def preset_of(directory: Path) -> str:
    """Returns which preset a study is.

    Raises:
      FileNotFoundError: if the directory is no study's.
    """
    path = directory / "study.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"`directory` must be a study's, with study.json in it, got {directory}: give the "
            "--out of scripts/study.py"
        )
    return read_json(path)["preset"]


def read_records(directory: Path) -> list[dict[str, Any]]:
    """Returns the records of a study, with the controls' accuracies, in the order of results.csv.

    Raises:
      FileNotFoundError: if no cell is finished.
    """
    records = {path.stem: read_json(path) for path in (directory / "records").glob("*.json")}
    if not any(record["row"]["stage"] == "cell" for record in records.values()):
        raise FileNotFoundError(
            f"`directory` must be a study's, with a finished cell, got {directory}: "
            "run scripts/study.py, or give its --out"
        )
    rows = with_controls([record["row"] for record in records.values()])
    return [records[row["name"]] | {"row": row} for row in rows]


def write_report(directory: Path) -> list[Path]:
    """Writes a study's tables and pictures into its directory; returns their paths.

    Args:
      directory: the study's, or a copy of its records.

    Raises:
      FileNotFoundError: if no cell is finished.
      OSError: if it cannot be written.
    """
    records = read_records(directory)
    rows = [record["row"] for record in records]
    write_text(directory / "results.csv", to_csv(rows))
    write_text(directory / "summary.csv", to_csv(summary(rows), SUMMARY))
    write_text(directory / "report.md", _document(directory, records))
    plot_accuracy(rows, directory / "accuracy.png")
    plot_differences(rows, directory / "differences.png")
    names = ["results.csv", "summary.csv", "report.md", "accuracy.png", "differences.png"]
    for network, shown in _shown(records).items():
        names.append(f"mu-{network}.png")
        plot_mu(shown, directory / names[-1])
        for record in shown:
            row = record["row"]
            if row["arrangement"] == shown[0]["row"]["arrangement"]:
                names.append(f"levels-{network}-w{row['weight_bits']}a{row['act_bits']}.png")
                plot_levels(record, directory / names[-1])
    return [directory / name for name in names]


def keep_report(directory: Path, kept: Path) -> None:
    """Copies a study's report and records, without checkpoints, to a directory.

    What a former report left there is replaced.
    """
    files = write_report(directory)
    if kept.resolve() == directory.resolve():
        return
    shutil.rmtree(kept, ignore_errors=True)
    for name in ("records", "failures"):
        if any((directory / name).glob("*.json")):
            shutil.copytree(directory / name, kept / name)
    for path in (directory / "study.json", *files):
        shutil.copyfile(path, kept / path.name)


def study_block(kept: Path) -> str:
    """Returns the README's text on a kept study.

    Raises:
      ValueError: if results.csv is not of the records, or report.md not of results.csv.
    """
    rows = read_csv(kept / "results.csv")
    records = read_records(kept)
    text = _text(records)
    if rows != [record["row"] for record in records]:
        what = "the rows of its records in results.csv"
    elif text not in (kept / "report.md").read_text():
        what = "the tables of results.csv in report.md"
    else:
        place = kept.as_posix()
        picture = f"![Test accuracy against bits]({place}/accuracy.png)"
        rest = f"Every mean and mu: [{place}/report.md]({place}/report.md)."
        return f"\n{text}\n\n{picture}\n\n{rest}\n\n"
    raise ValueError(f"`results` must have {what}, got others in {kept}: run scripts/report.py")


def _shown(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Returns the records whose mu and levels are drawn, by network and data set.

    They are the learned mu of its own per layer, the first seed of each bits and arrangement.
    """
    found: dict[str, dict[tuple, Record]] = {}
    for record in records:
        row = record["row"]
        if row["mu_scope"] == "per_layer" and row["mu"] == "learned":
            key = (row["arrangement"], row["weight_bits"])
            found.setdefault(f"{row['network']}-{row['dataset']}", {}).setdefault(key, record)
    return {network: list(own.values()) for network, own in found.items()}


def _document(directory: Path, records: Sequence[Record]) -> str:
    rows = [record["row"] for record in records]
    parts = [f"# The study {preset_of(directory)}", _text(records)]
    parts += ["## Every mean", _means(rows), "## mu at the end", *_mu_tables(records)]
    failures = [read_json(path) for path in sorted((directory / "failures").glob("*.json"))]
    if failures:
        parts += ["## Failed", "\n".join(f"- {f['name']}: {f['error']}" for f in failures)]
    versions = sorted({tuple(record["versions"].items()) for record in records})
    listed = "; ".join(", ".join(f"{name} {version}" for name, version in found)
                       for found in versions)  # fmt: skip
    return "\n\n".join([*parts, f"Made with {listed}."]) + "\n"


def _text(records: Sequence[Record]) -> str:
    """Returns what is compared, and the range of the mu that was learned."""
    text = summary_text([record["row"] for record in records])
    lines = []
    for record in (record for shown in _shown(records).values() for record in shown):
        row, found = record["row"], record["quantizers"].values()
        bits = f"{row['weight_bits']}/{row['act_bits']}"
        ranges = (_range(each.get(f"{operand}_mu") for each in found)
                  for operand in ("weight", "act"))  # fmt: skip
        lines.append((row["network"], row["dataset"], row["arrangement"], bits, *ranges))
    if not lines:
        return text
    header = ("network", "dataset", "arrangement", "W/A", "mu of weights", "mu of activations")
    note = "mu learned per layer, from the layers' smallest to their largest, of the first seed:"
    return f"{text}\n\n{note}\n\n{markdown(header, lines)}"


def _range(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{min(known):.2f} to {max(known):.2f}" if known else "-"


def _means(rows: Sequence[Mapping[str, Any]]) -> str:
    header = ("network", "dataset", "arrangement", "bits", "method", "mu scope", "mu", "seeds",
              "accuracy", "std", "difference", "std")  # fmt: skip
    lines = [[_cell(found[name]) for name in SUMMARY] for found in summary(rows)]
    return markdown(header, lines)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def _mu_tables(records: Sequence[Record]) -> list[str]:
    parts = []
    for shown in _shown(records).values():
        for record in shown:
            found = record["quantizers"]
            lines = [(site, _mu(found[site], "weight"), _mu(found[site], "act")) for site in found]
            parts += [f"{title_of(record['row'])}, seed {record['row']['seed']}:",
                      markdown(("site", "weights", "activations"), lines)]  # fmt: skip
    return parts


def _mu(found: Mapping[str, Any], operand: str) -> str:
    return f"{found[f'{operand}_mu']:.2f}" if f"{operand}_mu" in found else "-"
