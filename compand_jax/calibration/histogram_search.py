"""The scales of quantizers whose mu is given, for tensors that are histograms.

With the magnitudes in order, and N, S, P the cumulative sums of counts n, n x and n x^2, what has
one code lies between two thresholds, and its part of the error at the code's level l is

    sum n (x - l)^2 = dP - 2 l dS + l^2 dN

with differences of the sums: a binary search for each threshold, however many values there are. In
float64, where the differences are exact to 1e-16 of the power.
"""

import functools
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from compand_jax.calibration.samples import Sample
from compand_jax.core.spec import Spec


class Cumulated(NamedTuple):
    """Of rows of histograms: magnitudes, [rows, n], and sums of n x^p, [rows, 3, n + 1]."""

    magnitudes: np.ndarray
    sums: np.ndarray


def cumulate(sample: Sample) -> Cumulated:
    """Returns the cumulative sums of a sample of histograms."""
    magnitudes, counts = (np.asarray(a, np.float64) for a in (sample.values, sample.weights))
    moments = np.stack([counts * magnitudes**power for power in range(3)], 1)
    return Cumulated(magnitudes, np.pad(np.cumsum(moments, 2), ((0, 0), (0, 0), (1, 0))))


def best_scales_of_histograms(
    cumulated: Cumulated,
    mus: Float[np.ndarray, "rows ..."],
    starts: Float[np.ndarray, "grids k rows"],
    spec: Spec,
    descents: int,
) -> tuple[Float[np.ndarray, "rows"], Float[np.ndarray, "rows"]]:
    """Returns the best scales that were met, going on from each grid's best, and their errors.

    As `scale_search.best_scales`, which does so from one grid.
    """
    table = spec.family.host_table(mus, spec)
    side = "left" if spec.midrise else "right"  # at a tie: the outer level, or the inner one
    at = functools.partial(attempt, cumulated, table, side)
    starts = np.moveaxis(starts, 2, 0)
    errors, onward, bounds = at(starts)
    scales = _pick(starts, errors)
    onward, errors = _pick(onward, bounds), errors.min(2)
    for _ in range(descents):
        new, further, _ = at(onward)
        scales = np.where(new < errors, onward, scales)
        errors, onward = np.minimum(new, errors), further
    best = errors.argmin(1)[:, None]
    return np.take_along_axis(scales, best, 1)[:, 0], np.take_along_axis(errors, best, 1)[:, 0]


def attempt(
    cumulated: Cumulated,
    table: tuple[np.ndarray, ...],
    side: Literal["left", "right"],
    scale: Float[np.ndarray, "rows ..."],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns of scales the errors, those one step on, and bounds of their errors.

    The step goes to where the error of a tensor whose values keep their codes is least.
    """
    shape = (len(scale), *(1,) * (scale.ndim - 1), -1)
    levels, thresholds = (scale[..., None] * part.reshape(shape) for part in table)
    between = [
        sums[:, np.searchsorted(magnitudes, own, side)]
        for magnitudes, sums, own in zip(*cumulated, thresholds, strict=True)
    ]
    ends = cumulated.sums[:, :, -1].reshape(len(scale), 3, *(1,) * scale.ndim)
    ends = np.broadcast_to(ends, (len(scale), 3, *scale.shape[1:], 1))
    count, first, second = np.moveaxis(
        np.diff(np.concatenate([np.zeros_like(ends), np.stack(between), ends], -1)), 1, 0
    )
    power = np.sum(levels**2 * count, -1)
    gain = np.sum(levels * first, -1) - power
    error = np.maximum(np.sum(second, -1) - 2 * gain - power, 0)
    step = np.where(power > 0, gain / np.where(power > 0, power, 1), 0)
    return error, scale * np.maximum(1 + step, 0.5), error - step * gain


def _pick(values: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Returns of each row and grid the value where the error is least."""
    return np.take_along_axis(values, errors.argmin(2)[..., None], 2)[..., 0]
