"""What a study would do: its trainings, their steps, and how long they take where known."""

import statistics
from collections.abc import Iterator, Sequence

from compand_jax.data.images import DATASETS
from compand_jax.experiments.records import provenance
from compand_jax.experiments.runs.config import CONTROL, FULL_PRECISION, RunConfig
from compand_jax.experiments.study.grid import Cell
from compand_jax.experiments.study.records import read_record
from compand_jax.experiments.study.run import Study

_TRAIN_IMAGES = {"digits": 1437, "cifar10": 50_000, "cifar100": 50_000}
assert set(_TRAIN_IMAGES) == set(DATASETS)


def list_cells(study: Study, cells: Sequence[Cell]) -> str:
    """Returns a line for each training: what it is, and its steps if it is to be done.

    Where a finished training of the study, of the same network and data set on such a machine, has
    shown how long a step takes, the line has the time too.
    """
    seconds, rows, total = _step_seconds(study), [], 0.0
    for name, config, epochs, is_finished in _trainings(study, cells):
        steps = epochs * (_TRAIN_IMAGES[config.dataset] // config.batch_size)
        if is_finished:
            rows.append(f"{name}: finished")
        elif (each := seconds.get(_kind(config))) is None:
            rows.append(f"{name}: {steps} steps")
        else:
            total += steps * each
            rows.append(f"{name}: {steps} steps of {each:.3f} s, {_time(steps * each)}")
    parents = len(rows) - len(cells)
    known = f"; what is left, and its time known, takes {_time(total)}" if total else ""
    return "\n".join([*rows, f"{len(cells)} cells of {parents} parents{known}"])


def _trainings(study: Study, cells: Sequence[Cell]) -> Iterator[tuple[str, RunConfig, int, bool]]:
    """Yields name, run, epochs and whether it is finished, of parents and cells in order.

    A parent counts as finished where all its cells are: it is not trained then.
    """
    needed = {cell.parent_name for cell in cells if not study.is_finished(cell)}
    seen = set()
    for cell in cells:
        if cell.parent_name not in seen:
            seen.add(cell.parent_name)
            is_finished = cell.parent_name not in needed or study.has_parent(cell)
            parent = study.parent_run(cell)
            yield f"parents/{cell.parent_name}", parent, parent.epochs, is_finished
        config = study.cell_run(cell)
        epochs = config.finetune_epochs * (1 + len(config.preceding_bits))
        yield cell.name, config, epochs, study.is_finished(cell)


def _step_seconds(study: Study) -> dict[tuple[str, str, bool], float]:
    """Returns the median seconds of a step, evaluations not counted, on machines like this one."""
    times: dict[tuple[str, str, bool], list[float]] = {}
    device = provenance()["devices"]
    for path in (study.directory / "records").glob("*.json"):
        row = read_record(path)["row"]
        if row["steps"] and row["device"] == device:
            kind = row["network"], row["dataset"], row["method"] != FULL_PRECISION
            times.setdefault(kind, []).append(row["seconds"] / row["steps"])
    return {kind: statistics.median(found) for kind, found in times.items()}


def _kind(config: RunConfig) -> tuple[str, str, bool]:
    """Returns what the time of a step depends on: network, data set, whether it is quantized."""
    return config.model, config.dataset, config.methods not in ((), (CONTROL,))


def _time(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{seconds / 60:.1f} min"
