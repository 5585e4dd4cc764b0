"""The search for the mu of groups of tensors, and their scales.

The search for mu is a grid, then ever finer ones around the best; mu = 0 is on the grid, so that no
tensor that has a mu of its own is left worse than uniform levels would leave it. At each mu the
scales are searched anew (`scale_search`). Any other family of one parameter, a `Compander`, has its
parameter found likewise; what is said of mu here is said of that.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from compand_jax.calibration.histogram_search import Cumulated, best_scales_of_histograms, cumulate
from compand_jax.calibration.samples import Sample
from compand_jax.calibration.scale_search import (
    best_scales,
    percentile_scales,
    power,
    starting_scales,
)
from compand_jax.core.families.base import Compander
from compand_jax.core.spec import Spec

MU_MAX = 255.0


class Effort(NamedTuple):
    """How closely is looked at first.

    Attributes:
      thetas: how many of log(1 + mu), or of another curve's trainable form.
      grids: of scales, as exponents, 0 being the largest magnitude and 1 a quarter of the mean;
        the search goes on from the best of each grid.
      basins: how many of the best thetas it goes on from.
      values: how many of a row, evenly spread, are looked at.
      zooms: then, of log(scale), the distances of what is looked at around the best.
    """

    thetas: int
    grids: list[np.ndarray]
    basins: int
    values: int
    zooms: tuple[float, ...]


COARSE = Effort(
    13,
    np.split(np.arange(-1, 14) / 13, 3),
    basins=1,
    values=512,
    zooms=(0.07, 0.02),
)
# The fewer values, the less smooth is their error: where they are few, it is cheap to look closer.
FEW_PRODUCTS = 2**18
FINE = Effort(
    49,
    np.split(np.arange(-3, 72) / 71, 15),
    basins=8,
    values=FEW_PRODUCTS,
    zooms=(0.07, 0.025, 0.01),
)
# A zoom looks at these points, in units of the last distance of thetas.
_POINTS = np.array([0, -2, -1, 1, 2]) / 3
_DESCENTS = 3
# Relative to the power: what differs by less is as good, and the flatter curve is taken.
_TIE = 1e-10


class Group(NamedTuple):
    """Tensors that share a mu.

    Attributes:
      samples: the tensors.
      specs: their quantizers.
      mu: the mu, or the parameters, that are held, 0 for uniform levels; None for the best.
    """

    samples: Sequence[Sample]
    specs: Sequence[Spec]
    mu: float | np.ndarray | None = None


class Fit(NamedTuple):
    """What was found for a group: its mu, and for each of its tensors scales and error.

    Attributes:
      mu: from 0 to 255 where it was fitted; another family's parameters.
      scales: [scales] of each tensor; where all of its values are zero, 1, or `SMALLEST_SCALE` on
        a grid without a level at zero.
      errors: E/P of each tensor.
    """

    mu: Any
    scales: list[np.ndarray]
    errors: np.ndarray


class _Batch(NamedTuple):
    """Tensors of one shape and quantizer, one below the other.

    Attributes:
      sample: their rows.
      spec: their quantizer.
      tensors: which tensor each scale belongs to.
      cumulated: the sums of histograms; None where they are none.
    """

    sample: Sample
    spec: Spec
    tensors: np.ndarray
    cumulated: Cumulated | None


class _Data(NamedTuple):
    """Batches, and the power of each tensor, 1 where it is zero."""

    batches: list[_Batch]
    powers: np.ndarray


class _State(NamedTuple):
    """Of each group mu and total error, and of each batch, scales and their errors."""

    mus: np.ndarray
    totals: np.ndarray
    scales: list[np.ndarray]
    errors: list[np.ndarray]


class Search:
    """The search for mu and scales of some groups.

    Args:
      groups: the groups; mu is held in all of them or in none. All are of one family, and their
        parameters have one shape.
      effort: how closely is looked.
      percent: the scale is this percentile of the magnitudes; None searches for it.
    """

    def __init__(self, groups: Sequence[Group], effort: Effort, percent: float | None) -> None:
        self._groups, self._effort, self._percent = groups, effort, percent
        self._owners = np.repeat(np.arange(len(groups)), [len(group.samples) for group in groups])
        batches = _batches(groups)
        self._tensors = [batch.tensors for batch in batches]
        self._data = self._with_powers(batches)

    def fits(self) -> list[Fit]:
        """Returns the groups' best fits."""
        if self._groups[0].mu is not None:
            mus = np.array([group.mu for group in self._groups], np.float64)
            best = self._at(mus, self._data)
            if self._percent is None:
                best = self._zoom(best, mus, self._effort.zooms[0])
        else:
            best = self._search_mu()
        errors = self._per_tensor(best.errors) / self._data.powers
        scales = {
            tensor: scale[tensors == tensor]
            for tensors, scale in zip(self._tensors, best.scales, strict=True)
            for tensor in np.unique(tensors)
        }
        members = [np.flatnonzero(self._owners == group) for group in range(len(self._groups))]
        return [
            Fit(
                float(mu) if np.ndim(mu) == 0 else mu,
                [scales[tensor] for tensor in own],
                errors[own],
            )
            for mu, own in zip(best.mus, members, strict=True)
        ]

    def _search_mu(self) -> _State:
        family = self._groups[0].specs[0].family
        assert isinstance(family, Compander)
        thetas, lowest = np.linspace(0, family.theta_max, self._effort.thetas), family.lowest
        data = self._with_powers([_thinned(b, self._effort.values) for b in self._data.batches])
        mus = (lowest + np.expm1(thetas))[:, None] * np.ones(len(self._groups))
        coarse = [self._at(mu, data) for mu in mus]
        order = _basins(np.stack([state.totals for state in coarse]))
        best = self._at(mus[0], self._data)
        for winners in order[: self._effort.basins]:
            state = self._choose(coarse, winners)
            state = state._replace(totals=np.full_like(state.totals, np.inf))  # of thinned data
            step = thetas[1]
            for distance in self._effort.zooms:
                centers = np.log1p(state.mus - lowest)
                for point in _POINTS:
                    mus = np.clip(centers + point * step, 0, family.theta_max)
                    mus = lowest + np.expm1(mus)
                    state = self._zoom(state, mus, distance)
                step /= 3
            best = self._better(best, state)
        return best

    def _zoom(self, state: _State, mus: np.ndarray, distance: float) -> _State:
        """Returns the state, or for each group the best one near its scales, at these mus."""
        near = np.exp(distance * np.arange(-2, 3))[:, None]
        starts = [near * scales for scales in state.scales]
        return self._better(state, self._at(mus, self._data, starts))

    def _better(self, old: _State, new: _State) -> _State:
        """Returns, for each group, the new state where it is better, else the old one."""
        return self._choose([old, new], (new.totals < old.totals - _TIE).astype(int))

    def _choose(self, states: Sequence[_State], winners: np.ndarray) -> _State:
        """Returns, for each group, the state of its winner."""
        of_scales = [winners[self._owners[tensors]] for tensors in self._tensors]
        mus, totals, scales, errors = zip(*states, strict=True)
        return _State(
            _take(mus, winners),
            _take(totals, winners),
            [_take(*pair) for pair in zip(zip(*scales, strict=True), of_scales, strict=True)],
            [_take(*pair) for pair in zip(zip(*errors, strict=True), of_scales, strict=True)],
        )

    def _at(
        self, mus: np.ndarray, data: _Data, starts: Sequence[np.ndarray] | None = None
    ) -> _State:
        """Returns the best scales at a mu for each group, from any or the given [k, scales]."""
        found = [
            self._best(batch, mus, None if starts is None else starts[i])
            for i, batch in enumerate(data.batches)
        ]
        scales, errors = [scale for scale, _ in found], [error for _, error in found]
        relative = self._per_tensor(errors) / data.powers
        return _State(mus, np.bincount(self._owners, relative, len(mus)), scales, errors)

    def _best(
        self, batch: _Batch, mus: np.ndarray, starts: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns a batch's best scales, from these [k, scales] or from any, and their errors.

        What is zero has no error, also where the grid has no zero: it is to have no say in mu.
        """
        scales, errors = self._best_of_grids(batch, mus, starts)
        return scales, np.where(np.asarray(batch.sample.absmax) > 0, errors, 0)

    def _best_of_grids(
        self, batch: _Batch, mus: np.ndarray, starts: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        sample, spec = batch.sample, batch.spec
        own = mus[self._owners[batch.tensors]].astype(np.float32)
        descents = 0 if self._percent is not None else _DESCENTS
        if self._percent is not None:
            grids = percentile_scales(sample, jnp.float32(self._percent))[None, None]
        elif starts is not None:
            grids = np.asarray(starts, np.float32)[None]
        else:
            exponents = np.concatenate(self._effort.grids).astype(np.float32)
            found = starting_scales(sample, own, exponents, spec)
            grids = found.reshape(len(self._effort.grids), -1, len(own))
        if batch.cumulated is not None:
            wide = np.asarray(own, np.float64), np.asarray(grids, np.float64)
            return best_scales_of_histograms(batch.cumulated, *wide, spec, descents)
        found = [best_scales(sample, own, grid, spec, descents) for grid in grids]
        scales, errors = zip(*jax.device_get(found), strict=True)
        winner = np.argmin(errors, 0)
        return _take(scales, winner), _take(errors, winner)

    def _with_powers(self, batches: list[_Batch]) -> _Data:
        powers = self._per_tensor([power(batch.sample) for batch in batches])
        return _Data(batches, np.where(powers > 0, powers, 1))

    def _per_tensor(self, values: Sequence[Array | np.ndarray]) -> np.ndarray:
        """Returns sums over each tensor's scales of what is given batch by batch."""
        sums = np.zeros(len(self._owners))
        for tensors, value in zip(self._tensors, values, strict=True):
            np.add.at(sums, tensors, np.asarray(value, np.float64))
        return sums


def _take(arrays: Sequence[np.ndarray], winners: np.ndarray) -> np.ndarray:
    """Returns, at each place, the value of the array that is its winner."""
    return np.stack(arrays)[winners, np.arange(len(winners))]


def _thinned(batch: _Batch, values: int) -> _Batch:
    """Returns a batch with every k-th of the values, so that at least so many are left.

    A sample that is a histogram already, or whose values go together, is left as it is.
    """
    sample = batch.sample
    if not sample.counted or sample.histogram:
        return batch
    stride = max(sample.values.shape[1] // values, 1)
    return batch._replace(sample=sample._replace(values=sample.values[:, ::stride]))


def _basins(totals: np.ndarray) -> np.ndarray:
    """Returns indices of [thetas, groups], the best first, those of local minima before all."""
    padded = np.pad(totals, ((1, 1), (0, 0)), constant_values=np.inf)
    minimal = (totals <= padded[:-2]) & (totals <= padded[2:])
    return np.lexsort((totals, ~minimal), axis=0)


def _batches(groups: Sequence[Group]) -> list[_Batch]:
    pairs = [pair for group in groups for pair in zip(group.samples, group.specs, strict=True)]
    alike: dict = {}
    for tensor, (sample, spec) in enumerate(pairs):
        key = (sample.values.shape[1], sample.weights.shape[1]) if sample.counted else tensor
        alike.setdefault((key, spec), []).append(tensor)
    batches = []
    for (_, spec), tensors in alike.items():
        samples = [pairs[tensor][0] for tensor in tensors]
        joined = Sample(*map(jnp.concatenate, zip(*samples, strict=True)))
        counts = [len(sample.absmax) for sample in samples]
        cumulated = cumulate(joined) if joined.histogram else None
        batches.append(_Batch(joined, spec, np.repeat(tensors, counts), cumulated))
    return batches
