"""The curve's functions and slopes as series where their closed forms cancel, or divide 0 by 0."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

# log(256): mu = 255 is the largest for which the number of terms below is meant.
_LARGEST_LOG = math.log(256.0)


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


def level_slope_in_mu(v: Array, v_q: Array, mu: Array, steps: int) -> Array:
    """Returns dv_q/dmu with rounding passed through, without cancellation or a logarithm of v.

    The textbook form (1/mu)[(1+mu v_q)(y_q-y)/(1+mu) + (v-v_q)/(1+mu v)] is 0/0 at mu = 0. With
    d = y_q - y, L = log(1+mu), q = L/mu and s(z) = (expm1(z) - z)/z^2 it equals

        d [(1 - q)/mu - (1 - v_q)/(1 + mu) - q^2 d s(d L)],

    every term smooth through mu = 0, where it is (v_q - v)(v_q + v - 1)/2. And d needs no F(v):

        d L = log((1 + mu v_q)/(1 + mu v)) = 2 atanh(t),   t = mu (v_q - v)/(2 + mu (v_q + v)).

    |d| is at most half a step, so both series are short: the fewer levels, the longer.
    """
    q = log1p_ratio(mu)
    d = _position_error(v, v_q, mu, steps)
    z_max = _LARGEST_LOG / (2 * steps)
    count = _terms_needed(lambda n: z_max**n / math.factorial(n + 2))
    s = power_series(d * (q * mu), tuple(1 / math.factorial(n + 2) for n in range(count)))
    return d * (_one_minus_q_over_mu(mu) - (1 - v_q) / (1 + mu) - q * q * d * s)


def _position_error(v: Array, v_q: Array, mu: Array, steps: int) -> Array:
    """Returns d = y_q - F(v) as above, divided by no mu."""
    t_max = math.tanh(_LARGEST_LOG / (4 * steps))
    few_steps = t_max > 0.7  # then the series would be long, and d is large enough for logarithms
    t_max = min(t_max, 0.2) if few_steps else t_max
    difference, total = v_q - v, 2 + mu * (v_q + v)
    t = mu * difference / total
    count = _terms_needed(lambda n: t_max ** (2 * n) / (2 * n + 1))
    series = power_series(t * t, tuple(1 / (2 * n + 1) for n in range(count)))
    d = 2 * difference / total * series / log1p_ratio(mu)
    if not few_steps:
        return d
    logs = (jnp.log1p(mu * v_q) - jnp.log1p(mu * v)) / jnp.log1p(jnp.where(mu > 0, mu, 1))
    return jnp.where(jnp.abs(t) < t_max, d, logs)


def _terms_needed(term: Callable[[int], float]) -> int:
    """Returns how many terms of a series there are before one that float32 does not see."""
    return next(n for n in range(1, 99) if term(n) < 2.0**-24)


@jax.jit  # so that it is traced once, for all sites
def _one_minus_q_over_mu(mu: Array) -> Array:
    """Returns (1 - q(mu))/mu = (mu - log1p(mu))/mu^2, 1/2 at mu = 0."""
    near = mu < 0.2
    safe = jnp.where(near, 1, mu)
    series = power_series(mu, tuple((-1.0) ** n / (n + 2) for n in range(12)))
    return jnp.where(near, series, (1 - log1p_ratio(safe)) / safe)
