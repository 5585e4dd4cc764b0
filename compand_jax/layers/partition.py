"""One optimizer for the weights, one for mu and one for the scales."""

from typing import Any

import jax
import optax

from compand_jax.core.families.registry import parameter_names


def partition_optimizer(
    weights: optax.GradientTransformation,
    mu: optax.GradientTransformation,
    scale: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Returns one optimizer with a part each for the weights, for mu and for the scales.

    It moves {"params": ..., "compand": ...}. `weights` has all of "params", `mu` and `scale` have
    the leaves of "compand" whose name ends in `mu` (or what another family's parameter is called)
    or `scale`. The parts do not mix: weight decay in `weights` leaves mu and the scales alone.
    "compand" may be absent, as in full precision.

    Args:
      weights: Optimizer of the network's own parameters.
      mu: Optimizer of theta = log(1 + mu), and of the trainable parameters of any other family.
        Whatever it does, mu stays in [0, 255].
      scale: Optimizer of rho = log(scale). Whatever it does, the scale stays positive.

    Returns:
      An optax transformation: its `init` takes these parameters, its `update` their gradients.

    Raises:
      ValueError: in `init`, if a leaf is neither in "params" nor named ...mu or ...scale in
        "compand".

    >>> tx = partition_optimizer(optax.sgd(0.1), mu=optax.adam(1e-3), scale=optax.set_to_zero())
    >>> state = tx.init({"params": {"kernel": 1.0}, "compand": {"weight_mu": 0.7}})
    """
    return optax.partition({"weights": weights, "mu": mu, "scale": scale}, label_parameters)


def label_parameters(parameters: Any) -> Any:
    """Returns the tree of parameters with "weights", "mu" or "scale" in each leaf's place."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _label(path), parameters)


def label_of(name: str) -> str | None:
    """Returns "mu" or "scale" of a leaf's name, such as "weight_mu"; None of any other."""
    if name.endswith("scale"):
        return "scale"
    if any(f"_{name}".endswith(f"_{parameter}") for parameter in parameter_names()):
        return "mu"
    return None


def _label(path: tuple) -> str:
    keys = [str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path]
    if keys and keys[0] == "params":
        return "weights"
    if keys and keys[0] == "compand" and (label := label_of(keys[-1])) is not None:
        return label
    raise ValueError(
        "`params` of the optimizer must be {'params': ..., 'compand': ...} with leaves of compand "
        f"named ...mu or ...scale, got {'/'.join(keys) or 'a leaf'}: "
        "give it the quantized model's two collections"
    )
