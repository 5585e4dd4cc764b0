"""A run's directory: opened only for the same configuration, and what is found in it.

It holds `config.json` and a directory for each stage, with `metrics.jsonl` (a row per compiled
call), `checkpoints/` (the newest two) and, once the stage is finished, `result.json`.
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from compand_jax.experiments.runs.config import (
    FULL_PRECISION,
    METHODS,
    RunConfig,
    differences,
    from_json,
    to_json,
    unknown_fields,
)

_PACKAGES = ("compand-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def open_run_dir(config: RunConfig, needed: int) -> None:
    """Makes the run's directory and writes its configuration, or checks that it has the same.

    As long as no fine-tuning has begun, its fields may change.

    Args:
      config: the run's.
      needed: bytes that have to be free there.

    Raises:
      ValueError: if the directory has another configuration, or other files.
      OSError: if it cannot be written, or the disk is full.
    """
    run_dir, path = config.run_dir, config.run_dir / "config.json"
    methods = config.methods
    if path.is_file():
        check_config(config, finetune=bool(_begun(run_dir)))
        methods = (*methods, *_begun(run_dir))
    elif run_dir.is_dir() and any(run_dir.iterdir()):
        raise ValueError(
            f"`run_dir` must be new, empty or a run's directory, got {run_dir} with other files: "
            "choose another directory"
        )
    directories = {"run_dir": (run_dir, needed)}
    if config.record_dir is not None:
        directories["record_dir"] = (config.record_dir, 0)
    make_writable(directories)
    methods = tuple(method for method in METHODS if method in methods)
    write_json(path, to_json(dataclasses.replace(config, methods=methods)))


def check_config(config: RunConfig, *, finetune: bool = True) -> None:
    """Raises ValueError if the run's directory has the configuration of another run.

    Args:
      config: the run's.
      finetune: whether the fields of the fine-tuning count.
    """
    path = config.run_dir / "config.json"
    rows = differences(_read_stored(path), config, finetune=finetune) if path.is_file() else []
    if rows:
        raise ValueError(
            f"`run_dir` must be of this configuration, got {config.run_dir} where "
            f"{'; '.join(rows)}: choose another directory or the same values"
        )


def read_config(run_dir: str | Path) -> RunConfig:
    """Returns the configuration of a run directory.

    Raises:
      FileNotFoundError: if it is none.
      ValueError: if its configuration cannot be read.
    """
    path = Path(run_dir) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"`run_dir` must be a run's directory, with config.json in it, got {run_dir}: "
            "give the directory that scripts/train.py wrote"
        )
    return dataclasses.replace(from_json(_read_stored(path)), run_dir=Path(run_dir))


def finished_stages(run_dir: str | Path) -> list[str]:
    """Returns the names of a run's finished stages, in the order they are run."""
    names = (FULL_PRECISION, *METHODS)
    return [name for name in names if (Path(run_dir) / name / "result.json").is_file()]


def read_results(run_dir: str | Path) -> list[dict]:
    """Returns the results of a run's finished stages, in the order they are run."""
    names = finished_stages(run_dir)
    return [read_json(Path(run_dir) / name / "result.json") for name in names]


def read_json(path: str | Path) -> Any:
    """Returns what a JSON file holds.

    Raises:
      ValueError: if it is damaged; the file is named.
    """
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(
            f"`path` must be a JSON file, got {path} ({error}): restore it, or delete it"
        ) from error


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON so that the file is either complete or as it was before."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Writes a text so that the file is either complete or as it was before.

    Of processes that write the same file, on one machine or several, the last one prevails.
    """
    partial = Path(f"{path}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def provenance(packages: Sequence[str] = ()) -> dict:
    """Returns what a result was made with: versions, devices, and the date in UTC.

    Args:
      packages: distributions to name besides this project's own dependencies.
    """
    devices = jax.devices()
    kind = devices[0].device_kind
    return {
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in (*_PACKAGES, *packages)},
        "devices": f"{len(devices)} x {_cpu_model() if kind == 'cpu' else kind}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _begun(run_dir: Path) -> list[str]:
    return [method for method in METHODS if (run_dir / method).is_dir()]


def _read_stored(path: Path) -> dict:
    try:
        stored = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"`run_dir` must hold a configuration, got {path}, which is no JSON ({error}): "
            "choose another directory"
        ) from error
    if isinstance(stored, dict) and not isinstance(stored.get("quant", {}), dict):
        raise ValueError(
            f"`run_dir` must hold a configuration, got {path} whose `quant` is no object: "
            "choose another directory"
        )
    if not isinstance(stored, dict) or (unknown := unknown_fields(stored)):
        what = f"the unknown fields {', '.join(unknown)}" if isinstance(stored, dict) else "none"
        raise ValueError(
            f"`run_dir` must hold this version's configuration, got {path} with {what}: "
            "choose another directory"
        )
    return stored


def make_writable(directories: dict[str, tuple[Path, int]]) -> None:
    """Makes the directories; OSError, with nothing made, if one cannot be written or is full."""
    paths = [path for path, _ in directories.values() for path in (path, *path.parents)]
    made = sorted({path for path in paths if not path.exists()}, reverse=True)
    try:
        for name, (directory, needed) in directories.items():
            _try_to_write(name, directory, needed)
    except OSError:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _try_to_write(name: str, directory: Path, needed: int) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(1 << 16))
            file.flush()
    except OSError as error:
        raise OSError(
            f"`{name}` must be a directory that can be written, got {directory} "
            f"({error.strerror or error}): choose another, or free some space"
        ) from error
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            f"`{name}` must have {needed / 1e6:.1f} MB free for its checkpoints, got {directory} "
            f"with {free / 1e6:.1f} MB: choose another, or free some space"
        )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # imported from where it lies
        return "not installed"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
        return f"{', '.join(sorted(names))} ({os.cpu_count()} cores)"
    except (OSError, IndexError):
        return f"{platform.processor() or platform.machine()} ({os.cpu_count()} cores)"
