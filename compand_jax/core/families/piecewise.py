"""Piecewise-linear companding.

Source: Yamamoto, "Learnable companding quantization for accurate low-bit neural networks", CVPR
2021, section 3.2: [0, 1] in K = 16 equal intervals, the slopes by softmax, even at first.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array

from compand_jax.core._xla import sum_to
from compand_jax.core.families.base import Gaps, positions, split_table

if TYPE_CHECKING:
    from compand_jax.core.spec import Spec

INTERVALS = 16


class Piecewise(Gaps):
    """A compressing curve F of K straight pieces, each with a slope; the levels are its inverse's.

    With heights h_j = s_j/sum(s) of the slopes s, and b_j = h_0 + ... + h_(j-1),

        F(v) = b_j + h_j (K v - j)         for v in [j/K, (j+1)/K]
        G(y) = (j + (y - b_j)/h_j)/K       for y in [b_j, b_(j+1)]
    """

    parameter = "slopes"
    required = "the 16 slopes of quantizer 'piecewise', positive and finite"

    def shape(self, spec: "Spec") -> tuple[int, ...]:
        """Returns (K,)."""
        return (INTERVALS,)

    def table(self, p: Array, spec: "Spec") -> tuple[Array, Array]:
        """Returns G at the grid's positions."""
        return split_table(spec, p, 1, piecewise_expand)

    def expand_slopes(self, p: Array, spec: "Spec") -> Array:
        """Returns 1/(K h_j) of the piece that each level is on; at a knot, the outer one's."""
        levels, _ = positions(spec.steps, spec.midrise)
        y = jnp.asarray(levels, p.dtype).reshape((1,) * (p.ndim - 1) + (-1,))
        _, _, height = _piece(y, jnp.expand_dims(p, p.ndim - 1))
        return 1 / (INTERVALS * height)

    def passed_on(self, g: Array, v: Array, slopes: Array, p: Array) -> Array:
        """Returns the sum over values of g dG/dy dF/ds."""
        heights, pull_back = jax.vjp(_heights, p)
        own, tables = g * slopes, heights.shape[:-1]
        if not tables:
            # A piece has its height's share of what lies on it, and all of what lies beyond.
            piece = jnp.minimum((INTERVALS * v).astype(jnp.int32), INTERVALS - 1)
            share = own * (INTERVALS * v - piece.astype(v.dtype))
            on, shares = (_sums(x, piece) for x in (own, share))
            return pull_back(shares + jnp.sum(on) - jnp.cumsum(on))[0]
        sums = [sum_to(own * jnp.clip(INTERVALS * v - j, 0, 1), tables) for j in range(INTERVALS)]
        return pull_back(jnp.stack(sums, -1))[0]


def _sums(x: Array, piece: Array) -> Array:
    """Returns the sum of what lies on each piece."""
    return jnp.zeros(INTERVALS, x.dtype).at[piece.ravel()].add(x.ravel())


def piecewise_expand(y: Array, slopes: Array) -> Array:
    """Returns G(y), the slopes along the last axis, behind axes that broadcast against y."""
    index, start, height = _piece(y, slopes)
    return (index + (y - start) / height) / INTERVALS


def _heights(slopes: Array) -> Array:
    return jax.lax.optimization_barrier(slopes / jnp.sum(slopes, -1, keepdims=True))


def _piece(y: Array, slopes: Array) -> tuple[Array, Array, Array]:
    """Returns, of the piece that each y is on, its number, where it starts, and its height."""
    heights = _heights(slopes)
    ends = jnp.cumsum(heights, -1)
    if heights.ndim == 1:
        heights, ends = (x.reshape((1,) * y.ndim + (-1,)) for x in (heights, ends))
    index = jnp.sum(y[..., None] >= ends[..., :-1], -1)
    at = jax.nn.one_hot(index, INTERVALS, dtype=bool)
    height = jnp.sum(jnp.where(at, heights, 0), -1)
    return index.astype(y.dtype), jnp.sum(jnp.where(at, ends - heights, 0), -1), height
