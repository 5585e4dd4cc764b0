"""Sums that XLA computes together with what they are sums of."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def sum_both(a: Array, b: Array, a_shape: tuple, b_shape: tuple) -> tuple[Array, Array]:
    """Returns a and b, each summed to the shape that was broadcast to theirs.

    One reduction for both: XLA computes what their operands have in common once. Two sums cost
    seven times the input in temporary memory, and twice the time.
    """
    axes = tuple(
        i for i in range(a.ndim) if all(not shape or shape[i] == 1 for shape in (a_shape, b_shape))
    )
    if jax.default_backend() == "cpu":
        # XLA's CPU backend adds complex numbers in vectors, but pairs of numbers one by one.
        both = jnp.sum(lax.complex(a, b), axes)
        sums = both.real, both.imag
    else:
        zero = jnp.zeros((), a.dtype)
        sums = lax.reduce((a, b), (zero, zero), lambda x, y: (x[0] + y[0], x[1] + y[1]), axes)
    a_sum, b_sum = (jnp.expand_dims(x, axes) for x in sums)
    return _sum_to(a_sum, a_shape), _sum_to(b_sum, b_shape)


def _sum_to(x: Array, shape: tuple) -> Array:
    if not shape:
        return jnp.sum(x)
    axes = tuple(i for i, n in enumerate(shape) if n == 1)
    return jnp.sum(x, axes, keepdims=True)
