"""How long a study takes: its trainings' steps times what a step was measured to take."""

import dataclasses
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from tqdm import tqdm

from compand_jax.data.images import DATASETS, ImageData
from compand_jax.experiments.runs.config import CONTROL, FULL_PRECISION, RunConfig
from compand_jax.experiments.runs.stages import calibration_batches, make_stage
from compand_jax.experiments.study.grid import Cell
from compand_jax.experiments.study.records import read_record
from compand_jax.experiments.study.run import Study
from compand_jax.training.fit import fit
from compand_jax.training.steps import create_state

# By data set: training images, shape, classes.
_SHAPES = {"digits": (1437, (8, 8, 1), 10), "cifar10": (50_000, (32, 32, 3), 10),
           "cifar100": (50_000, (32, 32, 3), 100)}  # fmt: skip
assert set(_SHAPES) == set(DATASETS)
_STEPS = 3

_Kind = tuple[str, str, bool]  # network, data set, whether it is quantized


def estimates_table(study: Study, cells: Sequence[Cell]) -> str:
    """Returns a line for each training to be done: what it is, its steps and its time.

    A step's time is that of the study's finished trainings of the same network and data set, and
    measured, on made-up images, where there is none.
    """
    trainings = list(_trainings(study, cells))
    open_ones = [(kind, config) for _, kind, config, _, finished in trainings if not finished]
    seconds = _recorded(study)
    missing = {kind: config for kind, config in open_ones if kind not in seconds}
    for kind in tqdm(missing, desc="measuring steps", disable=not missing):
        seconds[kind] = _measure(missing[kind], quantized=kind[2])
    rows, total = [], 0.0
    for name, kind, _, steps, finished in trainings:
        if finished:
            rows.append(f"{name}: finished")
            continue
        total += steps * seconds[kind]
        each = seconds[kind]
        rows.append(f"{name}: {steps} steps of {each:.3f} s, {_time(steps * each)}")
    rows.append(
        f"{len(cells)} cells of {len(trainings) - len(cells)} parents; what is left takes "
        f"{_time(total)} in one process, evaluations not counted"
    )
    return "\n".join(rows)


def _trainings(
    study: Study, cells: Sequence[Cell]
) -> Iterator[tuple[str, _Kind, RunConfig, int, bool]]:
    """Yields name, kind, run, steps and whether it is finished, of parents and cells in order.

    A parent counts as finished where all its cells are: it is not trained then.
    """
    seen = set()
    needed = {cell.parent_name for cell in cells if not study.is_finished(cell)}
    for cell in cells:
        parent, config = study.parent_run(cell), study.cell_run(cell)
        if cell.parent_name not in seen:
            seen.add(cell.parent_name)
            result = parent.run_dir / FULL_PRECISION / "result.json"
            done = cell.parent_name not in needed or result.is_file()
            yield f"parents/{cell.parent_name}", _kind(parent), parent, _steps(parent, 0), done
        done = study.is_finished(cell)
        yield cell.name, _kind(config), config, _steps(config, config.finetune_epochs), done


def _kind(config: RunConfig) -> _Kind:
    return config.model, config.dataset, config.methods not in ((), (CONTROL,))


def _steps(config: RunConfig, finetune_epochs: int) -> int:
    epochs = finetune_epochs or config.epochs
    return epochs * (_SHAPES[config.dataset][0] // config.batch_size)


def _recorded(study: Study) -> dict[_Kind, float]:
    times: dict[_Kind, list[float]] = {}
    for path in sorted((study.directory / "records").glob("*.json")):
        row = read_record(path)["row"]
        if row["steps"]:
            kind = row["network"], row["dataset"], row["method"] != FULL_PRECISION
            times.setdefault(kind, []).append(row["seconds"] / row["steps"])
    return {kind: statistics.median(found) for kind, found in times.items()}


def _measure(config: RunConfig, *, quantized: bool) -> float:
    """Returns the seconds of a training step, the compilation not counted."""
    _, shape, classes = _SHAPES[config.dataset]
    n = config.batch_size * _STEPS
    images = np.random.default_rng(0).integers(0, 256, (n, *shape)).astype(np.uint8)
    labels = np.arange(n, dtype=np.int32) % classes
    half = (0.5,) * shape[-1]
    data = ImageData("made-up", images, labels, images[:1], labels[:1], classes, half, half)
    stage = make_stage(config, data, config.methods[0] if quantized else FULL_PRECISION)
    key = jax.random.key(0)
    batch = next(calibration_batches(config, data, key))[0]
    times = [time.perf_counter()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is not calibrated, which takes no longer
        variables = jax.jit(stage.model.init)(key, batch)
        fit(
            create_state(variables, stage.tx, key),
            data,
            dataclasses.replace(stage.fit, epochs=1, steps_per_call=1),
            model=stage.model,
            tx=stage.tx,
            describe=lambda state: times.append(time.perf_counter()) or {},
        )
    return min(np.diff(times)[1:])


def _time(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{seconds / 60:.1f} min"
