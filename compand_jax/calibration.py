"""mu and scale from data: the least mean squared error, or the largest magnitude.

A tensor is reduced to a `Sample`: magnitudes m_i with counts n_i. Its error under a quantizer is

    E(mu, c) = sum_i n_i (m_i - Q(m_i; mu, c))^2

A weight with a scale per channel is its own sample. Any other tensor, and activations that stream
by, are binned by the leading bits of their float32 representation (512 bins an octave, from 2^-40
to 2^40, no range to know beforehand), each bin standing for the mean of what fell into it: what is
left out, the spread within a bin, is the same for every quantizer that sends the bin to one level.

The search is a grid over theta = log(1 + mu) and log c, then ever finer ones around the best.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from compand_jax.codebooks import Spec
from compand_jax.companding import mu_law_expand
from compand_jax.quantizers import fake_quantize

CALIBRATIONS = ("mse", "absmax")
MU_MAX = 255.0

_BINS_PER_OCTAVE_LOG2 = 9
_LOWEST_EXPONENT, _HIGHEST_EXPONENT = -40, 40
BINS = (_HIGHEST_EXPONENT - _LOWEST_EXPONENT) << _BINS_PER_OCTAVE_LOG2
_UNUSED_BITS = 23 - _BINS_PER_OCTAVE_LOG2
_LOWEST_BIN = (127 + _LOWEST_EXPONENT) << _BINS_PER_OCTAVE_LOG2
_MIN_SAMPLE = 8192

_THETA_POINTS, _SCALE_POINTS, _ZOOMS = 13, 25, 3
# Relative to the power: what differs by less is as good, and the flatter curve is taken.
_TIE = 1e-10


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
    """Magnitudes [channels, n], how often each occurs, and the largest, [channels]."""

    magnitudes: Array
    counts: Array | np.ndarray
    absmax: Array


def histogram(x: Float[Array, "..."]) -> Histogram:
    """Returns the histogram of a tensor's magnitudes; NaN is not counted."""
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
    """Returns a histogram's sample: the mean magnitude of each bin in use, of one channel."""
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


def sample_from_tensor(x: Float[Array, "..."], channel_axes: tuple[int, ...] = ()) -> Sample:
    """Returns a concrete tensor's sample, each index of `channel_axes` being a channel."""
    if not channel_axes:
        return sample_from_histogram(jax.jit(histogram)(x), signed=True)
    magnitudes = jnp.moveaxis(
        jnp.abs(x.astype(jnp.float32)), channel_axes, range(len(channel_axes))
    )
    channels = int(np.prod([x.shape[axis] for axis in channel_axes]))
    magnitudes = magnitudes.reshape(channels, -1)
    return Sample(magnitudes, jnp.ones_like(magnitudes), jnp.max(magnitudes, 1, initial=0.0))


def fit_group(
    samples: list[Sample], specs: list[Spec], *, calibration: str = "mse", uniform: bool = False
) -> tuple[float, list[Array], list[float]]:
    """Returns the mu that a group of tensors shares, and the scale of each of them.

    mu minimizes sum_t E_t(mu, c_t(mu)) / P_t, P_t being the tensor's power and c_t(mu) its best
    scale at that mu (calibration "mse") or its largest magnitude ("absmax").

    Args:
      samples: The tensors.
      specs: Their quantizers.
      calibration: "mse" or "absmax".
      uniform: Whether mu is held at 0.

    Returns:
      mu, from 0 to 255; scales, [channels] each, 1 where a channel is all zero; and the relative
      squared errors E_t/P_t that they leave.
    """
    best = functools.partial(_best_scales, refine=calibration == "mse")
    low, high = 0.0, 0.0 if uniform else float(np.log1p(MU_MAX))
    points = 1 if uniform else _THETA_POINTS
    bounds = (low, high)
    for _ in range(1 if uniform else _ZOOMS):
        thetas = np.linspace(low, high, points)
        mus = jnp.asarray(np.expm1(thetas), jnp.float32)
        fits = [best(sample, mus, spec) for sample, spec in zip(samples, specs, strict=True)]
        errors = np.stack([np.asarray(error, np.float64) for _, error in fits])
        total = errors.sum(0)
        winner = int(np.argmax(total <= total.min() + _TIE))
        step = (high - low) / max(points - 1, 1)
        low, high = np.clip([thetas[winner] - step, thetas[winner] + step], *bounds)
    scales = [scale[winner] for scale, _ in fits]
    return float(mus[winner]), scales, [float(error) for error in errors[:, winner]]


@functools.partial(jax.jit, static_argnames=("spec", "refine"))
def _best_scales(
    sample: Sample, mus: Float[Array, "k"], spec: Spec, refine: bool
) -> tuple[Float[Array, "k channels"], Float[Array, "k"]]:
    """Returns each mu's best scale per channel, and the error left, relative to the power."""
    power = jnp.sum(sample.counts * sample.magnitudes**2)

    def at_mu(mu: Array) -> tuple[Array, Array]:
        scale, error = _best_scale(sample, mu, spec, refine)
        return scale, jnp.where(power > 0, jnp.sum(error) / power, 0)

    return jax.lax.map(at_mu, mus)


def _best_scale(sample: Sample, mu: Array, spec: Spec, refine: bool) -> tuple[Array, Array]:
    absmax = jnp.where(sample.absmax > 0, sample.absmax, 1)
    if not refine:
        return absmax, _squared_error(sample, mu, absmax, spec)
    # A midrise grid's top level lies below the scale; at this scale it is the largest magnitude.
    top = 1 - 0.5 / spec.steps if spec.midrise else 1.0
    highest = absmax / mu_law_expand(jnp.full_like(mu, top), mu)
    mean = jnp.sum(sample.counts * sample.magnitudes, 1) / jnp.maximum(
        jnp.sum(jnp.where(sample.magnitudes > 0, sample.counts, 0), 1), 1
    )
    lowest = jnp.where(mean > 0, jnp.minimum(0.25 * mean, 0.5 * highest), 0.5 * highest)
    lowest = jnp.maximum(lowest, highest * 2.0**-12)
    offsets = jnp.linspace(-1.0, 1.0, _SCALE_POINTS, dtype=jnp.float32)[:, None]

    def zoom(_: Array, state: tuple) -> tuple:
        center, span, scale, _ = state
        # The scale found so far, unrounded by exp(log(c)): a constant tensor is exact there.
        candidates = jnp.concatenate([jnp.exp(center[None] + offsets * span[None]), scale[None]])
        candidates = jnp.minimum(candidates, highest[None])
        errors = jax.lax.map(lambda c: _squared_error(sample, mu, c, spec), candidates)
        scale = jnp.take_along_axis(candidates, jnp.argmin(errors, 0)[None], 0)[0]
        return jnp.log(scale), span * 2 / (_SCALE_POINTS - 1), scale, jnp.min(errors, 0)

    span = (jnp.log(highest) - jnp.log(lowest)) / 2
    start = (jnp.log(highest) - span, span, highest, jnp.zeros_like(highest))
    _, _, scale, error = jax.lax.fori_loop(0, _ZOOMS, zoom, start)
    return jnp.where(sample.absmax > 0, scale, 1), error


def _squared_error(sample: Sample, mu: Array, scale: Array, spec: Spec) -> Array:
    quantized = fake_quantize(
        sample.magnitudes, mu, scale[:, None], bits=spec.bits, signed=spec.signed, grid=spec.grid
    )
    return jnp.sum(sample.counts * (sample.magnitudes - quantized) ** 2, 1)
