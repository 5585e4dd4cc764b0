"""A quantizer as its codebook: the levels, the thresholds between them, and looking a value up.

With scale c, v = min(|x|/c, 1) and the mu-law curve F and its inverse G (`companding`):

    midtread   M = 2^(bits-1) - 1 signed, 2^bits - 1 unsigned;  y_q = round(M F(v)) / M
    midrise    H = 2^(bits-1), signed only;                     y_q = (floor(H F(v)) + 1/2) / H

the levels are c G(y_q), and the thresholds are c G at the points halfway between. Every quantizer
reads the one table that `half_table` makes, so that all of them agree to the last bit; at a tie
midtread takes the inner level and midrise the outer. Another family of levels (power of two, say)
would differ only in how the table is made.
"""

import functools
import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from compand_jax.core.companding import (
    check_values,
    compute_dtype,
    mu_law_expand,
)

GRIDS = ("midtread", "midrise")
ONE_BIT_REMEDY = "grid='midrise' or signed=False"

# Up to so many thresholds comparing with each is cheaper than finding out which one matters.
_MAX_COMPARISONS = 15
# And so it is where each of many tables serves no more values than this: finding out needs
# another table for each.
_FEW_VALUES = 2**13


class Spec(NamedTuple):
    """What is static about a quantizer: it decides the table's shape and the codes' type."""

    bits: int
    signed: bool = True
    grid: str = "midtread"

    @property
    def midrise(self) -> bool:
        """Whether there is a threshold, instead of a level, at zero."""
        return self.grid == "midrise"

    @property
    def steps(self) -> int:
        """M or H: the intervals that [0, 1] is divided into after compression."""
        return 2 ** (self.bits - self.signed) - (not self.midrise)

    @property
    def code_dtype(self) -> Any:
        """int8 where signed, uint8 where not."""
        return jnp.int8 if self.signed else jnp.uint8


def check_spec(bits: Any, signed: bool = True, grid: str = "midtread") -> Spec:
    """Returns the `Spec`; raises ValueError where `bits`, `signed` and `grid` are none."""
    if isinstance(bits, bool) or not isinstance(bits, numbers.Integral) or not 1 <= int(bits) <= 8:
        raise ValueError(f"`bits` must be an integer from 1 to 8, got {bits!r}")
    if not isinstance(signed, bool | np.bool_):
        raise ValueError(f"`signed` must be True or False, got {signed!r}")
    if grid not in GRIDS:
        raise ValueError(f"`grid` must be one of {', '.join(GRIDS)}, got {grid!r}")
    if grid == "midrise" and not signed:
        raise ValueError("`grid` midrise is signed, got signed=False: use grid='midtread'")
    if grid == "midtread" and signed and bits == 1:
        raise ValueError(
            "`bits` must be at least 2 for a signed midtread grid, got 1: "
            f"use {ONE_BIT_REMEDY}"
        )
    return Spec(int(bits), bool(signed), grid)


def codebook(
    mu: ArrayLike, scale: ArrayLike, *, bits: int, signed: bool = True, grid: str = "midtread"
) -> tuple[Float[Array, "... levels"], Float[Array, "... thresholds"]]:
    """Returns all levels of a quantizer and the thresholds between them, in ascending order.

    midtread: l_k = c G(k/M), k in [-M, M] (signed) or [0, M]; thresholds at c G((k - 1/2)/M).
    midrise: l_k = c G((k + 1/2)/H), k in [-H, H - 1]; thresholds at c G(k/H).

    Args:
      mu: Curvature, at least 0; a scalar or an array.
      scale: Clip c > 0, in the units of x; a scalar or an array that broadcasts with mu.
      bits: Bits per code, 1 to 8.
      signed: Whether x has a sign; where not, x <= 0 has code 0.
      grid: "midtread" (a level at zero) or "midrise" (a threshold at zero; signed only).

    Returns:
      float32 levels (2M + 1, M + 1 or 2H of them) and thresholds (one fewer) along a new last
      axis behind the broadcast shape of mu and scale. A value at a threshold belongs to the
      level nearer zero on midtread, farther from zero on midrise.

    Raises:
      ValueError: `bits`, `signed` and `grid` do not go together, or a concrete mu is negative
        or not finite, or a concrete scale is not positive and finite.

    >>> levels, thresholds = codebook(0.0, 3.0, bits=3)
    >>> print(levels, thresholds)
    [-3. -2. -1.  0.  1.  2.  3.] [-2.5 -1.5 -0.5  0.5  1.5  2.5]
    """
    spec = check_spec(bits, signed, grid)
    mu, scale = check_parameters(mu, scale, dtype=compute_dtype(jnp.result_type(float)))
    return _codebook(mu, scale, spec)


def check_parameters(
    mu: ArrayLike, scale: ArrayLike, *, dtype: Any, like: tuple[str, tuple] | None = None
) -> tuple[Array, Array]:
    """Returns mu and scale as arrays of a dtype; raises ValueError where they cannot be.

    `like` names the operand that they must broadcast to, and gives its shape. Values are checked
    only where they are at hand: a traced mu costs nothing.
    """
    mu = check_values("mu", mu, dtype, 0.0, "at least 0 and finite")
    # A smaller scale is taken for zero by the processor.
    scale = check_values("scale", scale, dtype, float(np.finfo(dtype).tiny), "positive and finite")
    for name, value in (("mu", mu), ("scale", scale)):
        if like is not None and value.ndim and not _broadcasts_to(value.shape, like[1]):
            raise ValueError(
                f"`{name}` must be a scalar or broadcast to `{like[0]}` at the same rank, "
                f"got shape {value.shape} for {like[1]}"
            )
    return mu, scale


def _broadcasts_to(shape: tuple, target: tuple) -> bool:
    pairs = zip(shape, target, strict=False)
    return len(shape) == len(target) and all(n in (1, m) for n, m in pairs)


def positions(spec: Spec) -> tuple[np.ndarray, np.ndarray]:
    """Returns where the levels at x >= 0, and the thresholds above 0, lie after compression."""
    if spec.midrise:
        return (np.arange(spec.steps) + 0.5) / spec.steps, np.arange(1, spec.steps) / spec.steps
    return np.arange(spec.steps + 1) / spec.steps, (np.arange(spec.steps) + 0.5) / spec.steps


def _expand_positions(y: Any, mu: Array, scale: Array) -> Array:
    """Returns c G(y) along a new last axis behind the broadcast shape of mu and scale."""
    ndim = max(mu.ndim, scale.ndim)
    y = jnp.asarray(y, mu.dtype).reshape((1,) * ndim + (-1,))
    mu, scale = (a[..., None] if a.ndim else a for a in (mu, scale))
    return scale * jnp.where(y == 1, 1, mu_law_expand(y, mu))


@functools.partial(jax.jit, static_argnums=2)  # so that it is traced once, for all sites
def half_table(mu: Array, scale: Array, spec: Spec) -> tuple[Array, Array]:
    """Returns the levels at x >= 0 and the thresholds above 0."""
    levels, thresholds = positions(spec)
    table = _expand_positions(np.concatenate([levels, thresholds]), mu, scale)
    return table[..., : len(levels)], table[..., len(levels) :]


@functools.partial(jax.jit, static_argnums=2)
def _codebook(mu: Array, scale: Array, spec: Spec) -> tuple[Array, Array]:
    levels, thresholds = half_table(mu, scale, spec)
    if not spec.signed:
        return levels, thresholds
    mirrored = levels if spec.midrise else levels[..., 1:]
    between = [jnp.zeros_like(levels[..., :1])] if spec.midrise else []
    return (
        jnp.concatenate([-mirrored[..., ::-1], levels], -1),
        jnp.concatenate([-thresholds[..., ::-1], *between, thresholds], -1),
    )


def look_up(magnitude: Array, mu: Array, scale: Array, table: Array, spec: Spec) -> Array:
    """Returns the table's entry for the number of thresholds that each magnitude lies beyond."""
    _, thresholds = half_table(mu, scale, spec)
    tables = math.prod(thresholds.shape[:-1])
    few_values = thresholds.ndim > 1 and magnitude.size <= _FEW_VALUES * tables
    if thresholds.shape[-1] <= _MAX_COMPARISONS or few_values:
        return _compare_all(magnitude, thresholds, table, spec)
    return _compare_one(magnitude, mu, scale, thresholds, table, spec)


def _beyond(magnitude: Array, threshold: Array, spec: Spec) -> Array:
    return magnitude >= threshold if spec.midrise else magnitude > threshold


def _compare_all(magnitude: Array, thresholds: Array, table: Array, spec: Spec) -> Array:
    value = jnp.broadcast_to(table[..., 0], magnitude.shape)
    for k in range(thresholds.shape[-1]):
        value = jnp.where(_beyond(magnitude, thresholds[..., k], spec), table[..., k + 1], value)
    return value


def _compare_one(
    magnitude: Array, mu: Array, scale: Array, thresholds: Array, table: Array, spec: Spec
) -> Array:
    # Buckets so narrow that none holds two thresholds: it says which one to compare with.
    count = 4 * 2 ** (spec.bits - spec.signed)
    found = _buckets(jnp.where(magnitude >= 0, magnitude, 0), mu, scale, count)  # NaN has code 0
    mu, scale = (a[..., None] if a.ndim else a for a in (mu, scale))
    # How many thresholds lie in lower buckets; what they were at, and the entry, follows.
    below = _count_below(_buckets(thresholds, mu, scale, count), count + 1)
    end = jnp.full_like(thresholds[..., :1], jnp.inf)
    threshold = _take_many(jnp.concatenate([thresholds, end], -1), below[..., :-1])
    entries = _take_many(table, below)
    # They are in order: XLA fuses no sort, and would else make them anew for every magnitude.
    threshold, entries = jnp.sort(threshold, -1), jnp.sort(entries, -1)
    beyond = _beyond(magnitude, take(threshold, found), spec)
    return jnp.where(beyond, take(entries[..., 1:], found), take(entries[..., :-1], found))


def _buckets(magnitude: Array, mu: Array, scale: Array, count: int) -> Array:
    """Returns an integer in [0, count) that grows with the magnitude in about even steps of F.

    As in G.711's codecs, the leading bits of |x| + c/mu as a floating-point number are a piecewise
    linear logarithm. Its slope is off by a factor of at most 1.5, so that at least count/2
    buckets on [0, c] are narrower than any of count/4 intervals that are even in F; below mu = 1,
    where F is nearly straight, mu = 1 does. Everything here is exact or monotone.
    """
    bits = jnp.int64 if mu.dtype == jnp.float64 else jnp.int32
    # A power of two that brings the scale near 1, so that c/mu is no subnormal number.
    unit = jnp.ldexp(jnp.ones_like(scale), -jnp.minimum(jnp.frexp(scale)[1], 126))
    offset = scale * unit / jnp.maximum(mu, 1)
    start = lax.bitcast_convert_type(offset, bits)
    width = lax.bitcast_convert_type(offset + scale * unit, bits) - start
    shift = jnp.iinfo(bits).bits - lax.clz(width) - (count.bit_length() - 1)
    position = lax.bitcast_convert_type(magnitude * unit + offset, bits) - start
    return jnp.minimum(position >> shift, count - 1)


def _count_below(numbers: Array, end: int) -> Array:
    """Returns how many of the ascending numbers are below 0, 1, ..., end - 1."""

    def count(numbers: Array) -> Array:
        return jnp.searchsorted(numbers, jnp.arange(end), method="scan_unrolled")

    return jnp.vectorize(count, signature="(n)->(m)")(numbers)


def _take_many(table: Array, indices: Array) -> Array:
    return take(table if table.ndim == 1 else table[..., None, :], indices)


def take(table: Array, index: Array) -> Array:
    """Returns table[..., index], the table's leading axes broadcast against the index."""
    if table.ndim == 1:
        return table.at[index].get(mode="promise_in_bounds")
    return jnp.take_along_axis(table, index[..., None], axis=-1, mode="promise_in_bounds")[..., 0]
