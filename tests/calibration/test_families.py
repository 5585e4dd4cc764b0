"""Calibration of each family of levels: against known optima, and never worse than uniform."""

import functools
from statistics import NormalDist

import jax.numpy as jnp
import numpy as np
import pytest

import compand_jax as cj

# Of a unit Gaussian, no quantizer of 2^b levels has a smaller error.
LLOYD_MAX = {2: 0.117482, 3: 0.034548, 4: 0.009501}


@functools.cache
def gaussian():
    count = 40_000
    quantiles = [NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]
    return np.array(quantiles, np.float32)


def error(x, p, scale, **keywords):
    quantized = np.asarray(cj.fake_quantize(x, p, scale, **keywords), np.float64)
    return np.mean((np.float64(x) - quantized) ** 2)


@pytest.mark.parametrize("bits", LLOYD_MAX)
def test_free_levels_are_lloyd_maxs(bits):
    keywords = {"bits": bits, "grid": "midrise", "quantizer": "free"}
    gaps, scale = cj.fit(gaussian(), **keywords)
    assert gaps.shape == (2 ** (bits - 1) + 1,)
    assert abs(error(gaussian(), gaps, scale, **keywords) / LLOYD_MAX[bits] - 1) < 5e-3


def test_the_exponent_is_the_one_of_the_least_error():
    """As PowerQuant searches it: over exponents and scales, in float64."""
    x = gaussian()[::20].astype(np.float64)
    a, scale = cj.fit(x.astype(np.float32), bits=4, quantizer="power")

    def reconstruction(a, c):
        v = np.minimum(np.abs(x) / c, 1)
        return np.mean((np.abs(x) - c * (np.round(7 * v ** (1 / a)) / 7) ** a) ** 2)

    every = [(reconstruction(a, c), a) for a in np.arange(1, 2.5, 0.02)
             for c in np.arange(2.0, 3.4, 0.02)]  # fmt: skip
    least, best = min(every)
    found = reconstruction(float(a), float(scale))
    assert found <= least * (1 + 1e-4)
    assert abs(float(a) - best) < 0.1


@pytest.mark.parametrize(
    ("quantizer", "axis"), [("power", None), ("piecewise", None), ("free", -1)]
)
def test_never_worse_than_uniform(quantizer, axis):
    rng = np.random.default_rng(0)
    x = rng.laplace(size=(500, 4)) * [1, 0.1, 3, 0.5]
    x = x.astype(np.float32)
    for calibration in ("mse", "absmax"):
        keywords = {"bits": 3, "axis": axis, "calibration": calibration}
        uniform = error(x, 0.0, cj.fit(x, mu=0.0, **keywords)[1], bits=3)
        p, scale = cj.fit(x, quantizer=quantizer, **keywords)
        # Well below: these tails are not those of uniform levels.
        assert error(x, p, scale, bits=3, quantizer=quantizer) < 0.95 * uniform


def test_slopes_leave_less_than_one_parameter_does():
    keywords = {"bits": 4, "grid": "midrise"}
    errors = {}
    for quantizer in ("mu_law", "piecewise"):
        p, scale = cj.fit(gaussian(), quantizer=quantizer, **keywords)
        errors[quantizer] = error(gaussian(), p, scale, quantizer=quantizer, **keywords)
    assert LLOYD_MAX[4] * 0.999 < errors["piecewise"] < 0.98 * errors["mu_law"]


def test_zeros_and_what_is_held():
    gaps, scale = cj.fit(jnp.zeros(10), bits=3, quantizer="free")
    assert np.all(np.isfinite(gaps))
    assert float(scale) == 1
    assert cj.fit(jnp.ones(4), bits=3, quantizer="apot")[0] is None
    with pytest.raises(ValueError, match="`mu` must be None for quantizer='power', got 2"):
        cj.fit(jnp.ones(4), bits=3, quantizer="power", mu=2.0)
