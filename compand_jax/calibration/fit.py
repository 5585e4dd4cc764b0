"""mu and scale from data, without training.

A group of tensors that share a mu is fitted by minimizing, over theta = log(1 + mu),

    sum_t E_t(mu, c_t) / P_t        E_t = <x - Q(x), x - Q(x)>,  P_t = <x, x>

in each tensor's inner product (`samples`). The scale c_t is, by calibration,

    mse, output   its best one, argmin_c E_t(mu, c): of the tensor's error, or the layer output's
    absmax        the largest magnitude
    percentile    the magnitude that so many percent of the values do not exceed
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from compand_jax.calibration.gap_search import fit_gaps, has_gaps
from compand_jax.calibration.samples import Sample, sample_from_weights
from compand_jax.calibration.search import COARSE, FEW_PRODUCTS, FINE, MU_MAX, Fit, Group, Search
from compand_jax.core.codebooks import SMALLEST_SCALE
from compand_jax.core.families.base import Compander, Gaps
from compand_jax.core.spec import check_spec

CALIBRATIONS = ("mse", "absmax", "percentile", "output")
_OF_ARRAYS = tuple(name for name in CALIBRATIONS if name != "output")
# In more products than these, mu is looked for in some of the rows, with as many as below: all of a
# layer's outputs weigh its inputs alike, and a kernel of 2048 x 2048 takes 2^33.
_MANY_PRODUCTS = 2**30
_ENOUGH_PRODUCTS = 2**28
# Rows that are too short to look at some of their values, as groups of inputs are.
_SHORT_ROW = 2 * COARSE.values
_MANY_VALUES, _ENOUGH_VALUES = 2**17, 2**16


def fit_groups(
    groups: Sequence[Group], *, calibration: str = "mse", percentile: float = 99.9
) -> list[Fit]:
    """Returns each group's mu and scales.

    Args:
      groups: The tensors.
      calibration: How scales are found; "mse" and "output" differ in the samples alone.
      percentile: Of the magnitudes, in (0, 100], for the calibration of that name.
    """
    percent = {"absmax": 100.0, "percentile": percentile}.get(calibration)
    # Those of one kind together. A group's kind does not depend on which others there are, so that
    # neither does what is found for it.
    groups = [_with_start(group) for group in groups]
    kinds: dict[tuple[bool, bool, bool, Any], list[int]] = {}
    for i, group in enumerate(groups):
        held, spec = group.mu is not None, group.specs[0]
        few = sum(sample.products for sample in group.samples) <= FEW_PRODUCTS
        family = spec.family, spec.family.shape(spec)
        many = not held and _has_many(group, percent)
        kinds.setdefault((held, few, many, family), []).append(i)
    fits: dict[int, Fit] = {}
    for (held, few, many, _), chosen in kinds.items():
        own = [groups[i] for i in chosen]
        if not held and has_gaps(own[0].specs[0]):
            found = fit_gaps(own, FINE if few else COARSE, percent)
        elif many:
            found = _fits_by_some_rows(own)
        else:
            found = Search(own, FINE if few else COARSE, percent).fits()
        fits |= zip(chosen, found, strict=True)
    return [_in_units(fits[i], group) for i, group in enumerate(groups)]


def _with_start(group: Group) -> Group:
    """Returns a group whose parameters are held at their start where they cannot be searched."""
    spec = group.specs[0]
    is_searched = isinstance(spec.family, Compander | Gaps) and spec.family.parameter is not None
    if group.mu is not None or is_searched:
        return group
    return group._replace(mu=spec.family.start(spec))


def _has_many(group: Group, percent: float | None) -> bool:
    """Whether a search in all rows takes too long; it does not where scales are not searched."""
    return any(
        percent is None and _has_many_short_rows(one)
        if one.counted
        else one.products > _MANY_PRODUCTS
        for one in group.samples
    )


def _has_many_short_rows(sample: Sample) -> bool:
    short = len(sample.absmax) > 1 and sample.values.shape[1] < _SHORT_ROW
    return short and sample.values.size > _MANY_VALUES


def _fits_by_some_rows(groups: Sequence[Group]) -> list[Fit]:
    """Returns the groups' fits at the mu that is the best of some rows, or at 0 if that is better.

    Scales are those of the least error in all rows.
    """
    some = [
        group._replace(
            samples=[
                one
                if one.histogram
                else one.some_rows(_ENOUGH_VALUES if one.counted else _ENOUGH_PRODUCTS)
                for one in group.samples
            ]
        )
        for group in groups
    ]
    mus = [fit.mu for fit in Search(some, COARSE, None).fits()]
    lowest = groups[0].specs[0].family.lowest
    uniform = Search([group._replace(mu=lowest) for group in groups], COARSE, None).fits()
    held = [group._replace(mu=mu) for group, mu in zip(groups, mus, strict=True)]
    companded = Search(held, COARSE, None).fits()
    return [
        min(pair, key=lambda fit: np.sum(fit.errors))
        for pair in zip(uniform, companded, strict=True)
    ]


def _in_units(fit: Fit, group: Group) -> Fit:
    """Returns a fit with scales in the units of the tensors."""
    scales = []
    for scale, sample, spec in zip(fit.scales, group.samples, group.specs, strict=True):
        of_zeros = SMALLEST_SCALE if spec.midrise else 1.0
        in_units = np.maximum(scale * np.asarray(sample.unit), SMALLEST_SCALE)
        scales.append(np.where(sample.absmax > 0, in_units, of_zeros))
    return fit._replace(scales=scales)


def check_arguments(
    calibration: str,
    percentile: ArrayLike,
    mu: ArrayLike | None,
    choices: tuple[str, ...] = CALIBRATIONS,
) -> tuple[float, float | None]:
    """Returns percentile and mu as numbers; raises ValueError where an argument is out of range."""
    if calibration not in choices:
        raise ValueError(
            f"`calibration` must be one of {', '.join(choices)}, got {calibration!r}: choose one"
        )
    percentile_number, mu_number = _number(percentile), _number(mu)
    if not 0 < percentile_number <= 100:
        raise ValueError(
            f"`percentile` must be in (0, 100], got {percentile!r}: 100 is the largest"
        )
    if mu is not None and not 0 <= mu_number <= MU_MAX:
        raise ValueError(f"`mu` must be None or from 0 to 255, got {mu!r}: leave it out to fit it")
    return percentile_number, None if mu is None else mu_number


def _number(value: Any) -> float:
    """Returns a real number, of Python, NumPy or JAX, as a float; NaN if it is something else."""
    is_array = isinstance(value, np.ndarray | Array) and not isinstance(value, Tracer)
    if is_array and value.shape == ():
        value = value.item()
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return float(value) if is_real else math.nan


def fit(
    x: ArrayLike,
    *,
    bits: int,
    signed: bool = True,
    grid: str = "midtread",
    axis: Any = None,
    calibration: str = "mse",
    percentile: ArrayLike = 99.9,
    mu: ArrayLike | None = None,
    quantizer: str = "mu_law",
) -> tuple[Float[Array, "..."] | None, Float[Array, "..."]]:
    """Returns the mu and the scale that quantize an array best.

    They minimize sum_i (x_i - Q(x_i; mu, c))^2, where Q is `fake_quantize`. mu is searched from 0
    to 255, and at each mu the scale c is the one that `calibration` asks for. With `axis` there
    are several scales, and still one mu for the whole array.

    Args:
      x: Values, floating, any shape, concrete.
      bits: Bits per value, 1 to 8.
      signed: Whether x has a sign; where not, x <= 0 counts as 0.
      grid: "midtread" or "midrise".
      axis: An axis or several, counted as in NumPy: each index along them has a scale of its own,
        such as -1 for the output channels of a kernel. None is one scale.
      calibration: "mse": the scale of the least squared error; "absmax": the largest magnitude;
        "percentile": the magnitude that `percentile` percent do not exceed.
      percentile: Percent of the magnitudes, in (0, 100], for the calibration of that name.
      mu: A mu to keep, 0 to 255, where 0 is uniform; only the scale is searched then. None
        searches both.
      quantizer: Another family of levels, whose parameters are then found in mu's place: exponent
        or slopes likewise, free levels by Lloyd's iteration, never worse than uniform ones.

    Returns:
      mu, a float32 scalar (another family's parameters; None where it has none), and scale,
      float32: a scalar, or with `axis` an array that broadcasts to x, of size 1 along the other
      axes. Values that do not exceed 2^-110 count as zero. The scale of values that are all zero
      is 1, or on the midrise grid, which has no level at zero, 2^-110.

    Raises:
      TypeError: x is not floating, or traced, or `axis` is no integer or integers.
      ValueError: x is empty or not finite, `bits`, `signed` and `grid` do not go together,
        `axis` is not of x, or `calibration`, `percentile` or `mu` is out of range.

    Not differentiable: the search runs on the host, outside of `jax.jit`.

    >>> import compand_jax as cj
    >>> x = jnp.array([-4.0, -1.0, 0.0, 1.0, 4.0])
    >>> mu, scale = cj.fit(x, bits=3)
    >>> print(cj.fake_quantize(x, mu, scale, bits=3).round(1))
    [-4. -1.  0.  1.  4.]
    """
    spec = check_spec(bits, signed, grid, quantizer)
    if mu is not None and spec.family.parameter != "mu":
        raise ValueError(
            f"`mu` must be None for quantizer={quantizer!r}, got {mu!r}: it is mu-law's alone"
        )
    percentile, mu = check_arguments(calibration, percentile, mu, _OF_ARRAYS)
    values = _values(x)
    kept = _kept_axes(axis, values.ndim)
    sample = sample_from_weights([values if signed else np.maximum(values, 0)], kept)
    (found,) = fit_groups(
        [Group([sample], [spec], mu)],
        calibration=calibration,
        percentile=percentile,
    )
    shape = [n if i - values.ndim in kept else 1 for i, n in enumerate(values.shape)]
    # The best scale of values of a few levels can lie beyond them, and beyond float32.
    scale = np.minimum(found.scales[0], np.finfo(np.float32).max)
    scale = jnp.asarray(scale, jnp.float32).reshape(shape if kept else ())
    p = None if spec.family.parameter is None else jnp.asarray(found.mu, jnp.float32)
    return p, scale


def _values(x: ArrayLike) -> np.ndarray:
    if isinstance(x, Tracer):
        raise TypeError("`x` must be an array with values, got a tracer: call fit outside jax.jit")
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise TypeError(
            f"`x` must be floating, got {jnp.result_type(x)}: convert it with x.astype(float)"
        )
    values = np.asarray(x, np.float32)
    if values.size == 0:
        raise ValueError(f"`x` must have values, got shape {values.shape}: give some")
    if not np.all(np.isfinite(values)):
        raise ValueError("`x` must be finite in float32, got NaN or infinity: leave them out")
    return values


def _kept_axes(axis: Any, ndim: int) -> tuple[int, ...]:
    """Returns the axes from the end, in ascending order."""
    axes = () if axis is None else axis if isinstance(axis, tuple | list) else (axis,)
    if not all(isinstance(i, numbers.Integral) and not isinstance(i, bool) for i in axes):
        raise TypeError(
            f"`axis` must be None, an integer or several, got {axis!r}: give those that keep a "
            "scale of their own"
        )
    if not all(-ndim <= i < ndim for i in axes):
        raise ValueError(
            f"`axis` must be of the array's {ndim} axes, got {axis!r}: count from 0, or from -1 "
            "at the end"
        )
    return tuple(sorted({int(i) % ndim - ndim for i in axes}))
