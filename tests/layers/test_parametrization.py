"""theta and rho: what an optimizer moves, and the mu and scale that are read from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compand_jax as cj
from compand_jax.layers import parametrization as par

pytestmark = pytest.mark.quick
TOP = float(np.log(256))


def test_mu_and_theta_are_inverse():
    for mu in (0.0, 1e-6, 1e-3, 0.5, 5.0, 50.0, 254.0):
        assert float(par.mu_from_theta(par.theta_from_mu(mu))) == pytest.approx(mu, rel=1e-5)


def test_scale_and_rho_are_inverse():
    scales = np.float32([1e-6, 0.3, 1, 40])
    np.testing.assert_allclose(par.scale_from_rho(par.rho_from_scale(scales)), scales, rtol=1e-5)
    assert float(par.scale_from_rho(jnp.float32(-80.0))) > 0


@pytest.mark.parametrize("theta", [-1e9, -1.0, -0.0, 0.0, 3.0, TOP, 6.0, 1e9])
def test_mu_is_bounded(theta):
    mu = float(par.mu_from_theta(jnp.float32(theta)))
    assert 0 <= mu <= 255.0001
    assert mu == pytest.approx(np.expm1(np.clip(theta, 0, TOP)), rel=1e-5)


# Descent moves theta against the gradient, so a positive one points down.
@pytest.mark.parametrize(
    ("theta", "cotangent", "passes"),
    [
        (1.0, 2.0, True),
        (1.0, -2.0, True),
        (0.0, -2.0, True),
        (0.0, 2.0, False),
        (-3.0, -2.0, True),
        (-3.0, 2.0, False),
        (6.0, 2.0, True),
        (6.0, -2.0, False),
        (float(np.float32(TOP)), 2.0, True),
        (float(np.float32(TOP)), -2.0, False),
    ],
)
def test_gradients_pass_where_they_lead_inside(theta, cotangent, passes):
    _, pull_back = jax.vjp(par.mu_from_theta, jnp.float32(theta))
    (gradient,) = pull_back(jnp.float32(cotangent))
    slope = np.exp(np.clip(theta, 0, TOP)) if passes else 0
    assert float(gradient) == pytest.approx(cotangent * slope, rel=1e-5)


def test_a_mu_at_zero_can_leave_it():
    theta = jnp.float32(-0.5)
    for _ in range(20):
        theta -= 0.1 * jax.grad(lambda t: (par.mu_from_theta(t) - 1.0) ** 2)(theta)
    assert float(par.mu_from_theta(theta)) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    ("config", "site", "path"),
    [
        ({}, "a/b", ("a", "b", "act_mu")),
        ({}, "", ("act_mu",)),
        ({"mu_scope": "single"}, "a/b", ("_shared", "mu")),
        ({"mu_scope": "separate"}, "a/b", ("_shared", "act_mu")),
        ({"quantizer": "uniform", "mu_scope": "single"}, "a/b", None),
        ({"rules": (cj.Rule("a/b", quantizer="uniform"),)}, "a/b", None),
    ],
)
def test_the_scopes_differ_in_where_mu_lies(config, site, path):
    assert par.parameter_path(site, "act", cj.QuantConfig(**config)) == path
    assert par.scale_path(site, "act") == (*(site.split("/") if site else ()), "act_scale")
