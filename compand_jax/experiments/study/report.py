"""A study's report from its records: tables, pictures, and the copy that is kept.

results.csv has a row for each parent, control and cell, summary.csv means and standard deviations
over the seeds, report.md the comparison, every mean, mu of every layer, and what failed. Pictures
are accuracy.png, differences.png and, by network, mu-*.png and levels-*.png.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compand_jax.experiments.errors import UserError
from compand_jax.experiments.records import read_json, write_json, write_text
from compand_jax.experiments.study.grid import LEARNED, STUDIES
from compand_jax.experiments.study.plots import (
    plot_accuracy,
    plot_differences,
    plot_levels,
    plot_mu,
    title_of,
)
from compand_jax.experiments.study.records import ROW, read_record
from compand_jax.experiments.study.tables import (
    SUMMARY,
    summary,
    summary_text,
    with_controls,
)
from compand_jax.experiments.text import markdown_table, to_csv

Record = Mapping[str, Any]


def preset_of(directory: Path) -> str:
    """Returns which preset a study is.

    Raises:
      UserError: if the directory is no study's, or one of an unknown preset.
    """
    path = directory / "study.json"
    if not path.is_file():
        raise UserError(
            f"`directory` must be a study's, with study.json in it, got {directory}: give the "
            "--out of compand study"
        )
    found = read_json(path)
    preset = found.get("preset") if isinstance(found, dict) else None
    if not isinstance(preset, str) or preset not in STUDIES:
        raise UserError(
            f"`preset` must be one of {', '.join(STUDIES)}, got {preset!r} in {path}: restore it"
        )
    return preset


def read_records(directory: Path) -> list[dict[str, Any]]:
    """Returns the records of a study, with the controls' accuracies, in the order of results.csv.

    Raises:
      UserError: if no cell is finished, or a record is damaged.
    """
    records = {path.stem: read_record(path) for path in (directory / "records").glob("*.json")}
    if not any(record["row"]["stage"] == "cell" for record in records.values()):
        raise UserError(
            f"`directory` must be a study's, with a finished cell, got {directory}: "
            "run compand study, or give its --out"
        )
    rows = with_controls([record["row"] for record in records.values()])
    return [records[row["name"]] | {"row": row} for row in rows]


def write_report(directory: Path) -> list[Path]:
    """Writes a study's tables and pictures into its directory; returns their paths.

    Args:
      directory: the study's, or a copy of its records.

    Raises:
      UserError: if no cell is finished, or a record is damaged.
    """
    records = read_records(directory)
    rows = [record["row"] for record in records]
    texts = _texts(directory, records)
    for name, text in texts.items():
        write_text(directory / name, text)
    plot_accuracy(rows, directory / "accuracy.png")
    plot_differences(rows, directory / "differences.png")
    names = [*texts, "accuracy.png", "differences.png"]
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
    """Copies a study's records, without checkpoints, to a directory, and writes its report there.

    What a former report left there is replaced, once the new one is whole. Of what failed the error
    is copied, without its traceback.

    Raises:
      UserError: if no cell is finished, or a record is damaged.
    """
    if kept.resolve() == directory.resolve():
        write_report(kept)
        return
    new = kept.with_name(f"{kept.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    (new / "records").mkdir(parents=True)
    shutil.copyfile(directory / "study.json", new / "study.json")
    for path in (directory / "records").glob("*.json"):
        shutil.copyfile(path, new / "records" / path.name)
    for path, failure in _failures(directory):
        (new / "failures").mkdir(exist_ok=True)
        shown = {name: failure[name] for name in ("name", "error", "date")}
        write_json(new / "failures" / path.name, shown)
    write_report(new)
    shutil.rmtree(kept, ignore_errors=True)
    new.rename(kept)


def study_block(kept: Path, link: str) -> str:
    """Returns a page's text on a kept study.

    Args:
      kept: the study's directory in results/.
      link: where that is, from the page.

    Raises:
      UserError: if no cell is finished, if the report's texts are not those of its records, or if
        a record is damaged.
    """
    records = read_records(kept)
    for name, text in _texts(kept, records).items():
        if (kept / name).read_text() != text:
            raise UserError(
                f"`results` must have the {name} of its records, got another in {kept}: run "
                f"compand report {kept}"
            )
    picture = f"![Test accuracy against bits]({link}/accuracy.png)"
    rest = f"Every mean and mu: [results/{kept.name}/report.md]({link}/report.md)."
    return f"{_text(records)}\n\n{picture}\n\n{rest}"


def _failures(directory: Path) -> list[tuple[Path, dict[str, Any]]]:
    return [(path, read_json(path)) for path in sorted((directory / "failures").glob("*.json"))]


def _texts(directory: Path, records: Sequence[Record]) -> dict[str, str]:
    """Returns what is written of the records, by the file's name, but for the pictures."""
    rows = [record["row"] for record in records]
    return {
        "results.csv": to_csv(rows, ROW),
        "summary.csv": to_csv(summary(rows), SUMMARY),
        "report.md": _document(directory, records),
    }


def _shown(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Returns the records whose mu and levels are drawn, by network and data set.

    They are the learned mu of its own per layer, the first seed of each bits and arrangement.
    """
    found: dict[str, dict[tuple, Record]] = {}
    for record in records:
        row = record["row"]
        if row["mu_scope"] == "per_layer" and row["mu"] == LEARNED:
            key = (row["arrangement"], row["weight_bits"])
            found.setdefault(f"{row['network']}-{row['dataset']}", {}).setdefault(key, record)
    return {network: list(own.values()) for network, own in found.items()}


def _document(directory: Path, records: Sequence[Record]) -> str:
    rows = [record["row"] for record in records]
    parts = [f"# The study {preset_of(directory)}", _text(records)]
    parts += ["## Every mean", _means(rows), "## mu at the end", *_mu_tables(records)]
    if failures := [f"- {found['name']}: {found['error']}" for _, found in _failures(directory)]:
        parts += ["## Failed", "\n".join(failures)]
    versions = sorted({tuple(record["versions"].items()) for record in records})
    listed = "; ".join(", ".join(f"{name} {version}" for name, version in found)
                       for found in versions)  # fmt: skip
    sources = sorted({record["source"] for record in records if record.get("source")})
    if sources:
        listed += f"; compand_jax's source has the SHA-256 {', '.join(sources)}"
    return "\n\n".join([*parts, f"Made with {listed}."]) + "\n"


def _text(records: Sequence[Record]) -> str:
    """Returns what is compared, and the range of the mu that was learned."""
    text = summary_text([record["row"] for record in records])
    header = ("network", "dataset", "arrangement", "W/A", "mu of weights", "mu of activations")
    lines = []
    for record in (record for shown in _shown(records).values() for record in shown):
        row = record["row"]
        bits = f"{row['weight_bits']}/{row['act_bits']}"
        ranges = (_mu_range(record, operand) for operand in ("weight", "act"))
        lines.append((row["network"], row["dataset"], row["arrangement"], bits, *ranges))
    if not lines:
        return text
    note = (
        "mu learned per layer, from the smallest to the largest of the layers at those bits, of "
        "the first seed:"
    )
    return f"{text}\n\n{note}\n\n{markdown_table([header, *lines], text_columns=3)}"


def _mu_range(record: Record, operand: str) -> str:
    """Returns the least and the largest mu of the sites that have as many bits as the row."""
    bits = f"{operand}_bits"
    known = [
        found[f"{operand}_mu"]
        for site, found in record["quantizers"].items()
        if f"{operand}_mu" in found and record["sites"][site][bits] == record["row"][bits]
    ]
    return f"{min(known):.2f} to {max(known):.2f}" if known else "-"


def _means(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = {
        name: name.replace("_", " ") for name in SUMMARY if not name.endswith("_std")
    } | {"weight_bits": "bits", "accuracy_std": "std", "difference_std": "std"}  # fmt: skip
    if not any(row["levers"] for row in rows):
        del columns["levers"]
    names = [name for name in SUMMARY if name in columns]
    header = tuple(columns[name] for name in names)
    lines = [[_cell(name, found[name]) for name in names] for found in summary(rows)]
    return markdown_table([header, *lines], text_columns=3)


def _cell(name: str, value: Any) -> str:
    if value in (None, ""):
        return "-"
    if name == "learning_rate":
        return f"{value:g}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _mu_tables(records: Sequence[Record]) -> list[str]:
    parts = []
    for shown in _shown(records).values():
        for record in shown:
            found = record["quantizers"]
            lines = [(site, _mu(found[site], "weight"), _mu(found[site], "act")) for site in found]
            parts += [f"{title_of(record['row'])}, seed {record['row']['seed']}:",
                      markdown_table([("site", "weights", "activations"), *lines])]  # fmt: skip
    return parts


def _mu(found: Mapping[str, Any], operand: str) -> str:
    return f"{found[f'{operand}_mu']:.2f}" if f"{operand}_mu" in found else "-"
