"""mu and scale of one array, for use with the quantizers as functions."""

import numbers
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from compand_jax.calibration.fit import CALIBRATIONS, MU_MAX, Group, fit_groups
from compand_jax.calibration.samples import sample_from_weights
from compand_jax.core.codebooks import check_spec

_OF_ARRAYS = tuple(name for name in CALIBRATIONS if name != "output")


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
) -> tuple[Float[Array, ""], Float[Array, "..."]]:
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

    Returns:
      mu, a float32 scalar, and scale, float32: a scalar, or with `axis` an array that broadcasts
      to x, of size 1 along the other axes. The scale of values that are all zero is 1.

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
    spec = check_spec(bits, signed, grid)
    if calibration not in _OF_ARRAYS:
        raise ValueError(
            f"`calibration` must be one of {', '.join(_OF_ARRAYS)}, got {calibration!r}: choose one"
        )
    if not 0 < percentile <= 100:
        raise ValueError(f"`percentile` must be in (0, 100], got {percentile!r}")
    if mu is not None and not 0 <= mu <= MU_MAX:
        raise ValueError(f"`mu` must be None or from 0 to {MU_MAX:g}, got {mu!r}")
    values = _values(x)
    kept = _kept_axes(axis, values.ndim)
    sample = sample_from_weights([values if signed else np.maximum(values, 0)], kept)
    (found,) = fit_groups(
        [Group([sample], [spec], None if mu is None else float(mu))],
        calibration=calibration,
        percentile=float(percentile),
    )
    shape = [n if i - values.ndim in kept else 1 for i, n in enumerate(values.shape)]
    scale = jnp.asarray(found.scales[0], jnp.float32).reshape(shape if kept else ())
    return jnp.asarray(found.mu, jnp.float32), scale


def _values(x: ArrayLike) -> np.ndarray:
    if isinstance(x, Tracer):
        raise TypeError("`x` must be an array with values, got a tracer: call fit outside jax.jit")
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise TypeError(
            f"`x` must be floating, got {jnp.result_type(x)}: convert it with x.astype(float)"
        )
    values = np.asarray(x, np.float32)
    if values.size == 0:
        raise ValueError(f"`x` must have values, got shape {values.shape}")
    if not np.all(np.isfinite(values)):
        raise ValueError("`x` must be finite in float32, got NaN or infinity: leave them out")
    return values


def _kept_axes(axis: Any, ndim: int) -> tuple[int, ...]:
    """Returns the axes from the end, in ascending order."""
    axes = () if axis is None else axis if isinstance(axis, tuple | list) else (axis,)
    if not all(isinstance(i, numbers.Integral) and not isinstance(i, bool) for i in axes):
        raise TypeError(f"`axis` must be None, an integer or several, got {axis!r}")
    if not all(-ndim <= i < ndim for i in axes):
        raise ValueError(f"`axis` must be of the array's {ndim} axes, got {axis!r}")
    return tuple(sorted({int(i) % ndim - ndim for i in axes}))
