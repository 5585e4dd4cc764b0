"""A run: full precision, then each method fine-tuned from it, and what came out.

A run that was stopped goes on at its last checkpoint; what is finished is not run again.
"""

import dataclasses
from pathlib import Path

import jax

from compand_jax.data.images import ImageData, load_data
from compand_jax.experiments.records import provenance, write_json
from compand_jax.experiments.runs.config import FULL_PRECISION, METHODS, RunConfig, to_json
from compand_jax.experiments.runs.directory import finished_stages as finished_stages
from compand_jax.experiments.runs.directory import open_run_dir
from compand_jax.experiments.runs.directory import read_config as read_config
from compand_jax.experiments.runs.report import write_reports
from compand_jax.experiments.runs.stages import (
    Stage,
    count_correct,
    finished,
    fit_config,
    make_stage,
    start_or_resume,
    state_bytes,
)
from compand_jax.linen.model_size import model_bytes
from compand_jax.training.checkpoints import Checkpoints
from compand_jax.training.distributed import is_main, wait_for_all
from compand_jax.training.fit import check_devices, fit
from compand_jax.training.metrics_log import read_log
from compand_jax.training.steps import TrainState


def run(config: RunConfig, *, progress: bool = True) -> str:
    """Runs what is not finished of a run, writes its reports, and returns its table.

    Args:
      config: what to run, and where.
      progress: whether to show progress bars.

    Raises:
      ValueError: if the run directory has another configuration, or a batch is larger than the
        training split; nothing is trained or overwritten then.
      FloatingPointError: if a training diverges.
      OSError: if the data set is not prepared, or the run directory cannot be written.
    """
    train_stages(config, load_run_data(config), progress=progress)
    try:
        return write_reports(config.run_dir, config.record_dir) if is_main() else ""
    except OSError as error:
        raise _with_advice(error, config) from error


def load_run_data(config: RunConfig, data_dir: Path | None = None) -> ImageData:
    """Returns a run's data set, with the run's mean and standard deviation where it has its own.

    Args:
      config: the run's.
      data_dir: directory of the prepared data sets; None is the run's.

    Raises:
      FileNotFoundError: if the data set is not prepared.
    """
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
    fit_config(config, 1).steps_per_epoch(len(data.train_labels))
    check_devices(config.batch_size, jax.device_count())
    methods = [method for method in METHODS if method in config.methods]
    names = methods if config.parent_dir is not None else [FULL_PRECISION, *methods]
    stages = [make_stage(config, data, name) for name in names]
    # Two checkpoints are kept while the next is written. This looks at every stage's layers, too:
    # a rule that matches none is an error before the first stage is trained.
    needed = 3 * sum(state_bytes(config, data, stage) for stage in stages)
    if is_main():
        open_run_dir(config, needed)
    wait_for_all("run directory")
    try:
        for stage in stages:
            _run_stage(config, data, stage, progress)
    except OSError as error:
        raise _with_advice(error, config) from error


def _with_advice(error: OSError, config: RunConfig) -> OSError:
    if error.errno is None:  # says what to do
        return error
    return OSError(
        f"`run_dir` must stay writable, got {config.run_dir} ({error}): free some space and "
        "give the same command again, which goes on where this stopped"
    )


def evaluate_stage(config: RunConfig, data: ImageData, name: str) -> tuple[int, int]:
    """Returns how many test images a stage's last checkpoint gets right, and of how many.

    Args:
      config: the run's, as `read_config` gives it.
      data: the run's data set.
      name: of a finished stage.

    Raises:
      FileNotFoundError: if there is no sound checkpoint of its last step.
      ValueError: if the checkpoint is one of another model.
    """
    stage, state = finished(config, data, name)
    correct = count_correct(config, data, stage.model, state.variables)
    return correct, len(data.test_labels)


def _run_stage(config: RunConfig, data: ImageData, stage: Stage, progress: bool) -> None:
    """Trains a stage to its end unless it is finished."""
    directory = config.run_dir / stage.name
    path, log = directory / "result.json", directory / "metrics.jsonl"
    if path.is_file():
        return
    with Checkpoints(directory / "checkpoints") as checkpoints:
        stage, state, metadata = start_or_resume(config, data, stage, checkpoints)
        directory.mkdir(exist_ok=True)
        state = fit(
            state,
            data,
            stage.fit,
            model=stage.model,
            tx=stage.tx,
            checkpoints=checkpoints,
            metadata=metadata,
            log=log,
            describe=_description(stage),
            progress=stage.name if progress else None,
        )
        if not checkpoints.steps():  # there was nothing to train
            checkpoints.save(int(state.step), state, metadata)
    result = _result(config, data, stage, state, metadata, log)
    if is_main():
        write_json(path, result)
    wait_for_all(f"result of {stage.name}")


def _description(stage: Stage):
    """Returns the function of a state that gives what is logged of it: rates, mu and scales."""
    quantized = stage.quantized

    @jax.jit
    def describe(state):
        rates = {name: schedule(state.step - 1) for name, schedule in stage.schedules.items()}
        if quantized is None:
            return rates
        return rates | {"quantizers": quantized.quantizers(state.variables)}

    return describe


def _result(
    config: RunConfig, data: ImageData, stage: Stage, state: TrainState, metadata: dict, log: Path
) -> dict:
    correct = count_correct(config, data, stage.model, state.variables)
    total = len(data.test_labels)
    quantized = stage.quantized
    result = {
        "stage": stage.name,
        "method": stage.name.partition("-")[0],
        "weight_bits": quantized and quantized.config.weight_bits,
        "act_bits": quantized and quantized.config.act_bits,
        "mu_scope": stage.name.partition("-")[2] or None,
        "test_accuracy": 100 * correct / total,
        "correct": correct,
        "total": total,
        "model_bytes": model_bytes(state.variables, quantized and quantized.sites),
        "seconds": round(sum(row["seconds"] for row in read_log(log)), 1),
        "steps": int(state.step),
        "epochs": stage.fit.epochs,
    }
    if quantized is not None:
        values = jax.device_get(quantized.quantizers(state.variables))
        result["calibrated_accuracy"] = 100 * metadata["calibrated_correct"] / total
        result["sites"] = metadata["sites"]
        result["quantizers"] = jax.tree.map(lambda value: value.tolist(), values)
    return result | {"seed": config.seed, "config": to_json(config)} | provenance()
