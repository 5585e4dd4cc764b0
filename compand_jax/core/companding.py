"""The mu-law curve and its inverse on [-1, 1].

With L = log(1 + mu) and v = |x|, the curve compresses, its inverse expands:

    F(v) = log(1 + mu v) / L          G(y) = (exp(y L) - 1) / mu

Both are odd and the identity at mu = 0. They are evaluated as

    F(v) = v q(mu v) / q(mu)          G(y) = y r(y L) q(mu)

with q(z) = log1p(z)/z and r(z) = expm1(z)/z, which are smooth through z = 0, so that nothing
is divided by mu.

Source: Osama, Madian, Fouda, "Companding quantization for deep neural networks", Applied Soft
Computing 185, 113979, 2025, doi 10.1016/j.asoc.2025.113979; the curve is that of ITU-T G.711.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float


def compute_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the precision that companding runs in: float32, or float64 for float64 input."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def check_values(name: str, value: Any, dtype: Any, lowest: float, required: str) -> Array:
    """Returns an argument as an array of a dtype.

    Raises:
      TypeError: it is not numeric.
      ValueError: a value of it is below `lowest` or not finite. Only where values are at hand: a
        traced argument is not checked, and costs nothing.
    """
    if not isinstance(value, Tracer):
        try:
            with np.errstate(over="ignore"):
                host = np.asarray(value).astype(dtype)  # 1e-50 and 1e39 are 0 and inf there
        except (TypeError, ValueError):
            raise TypeError(f"`{name}` must be numeric, got {value!r}") from None
        bad = ~((host >= lowest) & np.isfinite(host))
        if np.any(bad):
            first = np.asarray(value)[bad][0]
            raise ValueError(f"`{name}` must be {required} in {np.dtype(dtype).name}, got {first}")
    return jnp.asarray(value, dtype)


def power_series(z: Array, coefficients: tuple[float, ...]) -> Array:
    """Returns sum_i coefficients[i] z^i, by Horner's rule."""
    total = jnp.full_like(z, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * z + coefficient
    return total


# q and r are analytic, but their closed forms are 0/0 at z = 0 and their derivatives cancel
# near it: below these bounds the Taylor series is the more exact of the two in float32.
_Q_SLOPE = tuple((-1.0) ** n * n / (n + 1) for n in range(1, 12))  # d/dz sum (-z)^n/(n+1)
_Q_SERIES_BELOW = 0.2
_R_SLOPE = (1 / 2, 1 / 3, 1 / 8, 1 / 30, 1 / 144, 1 / 840, 1 / 5760)
_R_SERIES_BELOW = 0.5


@jax.custom_jvp
def log1p_ratio(z: Array) -> Array:
    """Returns q(z) = log1p(z)/z for z > -1, with q(0) = 1.

    Gradient: (1/(1+z) - q(z))/z, -1/2 at z = 0.
    """
    safe = jnp.where(z == 0, 1, z)
    return jnp.where(z == 0, 1, jnp.log1p(safe) / safe)


@log1p_ratio.defjvp
def _log1p_ratio_jvp(primals: tuple, tangents: tuple) -> tuple:
    (z,), (dz,) = primals, tangents
    q = log1p_ratio(z)
    near = jnp.abs(z) < _Q_SERIES_BELOW
    safe = jnp.where(near, 1, z)
    slope = jnp.where(near, power_series(z, _Q_SLOPE), (1 / (1 + safe) - q) / safe)
    return q, slope * dz


@jax.custom_jvp
def expm1_ratio(z: Array) -> Array:
    """Returns r(z) = expm1(z)/z, with r(0) = 1.

    Gradient: (exp(z) - r(z))/z, 1/2 at z = 0.
    """
    safe = jnp.where(z == 0, 1, z)
    return jnp.where(z == 0, 1, jnp.expm1(safe) / safe)


@expm1_ratio.defjvp
def _expm1_ratio_jvp(primals: tuple, tangents: tuple) -> tuple:
    (z,), (dz,) = primals, tangents
    r = expm1_ratio(z)
    near = jnp.abs(z) < _R_SERIES_BELOW
    safe = jnp.where(near, 1, z)
    slope = jnp.where(near, power_series(z, _R_SLOPE), (jnp.exp(safe) - r) / safe)
    return r, slope * dz


def mu_law_compress(x: ArrayLike, mu: ArrayLike) -> Float[Array, "..."]:
    """Returns x compressed by the mu-law curve, sign(x) log(1 + mu |x|) / log(1 + mu).

    Args:
      x: Values in [-1, 1], any shape, floating.
      mu: Curvature, at least 0, without unit; a scalar or of x's rank, broadcast. 0 is the
        identity, exactly.

    Returns:
      Values in [-1, 1], of x's shape and dtype; evaluated in float32 or wider.

    Raises:
      TypeError: x is not floating, or mu not numeric.
      ValueError: a concrete mu is negative or not finite.

    Gradient: in x, q(mu)^-1/(1 + mu |x|) with q(mu) = log1p(mu)/mu; in mu,
      sign(x) [|x|/(1 + mu |x|) - F/(1 + mu)] / L, which tends to sign(x) |x| (1 - |x|)/2 at 0.

    >>> float(mu_law_compress(0.5, mu=0.0))
    0.5
    >>> round(float(mu_law_compress(0.1, mu=255.0)), 4)
    0.591
    """
    x = jnp.asarray(x)
    v, sign, mu = _magnitude_sign_mu(x, mu)
    return (sign * v * log1p_ratio(mu * v) / log1p_ratio(mu)).astype(x.dtype)


def mu_law_expand(y: ArrayLike, mu: ArrayLike) -> Float[Array, "..."]:
    """Returns the inverse of `mu_law_compress`, sign(y) ((1 + mu)^|y| - 1) / mu.

    Args:
      y: Values in [-1, 1], any shape, floating.
      mu: Curvature, at least 0, without unit; a scalar or of y's rank, broadcast. 0 is the
        identity, exactly.

    Returns:
      Values in [-1, 1], of y's shape and dtype; evaluated in float32 or wider.

    Gradient: in y, q(mu) (1 + mu |G|) with q(mu) = log1p(mu)/mu; in mu,
      sign(y) [|y| (1 + mu |G|)/(1 + mu) - |G|] / mu, which tends to sign(y) |y| (|y| - 1)/2 at 0.

    >>> float(mu_law_expand(0.5, mu=0.0))
    0.5
    >>> round(float(mu_law_expand(mu_law_compress(0.1, 5.0), 5.0)), 6)
    0.1
    """
    y = jnp.asarray(y)
    w, sign, mu = _magnitude_sign_mu(y, mu)
    return (sign * w * expm1_ratio(w * jnp.log1p(mu)) * log1p_ratio(mu)).astype(y.dtype)


def _magnitude_sign_mu(x: Array, mu: ArrayLike) -> tuple[Array, Array, Array]:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`x` must be floating, got {x.dtype}: convert it with x.astype(float)")
    dtype = compute_dtype(x.dtype)
    mu = check_values("mu", mu, dtype, 0.0, "at least 0 and finite")
    x = x.astype(dtype)
    # Not jnp.abs, whose slope at 0 is 0: the curve passes through 0 with a slope of its own.
    return jnp.where(x < 0, -x, x), jnp.where(x < 0, -1, 1).astype(dtype), mu
