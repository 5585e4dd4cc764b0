"""What calibration keeps of a tensor: its values, and the inner product its errors are taken in.

The squared error of a quantizer Q on values x is <e, e> with e = x - Q(x), and

    <a, b> = sum_i n_i a_i b_i    n_i counts:        the error of the tensor itself
    <a, b> = a^T H b              H second moments:  the error of a layer's output

where H = sum_t x_t x_t^T over all inputs x_t that a row of weights is multiplied with.

A weight with a scale per channel is kept as it is. Any other tensor, and activations that stream
by, are binned by the leading bits of their float32 representation (512 bins an octave, 40 octaves
down from the largest magnitude), each bin standing for the mean of what fell into it: what is left
out, the spread within a bin, is the same for every quantizer that sends the bin to one level.

All is in a unit of the tensor's own, a power of two near its largest magnitude, so that squares
neither vanish nor overflow, whatever the magnitudes are that float32 has. What has a scale of its
own and does not exceed `SMALLEST_SCALE` counts as zero.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from compand_jax.core._mesh import sharded_as
from compand_jax.core.codebooks import SMALLEST_SCALE

_BINS_PER_OCTAVE_LOG2 = 9
_LOWEST_EXPONENT, _HIGHEST_EXPONENT = -39, 1
BINS = (_HIGHEST_EXPONENT - _LOWEST_EXPONENT) << _BINS_PER_OCTAVE_LOG2
_UNUSED_BITS = 23 - _BINS_PER_OCTAVE_LOG2
_LOWEST_BIN = (127 + _LOWEST_EXPONENT) << _BINS_PER_OCTAVE_LOG2
_MIN_SAMPLE = 8192


class Histogram(NamedTuple):
    """Counts and sums of magnitudes by bin, and the extremes of the values.

    `counts` and `sums` are [2, BINS]: first of the values at or above zero, then of those below.
    A sum is of the distances from the bin's lower edge, which stays exact where the sum of a
    million equal magnitudes would not; edges and sums are in `unit`, a power of two. What is not
    finite is not counted, but shows in the extremes.
    """

    counts: Array | np.ndarray
    sums: Array | np.ndarray
    maximum: Array | np.ndarray
    minimum: Array | np.ndarray
    unit: Array | np.ndarray


class Sample(NamedTuple):
    """Rows of values, their inner product, and the largest magnitude for each scale.

    Attributes:
      values: [rows, n]; magnitudes, where the inner product is by counts.
      weights: the inner product: counts, [rows, n] or [rows, 1], or moments, [groups, n, n], the
        rows being divided evenly among the groups.
      absmax: [rows], or [1] where all rows share a scale.
      unit: like absmax, what values, absmax and scales are in: a power of two, one for the tensor.
    """

    values: Array
    weights: Array
    absmax: Array
    unit: Array

    @property
    def counted(self) -> bool:
        """Whether the inner product is by counts."""
        return self.weights.ndim == 2

    @property
    def histogram(self) -> bool:
        """Whether the values are in order and have counts of their own."""
        return self.counted and self.weights.shape[1] > 1

    @property
    def products(self) -> int:
        """How many products an inner product takes."""
        return self.values.size * (1 if self.counted else self.values.shape[1])

    def weighted(self, x: Float[Array, "rows n"]) -> Float[Array, "rows n"]:
        """Returns n x or H x, so that <x, y> is the plain inner product of this with y."""
        if self.counted:
            return self.weights * x
        groups, n, _ = self.weights.shape
        grouped = x.reshape(groups, -1, n)
        return jnp.matmul(grouped, self.weights, precision="highest").reshape(x.shape)

    def some_rows(self, products: int) -> "Sample":
        """Returns every k-th row of each group, at least 16, for about so many products at most."""
        groups = 1 if self.counted else len(self.weights)
        rows = len(self.values) // groups
        stride = max(min(rows // 16, -(-self.products // products)), 1)

        def some(x: Array) -> Array:
            """Returns of an array by row the entries of those rows; of one for all rows, itself."""
            if len(x) < len(self.values):
                return x
            return x.reshape(groups, rows, *x.shape[1:])[:, ::stride].reshape(-1, *x.shape[1:])

        weights = some(self.weights) if self.counted else self.weights
        return Sample(some(self.values), weights, some(self.absmax), some(self.unit))

    def per_scale(self, products: Float[Array, "rows n"]) -> Float[Array, "scales"]:
        """Returns the sums over what each scale has to do with."""
        sums = jnp.sum(products, 1)
        return sums if len(self.absmax) == len(sums) else jnp.sum(sums, keepdims=True)


@sharded_as()
def histogram(x: Float[Array, "..."]) -> Histogram:
    """Returns the histogram of a tensor's magnitudes."""
    x = x.astype(jnp.float32).ravel()
    known = jnp.isfinite(x)
    unit = _unit(jnp.max(jnp.abs(x), initial=0.0, where=known))
    magnitudes = jnp.abs(x) / unit
    index = jax.lax.bitcast_convert_type(magnitudes, jnp.int32) >> _UNUSED_BITS
    index = jnp.clip(index - _LOWEST_BIN, 0, BINS - 1)
    distances = jnp.where(known, magnitudes - _lower_edges(index), 0)
    index = index + jnp.where(x < 0, BINS, 0)
    return Histogram(
        jnp.zeros(2 * BINS, jnp.int32).at[index].add(known.astype(jnp.int32)).reshape(2, BINS),
        jnp.zeros(2 * BINS, jnp.float32).at[index].add(distances).reshape(2, BINS),
        jnp.max(x, initial=0.0),
        jnp.min(x, initial=0.0),
        unit,
    )


def _unit(absmax: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the largest power of two that does not exceed a magnitude, of at least 2^-126."""
    exponent = jax.lax.bitcast_convert_type(absmax, jnp.int32) >> 23
    return jax.lax.bitcast_convert_type(jnp.maximum(exponent, 1) << 23, jnp.float32)


def _lower_edges(index: Array) -> Array:
    edges = jax.lax.bitcast_convert_type((index + _LOWEST_BIN) << _UNUSED_BITS, jnp.float32)
    return jnp.where(index == 0, 0, edges)  # all that is smaller, and zero, is in the first bin


def merge_histograms(a: Histogram, b: Histogram) -> Histogram:
    """Returns the histogram of both tensors' values together, in the larger of their units."""
    unit = max(a.unit, b.unit)
    a, b = _in_unit(a, unit), _in_unit(b, unit)
    return Histogram(
        a.counts + b.counts,
        a.sums + b.sums,
        np.maximum(a.maximum, b.maximum),
        np.minimum(a.minimum, b.minimum),
        unit,
    )


def _in_unit(data: Histogram, unit: Array | np.ndarray) -> Histogram:
    """Returns a histogram in the same or a larger unit; small bins go to the first one."""
    ratio = np.float64(data.unit) / np.float64(unit)
    shift = min(-int(np.log2(ratio)) << _BINS_PER_OCTAVE_LOG2, BINS - 1)
    counts, sums = np.asarray(data.counts, np.float64), np.asarray(data.sums, np.float64)
    first = slice(0, shift + 1)
    totals = np.sum(sums[:, first] + counts[:, first] * _bin_edges()[first], 1, keepdims=True)
    padding = ((0, 0), (0, shift))
    return data._replace(
        counts=np.pad(
            np.hstack([counts[:, first].sum(1, keepdims=True), counts[:, shift + 1 :]]), padding
        ),
        sums=ratio * np.pad(np.hstack([totals, sums[:, shift + 1 :]]), padding),
        unit=unit,
    )


def _bin_edges() -> np.ndarray:
    return np.asarray(_lower_edges(jnp.arange(BINS, dtype=jnp.int32)), np.float64)


def sample_from_histogram(data: Histogram, signed: bool) -> Sample:
    """Returns a histogram's sample: the mean magnitude of each bin in use, as one row."""
    rows = slice(0, 2 if signed else 1)
    counts = np.sum(np.asarray(data.counts, np.float64)[rows], 0)
    sums = np.sum(np.asarray(data.sums, np.float64)[rows], 0)
    unit = np.float64(data.unit)
    absmax = max(data.maximum, -data.minimum if signed else 0)
    absmax = absmax / unit if absmax > SMALLEST_SCALE else 0.0
    edges = _bin_edges()
    used = np.flatnonzero(counts)
    # To few lengths, so that the search is compiled few times.
    padding = _padded_length(len(used)) - len(used)
    magnitudes = np.pad(edges[used] + sums[used] / counts[used], (padding, 0))
    magnitudes = magnitudes if absmax > 0 else np.zeros_like(magnitudes)
    return Sample(
        jnp.asarray(magnitudes, jnp.float32)[None],
        jnp.asarray(np.pad(counts[used], (padding, 0)), jnp.float32)[None],
        jnp.asarray(absmax, jnp.float32)[None],
        jnp.asarray(unit, jnp.float32)[None],
    )


def sample_from_weights(
    weights: Sequence[Array | np.ndarray], scale_axes: tuple[int, ...] = ()
) -> Sample:
    """Returns the sample of concrete tensors that share their scales: one, or one per channel.

    Args:
      weights: tensors of one shape: one, or the layers of a stack.
      scale_axes: the axes, from the end, whose every index is a channel.
    """
    if not scale_axes:
        total = functools.reduce(merge_histograms, map(_histogram_of_weight, weights))
        return sample_from_histogram(total, signed=True)
    rows = []
    for weight in weights:
        magnitudes = np.abs(np.asarray(weight, np.float32))
        magnitudes = np.moveaxis(magnitudes, scale_axes, range(len(scale_axes)))
        channels = int(np.prod(magnitudes.shape[: len(scale_axes)]))
        rows.append(magnitudes.reshape(channels, -1))
    values = np.concatenate(rows, 1)
    values[np.max(values, 1, initial=0) <= SMALLEST_SCALE] = 0
    unit = np.asarray(_unit(jnp.asarray(np.max(values, initial=0))))
    values, absmax = values / unit, np.max(values, 1, initial=0) / unit
    ones, units = np.ones((len(values), 1), np.float32), np.full_like(absmax, unit)
    return Sample(*map(jnp.asarray, (values, ones, absmax, units)))


def _histogram_of_weight(weight: Array | np.ndarray) -> Histogram:
    values = np.asarray(weight, np.float32).ravel()
    # To few lengths, so that it is compiled few times.
    padding = _padded_length(values.size) - values.size
    found = jax.device_get(_jitted_histogram(np.pad(values, (0, padding))))
    counts = found.counts.copy()
    counts[0, 0] -= padding  # the zeros that were added
    return found._replace(counts=counts)


def _padded_length(count: int) -> int:
    """Returns the next power of two, `_MIN_SAMPLE` at least."""
    return max(_MIN_SAMPLE, 1 << max(count - 1, 0).bit_length())


_jitted_histogram = jax.jit(histogram)


def sample_from_moments(
    rows: Float[Array, "groups rows n"],
    moments: Float[Array | np.ndarray, "groups n n"],
    per_row: bool,
) -> Sample:
    """Returns the sample of a layer's weights in the inner product of its output.

    Args:
      rows: the weights, a row an output; rows and moments as `Unrolling` gives them.
      moments: H, a matrix for each group of rows.
      per_row: whether every row has a scale of its own.
    """
    values = jnp.asarray(rows, jnp.float32).reshape(-1, rows.shape[-1])
    absmax = jnp.max(jnp.abs(values), 1, initial=0.0)
    if not per_row:
        absmax = jnp.max(absmax, keepdims=True)
    is_zero = absmax <= SMALLEST_SCALE
    values, absmax = jnp.where(is_zero[:, None], 0, values), jnp.where(is_zero, 0, absmax)
    unit, moments = _unit(jnp.max(absmax)), jnp.asarray(moments, jnp.float32)
    # The moments' unit is of no account: it is that of errors and power alike.
    moments = moments / _unit(jnp.max(jnp.abs(moments)))
    return Sample(values / unit, moments, absmax / unit, jnp.full_like(absmax, unit))
