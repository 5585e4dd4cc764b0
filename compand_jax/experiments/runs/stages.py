"""A run's stages: what is trained in each, by which optimizer, and from where it starts."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax

from compand_jax.data.calibration_images import sample_training_images
from compand_jax.data.images import ImageData, normalize
from compand_jax.experiments.runs.config import CONTROL, FULL_PRECISION, RunConfig
from compand_jax.experiments.runs.directory import read_config
from compand_jax.layers.partition import partition_optimizer
from compand_jax.layers.sites import sites_from_json, sites_to_json
from compand_jax.linen.quantized_model import QuantizedModel, quantize_model
from compand_jax.models import create_model
from compand_jax.models.torch_weights import import_state_dict, load_npz_state_dict
from compand_jax.training.checkpoints import Checkpoints
from compand_jax.training.fit import FitConfig
from compand_jax.training.steps import TrainState, create_state, evaluate

_MOMENTUM = 0.9


@dataclass(frozen=True)
class Stage:
    """One training of a run.

    Attributes:
      name: of its directory; that of its method.
      model: a Linen module or a `QuantizedModel`.
      tx: its optimizer.
      schedules: learning rates by name, each a function of the step.
      fit: epochs, batches, augmentation.
    """

    name: str
    model: Any
    tx: optax.GradientTransformation
    schedules: Mapping[str, optax.Schedule]
    fit: FitConfig

    @property
    def quantized(self) -> QuantizedModel | None:
        """The model, if it is quantized."""
        return self.model if isinstance(self.model, QuantizedModel) else None


def make_stage(config: RunConfig, data: ImageData, name: str) -> Stage:
    """Returns the stage of that name, its model not yet calibrated."""
    first = name == FULL_PRECISION
    fit = fit_config(config, config.epochs if first else config.finetune_epochs)
    per_epoch = fit.steps_per_epoch(len(data.train_labels))

    def schedule(peak: float) -> optax.Schedule:
        return _schedule(config, fit.epochs, per_epoch, peak)

    rate = config.learning_rate if first else config.finetune_learning_rate
    schedules = {"learning_rate": schedule(rate)}
    model = create_model(config.model, data.num_classes, config.block_order, config.dtype)
    tx = _sgd(config, schedules["learning_rate"])
    if name not in (FULL_PRECISION, CONTROL):
        quantizer, _, scope = name.partition("-")
        quant = dataclasses.replace(
            config.quant, quantizer=quantizer, mu_scope=scope or config.quant.mu_scope
        )
        model = quantize_model(model, quant)
        mu, scale = schedule(config.mu_learning_rate), schedule(config.scale_learning_rate)
        schedules |= {"mu_learning_rate": mu, "scale_learning_rate": scale}
        tx = partition_optimizer(weights=tx, mu=optax.adam(mu), scale=optax.adam(scale))
    return Stage(name, model, tx, schedules, fit)


def fit_config(config: RunConfig, epochs: int) -> FitConfig:
    """Returns what `fit` is to do in a stage of so many epochs."""
    return FitConfig(
        epochs=epochs,
        batch_size=config.batch_size,
        pad=config.pad,
        flip=config.flip,
        steps_per_call=config.steps_per_call,
        checkpoint_every=config.checkpoint_every,
    )


def start_or_resume(
    config: RunConfig, data: ImageData, stage: Stage, checkpoints: Checkpoints
) -> tuple[Stage, TrainState, dict]:
    """Returns the stage, calibrated where it is quantized, its state, and its metadata.

    The state is the stage's newest sound checkpoint or, if there is none, its start: for full
    precision the state dict's, or initialized; else the end of full precision, the run's own or
    its parent's.

    Raises:
      ValueError: if the checkpoint is one of another model.
      FileNotFoundError: if the end of full precision has no sound checkpoint, or there is no such
        state dict.
    """
    found = resume(config, data, stage, checkpoints)
    if found is not None:
        return found
    first_key, finetune_key = _keys(config)[1:]
    if stage.name == FULL_PRECISION:
        if config.state_dict is not None:
            variables = import_state_dict(load_npz_state_dict(config.state_dict), stage.model)
            return stage, create_state(variables, stage.tx, first_key), {}
        state = jax.jit(lambda: _initial_state(config, data, stage, first_key))()
        return stage, state, {}
    variables = finished(parent_config(config), data, FULL_PRECISION)[1].variables
    if stage.quantized is None:
        return stage, create_state(variables, stage.tx, finetune_key), {}
    batches = calibration_batches(config, data, jax.random.fold_in(finetune_key, 2))
    model, variables = stage.quantized.calibrate(
        variables,
        batches,
        calibration=config.calibration,
        mu=config.calibration_mu,
        train=False,
    )
    assert model.sites is not None
    stage = dataclasses.replace(stage, model=model)
    metadata = {
        "sites": json.loads(sites_to_json(model.sites)),
        "calibrated_correct": count_correct(config, data, model, variables),
    }
    return stage, create_state(variables, stage.tx, finetune_key), metadata


def resume(
    config: RunConfig, data: ImageData, stage: Stage, checkpoints: Checkpoints
) -> tuple[Stage, TrainState, dict] | None:
    """Returns what `start_or_resume` does, or None if the stage has no sound checkpoint.

    Raises:
      ValueError: if the checkpoint is one of another model.
    """
    key = _keys(config)[1]
    target = jax.eval_shape(lambda: _initial_state(config, data, stage, key))
    restored = checkpoints.restore(target)
    if restored is None:
        return None
    _, state, metadata = restored
    if stage.quantized is not None:
        sites = sites_from_json(json.dumps(metadata["sites"]))
        model = quantize_model(stage.quantized.model, stage.quantized.config, sites=sites)
        stage = dataclasses.replace(stage, model=model)
    return stage, state, metadata


def parent_config(config: RunConfig) -> RunConfig:
    """Returns the configuration of the run whose full precision is fine-tuned: this or another.

    Raises:
      FileNotFoundError: if `parent_dir` is no run's directory.
    """
    return config if config.parent_dir is None else read_config(config.parent_dir)


def calibration_batches(
    config: RunConfig, data: ImageData, key: jax.Array
) -> Iterator[tuple[jax.Array]]:
    """Yields the run's number of calibration batches: training images, augmented as in training."""
    images = sample_training_images(
        data,
        config.calibration_batches * config.batch_size,
        key,
        key,
        pad=config.pad,
        flip=config.flip,
        batch_size=config.batch_size,
    )
    for batch in images:
        yield (batch,)


def count_correct(config: RunConfig, data: ImageData, model: Any, variables: Mapping) -> int:
    """Returns how many test images a model classifies correctly."""
    return evaluate(
        model,
        dict(variables),
        data.test_images,
        data.test_labels,
        mean=data.mean,
        std=data.std,
        batch_size=config.batch_size,
    )


def state_bytes(config: RunConfig, data: ImageData, stage: Stage) -> int:
    """Returns the size of a stage's state; ValueError if a rule matches none of its layers."""
    key = _keys(config)[1]
    state = jax.eval_shape(lambda: _initial_state(config, data, stage, key))
    leaves = jax.tree.leaves((state.params, state.model_state, state.opt_state))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def finished(config: RunConfig, data: ImageData, name: str) -> tuple[Stage, TrainState]:
    """Returns a finished stage, calibrated where it is quantized, and its last state.

    Raises:
      FileNotFoundError: if there is no sound checkpoint of its last step.
      ValueError: if the checkpoint is one of another model.
    """
    stage, directory = make_stage(config, data, name), config.run_dir / name
    last = stage.fit.epochs * stage.fit.steps_per_epoch(len(data.train_labels))
    with Checkpoints(directory / "checkpoints") as checkpoints:
        found = resume(config, data, stage, checkpoints)
    if found is None or int(found[1].step) != last:
        got = "none" if found is None else f"one of step {int(found[1].step)}"
        raise FileNotFoundError(
            f"`run_dir` must have a sound checkpoint of step {last} in {checkpoints.directory}, "
            f"got {got}: delete {directory / 'result.json'} and run scripts/train.py again, "
            "which repeats what is missing"
        )
    return found[0], found[1]


def _initial_state(config: RunConfig, data: ImageData, stage: Stage, key: jax.Array) -> TrainState:
    sample = normalize(data.train_images[:1], data.mean, data.std)
    return create_state(stage.model.init(_keys(config)[0], sample), stage.tx, key)


def _keys(config: RunConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the keys of initialization, of full-precision training, of every fine-tuning."""
    first, second, third = jax.random.split(jax.random.key(config.seed), 3)
    return first, second, third


def _schedule(config: RunConfig, epochs: int, per_epoch: int, peak: float) -> optax.Schedule:
    total = epochs * per_epoch
    if total == 0:
        return optax.constant_schedule(0.0)
    warmup = min(round(config.warmup_epochs * per_epoch), total // 2)
    if warmup == 0:
        return optax.cosine_decay_schedule(peak, total)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, total)


def _is_kernel(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _sgd(config: RunConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    decay = optax.add_decayed_weights(config.weight_decay, mask=_is_kernel)
    return optax.chain(decay, optax.sgd(schedule, momentum=_MOMENTUM, nesterov=True))
