"""Looking up in a table, and sums, in the forms that XLA compiles to fast code."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

# Up to so many thresholds comparing with each is cheaper than finding out which one matters.
_MAX_COMPARISONS = 15
# And so it is where each of many tables serves no more values than this: finding out needs
# another table for each.
_FEW_VALUES = 2**13


def look_up(
    magnitude: Array,
    table: Array,
    thresholds: Array,
    mu: Array | None,
    scale: Array,
    *,
    outer: bool,
) -> Array:
    """Returns the table's entry for the number of thresholds that each magnitude lies beyond.

    Args:
      magnitude: at least 0, or NaN, which lies beyond none.
      table: one entry more than thresholds, along the last axis.
      thresholds: ascending along the last axis.
      mu: of the thresholds, where they are about even after compression by its curve; without the
        last axis, broadcast against the magnitude. None looks for them by bisection.
      scale: likewise.
      outer: whether a magnitude at a threshold lies beyond it.
    """
    tables = math.prod(thresholds.shape[:-1])
    few_values = thresholds.ndim > 1 and magnitude.size <= _FEW_VALUES * tables
    if thresholds.shape[-1] <= _MAX_COMPARISONS or few_values:
        return _compare_all(magnitude, table, thresholds, outer)
    if mu is None:
        return take(table, _bisect(magnitude, thresholds, outer))
    return _compare_one(magnitude, table, thresholds, mu, scale, outer)


def _beyond(magnitude: Array, threshold: Array, outer: bool) -> Array:
    return magnitude >= threshold if outer else magnitude > threshold


def _compare_all(magnitude: Array, table: Array, thresholds: Array, outer: bool) -> Array:
    value = jnp.broadcast_to(table[..., 0], magnitude.shape)
    for k in range(thresholds.shape[-1]):
        value = jnp.where(_beyond(magnitude, thresholds[..., k], outer), table[..., k + 1], value)
    return value


def _bisect(magnitude: Array, thresholds: Array, outer: bool) -> Array:
    """Returns how many thresholds, one fewer than a power of two, each magnitude lies beyond."""
    found = jnp.zeros(magnitude.shape, jnp.int32)
    step = (thresholds.shape[-1] + 1) // 2
    while step:
        threshold = take(thresholds, found + (step - 1))
        found = jnp.where(_beyond(magnitude, threshold, outer), found + step, found)
        step //= 2
    return found


def _compare_one(
    magnitude: Array, table: Array, thresholds: Array, mu: Array, scale: Array, outer: bool
) -> Array:
    # Buckets so narrow that none holds two thresholds: it says which one to compare with.
    count = 4 * (thresholds.shape[-1] + 1)
    found = _buckets(jnp.where(magnitude >= 0, magnitude, 0), mu, scale, count)  # NaN has code 0
    mu, scale = (a[..., None] if a.ndim else a for a in (mu, scale))
    # How many thresholds lie in lower buckets; what they were at, and the entry, follows.
    below = _count_below(_buckets(thresholds, mu, scale, count), count + 1)
    end = jnp.full_like(thresholds[..., :1], jnp.inf)
    threshold = _take_many(jnp.concatenate([thresholds, end], -1), below[..., :-1])
    entries = _take_many(table, below)
    # They are in order: XLA fuses no sort, and would else make them anew for every magnitude.
    threshold, entries = jnp.sort(threshold, -1), jnp.sort(entries, -1)
    beyond = _beyond(magnitude, take(threshold, found), outer)
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


def sum_both(a: Array, b: Array, a_shape: tuple, b_shape: tuple) -> tuple[Array, Array]:
    """Returns a and b, each summed to the shape that was broadcast to theirs.

    One reduction for both: XLA computes what their operands have in common once. Two sums cost
    seven times the input in temporary memory, and twice the time.
    """
    axes = tuple(
        i for i in range(a.ndim) if all(not shape or shape[i] == 1 for shape in (a_shape, b_shape))
    )

    def on_cpu(a: Array, b: Array) -> tuple[Array, Array]:
        # XLA's CPU backend adds complex numbers in vectors, but pairs of numbers one by one.
        both = jnp.sum(lax.complex(a, b), axes)
        return both.real, both.imag

    def elsewhere(a: Array, b: Array) -> tuple[Array, Array]:
        zero = jnp.zeros((), a.dtype)
        sums = lax.reduce((a, b), (zero, zero), lambda x, y: (x[0] + y[0], x[1] + y[1]), axes)
        return tuple(sums)

    # When it is lowered, not here: a function exported on a CPU may run elsewhere.
    sums = lax.platform_dependent(a, b, cpu=on_cpu, default=elsewhere)
    a_sum, b_sum = (jnp.expand_dims(x, axes) for x in sums)
    return sum_to(a_sum, a_shape), sum_to(b_sum, b_shape)


def sum_to(x: Array, shape: tuple) -> Array:
    """Returns x summed to a shape that was broadcast to its own."""
    if not shape:
        return jnp.sum(x)
    axes = tuple(i for i, n in enumerate(shape) if n == 1)
    return jnp.sum(x, axes, keepdims=True)
