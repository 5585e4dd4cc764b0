"""One optimizer for the weights of an NNX model, one for mu and one for the scales."""

from typing import Any

import jax
import optax
from flax import nnx

from compand_jax.layers.partition import label_of
from compand_jax.nnx.contractions import ATTRIBUTE
from compand_jax.nnx.promotion import HOOK


def partition_optimizer(
    weights: optax.GradientTransformation,
    mu: optax.GradientTransformation,
    scale: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Returns one optimizer with a part each for the weights, for mu and for the scales.

    It is for `nnx.Optimizer(model, tx, wrt=nnx.Any(nnx.Param, compand_jax.nnx.Quantizer))`. The
    parts do not mix: weight decay in `weights` leaves mu and the scales alone. The model may be in
    full precision.

    Args:
      weights: Optimizer of the network's own parameters: all but what follows.
      mu: Optimizer of every `Mu`, theta = log(1 + mu), also where it is another family's theta.
        Whatever it does, mu stays in [0, 255].
      scale: Optimizer of every `Scale`, rho = log(scale). Whatever it does, the scale stays
        positive.

    Returns:
      An optax transformation, of states of NNX models.

    >>> from compand_jax import QuantConfig
    >>> from compand_jax.nnx import Quantizer, quantize
    >>> tx = partition_optimizer(optax.sgd(0.1), mu=optax.adam(1e-3), scale=optax.adam(1e-3))
    >>> model = quantize(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), QuantConfig())
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Any(nnx.Param, Quantizer))
    """
    return optax.partition({"weights": weights, "mu": mu, "scale": scale}, _label_state)


def _label_state(state: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        # In a Variable's place: Flax 0.11 cannot have an optimizer's masks inside of one.
        lambda path, _: _label(path),
        state,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )


def _label(path: tuple) -> str:
    # `init` shows Variables, `update` arrays, whose types are not those of variables any more.
    keys = [str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path]
    if HOOK in keys[:-1]:
        return "scale" if keys[keys.index(HOOK) + 1].endswith("_scale") else "mu"
    if ATTRIBUTE in keys[:-1]:
        return next(filter(None, map(label_of, reversed(keys))))
    return "weights"
