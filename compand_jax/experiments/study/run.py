"""A study: every cell of a grid trained from its parent, each in a directory of its own.

    DIR/study.json         which preset it is
    DIR/parents/NAME/      the run of a full-precision parent (or elsewhere, to be shared)
    DIR/cells/NAME/        the run of a cell
    DIR/records/NAME.json  what the report is made from; it says that a training is finished
    DIR/failures/NAME.json the error of a cell that failed; it is tried again at the next start
    DIR/locks/NAME         held while a process works on a cell

Processes that share the directory take cells that no other one holds; cells whose parent another
one is training come last. A lock is the operating system's, of an open file: it ends with its
process, however that ends.
"""

import dataclasses
import fcntl
import functools
import shutil
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import jax

from compand_jax.experiments.errors import UserError, user_errors
from compand_jax.experiments.records import make_writable, provenance, read_json, write_json
from compand_jax.experiments.runs.config import FULL_PRECISION, RunConfig, to_json
from compand_jax.experiments.runs.directory import check_config
from compand_jax.experiments.runs.run import load_run_data, train_stages
from compand_jax.experiments.study.grid import Cell
from compand_jax.experiments.study.records import cell_record, parent_record
from compand_jax.training.events import require_tensorboard


@dataclass(frozen=True)
class Study:
    """A study's directories.

    Attributes:
      preset: its name.
      directory: of the study.
      parents_dir: of the parents' runs.
      data_dir: of the prepared data sets.
      discard_checkpoints: whether a cell's checkpoints are deleted once its record is written.
      tensorboard: whether each training writes for TensorBoard, too.
    """

    preset: str
    directory: Path
    parents_dir: Path
    data_dir: Path = Path("data")
    discard_checkpoints: bool = False
    tensorboard: bool = False

    def parent_run(self, cell: Cell) -> RunConfig:
        """Returns the run of a cell's parent, full precision alone."""
        return dataclasses.replace(
            cell.parent,
            methods=(),
            run_dir=self.parents_dir / cell.parent_name,
            data_dir=self.data_dir,
            steps_per_call=_steps_per_call(),
            tensorboard=self.tensorboard,
        )

    def cell_run(self, cell: Cell) -> RunConfig:
        """Returns the run of a cell."""
        return dataclasses.replace(
            cell.config,
            run_dir=self.directory / "cells" / cell.name,
            parent_dir=self.parents_dir / cell.parent_name,
            data_dir=self.data_dir,
            steps_per_call=_steps_per_call(),
            tensorboard=self.tensorboard,
        )

    def record_path(self, name: str) -> Path:
        """Returns where the record of a cell or a parent is."""
        return self.directory / "records" / f"{name}.json"

    def failure_path(self, cell: Cell) -> Path:
        """Returns where the error of a cell is, if it failed."""
        return self.directory / "failures" / f"{cell.name}.json"

    def lock_path(self, cell: Cell, *, of_parent: bool) -> Path:
        """Returns what a process holds while it trains a cell, or its parent."""
        if of_parent:
            return self.parents_dir / f"{cell.parent_name}.lock"
        return self.directory / "locks" / cell.name

    def has_parent(self, cell: Cell) -> bool:
        """Whether the cell's parent is trained."""
        return (self.parents_dir / cell.parent_name / FULL_PRECISION / "result.json").is_file()

    def is_finished(self, cell: Cell) -> bool:
        """Whether the cell has its record."""
        return self.record_path(cell.name).is_file()


def run_study(study: Study, cells: Sequence[Cell], *, progress: bool = True) -> list[str]:
    """Runs the cells that no process has finished or is at work on; returns those that failed.

    Args:
      study: the directories.
      cells: in the order to run them.
      progress: whether to show where it is.

    Raises:
      UserError: if the directory is another study's, holds a training of another configuration
        under a name that is needed, or cannot be written, or if a data set that is needed cannot
        be read; nothing is trained then.
    """
    if study.tensorboard:
        with user_errors(ImportError):
            require_tensorboard()
    _open(study, cells)
    errors: dict[str, Exception] = {}
    while (found := _next_cell(study, cells, errors)) is not None:
        cell, is_parent, lock = found
        with lock:
            if progress:
                at = f"[{cells.index(cell) + 1}/{len(cells)}] {cell.name}"
                print(f"parent {cell.parent_name}" if is_parent else at, flush=True)
            _attempt(study, cell, is_parent, errors, progress)
        jax.clear_caches()  # of what is never called again
    return [cell.name for cell in cells if cell.name in errors]


def _next_cell(
    study: Study, cells: Sequence[Cell], errors: Mapping[str, Exception]
) -> tuple[Cell, bool, IO] | None:
    """Returns the next cell to work on, whether its parent is to be trained first, and the lock.

    The lock is the parent's or else the cell's. What another process is at is passed over; at the
    end the parents that others train are waited for.
    """
    for wait in (False, True):
        for cell in cells:
            if cell.name in errors or study.is_finished(cell):
                continue
            is_parent = not (study.has_parent(cell) or cell.parent_name in errors)
            path = study.lock_path(cell, of_parent=is_parent)
            if (lock := _claim(path, wait=wait and is_parent)) is not None:
                return cell, is_parent, lock
    return None


def _attempt(
    study: Study, cell: Cell, is_parent: bool, errors: dict[str, Exception], progress: bool
) -> None:
    """Trains a cell, or its parent, unless another process just has; adds to the errors by name."""
    try:
        if is_parent and not study.has_parent(cell):
            config = study.parent_run(cell)
            train_stages(config, _data(config), progress=progress)
        elif not is_parent and not study.is_finished(cell):
            if not study.has_parent(cell):
                raise errors[cell.parent_name]
            _run_cell(study, cell, progress)
    except Exception as error:  # whatever it is, the other cells go on
        errors[cell.parent_name if is_parent else cell.name] = error
        if not is_parent:
            _record_failure(study, cell, error)
        if progress:
            print(f"  failed: {error}", flush=True)


def _steps_per_call() -> int:
    # Of a loop that is unrolled on a CPU, and takes as much longer to compile.
    return 1 if jax.default_backend() == "cpu" else 50


def _open(study: Study, cells: Sequence[Cell]) -> None:
    path = study.directory / "study.json"
    found = read_json(path)["preset"] if path.is_file() else study.preset
    if found != study.preset:
        raise UserError(
            f"`out` must be a directory of the study {study.preset}, got {study.directory} of "
            f"{found}: choose another"
        )
    for cell in cells:
        check_config(study.parent_run(cell), finetune=False)
        check_config(study.cell_run(cell))
    for cell in cells:
        if not study.is_finished(cell):
            _data(study.cell_run(cell))
    make_writable({"out": (study.directory, 0), "parents": (study.parents_dir, 0)})
    for name in ("locks", "records", "failures", "cells"):
        (study.directory / name).mkdir(exist_ok=True)
    write_json(path, {"preset": study.preset})


def _run_cell(study: Study, cell: Cell, progress: bool) -> None:
    config = study.cell_run(cell)
    data = _data(config)
    assert config.parent_dir is not None
    if not study.record_path(cell.parent_name).is_file():
        parent = parent_record(cell.parent_name, config.parent_dir)
        write_json(study.record_path(cell.parent_name), parent)
    train_stages(config, data, progress=progress)
    record = cell_record(cell, config.run_dir, config.parent_dir, data)
    write_json(study.record_path(cell.name), record)
    study.failure_path(cell).unlink(missing_ok=True)
    if study.discard_checkpoints:
        for checkpoints in list(config.run_dir.glob(f"**/{cell.method.name}/checkpoints")):
            shutil.rmtree(checkpoints)
    if progress:
        print(f"  {record['row']['accuracy']:.2f} %", flush=True)


def _data(config: RunConfig):
    return _load(config.dataset, config.data_dir, config.mean, config.std)


@functools.lru_cache(maxsize=1)
def _load(dataset, data_dir, mean, std):
    return load_run_data(RunConfig(dataset=dataset, data_dir=data_dir, mean=mean, std=std))


def _record_failure(study: Study, cell: Cell, error: Exception) -> None:
    failure = {
        "name": cell.name,
        "error": f"{type(error).__name__}: {error}",
        "traceback": traceback.format_exception(error),
        "config": to_json(cell.config),
    }
    write_json(study.failure_path(cell), failure | provenance())


def _claim(path: Path, *, wait: bool) -> IO | None:
    """Returns the lock of a file, held until it is closed; None where another process holds it.

    The file stays: one that is deleted could be locked by two that opened it before and after.
    """
    file = open(path, "a")  # noqa: SIM115  # it is the lock
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        return None
    return file
