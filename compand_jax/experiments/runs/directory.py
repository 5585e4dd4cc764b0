"""A run's directory: opened only for the same configuration, and what is found in it.

It holds `config.json` and a directory for each stage, with `metrics.jsonl` (a row per compiled
call), `checkpoints/` (the newest two) and, once the stage is finished, `result.json`.
"""

import dataclasses
from pathlib import Path
from typing import Any

from compand_jax.experiments.errors import UserError, user_errors
from compand_jax.experiments.records import make_writable, read_json, write_json
from compand_jax.experiments.runs.config import (
    FULL_PRECISION,
    METHODS,
    METHODS_BY_NAME,
    Method,
    RunConfig,
    differences,
    from_json,
    to_json,
    unknown_fields,
)


def open_run_dir(config: RunConfig, needed: int) -> None:
    """Makes the run's directory and writes its configuration, or checks that it has the same.

    As long as no fine-tuning has begun, its fields may change.

    Args:
      config: the run's.
      needed: bytes that have to be free there.

    Raises:
      UserError: if the directory has another configuration, or other files, if it cannot be
        written, or if the disk is full.
    """
    run_dir, path = config.run_dir, config.run_dir / "config.json"
    methods = config.methods
    if path.is_file():
        check_config(config, finetune=bool(_begun(run_dir)))
        methods = (*methods, *_begun(run_dir))
    elif run_dir.is_dir() and any(run_dir.iterdir()):
        raise UserError(
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
    """Raises UserError if the run's directory has the configuration of another run.

    Args:
      config: the run's.
      finetune: whether the fields of the fine-tuning count.
    """
    path = config.run_dir / "config.json"
    rows = differences(_read_stored(path), config, finetune=finetune) if path.is_file() else []
    if rows:
        raise UserError(
            f"`run_dir` must be of this configuration, got {config.run_dir} where "
            f"{'; '.join(rows)}: choose another directory or the same values"
        )


def read_config(run_dir: str | Path) -> RunConfig:
    """Returns the configuration of a run directory.

    Raises:
      UserError: if it is none, or its configuration cannot be read.
    """
    path = Path(run_dir) / "config.json"
    if not path.is_file():
        raise UserError(
            f"`run_dir` must be a run's directory, with config.json in it, got {run_dir}: "
            "give the directory that compand train wrote"
        )
    with user_errors(ValueError, TypeError):  # of a field
        return dataclasses.replace(from_json(_read_stored(path)), run_dir=Path(run_dir))


def find_stages(path: Path) -> tuple[Path, list[str]]:
    """Returns the directory of a run, and the names of its finished stages.

    Args:
      path: of the run; or of one of its stages, which is then the only one.
    """
    if (path / "config.json").is_file() or not (path.parent / "config.json").is_file():
        return path, finished_stages(path)
    path = path.absolute()
    return path.parent, [name for name in finished_stages(path.parent) if name == path.name]


def finished_stages(run_dir: str | Path) -> list[str]:
    """Returns the names of a run's finished stages, in the order they are run."""
    names = (FULL_PRECISION, *METHODS_BY_NAME)
    return [name for name in names if (Path(run_dir) / name / "result.json").is_file()]


def read_results(run_dir: str | Path) -> list[dict]:
    """Returns the results of a run's finished stages, in the order they are run."""
    names = finished_stages(run_dir)
    return [read_json(Path(run_dir) / name / "result.json") for name in names]


def _begun(run_dir: Path) -> list[Method]:
    """Returns the methods that have begun, at the run's bits or at those before them."""
    return [
        method
        for name, method in METHODS_BY_NAME.items()
        if (run_dir / name).is_dir() or any(run_dir.glob(f"w?a?/**/{name}"))
    ]


def _read_stored(path: Path) -> dict[str, Any]:
    stored = read_json(path)
    is_one = isinstance(stored, dict) and isinstance(stored.get("quant", {}), dict)
    unknown = unknown_fields(stored) if is_one else []
    if unknown or not is_one:
        what = f"the unknown fields {', '.join(unknown)}" if is_one else "none"
        raise UserError(
            f"`run_dir` must hold this version's configuration, got {path} with {what}: "
            "choose another directory"
        )
    return stored
