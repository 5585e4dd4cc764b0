"""Parameters of families that have several: slopes of a piecewise curve, gaps of free levels.

What is minimized is the sum over tensors of E/P, as for one parameter (`fit`). Starts are uniform
levels, and those of the best mu-law curve. From each, in units of the best scales there,

    free        Lloyd's iteration: each level the mean of what it stands for
    others      steps in one parameter at a time, and in all scales together, ever smaller

both in float64 on cumulative sums (`histogram_search`). Then scales are searched anew, and the best
of all that was met is taken: uniform levels are among it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from compand_jax.calibration.histogram_search import Cumulated, attempt
from compand_jax.calibration.samples import Sample
from compand_jax.calibration.search import COARSE, Effort, Fit, Group, Search
from compand_jax.core.families.base import Gaps
from compand_jax.core.families.free import Free
from compand_jax.core.families.registry import MU_LAW
from compand_jax.core.spec import Spec

# Of a tensor's values, so many are looked at.
_VALUES = 2**18
_LLOYD_STEPS = 500
_SWEEPS = 40
_FIRST_STEP, _LAST_STEP = 0.4, 0.002
_ROUNDS = 2


def fit_gaps(groups: Sequence[Group], effort: Effort, percent: float | None) -> list[Fit]:
    """Returns the groups' best fits; all are of one family, with parameters of one shape."""

    def at(parameters: Sequence[Any]) -> list[Fit]:
        held = [g._replace(mu=p) for g, p in zip(groups, parameters, strict=True)]
        return Search(held, effort, percent).fits()

    best = at([_stored(group.specs[0], _start(group)) for group in groups])
    # A start is all that it is: it need not be the best curve.
    curves = Search([_companded(group) for group in groups], COARSE, percent).fits()
    starts = [
        best,
        [
            fit._replace(mu=_of_curve(group.specs[0], fit.mu))
            for group, fit in zip(groups, curves, strict=True)
        ],
    ]
    for _ in range(_ROUNDS):
        for start in starts:
            refined = [
                _stored(group.specs[0], _refined(group, fit, percent is None))
                for group, fit in zip(groups, start, strict=True)
            ]
            best = [
                min(pair, key=lambda fit: np.sum(fit.errors))
                for pair in zip(best, at(refined), strict=True)
            ]
        starts = [best]
    return best


def _start(group: Group) -> np.ndarray:
    return group.specs[0].family.start(group.specs[0])


def _stored(spec: Spec, p: np.ndarray) -> np.ndarray:
    """Returns the parameters that come back from their trainable form."""
    family = spec.family
    return np.asarray(family.from_trainable(family.to_trainable(p)), np.float64)


def _companded(group: Group) -> Group:
    return group._replace(specs=[spec._replace(family=MU_LAW) for spec in group.specs])


def _of_curve(spec: Spec, mu: float) -> np.ndarray:
    """Returns the parameters of the levels of mu-law's curve, or close to them."""
    curve = spec._replace(family=MU_LAW)
    if isinstance(spec.family, Free):
        return _gaps(MU_LAW.host_table(mu, curve)[0], spec, 1.0)
    ends = np.linspace(0, 1, spec.family.shape(spec)[0] + 1)
    return np.diff(np.log1p(mu * ends) / np.log1p(mu) if mu > 0 else ends)


def _refined(group: Group, fit: Fit, scale_is_free: bool) -> np.ndarray:
    pools = _pools(group, fit)
    if isinstance(group.specs[0].family, Free):
        (spec,) = pools
        levels, _ = spec.family.host_table(fit.mu, spec)
        return _lloyd(pools[spec], levels, spec, scale_is_free)
    return _step_by_step(pools, np.asarray(fit.mu, np.float64), scale_is_free)


def _pools(group: Group, fit: Fit) -> dict[Spec, Cumulated]:
    """Returns the values of all tensors, each in units of its scale, by their quantizers."""
    parts: dict[Spec, list[tuple[np.ndarray, np.ndarray]]] = {}
    for sample, spec, scales in zip(group.samples, group.specs, fit.scales, strict=True):
        values, weights = (np.asarray(x, np.float64) for x in (sample.values, _counts(sample)))
        stride = -(-values.size // _VALUES) if values.shape[1] > 1 and not sample.histogram else 1
        values, scales = np.abs(values)[:, ::stride], np.reshape(scales, (-1, 1))
        weights = np.broadcast_to(weights, (len(values), weights.shape[1]))
        weights = weights if weights.shape[1] == 1 else weights[:, ::stride]
        power = np.sum(weights * values**2)
        weights = weights * scales**2 / power if power > 0 else 0 * weights * scales
        magnitudes = (values / scales).ravel()
        counts = np.broadcast_to(weights, values.shape).ravel()
        parts.setdefault(spec, []).append((magnitudes, counts))
    return {
        spec: _pool(*map(np.concatenate, zip(*own, strict=True))) for spec, own in parts.items()
    }


def _counts(sample: Sample) -> Any:
    """Returns the counts of values, or of moments their diagonal, by row."""
    if sample.counted:
        return sample.weights
    rows = len(sample.values) // len(sample.weights)
    return np.repeat(np.asarray(jnp.diagonal(sample.weights, axis1=1, axis2=2)), rows, 0)


def _pool(magnitudes: np.ndarray, counts: np.ndarray) -> Cumulated:
    order = np.argsort(magnitudes)
    magnitudes, counts = magnitudes[order], counts[order]
    moments = np.stack([counts * magnitudes**power for power in range(3)])
    sums = np.pad(np.cumsum(moments, 1), ((0, 0), (1, 0)))
    return Cumulated(magnitudes[None], sums[None])


def _lloyd(pool: Cumulated, levels: np.ndarray, spec: Spec, scale_is_free: bool) -> np.ndarray:
    """Returns the gaps of levels that are the means of what they stand for."""
    first = 0 if spec.midrise else 1  # a level at zero stays there
    last = len(levels) - (not scale_is_free and not spec.midrise)  # and the top one at the clip
    for _ in range(_LLOYD_STEPS):
        thresholds = (levels[1:] + levels[:-1]) / 2
        bounds = np.concatenate(
            [[0], np.searchsorted(pool.magnitudes[0], thresholds), [pool.magnitudes.size]]
        )
        count, total, _ = np.diff(pool.sums[0][:, bounds])
        means = np.where(count > 0, total / np.where(count > 0, count, 1), levels)
        if not scale_is_free:
            means = np.minimum(means, 1)
        moved = levels.copy()
        moved[first:last] = np.sort(means[first:last])
        change = np.max(np.abs(moved - levels))
        levels = moved
        if change < 1e-7 * levels[-1]:
            break
    return _gaps(levels, spec, None if scale_is_free else 1.0)


def _gaps(levels: np.ndarray, spec: Spec, clip: float | None) -> np.ndarray:
    """Returns the positive gaps of levels; no clip: as far out as the last threshold."""
    if not spec.midrise:
        ends = levels
    else:
        below = levels[-2] if len(levels) > 1 else -levels[-1]
        top = levels[-1] + (levels[-1] - below) / 2 if clip is None else clip
        ends = np.concatenate([[0], levels, [top]])
    gaps = np.diff(ends)
    return np.maximum(gaps, 1e-6 * np.mean(gaps) + np.finfo(np.float32).tiny)


def _step_by_step(
    pools: dict[Spec, Cumulated], start: np.ndarray, scale_is_free: bool
) -> np.ndarray:
    """Returns parameters of less error, found by steps in the logarithm of each."""
    logs = np.append(np.log(start), 0.0)  # the last is that of the scales
    error = _errors_of(pools)
    steps = np.full(len(logs), _FIRST_STEP)
    steps[-1] = _FIRST_STEP / 4 if scale_is_free else 0
    least = error(logs)
    for _ in range(_SWEEPS):
        for i in np.flatnonzero(steps):
            for sign in (1, -1):
                moved = logs.copy()
                moved[i] += sign * steps[i]
                if (found := error(moved)) < least:
                    logs, least = moved, found
                    break
            else:
                steps[i] /= 2
                continue
            steps[i] *= 1.2
        if np.max(steps) < _LAST_STEP:
            break
    return np.exp(logs[:-1])


def _errors_of(pools: dict[Spec, Cumulated]) -> Callable[[np.ndarray], float]:
    """Returns the error of logarithms of parameters, and of a factor of all scales."""

    def error(logs: np.ndarray) -> float:
        p, factor = np.exp(logs[:-1]), np.exp(logs[-1:])
        total = 0.0
        for spec, pool in pools.items():
            side = "left" if spec.midrise else "right"
            table = spec.family.host_table(p[None], spec)
            total += float(attempt(pool, table, side, factor)[0][0])
        return total

    return error


def has_gaps(spec: Spec) -> bool:
    """Returns whether a quantizer's parameters are found here."""
    return isinstance(spec.family, Gaps)
