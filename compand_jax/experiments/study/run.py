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

import contextlib
import dataclasses
import fcntl
import functools
import itertools
import shutil
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from compand_jax.experiments.records import provenance, read_json, write_json
from compand_jax.experiments.runs.config import FULL_PRECISION, RunConfig, to_json
from compand_jax.experiments.runs.directory import check_config
from compand_jax.experiments.runs.run import load_run_data, train_stages
from compand_jax.experiments.study.grid import Cell
from compand_jax.experiments.study.records import cell_record, parent_record


@dataclass(frozen=True)
class Study:
    """A study's directories.

    Attributes:
      preset: its name.
      directory: of the study.
      parents_dir: of the parents' runs.
      data_dir: of the prepared data sets.
      discard_checkpoints: whether a cell's checkpoints are deleted once its record is written.
    """

    preset: str
    directory: Path
    parents_dir: Path
    data_dir: Path = Path("data")
    discard_checkpoints: bool = False

    def parent_run(self, cell: Cell) -> RunConfig:
        """Returns the run of a cell's parent, full precision alone."""
        return dataclasses.replace(
            cell.parent,
            methods=(),
            run_dir=self.parents_dir / cell.parent_name,
            data_dir=self.data_dir,
            steps_per_call=_steps_per_call(),
        )

    def cell_run(self, cell: Cell) -> RunConfig:
        """Returns the run of a cell."""
        return dataclasses.replace(
            cell.config,
            run_dir=self.directory / "cells" / cell.name,
            parent_dir=self.parents_dir / cell.parent_name,
            data_dir=self.data_dir,
            steps_per_call=_steps_per_call(),
        )

    def record_path(self, name: str) -> Path:
        """Returns where the record of a cell or a parent is."""
        return self.directory / "records" / f"{name}.json"

    def failure_path(self, cell: Cell) -> Path:
        """Returns where the error of a cell is, if it failed."""
        return self.directory / "failures" / f"{cell.name}.json"

    def is_finished(self, cell: Cell) -> bool:
        """Whether the cell has its record."""
        return self.record_path(cell.name).is_file()


def shard(cells: Sequence[Cell], text: str) -> list[Cell]:
    """Returns every n-th cell, for `text` = "i/n", from the i-th on; i = n is the same as i = 0.

    Raises:
      ValueError: if the text is not i/n with 0 <= i <= n.
    """
    i, slash, n = text.partition("/")
    if not (slash and i.isdecimal() and n.isdecimal() and 0 <= int(i) <= int(n) != 0):
        raise ValueError(
            f"`shard` must be i/n with i from 0 to n - 1 (or from 1 to n), got {text!r}: correct it"
        )
    return list(cells[int(i) % int(n) :: int(n)])


def run_study(study: Study, cells: Sequence[Cell], *, progress: bool = True) -> list[str]:
    """Runs the cells that no process has finished or is at work on; returns those that failed.

    Args:
      study: the directories.
      cells: in the order to run them.
      progress: whether to show where it is.

    Raises:
      ValueError: if the directory is another study's, or holds a training of another
        configuration under a name that is needed; nothing is trained then.
      OSError: if it cannot be written, or a data set that is needed cannot be read.
    """
    _open(study, cells)
    failed, failed_parents = [], {}
    for wait, (i, cell) in itertools.product((False, True), enumerate(cells, start=1)):
        with _claimed(study.directory / "locks" / cell.name, wait=False) as mine:
            if not mine or study.is_finished(cell) or cell.name in failed:
                continue
            try:
                if cell.parent_name in failed_parents:
                    raise failed_parents[cell.parent_name]
                try:
                    if not _finish_parent(study, cell, progress, wait=wait):
                        continue
                except Exception as error:  # whatever it is, its other cells fail by it too
                    failed_parents[cell.parent_name] = error
                    raise
                if progress:
                    print(f"[{i}/{len(cells)}] {cell.name}", flush=True)
                _run_cell(study, cell, progress)
            except Exception as error:  # whatever it is, the other cells go on
                failed.append(cell.name)
                _record_failure(study, cell, error)
                if progress:
                    print(f"  {cell.name} failed: {error}", flush=True)
            finally:
                jax.clear_caches()  # of what is never called again
    return failed


def _steps_per_call() -> int:
    # Of a loop that is unrolled on a CPU, and takes as much longer to compile.
    return 1 if jax.default_backend() == "cpu" else 50


def _open(study: Study, cells: Sequence[Cell]) -> None:
    path = study.directory / "study.json"
    found = read_json(path)["preset"] if path.is_file() else study.preset
    if found != study.preset:
        raise ValueError(
            f"`out` must be a directory of the study {study.preset}, got {study.directory} of "
            f"{found}: choose another"
        )
    for cell in cells:
        check_config(study.parent_run(cell), finetune=False)
        check_config(study.cell_run(cell))
    for cell in cells:
        if not study.is_finished(cell):
            _data(study.cell_run(cell))
    for name in ("locks", "records", "failures", "cells"):
        (study.directory / name).mkdir(parents=True, exist_ok=True)
    study.parents_dir.mkdir(parents=True, exist_ok=True)
    write_json(path, {"preset": study.preset})


def _finish_parent(study: Study, cell: Cell, progress: bool, *, wait: bool) -> bool:
    """Trains a cell's parent unless it is finished; returns whether it is now.

    It is not where another process is at it, unless `wait` says to wait for that one.
    """
    config = study.parent_run(cell)
    name, result = cell.parent_name, config.run_dir / FULL_PRECISION / "result.json"
    if not result.is_file():
        with _claimed(study.parents_dir / f"{name}.lock", wait=wait) as mine:
            if not mine:
                return False
            if not result.is_file():
                if progress:
                    print(f"parent {name}", flush=True)
                train_stages(config, _data(config), progress=progress)
    if not study.record_path(name).is_file():
        write_json(study.record_path(name), parent_record(name, config.run_dir))
    return True


def _run_cell(study: Study, cell: Cell, progress: bool) -> None:
    config = study.cell_run(cell)
    data = _data(config)
    train_stages(config, data, progress=progress)
    assert config.parent_dir is not None
    record = cell_record(cell, config.run_dir, config.parent_dir, data)
    write_json(study.record_path(cell.name), record)
    study.failure_path(cell).unlink(missing_ok=True)
    if study.discard_checkpoints:
        shutil.rmtree(config.run_dir / cell.method / "checkpoints")
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


@contextlib.contextmanager
def _claimed(path: Path, *, wait: bool) -> Iterator[bool]:
    """Holds the lock of a file while it is entered; yields whether it is held.

    The file stays: one that is deleted could be locked by two that opened it before and after.
    """
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
