"""What XLA is told about what to compute together, and what not to."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array


def computed_once(*, static_argnums: int | tuple[int, ...]) -> Callable[[Callable], Callable]:
    """Decorates a function that is computed once, however many read slices of what it returns.

    XLA's CPU backend would otherwise compute an elementwise chain anew inside of everything that
    reads its result, an optimization barrier notwithstanding: the many products of a convolution
    of small maps took a third of a training step more that way. A call that is not inlined has a
    buffer for its result. Other backends fuse into fewer, and there nothing is changed.

    Args:
      static_argnums: as in `jax.jit`.
    """

    def decorate(function: Callable) -> Callable:
        @functools.partial(jax.jit, static_argnums=static_argnums)
        def body(*args: Any) -> Any:
            with set_xla_metadata(inlineable=None):  # what is called in turn is inlined
                return function(*args)

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            if jax.default_backend() != "cpu":
                return function(*args)
            with set_xla_metadata(inlineable="false"):
                return body(*args)

        return call

    return decorate


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
