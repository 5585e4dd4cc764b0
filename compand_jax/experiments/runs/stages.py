"""A run's stages: what is trained in each, by which optimizer, and from where it starts."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import optax

from compand_jax.data.calibration_images import CalibrationImages, sample_training_images
from compand_jax.data.images import ImageData, normalize
from compand_jax.experiments.errors import UserError, user_errors
from compand_jax.experiments.runs.config import FULL_PRECISION, METHODS_BY_NAME, Method, RunConfig
from compand_jax.experiments.runs.directory import read_config
from compand_jax.experiments.runs.levers import preceding, quant_of
from compand_jax.experiments.runs.optimizer import make_optimizer, make_schedules
from compand_jax.layers.stored_sites import sites_from_json, sites_to_json
from compand_jax.linen.batch_statistics import estimate_batch_stats, update_batch_stats
from compand_jax.linen.quantized_model import QuantizedModel, quantize_model
from compand_jax.models import create_model
from compand_jax.models.torch_weights import import_state_dict, load_npz_state_dict
from compand_jax.training.checkpoints import Checkpoints
from compand_jax.training.fit import FitConfig
from compand_jax.training.steps import Model, Teacher, TrainState, create_state, evaluate


@dataclass(frozen=True, eq=False)
class Stage:
    """One training of a run, with all that it needs.

    Attributes:
      directory: where it is kept; its name is the stage's.
      data: the run's data set.
      model: a Linen module or a `QuantizedModel`.
      tx: its optimizer.
      schedules: learning rates by name, each a function of the step.
      fit: epochs, batches, augmentation.
      key: of the state, for shuffling and augmentation.
      state: shapes and types of the state.
      start: returns the model, calibrated where it is quantized, and the variables it starts from.
    """

    directory: Path
    data: ImageData
    model: Any
    tx: optax.GradientTransformation
    schedules: Mapping[str, optax.Schedule]
    fit: FitConfig
    key: jax.Array
    state: TrainState
    start: Callable[[], tuple[Any, dict[str, Any]]]

    @property
    def name(self) -> str:
        """Full precision's, or that of a method."""
        return self.directory.name

    @property
    def quantized(self) -> QuantizedModel | None:
        """The model, if it is quantized."""
        return self.model if isinstance(self.model, QuantizedModel) else None

    @property
    def steps(self) -> int:
        """How many steps it has."""
        return self.fit.epochs * self.fit.steps_per_epoch(len(self.data.train_labels))

    @property
    def state_bytes(self) -> int:
        """The size of the state."""
        leaves = jax.tree.leaves((self.state.params, self.state.model_state, self.state.opt_state))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    def checkpoints(self) -> Checkpoints:
        """Returns its checkpoints, to be closed."""
        return Checkpoints(self.directory / "checkpoints")

    def count_correct(self, variables: Mapping[str, Any]) -> int:
        """Returns how many test images the model classifies correctly."""
        return count_correct(self.model, variables, self.data, self.fit.batch_size)


def make_stage(config: RunConfig, data: ImageData, name: str) -> Stage:
    """Returns the stage of that name, its model not yet calibrated.

    Raises:
      UserError: if a batch is larger than the training split, or a rule matches no layer.
    """
    method = None if name == FULL_PRECISION else METHODS_BY_NAME[name]
    epochs = config.epochs if method is None else config.finetune_epochs
    if method is not None and method.quantizer is None:
        epochs *= 1 + len(config.preceding_bits)  # as many as the others have in all
    fields: dict[str, Any] = {
        field.name: getattr(config, field.name) for field in dataclasses.fields(FitConfig)
    }
    fit = FitConfig(**{**fields, "epochs": epochs})
    with user_errors(ValueError):  # a batch that is too large
        per_epoch = fit.steps_per_epoch(len(data.train_labels))
    model = create_model(config.model, data.num_classes, config.block_order, config.dtype)
    if method is not None and method.quantizer is not None:
        model = quantize_model(model, quant_of(config, method))
    schedules = make_schedules(config, method, epochs * per_epoch, per_epoch)
    tx = make_optimizer(config, schedules, model)
    init_key, first_key, finetune_key = _keys(config.seed)
    key = first_key if method is None else finetune_key
    sample = normalize(data.train_images[:1], data.mean, data.std)
    initialize = jax.jit(lambda: model.init(init_key, sample))
    with user_errors(ValueError):  # a rule that matches no layer
        state = jax.eval_shape(lambda: create_state(initialize(), tx, key))
    start = functools.partial(_start, config, data, method, model, initialize)
    return Stage(config.run_dir / name, data, model, tx, schedules, fit, key, state, start)


def _start(
    config: RunConfig,
    data: ImageData,
    method: Method | None,
    model: Any,
    initialize: Callable[[], dict[str, Any]],
) -> tuple[Any, dict[str, Any]]:
    """Returns a stage's model, calibrated where it is quantized, and what it starts from.

    That is the state dict's variables, or random ones, in full precision; else the end of full
    precision, the run's own or its parent's.
    """
    if method is None:
        if config.state_dict is None:
            return model, initialize()
        with user_errors(OSError, ValueError):
            return model, import_state_dict(load_npz_state_dict(config.state_dict), model)
    before = None if method.quantizer is None else preceding(config)
    if before is None:
        variables = _parent(config, data)[1].variables
    else:
        variables = finished(before, data, method.name)[1].variables
    if method.quantizer is None:
        return model, variables
    return model.calibrate(
        variables,
        _training_images(config, data, config.calibration_batches, purpose=2),
        calibration=config.calibration,
        mu=config.calibration_mu,
        train=False,
    )


def _parent(config: RunConfig, data: ImageData) -> tuple[Stage, TrainState]:
    """Returns the full precision that a run's fine-tunings start from, and its last state."""
    parent = config if config.parent_dir is None else read_config(config.parent_dir)
    return finished(parent, data, FULL_PRECISION)


def _training_images(
    config: RunConfig, data: ImageData, batches: int, purpose: int
) -> CalibrationImages:
    key = jax.random.fold_in(_keys(config.seed)[2], purpose)
    return sample_training_images(
        data,
        batches * config.batch_size,
        key,
        key,
        pad=config.pad,
        flip=config.flip,
        batch_size=config.batch_size,
    )


def make_teacher(config: RunConfig, stage: Stage) -> Teacher | None:
    """Returns what a stage learns from beside the labels: the full-precision parent, or nothing.

    Raises:
      UserError: if the parent's full precision has no sound checkpoint.
    """
    if stage.name == FULL_PRECISION or config.distillation_weight == 0:
        return None
    parent, state = _parent(config, stage.data)
    return Teacher(
        state.variables,
        parent.model,
        config.distillation_weight,
        config.distillation_temperature,
    )


def estimate_statistics(config: RunConfig, stage: Stage, state: TrainState) -> TrainState:
    """Returns a state whose batch norms have the statistics of some training batches.

    It is the same where none are asked for, in full precision, and without batch norms.
    """
    if stage.name == FULL_PRECISION or not config.batch_stats_batches:
        return state
    if "batch_stats" not in state.model_state:
        return state
    variables = jax.device_get(state.variables)

    @jax.jit
    def update(variables: Mapping[str, Any], args: tuple) -> Any:
        return update_batch_stats(stage.model.apply, variables, args, {"train": False})

    images = _training_images(config, stage.data, config.batch_stats_batches, purpose=3)
    stats = estimate_batch_stats(variables, images, update)
    return state.replace(model_state={**state.model_state, "batch_stats": stats})


def start_or_resume(
    stage: Stage, checkpoints: Checkpoints
) -> tuple[Stage, TrainState, dict[str, Any]]:
    """Returns the stage, calibrated where it is quantized, its state, and its metadata.

    The state is that of the stage's newest sound checkpoint or, if there is none, its start.

    Raises:
      UserError: if the checkpoint is one of another model, if the end of full precision has no
        sound checkpoint, or there is no such state dict.
    """
    if (found := _resume(stage, checkpoints)) is not None:
        return found
    model, variables = stage.start()
    stage, metadata = dataclasses.replace(stage, model=model), {}
    if stage.quantized is not None:
        metadata = {
            "sites": json.loads(sites_to_json(model.sites)),
            "calibrated_correct": stage.count_correct(variables),
        }
    return stage, create_state(variables, stage.tx, stage.key), metadata


def _resume(
    stage: Stage, checkpoints: Checkpoints
) -> tuple[Stage, TrainState, dict[str, Any]] | None:
    """Returns what `start_or_resume` does, or None if the stage has no sound checkpoint."""
    with user_errors(ValueError):  # it is one of another model
        restored = checkpoints.restore(stage.state)
    if restored is None:
        return None
    _, state, metadata = restored
    if stage.quantized is not None:
        sites = sites_from_json(json.dumps(metadata["sites"]))
        model = quantize_model(stage.quantized.model, stage.quantized.config, sites=sites)
        stage = dataclasses.replace(stage, model=model)
    return stage, state, metadata


def finished(config: RunConfig, data: ImageData, name: str) -> tuple[Stage, TrainState]:
    """Returns a finished stage, calibrated where it is quantized, and its last state.

    Raises:
      UserError: if there is no sound checkpoint of its last step, or it is one of another model.
    """
    stage = make_stage(config, data, name)
    with stage.checkpoints() as checkpoints:
        found = _resume(stage, checkpoints)
    if found is None or int(found[1].step) != stage.steps:
        got = "none" if found is None else f"one of step {int(found[1].step)}"
        raise UserError(
            f"`run_dir` must have a sound checkpoint of step {stage.steps} in "
            f"{checkpoints.directory}, got {got}: delete {stage.directory / 'result.json'} and run "
            "compand train again, which repeats what is missing"
        )
    return found[0], found[1]


def count_correct(
    model: Model, variables: Mapping[str, Any], data: ImageData, batch_size: int
) -> int:
    """Returns how many test images a model classifies correctly."""
    return evaluate(
        model,
        dict(variables),
        data.test_images,
        data.test_labels,
        mean=data.mean,
        std=data.std,
        batch_size=batch_size,
    )


def _keys(seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the keys of initialization, of full-precision training, of every fine-tuning."""
    first, second, third = jax.random.split(jax.random.key(seed), 3)
    return first, second, third
