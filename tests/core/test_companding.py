"""The curve and its inverse, against float64 and against their own equations."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import compand_jax as cj

MUS = (0.0, 1e-7, 1e-6, 1e-4, 1e-3, 0.03, 0.5, 5.0, 50.0, 255.0)
X = np.concatenate(
    [np.linspace(-1, 1, 2001), np.geomspace(1e-7, 1, 500), -np.geomspace(1e-7, 1, 500)]
).astype(np.float32)


@pytest.mark.quick
@pytest.mark.parametrize("mu", MUS)
@pytest.mark.parametrize(
    ("function", "reference"),
    [(cj.mu_law_compress, oracle.compress), (cj.mu_law_expand, oracle.expand)],
)
def test_equals_float64(function, reference, mu):
    got = function(jnp.asarray(X), jnp.float32(mu))
    assert got.dtype == jnp.float32
    expected = reference(oracle.exact(X), oracle.exact(mu))
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("mu", MUS)
def test_are_inverse_to_each_other(mu):
    x, mu = jnp.asarray(X), jnp.float32(mu)
    # Expanding multiplies an error in y by up to L = 5.5 relative to the result.
    np.testing.assert_allclose(cj.mu_law_expand(cj.mu_law_compress(x, mu), mu), X, rtol=2e-6)
    np.testing.assert_allclose(cj.mu_law_compress(cj.mu_law_expand(x, mu), mu), X, rtol=2e-6)


@pytest.mark.quick
@pytest.mark.parametrize("function", [cj.mu_law_compress, cj.mu_law_expand])
@pytest.mark.parametrize("mu", MUS)
def test_is_odd_monotone_and_keeps_the_ends(function, mu):
    x = jnp.asarray(np.sort(X))
    y = np.asarray(function(x, jnp.float32(mu)))
    np.testing.assert_array_equal(y, -np.asarray(function(-x, jnp.float32(mu))))
    # Neighbours closer than the rounding of the curve may come out in either order.
    assert np.all(np.diff(y) >= -2e-7 * np.abs(y[1:]))
    ends = np.asarray(function(jnp.float32([-1, 0, 1]), jnp.float32(mu)))
    np.testing.assert_allclose(ends, [-1, 0, 1], rtol=2e-7)


@pytest.mark.quick
@pytest.mark.parametrize("function", [cj.mu_law_compress, cj.mu_law_expand])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_is_the_identity_at_mu_zero(function, dtype):
    x = jnp.asarray(X).astype(dtype)
    for mu in (0.0, jnp.float32(0), jnp.zeros((1,), jnp.float32)):
        y = function(x, mu)
        assert y.dtype == dtype
        np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(x, np.float32))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("mu", [1e-3, 5.0, 255.0])
@pytest.mark.parametrize(
    ("function", "reference"),
    [(cj.mu_law_compress, oracle.compress), (cj.mu_law_expand, oracle.expand)],
)
def test_half_precision_only_rounds_the_result(function, reference, mu, dtype):
    x = jnp.asarray(X).astype(dtype)
    got = function(x, jnp.float32(mu))
    assert got.dtype == dtype
    expected = reference(np.asarray(x, np.float64), oracle.exact(mu))
    tolerance = 0.5001 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.asarray(got, np.float64), expected, rtol=tolerance, atol=float(jnp.finfo(dtype).tiny)
    )


def _slopes(function, x, mu):
    """Returns the derivatives in the first argument and in mu, element by element."""

    def at(x, mu):
        return jax.grad(function, argnums=(0, 1))(x, mu)

    return jax.jit(jax.vmap(at, (0, None)))(x, mu)


def _exact_slopes(function, x, mu):
    """Returns the same in extended precision, by hand."""
    v, mu, sign = np.abs(x).astype(np.longdouble), np.longdouble(mu), np.where(x < 0, -1, 1)
    bend = sign * v * (1 - v) / 2  # dF/dmu at mu = 0, and -dG/dmu
    if function is cj.mu_law_compress:
        if mu == 0:
            return np.ones_like(v), bend
        L, slope = np.log1p(mu), 1 + mu * v
        in_mu = v / (slope * L) - np.log1p(mu * v) / (L * L * (1 + mu))
        return mu / (L * slope), sign * in_mu
    if mu == 0:
        return np.ones_like(v), -bend
    L, power = np.log1p(mu), np.exp(v * np.log1p(mu))
    in_mu = v * power / ((1 + mu) * mu) - np.expm1(v * L) / mu**2
    return L * power / mu, sign * in_mu


@pytest.mark.quick
@pytest.mark.parametrize("function", [cj.mu_law_compress, cj.mu_law_expand])
@pytest.mark.parametrize("mu", [0.0, 1e-3, 0.03, 0.19, 0.21, 0.5, 1.0, 5.0, 50.0, 255.0])
def test_gradients_equal_the_derivatives(function, mu):
    x = X[np.abs(X) < 1]
    assert np.any(x == 0)
    in_x, in_mu = _slopes(function, jnp.asarray(x), jnp.float32(mu))
    exact_x, exact_mu = _exact_slopes(function, x, oracle.exact(mu))
    np.testing.assert_allclose(in_x, exact_x, rtol=1e-5)
    np.testing.assert_allclose(in_mu, exact_mu, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("function", [cj.mu_law_compress, cj.mu_law_expand])
@pytest.mark.parametrize("mu", [1e-30, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
def test_gradients_approach_their_limits_at_mu_zero(function, mu):
    x = X[np.abs(X) < 1]
    in_x, in_mu = _slopes(function, jnp.asarray(x), jnp.float32(mu))
    exact_x, exact_mu = _exact_slopes(function, x, np.float64(0))
    np.testing.assert_allclose(in_x, exact_x, rtol=1.1 * mu + 1e-6)
    np.testing.assert_allclose(in_mu, exact_mu, atol=mu + 1e-6)


@pytest.mark.parametrize("function", [cj.mu_law_compress, cj.mu_law_expand])
@pytest.mark.parametrize("mu", MUS)
def test_values_and_gradients_are_finite_at_the_ends(function, mu):
    x = jnp.float32([-1, -0.0, 0, 1e-38, 1])
    assert np.all(np.isfinite(function(x, jnp.float32(mu))))
    for slope in _slopes(function, x, jnp.float32(mu)):
        assert np.all(np.isfinite(slope))


def test_mu_broadcasts_like_an_array():
    x = jnp.asarray(X[:600].reshape(2, 100, 3))
    mu = jnp.float32([0, 5, 255]).reshape(1, 1, 3)
    got = cj.mu_law_compress(x, mu)
    assert got.shape == x.shape
    expected = oracle.compress(oracle.exact(x), oracle.exact(mu))
    np.testing.assert_allclose(got, expected, rtol=2e-6)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    mu=st.floats(0, 255, width=32),
    x=st.floats(-1, 1, width=32, allow_subnormal=False),
)
def test_any_point_goes_there_and_back(mu, x):
    y = cj.mu_law_compress(jnp.float32(x), jnp.float32(mu))
    assert abs(float(y)) >= abs(x) * (1 - 1e-6)  # companding only ever raises small values
    np.testing.assert_allclose(cj.mu_law_expand(y, jnp.float32(mu)), x, rtol=3e-6, atol=1e-37)
