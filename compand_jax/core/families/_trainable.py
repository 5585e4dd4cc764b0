"""Trainable forms that an optimizer cannot move out of bounds.

A parameter's gradient is the slope at the bound where a descent step leads back inside, and 0 where
it leads outside: what has reached a bound can leave it again.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# A ratio of 2981 between two gaps: of 256, each is still seen by float32 beside 1.
LOG_BOUND = 4.0


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _bounded(theta: Array, low: float, high: float) -> Array:
    return jnp.clip(theta, low, high)


def _bounded_fwd(theta: Array, low: float, high: float) -> tuple[Array, Array]:
    return _bounded(theta, low, high), theta


def _bounded_bwd(low: float, high: float, theta: Array, cotangent: Array) -> tuple[Array]:
    # Descent moves theta against its gradient.
    outward = ((theta <= low) & (cotangent > 0)) | ((theta >= high) & (cotangent < 0))
    return (jnp.where(outward, 0, cotangent),)


_bounded.defvjp(_bounded_fwd, _bounded_bwd)


def bounded_expm1(theta: Float[Array, "..."], high: float) -> Float[Array, "..."]:
    """Returns expm1(clip(theta, 0, high))."""
    return jnp.expm1(_bounded(theta, 0.0, high))


def bounded_softmax(theta: Float[Array, "... n"]) -> Float[Array, "... n"]:
    """Returns softmax(clip(theta, -4, 4)) over the last axis."""
    return jax.nn.softmax(_bounded(theta, -LOG_BOUND, LOG_BOUND), axis=-1)


def bounded_log(p: Float[Array, "... n"]) -> Float[Array, "... n"]:
    """Returns log(p/mean(p)) over the last axis, within the bounds."""
    return jnp.clip(jnp.log(p / jnp.mean(p, -1, keepdims=True)), -LOG_BOUND, LOG_BOUND)
