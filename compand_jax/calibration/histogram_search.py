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
from compand_jax.core.codebooks import Spec, positions


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
    mus: Float[np.ndarray, "rows"],
    starts: Float[np.ndarray, "grids k rows"],
    spec: Spec,
    descents: int,
) -> tuple[Float[np.ndarray, "rows"], Float[np.ndarray, "rows"]]:
    """Returns the best scales that were met, going on from each grid's best, and their errors.

    As `scale_search.best_scales`, which does so from one grid.
    """
    found = [
        _best_scale(magnitudes, sums, mu, starts[:, :, row], spec, descents)
        for row, (magnitudes, sums, mu) in enumerate(zip(*cumulated, mus, strict=True))
    ]
    scales, errors = np.array(found).T
    return scales, errors


def _best_scale(
    magnitudes: np.ndarray,
    sums: np.ndarray,
    mu: float,
    starts: Float[np.ndarray, "grids k"],
    spec: Spec,
    descents: int,
) -> tuple[float, float]:
    table = tuple(_expand(y, mu) for y in positions(spec))
    side = "left" if spec.midrise else "right"  # at a tie: the outer level, or the inner one
    attempt = functools.partial(_attempt, magnitudes, sums, table, side)
    errors, onward, bounds = attempt(starts)
    scales = _pick(starts, errors)
    onward, errors = _pick(onward, bounds), errors.min(1)
    for _ in range(descents):
        new, further, _ = attempt(onward)
        scales = np.where(new < errors, onward, scales)
        errors, onward = np.minimum(new, errors), further
    best = errors.argmin()
    return scales[best], errors[best]


def _attempt(
    magnitudes: np.ndarray,
    sums: np.ndarray,
    table: tuple[np.ndarray, ...],
    side: Literal["left", "right"],
    scale: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns of scales the errors, those one step on, and bounds of their errors.

    The step goes to where the error of a tensor whose values keep their codes is least.
    """
    levels, thresholds = table
    bounds = np.searchsorted(magnitudes, scale[..., None] * thresholds, side)
    ends = np.zeros_like(bounds[..., :1])
    bounds = np.concatenate([ends, bounds, ends + len(magnitudes)], -1)
    count, first, second = np.diff(sums[:, bounds])
    level = scale[..., None] * levels
    power = np.sum(level**2 * count, -1)
    gain = np.sum(level * first, -1) - power
    error = np.maximum(np.sum(second, -1) - 2 * gain - power, 0)
    step = np.where(power > 0, gain / np.where(power > 0, power, 1), 0)
    return error, scale * np.maximum(1 + step, 0.5), error - step * gain


def _expand(y: np.ndarray, mu: float) -> np.ndarray:
    return np.expm1(y * np.log1p(mu)) / mu if mu > 0 else y


def _pick(values: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Returns of each grid the value where the error is least."""
    return np.take_along_axis(values, errors.argmin(1)[:, None], 1)[:, 0]
