"""A run: full precision, then each method fine-tuned from it, and what came out.

A run that was stopped goes on at its last checkpoint; what is finished is not run again.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from compand_jax.data.images import ImageData, load_data
from compand_jax.experiments.errors import UserError, user_errors
from compand_jax.experiments.records import provenance, write_json
from compand_jax.experiments.runs.config import (
    FULL_PRECISION,
    METHODS,
    METHODS_BY_NAME,
    RunConfig,
    to_json,
)
from compand_jax.experiments.runs.directory import open_run_dir
from compand_jax.experiments.runs.levers import preceding
from compand_jax.experiments.runs.report import write_reports
from compand_jax.experiments.runs.stages import (
    Stage,
    estimate_statistics,
    finished,
    make_stage,
    make_teacher,
    start_or_resume,
)
from compand_jax.experiments.runs.tensorboard import make_events
from compand_jax.layers.model_size import model_bytes
from compand_jax.training.distributed import is_main, wait_for_all
from compand_jax.training.events import require_tensorboard
from compand_jax.training.fit import check_devices, fit
from compand_jax.training.metrics_log import read_log
from compand_jax.training.steps import TrainState


def run(config: RunConfig, *, progress: bool = True) -> str:
    """Runs what is not finished of a run, writes its reports, and returns its table.

    Args:
      config: what to run, and where.
      progress: whether to show progress bars.

    Raises:
      UserError: if the data set is not prepared, the run directory has another configuration or
        cannot be written, or a batch is larger than the training split; nothing is trained or
        overwritten then. Or if a training diverges.
    """
    train_stages(config, load_run_data(config), progress=progress)
    with _writable(config):
        return write_reports(config.run_dir, config.record_dir) if is_main() else ""


def load_run_data(config: RunConfig, data_dir: Path | None = None) -> ImageData:
    """Returns a run's data set, with the run's mean and standard deviation where it has its own.

    Args:
      config: the run's.
      data_dir: directory of the prepared data sets; None is the run's.

    Raises:
      UserError: if the data set is not prepared, or damaged.
    """
    with user_errors(OSError, ValueError):
        data = load_data(config.dataset, data_dir or config.data_dir)
    if config.mean is None or config.std is None:
        return data
    return dataclasses.replace(data, mean=config.mean, std=config.std)


def train_stages(config: RunConfig, data: ImageData, *, progress: bool = True) -> None:
    """Runs what is not finished of a run's stages.

    Args:
      config: what to run, and where.
      data: the run's data set, as `load_run_data` returns it.
      progress: whether to show progress bars.

    Raises:
      As `run`.
    """
    with user_errors(ValueError, ImportError):
        check_devices(config.batch_size, jax.device_count())
        if config.tensorboard:
            require_tensorboard()
    # Every stage is made before the first one is trained: a rule that matches no layer is an error
    # at once.
    names = [method.name for method in METHODS if method in config.methods]
    if config.parent_dir is None:
        names.insert(0, FULL_PRECISION)
    stages = [found for name in names for found in _with_preceding(config, data, name)]
    if is_main():
        # Two checkpoints are kept while the next is written.
        open_run_dir(config, 3 * sum(stage.state_bytes for _, stage in stages))
    wait_for_all("run directory")
    with _writable(config):
        for own, stage in stages:
            _run_stage(own, stage, progress)


def _with_preceding(
    config: RunConfig, data: ImageData, name: str
) -> Iterator[tuple[RunConfig, Stage]]:
    """Yields a stage, those of more bits that come before it first, each with its run."""
    method = METHODS_BY_NAME.get(name)
    before = None if method is None or method.quantizer is None else preceding(config)
    if before is not None:
        yield from _with_preceding(before, data, name)
    yield config, make_stage(config, data, name)


@contextlib.contextmanager
def _writable(config: RunConfig) -> Iterator[None]:
    """Within it, what the system says of the disk names the argument, and what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"`run_dir` must stay writable, got {config.run_dir} ({error.strerror or error}): free "
            "some space and give the same command again, which goes on where this stopped"
        ) from error


def evaluate_stage(config: RunConfig, data: ImageData, name: str) -> tuple[int, int]:
    """Returns how many test images a stage's last checkpoint gets right, and of how many.

    Args:
      config: the run's, as `read_config` gives it.
      data: the run's data set.
      name: of a finished stage.

    Raises:
      UserError: if there is no sound checkpoint of its last step, or it is one of another model.
    """
    stage, state = finished(config, data, name)
    return stage.count_correct(state.variables), len(data.test_labels)


def _run_stage(config: RunConfig, stage: Stage, progress: bool) -> None:
    """Trains a stage to its end unless it is finished."""
    path, log = stage.directory / "result.json", stage.directory / "metrics.jsonl"
    if path.is_file():
        return
    with contextlib.ExitStack() as stack, stage.checkpoints() as checkpoints:
        stage, state, metadata = start_or_resume(stage, checkpoints)
        stage.directory.mkdir(parents=True, exist_ok=True)
        events = make_events(stage, int(state.step)) if config.tensorboard else None
        if events is not None:
            stack.callback(events.close)
        try:
            state = fit(
                state,
                stage.data,
                stage.fit,
                model=stage.model,
                tx=stage.tx,
                checkpoints=checkpoints,
                metadata=metadata,
                log=log,
                describe=_description(stage),
                progress=stage.name if progress else None,
                teacher=make_teacher(config, stage),
                at_end=functools.partial(estimate_statistics, config, stage),
                events=events,
            )
        except FloatingPointError as error:  # it diverges
            raise UserError(str(error).replace("`learning_rate`", _rates(stage))) from error
        if not checkpoints.steps():  # there was nothing to train
            checkpoints.save(int(state.step), state, metadata)
        result = _result(config, stage, state, metadata)
        if events is not None:
            events.row({"step": result["steps"], "test_accuracy": result["test_accuracy"]})
    if is_main():
        write_json(path, result)
    wait_for_all(f"result of {stage.name}")


def _rates(stage: Stage) -> str:
    """Returns the names of the fields that say how fast a stage learns."""
    names = [name for name in stage.schedules if name != "learning_rate"]
    first = "learning_rate" if stage.name == FULL_PRECISION else "finetune_learning_rate"
    return " or ".join(f"`{name}`" for name in (first, *names))


def _description(stage: Stage) -> Callable[[TrainState], dict[str, Any]]:
    """Returns the function of a state that gives what is logged of it: rates, mu and scales."""
    quantized = stage.quantized

    @jax.jit
    def describe(state):
        rates = {name: schedule(state.step - 1) for name, schedule in stage.schedules.items()}
        if quantized is None:
            return rates
        return rates | {"quantizers": quantized.quantizers(state.variables)}

    return describe


def _epochs(config: RunConfig, stage: Stage) -> int:
    """Returns a stage's epochs, those at more bits before it counted."""
    return stage.fit.epochs * (1 + len(config.preceding_bits) if stage.quantized else 1)


def _result(
    config: RunConfig, stage: Stage, state: TrainState, metadata: dict[str, Any]
) -> dict[str, Any]:
    correct, total = stage.count_correct(state.variables), len(stage.data.test_labels)
    method, quantized = METHODS_BY_NAME.get(stage.name), stage.quantized
    rows = read_log(stage.directory / "metrics.jsonl")
    result = {
        "stage": stage.name,
        "method": (method and method.quantizer) or stage.name,
        "weight_bits": quantized and quantized.config.weight_bits,
        "act_bits": quantized and quantized.config.act_bits,
        "mu_scope": method and method.mu_scope,
        "test_accuracy": 100 * correct / total,
        "correct": correct,
        "total": total,
        "model_bytes": model_bytes(state.variables, quantized and quantized.sites),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "steps": int(state.step),
        "epochs": _epochs(config, stage),
    }
    if quantized is not None:
        values = jax.device_get(quantized.quantizers(state.variables))
        result["calibrated_accuracy"] = 100 * metadata["calibrated_correct"] / total
        result["sites"] = metadata["sites"]
        result["quantizers"] = jax.tree.map(lambda value: value.tolist(), values)
    return result | {"seed": config.seed, "config": to_json(config)} | provenance()
