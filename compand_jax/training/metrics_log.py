"""Metrics as a JSONL file: a row a line, with its `step`."""

import json
import os
from pathlib import Path


def append_log(path: str | Path, row: dict) -> None:
    """Appends a row to a JSONL file."""
    with open(path, "a") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def truncate_log(path: str | Path, step: int) -> None:
    """Drops the rows after `step`, and a last one that was not completely written."""
    path = Path(path)
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] > step:
            break
        kept.append(line + "\n")
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    os.replace(partial, path)


def read_log(path: str | Path) -> list[dict]:
    """Returns the rows of a JSONL file; none if there is no file."""
    path = Path(path)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
