"""A run's stages: full precision, then each method fine-tuned from it, and what came out.

Every stage has a directory of its own with `metrics.jsonl`, `checkpoints/` and, once it is
finished, `result.json`. A run that was stopped goes on at its last checkpoint.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from compand_jax.checkpoints import Checkpoints
from compand_jax.data import ImageData, load_data, normalize
from compand_jax.models import create_model
from compand_jax.recipes import CONTROL, METHODS, RunConfig, differences, from_json, to_json
from compand_jax.training import FitConfig, TrainState, create_state, evaluate, fit

FULL_PRECISION = "full_precision"
_MOMENTUM = 0.9
_PACKAGES = ("compand-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


@dataclass(frozen=True)
class Stage:
    """One training of a run.

    Attributes:
      name: of its directory.
      model: the module, quantized or not.
      tx: its optimizer.
      schedule: the weights' learning rate, of the step.
      fit: epochs, batches, augmentation.
      metadata: stored with its checkpoints.
      result: what its result says beforehand: method, bits, mu scope, model size.
    """

    name: str
    model: Any
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    fit: FitConfig
    metadata: dict
    result: dict


def run(config: RunConfig, *, progress: bool = True) -> list[dict]:
    """Runs what is not finished of a run, and returns the results of its stages in order.

    Args:
      config: what to run, and where.
      progress: whether to show progress bars.

    Raises:
      ValueError: if the run directory has another configuration, or a batch is larger than the
        training split; nothing is trained or overwritten then.
      FloatingPointError: if a training diverges.
      OSError: if the data set is not prepared, or the run directory cannot be written.
    """
    data = load_data(config.dataset, config.data_dir)
    _fit_config(config, 1).steps_per_epoch(len(data.train_labels))
    _open_run_dir(config, data)
    results = [_full_precision(config, data, progress)]
    for method in sorted(config.methods, key=METHODS.index):
        results.append(_fine_tune(config, data, method, results, progress))
    return results


def read_config(run_dir: str | Path) -> RunConfig:
    """Returns the configuration of a run directory; FileNotFoundError if it is none."""
    path = Path(run_dir) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"`run_dir` must be a run's directory, with config.json in it, got {run_dir}: "
            "give the directory that scripts/train.py wrote"
        )
    return dataclasses.replace(from_json(json.loads(path.read_text())), run_dir=Path(run_dir))


def finished_stages(run_dir: str | Path) -> list[str]:
    """Returns the names of a run's finished stages, in the order they are run."""
    names = (FULL_PRECISION, *METHODS)
    return [name for name in names if (Path(run_dir) / name / "result.json").is_file()]


def evaluate_stage(config: RunConfig, data: ImageData, name: str) -> tuple[int, int]:
    """Returns how many test images a stage's newest checkpoint gets right, and of how many.

    Args:
      config: the run's, as `read_config` gives it.
      data: the run's data set.
      name: of a finished stage.

    Raises:
      FileNotFoundError: if there is no sound checkpoint.
      ValueError: if the checkpoint is one of another model.
    """
    with Checkpoints(config.run_dir / name / "checkpoints") as checkpoints:
        metadata = checkpoints.metadata() or {}
        stage, target = _stage(config, data, name, metadata)
        state = _restored(checkpoints, target)
    return _count(config, data, stage, state), len(data.test_labels)


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON so that the file is either complete or as it was before."""
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)


def _open_run_dir(config: RunConfig, data: ImageData) -> None:
    run_dir, path = config.run_dir, config.run_dir / "config.json"
    if path.is_file():
        rows = differences(json.loads(path.read_text()), config)
        if rows:
            raise ValueError(
                f"`run_dir` must be of this configuration, got {run_dir} where "
                f"{'; '.join(rows)}: choose another directory or the same values"
            )
    elif run_dir.is_dir() and any(run_dir.iterdir()):
        raise ValueError(
            f"`run_dir` must be new, empty or a run's directory, got {run_dir} with other files: "
            "choose another directory"
        )
    needed = (1 + len(config.methods)) * 3 * _state_bytes(config, data)
    _check_writable("run_dir", run_dir, needed)
    if config.record_dir is not None:
        _check_writable("record_dir", config.record_dir, 0)
    write_json(path, to_json(config))


def _check_writable(name: str, directory: Path, needed: int) -> None:
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
            f"`{name}` must have {needed / 1e6:.0f} MB free for its checkpoints, got {directory} "
            f"with {free / 1e6:.0f} MB: choose another, or free some space"
        )


def _state_bytes(config: RunConfig, data: ImageData) -> int:
    _, target = _stage(config, data, FULL_PRECISION, {})
    leaves = jax.tree.leaves((target.params, target.model_state, target.opt_state))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _fit_config(config: RunConfig, epochs: int) -> FitConfig:
    return FitConfig(
        epochs=epochs,
        batch_size=config.batch_size,
        pad=config.pad,
        flip=config.flip,
        steps_per_call=config.steps_per_call,
        checkpoint_every=config.checkpoint_every,
    )


def _schedule(config: RunConfig, epochs: int, per_epoch: int, peak: float) -> optax.Schedule:
    total, warmup = epochs * per_epoch, round(config.warmup_epochs * per_epoch)
    if warmup == 0:
        return optax.cosine_decay_schedule(peak, total)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, total)


def _is_kernel(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _sgd(config: RunConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    decay = optax.add_decayed_weights(config.weight_decay, mask=_is_kernel)
    return optax.chain(decay, optax.sgd(schedule, momentum=_MOMENTUM, nesterov=True))


def _stage(
    config: RunConfig, data: ImageData, name: str, metadata: dict
) -> tuple[Stage, TrainState]:
    """Returns the stage, and the shapes of its state."""
    module = create_model(config.model, data.num_classes, config.block_order, config.dtype)
    first = name == FULL_PRECISION
    epochs = config.epochs if first else config.finetune_epochs
    fit_config = _fit_config(config, epochs)
    per_epoch = fit_config.steps_per_epoch(len(data.train_labels))
    peak = config.learning_rate if first else config.finetune_learning_rate
    schedule = _schedule(config, epochs, per_epoch, peak)
    if name not in (FULL_PRECISION, CONTROL):
        raise NotImplementedError(name)
    stage = Stage(
        name=name,
        model=module,
        tx=_sgd(config, schedule),
        schedule=schedule,
        fit=fit_config,
        metadata=metadata,
        result={"method": name, "weight_bits": None, "act_bits": None, "mu_scope": None},
    )
    return stage, jax.eval_shape(lambda: _initial_state(config, data, stage))


def _keys(config: RunConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the keys of initialization, of full-precision training, of every fine-tuning."""
    first, second, third = jax.random.split(jax.random.key(config.seed), 3)
    return first, second, third


def _sample(data: ImageData) -> jax.Array:
    return normalize(data.train_images[:1], data.mean, data.std)


def _initial_state(config: RunConfig, data: ImageData, stage: Stage) -> TrainState:
    init_key, key, _ = _keys(config)
    variables = stage.model.init(init_key, _sample(data))
    return create_state(variables, stage.tx, key)


def _full_precision(config: RunConfig, data: ImageData, progress: bool) -> dict:
    stage, _ = _stage(config, data, FULL_PRECISION, {})

    def start():
        return jax.jit(lambda: _initial_state(config, data, stage))()

    return _train(config, data, stage, start, None, progress)


def _fine_tune(
    config: RunConfig, data: ImageData, method: str, results: list[dict], progress: bool
) -> dict:
    stage, _ = _stage(config, data, method, {})

    def start():
        parent_stage, target = _stage(config, data, FULL_PRECISION, {})
        with Checkpoints(config.run_dir / FULL_PRECISION / "checkpoints") as checkpoints:
            parent = _restored(checkpoints, target)
        return create_state(parent.variables, stage.tx, _keys(config)[2])

    by_method = {result["stage"]: result for result in results}
    reference = by_method.get(CONTROL, by_method[FULL_PRECISION])
    return _train(config, data, stage, start, reference, progress)


def _restored(checkpoints: Checkpoints, target: TrainState) -> TrainState:
    restored = checkpoints.restore(target)
    if restored is None:
        raise FileNotFoundError(
            f"`run_dir` must have a sound checkpoint in {checkpoints.directory}, got none: "
            "start the run again"
        )
    return restored[1]


def _train(
    config: RunConfig,
    data: ImageData,
    stage: Stage,
    start: Callable[[], TrainState],
    reference: dict | None,
    progress: bool,
) -> dict:
    """Trains a stage to its end unless it is finished, and returns its result."""
    directory = config.run_dir / stage.name
    path, log = directory / "result.json", directory / "metrics.jsonl"
    if path.is_file():
        return json.loads(path.read_text())
    directory.mkdir(exist_ok=True)

    @jax.jit
    def describe(state):
        return {"learning_rate": stage.schedule(state.step - 1)}

    with Checkpoints(directory / "checkpoints") as checkpoints:
        state = fit(
            start(),
            data,
            stage.fit,
            model=stage.model,
            tx=stage.tx,
            checkpoints=checkpoints,
            metadata=stage.metadata,
            log=log,
            describe=describe,
            progress=stage.name if progress else None,
        )
    correct, total = _count(config, data, stage, state), len(data.test_labels)
    accuracy = 100 * correct / total
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    result = {
        "stage": stage.name,
        **stage.result,
        "test_accuracy": accuracy,
        "correct": correct,
        "total": total,
        "difference": accuracy - reference["test_accuracy"] if reference else None,
        "model_bytes": _model_bytes(state),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "steps": int(state.step),
        "seed": config.seed,
        "config": to_json(config),
        **_provenance(),
    }
    write_json(path, result)
    return result


def _count(config: RunConfig, data: ImageData, stage: Stage, state: TrainState) -> int:
    return evaluate(
        stage.model,
        state.variables,
        data.test_images,
        data.test_labels,
        mean=data.mean,
        std=data.std,
        batch_size=config.batch_size,
    )


def _model_bytes(state: TrainState) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state.variables))


def _provenance() -> dict:
    devices = jax.devices()
    kind = devices[0].device_kind
    return {
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
        "devices": f"{len(devices)} x {_cpu_model() if kind == 'cpu' else kind}",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
        return f"{', '.join(sorted(names))} ({os.cpu_count()} cores)"
    except (OSError, IndexError):
        return f"{platform.processor() or platform.machine()} ({os.cpu_count()} cores)"
