"""A trained network that is to be quantized without training: observed once, and evaluated."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from compand_jax.data.calibration_images import BATCH_SIZE, CalibrationImages
from compand_jax.data.images import ImageData
from compand_jax.experiments.errors import UserError
from compand_jax.experiments.runs import stages
from compand_jax.layers.model_size import model_bytes
from compand_jax.layers.observation import Observations
from compand_jax.linen.batch_statistics import estimate_batch_stats, update_batch_stats
from compand_jax.linen.calibration import observe
from compand_jax.training.steps import Model

_MODEL_KWARGS = {"train": False}


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedNetwork:
    """A trained network, the data that it is tested on, and what was seen of it.

    Attributes:
      model: the Linen module, called with `train`.
      variables: its collections.
      data: whose test images are classified, with the normalization of the network's training.
      calibration: what it was observed on.
      seen: its observations, with moments.
    """

    model: nn.Module
    variables: dict[str, Any]
    data: ImageData
    calibration: CalibrationImages
    seen: Observations


def observe_network(
    model: nn.Module, variables: dict[str, Any], data: ImageData, calibration: CalibrationImages
) -> TrainedNetwork:
    """Returns the network with what calibration needs to know of it, from one pass.

    Raises:
      UserError: a variable is not finite.
    """
    require_finite(variables)
    seen = observe(
        model,
        variables,
        calibration,
        _MODEL_KWARGS,
        at_output=False,
        activations=True,
        moments=True,
    )
    return TrainedNetwork(model, variables, data, calibration, seen)


def require_finite(variables: Mapping[str, Any]) -> None:
    """Raises UserError, naming them by path, where variables hold NaN or infinity."""
    bad = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
        if not bool(jnp.all(jnp.isfinite(leaf)))
    ]
    if bad:
        raise UserError(
            f"`checkpoint` must hold finite numbers, got NaN or infinity in {', '.join(bad)}: "
            "give one of a training that did not diverge"
        )


def reestimated(
    model: Model, variables: Mapping[str, Any], batches: Iterable[Array]
) -> dict[str, Any]:
    """Returns the variables with `batch_stats`, where there are any, estimated anew from batches.

    As `QuantizedModel.calibrate` with `batch_stats=True`, compiled once for each model.
    """
    if "batch_stats" not in variables:
        return dict(variables)
    update = functools.partial(_update_batch_stats, model=model)
    return {**variables, "batch_stats": estimate_batch_stats(variables, batches, update)}


@functools.partial(jax.jit, static_argnames="model")
def _update_batch_stats(variables, args, *, model):
    return update_batch_stats(model.apply, variables, args, _MODEL_KWARGS)


def count_correct(network: TrainedNetwork, model: Model, variables: Mapping[str, Any]) -> int:
    """Returns how many of the network's test images a model classifies correctly."""
    batch_size = min(BATCH_SIZE, len(network.data.test_labels))
    return stages.count_correct(model, variables, network.data, batch_size)


def evaluate_full_precision(network: TrainedNetwork) -> dict[str, Any]:
    """Returns `correct`, `total`, `accuracy` and `model_bytes` of the network as it is.

    And `reestimated_correct`, with its batch-norm statistics from the calibration images: what
    these alone cost.
    """
    correct = count_correct(network, network.model, network.variables)
    variables = reestimated(network.model, network.variables, network.calibration)
    return {
        "accuracy": 100 * correct / len(network.data.test_labels),
        "correct": correct,
        "total": len(network.data.test_labels),
        "reestimated_correct": count_correct(network, network.model, variables),
        "model_bytes": model_bytes(network.variables),
    }


def weight_counts(network: TrainedNetwork) -> dict[str, int]:
    """Returns the number of weights of every site, in the order that they run in."""
    return {
        name: sum(np.size(weight) for weight in network.seen.weights[name])
        for name in network.seen.observers[0].layers
    }


def log_probabilities(
    model: Model, variables: Mapping[str, Any], batches: Iterable[Array]
) -> list[Float[Array, "batch classes"]]:
    """Returns the logarithms of a network's softmax on each of the batches."""
    return [_log_softmax(variables, batch, model=model) for batch in batches]


@functools.partial(jax.jit, static_argnames="model")
def _log_softmax(variables, batch, *, model):
    return jax.nn.log_softmax(model.apply(variables, batch, **_MODEL_KWARGS))
