"""A quantizer's gradients in the parameters of its family of levels."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from compand_jax.core._xla import sum_to, take
from compand_jax.core.spec import Spec


def slope_of_one(
    v: Array, v_q: Array, p: Array, spec: Spec, look_up: Callable[[Array], Array]
) -> Array | None:
    """Returns dv_q/dp of each value, where the family has one parameter; None for others.

    `look_up` returns the entry of a table that each value has.
    """
    family = spec.family
    if family.shape(spec):
        return None
    slope = family.slope(v, v_q, p, spec)
    if slope is not None or family.parameter is None:
        return slope
    return look_up(jax.jvp(lambda p: family.table(p, spec)[0], (p,), (jnp.ones_like(p),))[1])


def sum_of_many(g: Array, v: Array, indices: Array, p: Array, spec: Spec) -> Array:
    """Returns sum g dv_q/dp, of p's shape, where the family has several parameters.

    Args:
      g: The gradient in each v_q.
      v: The magnitudes, in units of the scale, at most 1.
      indices: Of their levels in the table.
      p: The parameters, along the last axis.
      spec: Of the quantizer.
    """
    family = spec.family
    levels, pull_back = jax.vjp(lambda p: family.table(p, spec)[0], p)
    (total,) = pull_back(_sum_by_level(g, indices, levels.shape))
    slopes = family.expand_slopes(p, spec)
    if slopes is None:
        return total
    passed_on = family.passed_on(g, v, take(slopes, indices), p)
    return total if passed_on is None else total + passed_on


def _sum_by_level(g: Array, indices: Array, shape: tuple[int, ...]) -> Array:
    """Returns the sum of what has each level, of a table's shape."""
    *tables, count = shape
    if not tables:
        return jnp.zeros(count, g.dtype).at[indices.ravel()].add(g.ravel())
    sums = [sum_to(jnp.where(indices == k, g, 0), tuple(tables)) for k in range(count)]
    return jnp.stack(sums, -1).reshape(shape)
