"""Mean squared errors of known sources, against quadrature, Lloyd-Max and high resolution.

Samples are quantiles, evenly spaced in probability: their error is far below random samples'.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtri

import compand_jax as cj

SIZE = 400_000
# Source, bits, grid, and by quadrature the best mu, the best scale and their MSE.
OPTIMA = [
    ("gaussian", 3, "midtread", 0.749, 2.018, 0.044448),
    pytest.param("gaussian", 4, "midtread", 1.533, 2.623, 0.0111188, marks=pytest.mark.quick),
    ("gaussian", 5, "midtread", 2.325, 3.106, 0.0028803),
    ("laplacian", 3, "midtread", 2.157, 2.786, 0.069920),
    ("laplacian", 4, "midtread", 4.569, 4.143, 0.0180505),
    ("laplacian", 5, "midtread", 7.201, 5.377, 0.0047547),
    ("gaussian", 2, "midrise", 0.372, 2.094, 0.117773),
    ("gaussian", 3, "midrise", 1.055, 2.562, 0.034993),
    ("gaussian", 4, "midrise", 1.775, 2.955, 0.0098695),
    ("laplacian", 2, "midrise", 1.761, 2.756, 0.180448),
    ("laplacian", 4, "midrise", 5.569, 4.896, 0.0160698),
]
# The best that uniform midtread levels do, over all scales.
UNIFORM = [
    ("gaussian", 2, 0.190),
    ("gaussian", 3, 0.046860),
    ("gaussian", 4, 0.012889),
    ("gaussian", 5, 0.0036932),
    ("laplacian", 3, 0.083087),
    ("laplacian", 4, 0.027395),
    ("laplacian", 5, 0.0090851),
]
LLOYD_MAX = {2: 0.117482, 3: 0.034548, 4: 0.009501}  # Gaussian, 2^bits levels


@functools.cache
def source(name):
    """Returns quantiles of a source of unit variance (uniform: on [-1, 1])."""
    p = (np.arange(SIZE) + 0.5) / SIZE
    if name == "uniform":
        return jnp.asarray(2 * p - 1, jnp.float32)
    if name == "gaussian":
        return jnp.asarray(ndtri(p), jnp.float32)
    tail = -np.log(2 * np.minimum(p, 1 - p)) / np.sqrt(2)
    return jnp.asarray(np.where(p < 0.5, -tail, tail), jnp.float32)


@functools.cache
def _errors(bits, grid):
    @jax.jit
    def errors(x, mus, scales):
        def error(operands):
            return jnp.mean((cj.fake_quantize(x, *operands, bits=bits, grid=grid) - x) ** 2)

        return jax.lax.map(error, (mus, scales))

    return errors


def mse(x, mus, scales, bits, grid):
    """Returns the mean squared error of each pair of mu and scale."""
    mus, scales = np.broadcast_arrays(np.float32(mus), np.float32(scales))
    return np.asarray(_errors(bits, grid)(x, jnp.asarray(mus.ravel()), jnp.asarray(scales.ravel())))


@pytest.mark.parametrize(("name", "bits", "grid", "mu", "scale", "expected"), OPTIMA)
def test_mse_at_the_optimum_and_that_it_is_one(name, bits, grid, mu, scale, expected):
    mus = [mu, 0.9 * mu, 1.1 * mu, mu, mu]
    scales = [scale, scale, scale, 0.97 * scale, 1.03 * scale]
    best, *others = mse(source(name), mus, scales, bits, grid)
    np.testing.assert_allclose(best, expected, rtol=5e-3)
    assert np.all(best < others)


@pytest.mark.parametrize(("name", "bits", "expected"), UNIFORM)
def test_mse_of_the_best_uniform_levels(name, bits, expected):
    scales = np.linspace(1, 6, 101)
    found = mse(source(name), 0.0, scales, bits, "midtread")
    assert 0 < np.argmin(found) < 100
    np.testing.assert_allclose(np.min(found), expected, rtol=5e-3)


@pytest.mark.parametrize("grid", ["midtread", "midrise"])
@pytest.mark.parametrize("bits", LLOYD_MAX)
def test_no_levels_beat_lloyd_max(bits, grid):
    mus, scales = np.meshgrid([0, 0.1, 0.4, 0.7, 1, 1.5, 2, 3, 5], np.linspace(1.6, 3.4, 13))
    found = mse(source("gaussian"), mus, scales, bits, grid)
    assert np.all(found >= LLOYD_MAX[bits] * (1 - 1e-3))
    if grid == "midrise":
        assert np.min(found) < LLOYD_MAX[bits] * 1.06  # nor are they far from it


@pytest.mark.quick
def test_mu_law_at_eight_bits_has_the_signal_to_noise_ratio_of_telephony():
    x, mu = source("uniform"), 255.0
    noise = mse(x, mu, 1.0, 8, "midrise")[0]
    ratio = 10 * np.log10(1 / 3 / noise)
    # High resolution: a noise of (c L (1 + mu |x|) / (mu H))^2 / 12 at x, with H = 128.
    high = 10 * np.log10(3 * 256**2 / np.log1p(mu) ** 2)
    np.testing.assert_allclose(high, 38.06, atol=0.005)
    exact = high - 10 * np.log10(1 + 3 / mu + 3 / mu**2)
    np.testing.assert_allclose(ratio, exact, atol=0.005)
