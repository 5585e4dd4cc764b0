"""The oracle itself: its gradients are the derivatives of the curves that it claims they are."""

import numpy as np
import oracle
import pytest
from oracle import CASES, MUS

SCALE = 1.7


def _smooth(x, mu, scale, offset):
    """Returns Q with rounding as the addition of a constant, which is straight-through.

    Not by the oracle's odd curves: around the level at zero they have a kink.
    """
    v, L = np.minimum(np.abs(x) / scale, 1), np.log1p(mu)
    y = np.log1p(mu * v) / L + offset
    return np.where(x < 0, -1, 1) * scale * np.expm1(y * L) / mu


def _difference(function, at, step):
    """Returns the derivative by central differences, to the fourth order."""
    near = function(at + step) - function(at - step)
    far = function(at + 2 * step) - function(at - 2 * step)
    return (8 * near - far) / (12 * step)


@pytest.mark.parametrize("mu", [mu for mu in MUS if mu >= 1e-3])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_derivatives(case, mu):
    x = oracle.samples(2000, SCALE, seed=20, specials=False).astype(np.float64)
    x = x[np.abs(np.abs(x) - SCALE) > 0.01]
    x = x if case[1] else x[x > 0.0]
    codes = oracle.quantize(x, mu, SCALE, *case)
    y_q = np.abs((codes + 0.5 * (case[2] == "midrise")) / oracle.steps(*case))
    offset = y_q - oracle.compress(np.minimum(np.abs(x) / SCALE, 1), mu)
    np.testing.assert_allclose(
        _smooth(x, mu, SCALE, offset),
        oracle.fake_quantize(x, mu, SCALE, *case),
        rtol=1e-9,
        atol=1e-12,
    )
    in_x, in_mu, in_scale = oracle.gradients(x, mu, SCALE, *case, gradient="chain")
    inside = np.abs(x) < SCALE
    small = np.abs(x) < 1e-3  # a step would lead to the other side of zero
    exact_mu = _difference(lambda m: _smooth(x, m, SCALE, offset), mu, 1e-2 * min(mu, 1))
    np.testing.assert_allclose(in_mu, exact_mu, rtol=1e-6, atol=1e-8)
    exact_x = _difference(lambda z: _smooth(z, mu, SCALE, offset), x, 1e-6)
    np.testing.assert_allclose(in_x[~small], exact_x[~small], rtol=1e-4, atol=1e-7)
    # With dQ/dx = 1 for the slope, the scale's gradient inside the clip is Q - x over the scale.
    exact_scale = np.where(inside, oracle.fake_quantize(x, mu, SCALE, *case) - x, np.nan) / SCALE
    np.testing.assert_allclose(in_scale[inside], exact_scale[inside], atol=1e-12)
    exact_scale = _difference(lambda c: _smooth(x, mu, c, offset), SCALE, 1e-6)
    np.testing.assert_allclose(in_scale[~inside], exact_scale[~inside], rtol=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_gradient_in_mu_reaches_its_limit(case):
    x = oracle.samples(5000, SCALE, seed=21)
    limit, near = (oracle.gradients(x, mu, SCALE, *case)[1] for mu in (0.0, 1e-5))
    assert np.max(np.abs(limit)) > 1e-4
    np.testing.assert_allclose(near, limit, atol=2e-5)


@pytest.mark.parametrize("mu", MUS)
@pytest.mark.parametrize("case", CASES)
def test_curve_and_table_tell_the_same_codes(case, mu):
    """Counting thresholds and rounding the compressed value are two ways to one code."""
    x = np.abs(oracle.samples(5000, SCALE, seed=22).astype(np.float64))
    numbers = (mu, SCALE, *case)
    thresholds = oracle.codebook(*numbers)[1]
    positive = thresholds[thresholds > 0]
    expected = np.searchsorted(positive, x)
    codes = oracle.quantize(x, *numbers)
    clear = ~oracle.near_threshold(x, *numbers, tolerance=1e-12)
    np.testing.assert_array_equal(codes[clear], expected[clear])
