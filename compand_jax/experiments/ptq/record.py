"""The record of a post-training quantization run: JSON, and CSV, Markdown and pictures of it."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compand_jax.experiments.errors import UserError
from compand_jax.experiments.ptq.families import families_table, families_text, plot_families
from compand_jax.experiments.ptq.plots import plot_bits, plot_budget, plot_sensitivity
from compand_jax.experiments.ptq.settings import Setting
from compand_jax.experiments.ptq.tables import (
    Table,
    base_setting,
    budget_text,
    full_precision_text,
    lead_text,
    sensitivity_table,
    site_bits_table,
    tables,
)
from compand_jax.experiments.records import make_writable, write_json, write_text
from compand_jax.experiments.text import to_csv


def open_record(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the record in a directory, or a new one, without results, if there is none.

    Args:
      directory: made if it is not there.
      config: all that results depend on.

    Raises:
      UserError: the record is of another configuration, there are other files, or the directory
        cannot be written.
    """
    record = read_record(directory)
    if record is None:
        make_writable({"out": (directory, 0)})
        parts: dict[str, Any] = {"rows": [], "divergences": [], "sensitivity": [], "budgets": []}
        return {"config": dict(config), **parts, "seconds": {}}
    stored = record["config"]
    other = [
        f"{name} is {stored.get(name)!r} there, {value!r} here"
        for name, value in config.items()
        if stored.get(name) != value
    ]
    if other:
        raise UserError(
            f"`out` must be of this configuration, got {directory} where {'; '.join(other)}: "
            "choose another directory or the same values"
        )
    make_writable({"out": (directory, 0)})
    return record


def read_record(directory: Path) -> dict[str, Any] | None:
    """Returns the record in a directory, None where there is nothing.

    Raises:
      UserError: there are other files, or the record is damaged.
    """
    path = directory / "results.json"
    if not path.is_file():
        if directory.is_dir() and any(directory.iterdir()):
            raise UserError(
                f"`out` must be new, empty or a record's directory, got {directory} with other "
                "files: choose another directory"
            )
        return None
    try:
        record = json.loads(path.read_text())
        _read_all(record)
    # Of what is damaged, anything can be missing, or of another kind.
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"`out` must hold a record of compand ptq, got {path}, which is none, or is "
            "damaged: choose another directory"
        ) from error
    return record


def _read_all(record: Mapping[str, Any]) -> None:
    """Raises what comes of it where something that a run goes on from, or writes, is missing."""
    document(record)
    if results_by_setting(record["rows"]):
        _ = record["full_precision"]["accuracy"]
    for part in ("divergences", "sensitivity"):
        for row in record[part]:
            _ = record["sites"][row["site"]] + row["weight_bits"]
    for row in [*record["divergences"], *with_divergences(record)]:
        _ = math.isfinite(row["divergence"])


def results_by_setting(rows: Iterable[Mapping[str, Any]]) -> dict[Setting, Mapping[str, Any]]:
    """Returns rows of a record by their setting."""
    return {Setting.from_row(row): row for row in rows}


def write_record(directory: Path, record: dict[str, Any]) -> str:
    """Writes a record with its rows in order, tables and pictures of it; returns its text.

    `results.json`, `results.md`, and of those parts that have been run, `rows.csv` and
    `plot.png` (the table), `sensitivity.csv` and `sensitivity.png`, and `budget.png` (the last).
    """
    rows = results_by_setting(record["rows"])
    order = [setting for table in _tables(record) for setting in table.settings()]
    record["rows"] = [rows[setting] for setting in dict.fromkeys(order) if setting in rows]
    sites = list(record.get("sites", ()))
    for part in ("divergences", "sensitivity"):
        record[part].sort(key=lambda row: (row["weight_bits"], sites.index(row["site"])))
    write_json(directory / "results.json", record)
    if record["rows"]:
        main = _tables(record)[0].settings()
        shown = [rows[setting] for setting in main if setting in rows]
        plot = plot_families if record["config"].get("families") else plot_bits
        plot(shown, record["full_precision"]["accuracy"], directory / "plot.png")
        kept = [{name: row[name] for name in row if name != "rules"} for row in record["rows"]]
        write_text(directory / "rows.csv", to_csv(kept))
    if sensitivities := with_divergences(record):
        plot_sensitivity(sensitivities, directory / "sensitivity.png")
        write_text(directory / "sensitivity.csv", to_csv(sensitivities))
    if record["budgets"]:
        plot_budget(record["budgets"][-1], directory / "budget.png")
    text = document(record)
    write_text(directory / "results.md", text)
    return text


def document(record: Mapping[str, Any]) -> str:
    """Returns a record as Markdown; what comes before its first second heading is for a page."""
    config, versions = record["config"], record["versions"]
    parts = [f"# Quantized without training: {config['model']} on {config['dataset']}"]
    if "full_precision" in record:
        parts.append(full_precision_text(record["full_precision"]))
    results = results_by_setting(record["rows"])
    for i, table in enumerate(_tables(record)):
        parts.append(table.to_markdown(results))
        if i == 0:
            is_of_families = record["config"].get("families")
            parts.append(families_text(results) if is_of_families else lead_text(results))
    parts += [budget_text(found) for found in record["budgets"]]
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in record["seconds"].items())
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts.append(
        f"{config['images']} training images for calibration, augmented as in training; seed "
        f"{config['seed']}; {record['workers']} rows at a time ({seconds}). {listed}; "
        f"{record['devices']}; {record['date']}. All settings are in results.json."
    )
    if sensitivities := with_divergences(record):
        parts.append("## One site at a time")
        parts.append(
            "Weights of one site alone quantized, mu-law, one scale per channel, with batch-norm "
            f"statistics {'re-estimated' if config['batch_stats'] else 'as they were'}. "
            "Divergence: mean Kullback-Leibler divergence of the quantized network's softmax from "
            "the full-precision network's, with its statistics alike, on calibration images, in "
            "nats."
        )
        parts.append(sensitivity_table(sensitivities))
    for found in record["budgets"]:
        parts += [f"## Bits in a budget of {found['budget']:g}", site_bits_table(found)]
    return "\n\n".join(filter(None, parts)) + "\n"


def with_divergences(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows of a record's sensitivities, each with its divergence."""
    divergences = {
        (row["site"], row["weight_bits"]): row["divergence"] for row in record["divergences"]
    }
    return [
        row | {"divergence": divergences[row["site"], row["weight_bits"]]}
        for row in record["sensitivity"]
    ]


def _tables(record: Mapping[str, Any]) -> list[Table]:
    bits = sorted({row["weight_bits"] for row in record["rows"]})
    fields = ("calibration", "error_feedback", "batch_stats")
    if not bits:
        return []
    base = base_setting(*(record["config"][name] for name in fields))
    return tables_of(base, bits, families=record["config"].get("families", False))


def tables_of(base: Setting, bits: Sequence[int], *, families: bool) -> list[Table]:
    """Returns the tables of a record: of all families of levels, or those of `tables`."""
    return [families_table(base, bits)] if families else tables(base, bits)
