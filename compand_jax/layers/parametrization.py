"""The trainable form of mu and scale, and where they lie in `variables["compand"]`.

    mu    = expm1(clip(theta, 0, log 256))     a leaf named `weight_mu`, `act_mu` or `mu` is theta
    scale = exp(rho)                           a leaf named `weight_scale` or `act_scale` is rho

so that mu stays in [0, 255] and the scale positive whatever an optimizer does, and a step is
relative to the size of what it moves. Leaves lie under the site's module path; what sites share
lies under `_shared`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from compand_jax.calibration.fit import MU_MAX
from compand_jax.layers.config import QuantConfig

SHARED = "_shared"
_THETA_MAX = float(np.log1p(MU_MAX))


@jax.custom_vjp
def mu_from_theta(theta: Float[Array, ""]) -> Float[Array, ""]:
    """Returns the mu of a trainable theta, mu = expm1(clip(theta, 0, log 256)).

    Args:
      theta: Any number, a scalar; what an optimizer moves.

    Returns:
      mu in [0, 255], of theta's dtype.

    Gradient: exp(theta) between the bounds. At a bound and beyond it, it is the slope at the bound
      where a descent step leads back inside, and 0 where it leads outside. So a mu that has
      reached 0 can leave it again.

    >>> float(mu_from_theta(jnp.log(3.0))), float(mu_from_theta(jnp.array(-1.0)))
    (2.0, 0.0)
    """
    return jnp.expm1(jnp.clip(theta, 0, _THETA_MAX))


def _mu_fwd(theta: Array) -> tuple[Array, Array]:
    return mu_from_theta(theta), theta


def _mu_bwd(theta: Array, cotangent: Array) -> tuple[Array]:
    # Descent moves theta against its gradient.
    outward = ((theta <= 0) & (cotangent > 0)) | ((theta >= _THETA_MAX) & (cotangent < 0))
    return (jnp.where(outward, 0, cotangent * jnp.exp(jnp.clip(theta, 0, _THETA_MAX))),)


mu_from_theta.defvjp(_mu_fwd, _mu_bwd)


def theta_from_mu(mu: Any) -> Float[Array, ""]:
    """Returns the trainable form of mu, theta = log(1 + mu); `mu_from_theta` is its inverse.

    Args:
      mu: Curvature, 0 to 255, a scalar.

    Returns:
      theta in [0, log 256], float32.

    Gradient: 1/(1 + mu).

    >>> round(float(mu_from_theta(theta_from_mu(255))), 3)
    255.0
    """
    return jnp.log1p(jnp.asarray(mu, jnp.float32))


def scale_from_rho(rho: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the scale of a trainable rho, exp(rho).

    Args:
      rho: Any numbers, of any shape; what an optimizer moves.

    Returns:
      Positive scales of rho's shape and dtype, in the units of what they clip.

    Gradient: exp(rho).

    >>> float(scale_from_rho(jnp.array(0.0)))
    1.0
    """
    return jnp.exp(rho)


def rho_from_scale(scale: Any) -> Float[Array, "..."]:
    """Returns the trainable form of a scale, rho = log(scale); `scale_from_rho` is its inverse.

    Args:
      scale: Positive numbers, of any shape, in the units of what they clip.

    Returns:
      rho, float32, of the scale's shape.

    Gradient: 1/scale.

    >>> float(rho_from_scale(1.0))
    0.0
    """
    return jnp.log(jnp.asarray(scale, jnp.float32))


def mu_path(site: str, operand: str, config: QuantConfig) -> tuple[str, ...] | None:
    """Returns where the theta of a site's operand ("weight" or "act") lies; None if uniform."""
    if config.at(site).quantizer == "uniform":
        return None
    if config.mu_scope == "single":
        return (SHARED, "mu")
    if config.mu_scope == "separate":
        return (SHARED, f"{operand}_mu")
    return (*site_path(site), f"{operand}_mu")


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
    compand: Mapping, site: str, operand: str, config: QuantConfig
) -> tuple[Array, Array] | None:
    """Returns mu and scale of a site's operand, or None where it has no scale.

    Raises:
      ValueError: there is a scale, but the mu that it goes with is missing.
    """
    rho = get_leaf(compand, scale_path(site, operand))
    if rho is None:
        return None
    path = mu_path(site, operand, config)
    if path is None:
        return jnp.zeros((), jnp.float32), scale_from_rho(rho)
    theta = get_leaf(compand, path)
    if theta is None:
        raise ValueError(
            f"`variables` must hold compand/{'/'.join(path)} for mu_scope={config.mu_scope!r}: "
            "they were made by another config, make them with this model's init or calibrate"
        )
    return mu_from_theta(theta), scale_from_rho(rho)
