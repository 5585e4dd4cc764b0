"""What calibration keeps of a tensor: its values, and the inner product its errors are taken in.

The squared error of a quantizer Q on values x is <e, e> with e = x - Q(x), and

    <a, b> = sum_i n_i a_i b_i    n_i counts:        the error of the tensor itself
    <a, b> = a^T H b              H second moments:  the error of a layer's output

where H = sum_t x_t x_t^T over all inputs x_t that a row of weights is multiplied with.

A weight with a scale per channel is kept as it is. Any other tensor, and activations that stream
by, are binned by the leading bits of their float32 representation (512 bins an octave, from 2^-40
to 2^40, no range to know beforehand), each bin standing for the mean of what fell into it: what is
left out, the spread within a bin, is the same for every quantizer that sends the bin to one level.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_BINS_PER_OCTAVE_LOG2 = 9
_LOWEST_EXPONENT, _HIGHEST_EXPONENT = -40, 40
BINS = (_HIGHEST_EXPONENT - _LOWEST_EXPONENT) << _BINS_PER_OCTAVE_LOG2
_UNUSED_BITS = 23 - _BINS_PER_OCTAVE_LOG2
_LOWEST_BIN = (127 + _LOWEST_EXPONENT) << _BINS_PER_OCTAVE_LOG2
_MIN_SAMPLE = 8192


class Histogram(NamedTuple):
    """Counts and sums of magnitudes by bin, and the extremes of the values; additive.

    `counts` and `sums` are [2, BINS]: first of the values at or above zero, then of those below.
    A sum is of the distances from the bin's lower edge, which stays exact where the sum of a
    million equal magnitudes would not.
    """

    counts: Array | np.ndarray
    sums: Array | np.ndarray
    maximum: Array | np.ndarray
    minimum: Array | np.ndarray


class Sample(NamedTuple):
    """Rows of values, their inner product, and the largest magnitude for each scale.

    Attributes:
      values: [rows, n]; magnitudes, where the inner product is by counts.
      weights: the inner product: counts, [rows, n] or [rows, 1], or moments, [groups, n, n], the
        rows being divided evenly among the groups.
      absmax: [rows], or [1] where all rows share a scale.
    """

    values: Array
    weights: Array
    absmax: Array

    @property
    def counted(self) -> bool:
        """Whether the inner product is by counts."""
        return self.weights.ndim == 2

    def inner(self, a: Array, b: Array) -> Array:
        """Returns <a, b>, [scales], of rows [rows, n]."""
        if self.counted:
            products = jnp.sum(self.weights * a * b, 1)
        else:
            groups, n, _ = self.weights.shape
            a, b = a.reshape(groups, -1, n), b.reshape(groups, -1, n)
            weighted = jnp.matmul(b, self.weights, precision="highest")  # H is symmetric
            products = jnp.sum(a * weighted, 2).ravel()
        return products if len(self.absmax) == len(products) else jnp.sum(products, keepdims=True)


def histogram(x: Float[Array, "..."]) -> Histogram:
    """Returns the histogram of a tensor's magnitudes; what is not finite is not counted."""
    x = x.astype(jnp.float32).ravel()
    magnitudes = jnp.abs(x)
    index = jax.lax.bitcast_convert_type(magnitudes, jnp.int32) >> _UNUSED_BITS
    index = jnp.clip(index - _LOWEST_BIN, 0, BINS - 1)
    known = jnp.isfinite(x)
    distances = jnp.where(known, magnitudes - _lower_edges(index), 0)
    index = index + jnp.where(x < 0, BINS, 0)
    return Histogram(
        jnp.zeros(2 * BINS, jnp.int32).at[index].add(known.astype(jnp.int32)).reshape(2, BINS),
        jnp.zeros(2 * BINS, jnp.float32).at[index].add(distances).reshape(2, BINS),
        jnp.max(x, initial=0.0, where=known),
        jnp.min(x, initial=0.0, where=known),
    )


def _lower_edges(index: Array) -> Array:
    edges = jax.lax.bitcast_convert_type((index + _LOWEST_BIN) << _UNUSED_BITS, jnp.float32)
    return jnp.where(index == 0, 0, edges)  # all that is smaller, and zero, is in the first bin


def merge_histograms(a: Histogram, b: Histogram) -> Histogram:
    """Returns the histogram of both tensors' values together."""
    return Histogram(
        a.counts + b.counts,
        a.sums + b.sums,
        np.maximum(a.maximum, b.maximum),
        np.minimum(a.minimum, b.minimum),
    )


def sample_from_histogram(data: Histogram, signed: bool) -> Sample:
    """Returns a histogram's sample: the mean magnitude of each bin in use, as one row."""
    rows = slice(0, 2 if signed else 1)
    counts = np.sum(np.asarray(data.counts, np.float64)[rows], 0)
    sums = np.sum(np.asarray(data.sums, np.float64)[rows], 0)
    absmax = max(data.maximum, -data.minimum if signed else 0)
    edges = np.asarray(_lower_edges(jnp.arange(BINS, dtype=jnp.int32)), np.float64)
    used = np.flatnonzero(counts)
    # To few lengths, so that the search is compiled few times.
    padding = max(_MIN_SAMPLE, 1 << (len(used) - 1).bit_length()) - len(used)
    magnitudes = np.pad(edges[used] + sums[used] / counts[used], (0, padding))
    return Sample(
        jnp.asarray(magnitudes, jnp.float32)[None],
        jnp.asarray(np.pad(counts[used], (0, padding)), jnp.float32)[None],
        jnp.asarray(absmax, jnp.float32)[None],
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
        parts = [_jitted_histogram(jnp.asarray(weight)) for weight in weights]
        total = parts[0]
        for part in parts[1:]:
            total = merge_histograms(total, part)
        return sample_from_histogram(jax.device_get(total), signed=True)
    rows = []
    for weight in weights:
        magnitudes = jnp.abs(jnp.asarray(weight, jnp.float32))
        magnitudes = jnp.moveaxis(magnitudes, scale_axes, range(len(scale_axes)))
        channels = int(np.prod(magnitudes.shape[: len(scale_axes)]))
        rows.append(magnitudes.reshape(channels, -1))
    values = jnp.concatenate(rows, 1)
    return Sample(values, jnp.ones((len(values), 1)), jnp.max(values, 1, initial=0.0))


_jitted_histogram = jax.jit(histogram)


def sample_from_moments(
    rows: Float[Array, "groups rows n"],
    moments: Float[Array | np.ndarray, "groups n n"],
    per_row: bool,
) -> Sample:
    """Returns the sample of a layer's weights in the inner product of its output.

    Args:
      rows: the weights, a row an output; rows and moments as `layer_moments` gives them.
      moments: H, a matrix for each group of rows.
      per_row: whether every row has a scale of its own.
    """
    values = jnp.asarray(rows, jnp.float32).reshape(-1, rows.shape[-1])
    absmax = jnp.max(jnp.abs(values), 1, initial=0.0)
    if not per_row:
        absmax = jnp.max(absmax, keepdims=True)
    return Sample(values, jnp.asarray(moments, jnp.float32), absmax)
