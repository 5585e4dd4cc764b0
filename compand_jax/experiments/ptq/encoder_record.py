"""The record of a sentence encoder's table: JSON, CSV, and Markdown of both."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compand_jax.experiments.errors import UserError
from compand_jax.experiments.records import make_writable, read_json, write_json, write_text
from compand_jax.experiments.text import markdown_table, size_text, to_csv

FILE = "encoder.json"
"""The record's, in its directory."""
_SETTING = ("bits", "granularity", "quantizer", "error_feedback")


def open_record(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the record in a directory, or a new one without rows.

    Raises:
      UserError: the record is of another configuration, or the directory cannot be written.
    """
    make_writable({"out": (directory, 0)})
    path = directory / FILE
    if not path.is_file():
        return {"config": dict(config), "rows": []}
    record = read_json(path)
    if not isinstance(record, dict) or record.get("config") != config:
        raise UserError(
            f"`out` must be new or of this configuration, got {directory}: choose another directory"
        )
    return record


def is_done(record: Mapping[str, Any], setting: Mapping[str, Any]) -> bool:
    """Whether a record has a row of a setting."""
    key = [setting[name] for name in _SETTING]
    return any([row[name] for name in _SETTING] == key for row in record["rows"])


def write_record(directory: Path, record: dict[str, Any]) -> str:
    """Writes `encoder.json`, `rows.csv` and `results.md`; returns the text."""
    record["rows"].sort(key=_order)
    write_json(directory / FILE, record)
    text = encoder_document(record)
    if record["rows"]:
        write_text(directory / "rows.csv", to_csv(record["rows"]))
        write_text(directory / "results.md", text)
    return text


def _order(row: Mapping[str, Any]) -> tuple:
    sizes = {"tensor": -2, "channel": -1}
    granularity = sizes.get(row["granularity"], row["granularity"])
    return -row["bits"], granularity, row["error_feedback"], row["quantizer"]


def encoder_document(record: Mapping[str, Any]) -> str:
    """Returns a record as Markdown."""
    config = record["config"]
    header = (
        "bits", "scale", "error feedback", "quantizer", "bits/weight", "cosine", "1st percentile",
        "nearest stays", "of the 10 nearest", "bytes", "time",
    )  # fmt: skip
    lines = [
        (
            str(row["bits"]),
            _granularity(row["granularity"]),
            "yes" if row["error_feedback"] else "no",
            row["quantizer"],
            f"{row['bits_per_weight']:.2f}",
            *_agreement(row),
            size_text(row["model_bytes"]),
            f"{row['seconds']:.0f} s",
        )
        for row in record["rows"]
    ]
    tables = record["tables_alone"]
    whole = ("32", "-", "-", "-", "32.00", "1.0000", "1.0000", "100.0 %", "100.0 %")
    alone = ("32", "-", "-", "-", "32.00", *_agreement(tables), size_text(tables["model_bytes"]))
    lines = [(*whole, size_text(record["full_precision_bytes"]), "-"), (*alone, "-"), *lines]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    bits = config["table_bits"]
    kept = "full precision" if bits is None else f"{bits} bits, {config['table_group']} to a scale"
    parts = [
        f"# Quantized without training: {config['encoder']}",
        markdown_table([header, *lines], text_columns=4),
        f"Weights alone, all but the look-up tables, which are in {kept}, from the second row on. "
        "Cosine: between a sentence's vector and that in full precision, on average over "
        f"{config['sentences']} sentences ({config['source']}), and the first percentile. Nearest "
        "stays: the share of sentences whose nearest other one is the same. bits/weight: scales "
        f"({config['scale_dtype']}) and mu included. bytes: of the whole encoder. Scales by the "
        f"calibration `{config['calibration']}`.",
        f"Calibrated on {config['calibration_sentences']} sentences "
        f"({config['calibration_source']}), none of the others; seed {config['seed']}. "
        f"{versions}; {record['devices']}; {record['date']}. All settings are in encoder.json.",
    ]
    return "\n\n".join(parts) + "\n"


def _granularity(value: str | int) -> str:
    return f"per {value}" if isinstance(value, str) else f"{value} inputs"


def _agreement(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['cosine']:.4f}",
        f"{row['cosine_p1']:.4f}",
        f"{100 * row['nearest']:.1f} %",
        f"{100 * row['nearest_10']:.1f} %",
    )
