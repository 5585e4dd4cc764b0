"""The trainable form of mu and scale, and where they lie in `variables["compand"]`.

    mu    = expm1(clip(theta, 0, log 256))     a leaf named `weight_mu`, `act_mu` or `mu` is theta
    scale = exp(rho)                           a leaf named `weight_scale` or `act_scale` is rho

so that mu stays in [0, 255] and the scale positive whatever an optimizer does, and a step is
relative to the size of what it moves. Another family's leaf is named by its parameter, such as
`weight_exponent`, and has that family's trainable form (`core.families`). Leaves lie under the
site's module path; what sites share lies under `_shared`.

A weight that is all zero, or a channel of one, tells nothing of the scale that it will need. Its
rho is log(c) - 100, c being where an initializer's weights would end. So low a rho says: the scale
is the weight's largest magnitude as long as that is below c, and c from then on.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from compand_jax.core.codebooks import SMALLEST_SCALE
from compand_jax.core.families.registry import MU_LAW, family_of
from compand_jax.core.spec import Spec
from compand_jax.layers.config import QuantConfig
from compand_jax.layers.groups import grouped, stored_scales
from compand_jax.layers.standardization import in_weights_units, moments

SHARED = "_shared"
# No rho of a scale from SMALLEST_SCALE on, log of which is -76.2, is as low as this.
_FOLLOWS_BELOW = -80.0
_FOLLOWS_SHIFT = 100.0
# The largest magnitude lies inside the clip, where gradients pass.
_JUST_ABOVE = 1 + 2.0**-20


def mu_from_theta(theta: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the mu of a trainable theta, mu = expm1(clip(theta, 0, log 256)).

    Args:
      theta: Any numbers, of any shape; what an optimizer moves.

    Returns:
      mu in [0, 255], of theta's shape and dtype.

    Gradient: exp(theta) between the bounds. At a bound and beyond it, it is the slope at the bound
      where a descent step leads back inside, and 0 where it leads outside. So a mu that has
      reached 0 can leave it again.

    >>> float(mu_from_theta(jnp.log(3.0))), float(mu_from_theta(jnp.array(-1.0)))
    (2.0, 0.0)
    """
    return MU_LAW.from_trainable(theta)


def theta_from_mu(mu: Any) -> Float[Array, "..."]:
    """Returns the trainable form of mu, theta = log(1 + mu); `mu_from_theta` is its inverse.

    Args:
      mu: Curvature, 0 to 255, of any shape.

    Returns:
      theta in [0, log 256], float32, of mu's shape.

    Gradient: 1/(1 + mu).

    >>> round(float(mu_from_theta(theta_from_mu(255))), 3)
    255.0
    """
    return MU_LAW.to_trainable(mu)


def scale_from_rho(rho: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the scale of a trainable rho, exp(rho), or 2^-110 where that is less.

    Args:
      rho: Any numbers, of any shape; what an optimizer moves.

    Returns:
      Positive scales of rho's shape and dtype, in the units of what they clip. Of a rho that says
      that the scale follows its weight, it is the scale of a weight that is zero.

    Gradient: exp(rho); 0 where 2^-110 is taken.

    >>> float(scale_from_rho(jnp.array(0.0)))
    1.0
    """
    return jnp.maximum(jnp.exp(rho), SMALLEST_SCALE)


def rho_from_scale(scale: Any) -> Float[Array, "..."]:
    """Returns the trainable form of a scale, rho = log(scale); `scale_from_rho` is its inverse.

    Args:
      scale: Positive numbers, of any shape, in the units of what they clip. What is less than
        2^-110 is taken for it.

    Returns:
      rho, float32, of the scale's shape.

    Gradient: 1/scale; 0 where 2^-110 is taken.

    >>> float(rho_from_scale(1.0))
    0.0
    """
    return jnp.log(jnp.maximum(jnp.asarray(scale, jnp.float32), SMALLEST_SCALE))


def following_rho(shape: tuple[int, ...], channel_axes: tuple[int, ...]) -> float:
    """Returns the rho of a scale that follows a weight of zeros, log(3/sqrt(n)) - 100.

    n is how many inputs an output has; initializers draw weights of the deviation 1/sqrt(n).

    Args:
      shape: Of the weight.
      channel_axes: The weight's output axes, from the end.
    """
    outputs = math.prod(shape[axis] for axis in channel_axes)
    inputs = max(math.prod(shape) // max(outputs, 1), 1)
    return math.log(3 / math.sqrt(inputs)) - _FOLLOWS_SHIFT


def weight_scale(rho: Float[Array, "..."], weight: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the scales of a weight: exp(rho), or where it follows, what the weight asks for.

        c = exp(rho)                                  for rho of -80 and more
        c = min(exp(rho + 100), (1 + 2^-20) max|w|)   below, and 2^-110 at least

    Args:
      rho: Scalar, or of the weight's last axes, with 1 along those that share a scale.
      weight: What is quantized, also a whole stack of layers that share their scales.

    Returns:
      Scales of rho's shape and dtype.

    Gradient: in rho, the scale; 0 as long as it follows the weight. None in the weight: it is
      straight-through there, as everywhere.
    """
    follows = rho < _FOLLOWS_BELOW
    learned = scale_from_rho(jnp.where(follows, rho + _FOLLOWS_SHIFT, rho))
    largest = _JUST_ABOVE * _largest_magnitude(jax.lax.stop_gradient(weight), rho.shape)
    bound = jnp.where(follows, largest.astype(rho.dtype), jnp.inf)
    return jnp.maximum(jnp.minimum(learned, bound), SMALLEST_SCALE)


def _largest_magnitude(weight: Array, shape: tuple[int, ...]) -> Array:
    """Returns maxima of a shape of scales; one number for all where the weight has other axes."""
    magnitude, extra = jnp.abs(weight), weight.ndim - len(shape)
    own = weight.shape[max(extra, 0) :]
    if extra < 0 or any(n not in (1, size) for n, size in zip(shape, own, strict=True)):
        return jnp.max(magnitude, initial=0.0)
    shared = (i for i, n in enumerate(shape, extra) if n == 1)
    return jnp.max(magnitude, (*range(extra), *shared), initial=0.0).reshape(shape)


def parameter_path(site: str, operand: str, config: QuantConfig) -> tuple[str, ...] | None:
    """Returns where the theta of a site's operand ("weight" or "act") lies; None without any."""
    parameter = family_of(config.at(site).quantizer).parameter
    if parameter is None:
        return None
    if config.mu_scope == "single":
        return (SHARED, parameter)
    if config.mu_scope == "separate":
        return (SHARED, f"{operand}_{parameter}")
    return (*site_path(site), f"{operand}_{parameter}")


def entry_name(operand: str, quantizer: str) -> str | None:
    """Returns what a quantizer's parameters are called in `quantizers`; None without any.

    Uniform quantizers have a mu, of 0.
    """
    parameter = "mu" if quantizer == "uniform" else family_of(quantizer).parameter
    return None if parameter is None else f"{operand}_{parameter}"


def entry(found: Mapping[str, Array], operand: str, spec: Spec) -> Array | None:
    """Returns of what `quantizers` found for a site the parameters; None without any."""
    return found.get(f"{operand}_{spec.family.parameter}")


def first_theta(config: QuantConfig, spec: Spec) -> Float[Array, "..."]:
    """Returns the theta of a quantizer before calibration."""
    start = config.mu_init if spec.family is MU_LAW else spec.family.start(spec)
    return spec.family.to_trainable(start)


def scale_path(site: str, operand: str) -> tuple[str, ...]:
    """Returns where the rho of a site's operand ("weight" or "act") lies."""
    return (*site_path(site), f"{operand}_scale")


def site_path(site: str) -> tuple[str, ...]:
    """Returns the module path that a site is named by."""
    return tuple(site.split("/")) if site else ()


def get_leaf(tree: Mapping, path: tuple[str, ...]) -> Any:
    """Returns tree[path[0]][path[1]]..., or None where there is no such entry."""
    for key in path:
        if not isinstance(tree, Mapping) or key not in tree:
            return None
        tree = tree[key]
    return tree


def set_leaf(tree: dict, path: tuple[str, ...], value: Any) -> None:
    """Sets tree[path[0]][path[1]]..., making the dictionaries on the way."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def quantized_operands(compand: Mapping) -> Iterator[tuple[str, str]]:
    """Yields (site, operand) for every scale in the collection."""
    for path, _ in jax.tree_util.tree_leaves_with_path(compand):
        keys = [entry.key for entry in path]
        if keys[-1] in ("weight_scale", "act_scale"):
            yield "/".join(keys[:-1]), keys[-1].removesuffix("_scale")


def read_parameters(
    compand: Mapping, site: str, operand: str, config: QuantConfig, weight: Array | None = None
) -> tuple[Array, Array] | None:
    """Returns mu (or other parameters; 0 for none) and scale, or None where there is no scale.

    Args:
      compand: The collection.
      site: The site's name.
      operand: "weight" or "act".
      config: What the collection was made for.
      weight: The weight, as `weight_scale` takes it; None for activations, and for a weight that
        is not known: it is then taken for zero where its scale follows it. A standardized weight's
        scale is in the units of the weight where that is given, else in standard deviations.

    Raises:
      ValueError: there is a scale, but the mu that it goes with is missing.
    """
    rho = get_leaf(compand, scale_path(site, operand))
    if rho is None:
        return None
    if weight is None:
        scale = scale_from_rho(rho)
    elif config.at(site).weight_standardization:
        scale = in_weights_units(scale_from_rho(rho), moments(weight)[1])
    else:
        scale = weight_scale(rho, grouped(weight, rho.shape, config.at(site).weight_granularity))
    if operand == "weight":
        scale = stored_scales(scale, config.scale_dtype, tuple(range(-scale.ndim, 0)))
    path = parameter_path(site, operand, config)
    if path is None:
        return jnp.zeros((), jnp.float32), scale
    theta = get_leaf(compand, path)
    if theta is None:
        raise ValueError(
            f"`variables` must hold compand/{'/'.join(path)} for mu_scope={config.mu_scope!r}: "
            "they were made by another config, make them with this model's init or calibrate"
        )
    return family_of(config.at(site).quantizer).from_trainable(theta), scale
