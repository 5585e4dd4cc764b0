"""Straight-through gradients in x, mu and scale, against the unsimplified formula in float64."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import CASES, FEW, MUS, spec
from small_models import QUICKLY

import compand_jax as cj

SCALE = np.float32(1.7)
SIZE = 20_000
SMALL_MUS = (0.0, 1e-12, 1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 3e-4, 5e-4, 1e-3, 1e-2)
MORE_MUS = (*SMALL_MUS, 0.1, 0.19, 0.21, 0.5, 1.0, 5.0, 50.0, 255.0)
PER_MU = 250
EACH = PER_MU * len(MORE_MUS)  # of what has a mu and a scale for each element: compiled once
THREE = [(4, True, "midtread"), (8, False, "midtread"), (2, True, "midrise")]
ALL = [pytest.param(c, marks=pytest.mark.quick) if c == THREE[0] else c for c in CASES]


@functools.cache
def gradient_function(case, gradient="identity"):
    """Returns the jitted pull-back of a cotangent to x, mu and scale."""

    @jax.jit
    def pull_back(x, mu, scale, cotangent):
        quantize = functools.partial(cj.fake_quantize, **spec(case), gradient=gradient)
        return jax.vjp(quantize, x, mu, scale)[1](cotangent)

    return pull_back


@functools.cache
def data():
    x = oracle.samples(SIZE, SCALE, seed=10)
    return x, np.random.default_rng(11).normal(size=SIZE).astype(np.float32)


def check_sum(got, terms, tolerance=1e-3):
    assert np.shape(got) == ()
    assert abs(float(got) - np.sum(terms)) <= tolerance * np.sum(np.abs(terms)) + 1e-30


@pytest.mark.parametrize("mu", MUS)
@pytest.mark.parametrize("case", ALL)
def test_sums_equal_the_oracle(case, mu):
    x, cotangent = data()
    exact = oracle.gradients(x, oracle.exact(mu), oracle.exact(SCALE), *case)

    def pull_back(cotangent):
        operands = jnp.asarray(x), jnp.float32(mu), jnp.asarray(SCALE), jnp.asarray(cotangent)
        return gradient_function(case)(*operands)

    in_x, in_mu, in_scale = pull_back(cotangent)
    np.testing.assert_array_equal(in_x, exact[0] * cotangent)
    check_sum(in_mu, exact[1] * cotangent)
    check_sum(in_scale, exact[2] * cotangent)
    # Errors of a random sign average out; with all terms positive they add up.
    for i in (1, 2):
        aligned = np.abs(cotangent) * np.where(exact[i] < 0, -1, 1).astype(np.float32)
        check_sum(pull_back(aligned)[i], exact[i] * aligned)


@pytest.mark.parametrize("mu", MUS)
@pytest.mark.parametrize("case", FEW)
def test_chain_changes_the_gradient_in_x_only(case, mu):
    x, cotangent = data()
    operands = jnp.asarray(x), jnp.float32(mu), jnp.asarray(SCALE), jnp.asarray(cotangent)
    in_x, in_mu, in_scale = gradient_function(case, "chain")(*operands)
    numbers = oracle.exact(mu), oracle.exact(SCALE), *case
    exact = oracle.gradients(x, *numbers, gradient="chain")
    clear = ~oracle.near_threshold(x.astype(np.float64), *numbers)
    assert np.mean(clear) > 0.99
    np.testing.assert_allclose(in_x[clear], (exact[0] * cotangent)[clear], rtol=1e-5)
    check_sum(in_mu, exact[1] * cotangent)
    check_sum(in_scale, exact[2] * cotangent)


@pytest.mark.parametrize("case", [*FEW, *THREE])
def test_every_element_equals_the_oracle_at_every_mu(case):
    """One mu and one scale for each element: their gradients are not summed then."""
    x, cotangent = (np.tile(a[:PER_MU], len(MORE_MUS)) for a in data())
    mu = np.repeat(np.float32(MORE_MUS), PER_MU)
    scale = np.full_like(mu, SCALE)
    operands = (jnp.asarray(a) for a in (x, mu, scale, cotangent))
    in_x, in_mu, in_scale = (np.asarray(g) for g in gradient_function(case)(*operands))
    numbers = oracle.exact(mu), oracle.exact(SCALE), *case
    exact = [g * cotangent for g in oracle.gradients(x, *numbers)]
    clear = ~near_any_threshold(x, *numbers)
    assert np.mean(clear) > 0.99
    np.testing.assert_array_equal(in_x, exact[0])
    np.testing.assert_allclose(in_scale[clear], exact[2][clear], rtol=1e-5, atol=1e-6)
    error = np.abs(in_mu - exact[1]) / np.abs(cotangent)
    distance = SCALE / oracle.steps(*case)
    assert np.all(error[clear] <= 2e-6 * distance + 1e-6)


def near_any_threshold(x, mu, scale, *case):
    """Like `oracle.near_threshold`, for a mu of each element's own."""
    near = np.zeros(x.shape, bool)
    for one in np.unique(mu):
        at = mu == one
        near[at] = oracle.near_threshold(x[at].astype(np.float64), one, scale, *case)
    return near


@pytest.mark.parametrize("case", THREE)
def test_gradient_in_mu_is_continuous_at_zero(case):
    x, cotangent = data()
    numbers = 0.0, oracle.exact(SCALE), *case
    # A threshold moves by at most mu / 2 of itself: no value here changes its level.
    still = ~oracle.near_threshold(x.astype(np.float64), *numbers, tolerance=max(SMALL_MUS))
    cotangent = cotangent * still
    assert np.mean(still) > 0.3

    def at(mu):
        operands = jnp.asarray(x), jnp.float32(mu), jnp.asarray(SCALE), jnp.asarray(cotangent)
        return gradient_function(case)(*operands)[1]

    size = np.sum(np.abs(oracle.gradients(x, *numbers)[1] * cotangent))
    for mu in SMALL_MUS:
        assert abs(at(mu) - at(0.0)) <= (2 * mu + 1e-4) * size


@pytest.mark.parametrize("gradient", ["identity", "chain"])
@pytest.mark.parametrize("case", FEW)
def test_is_finite_at_zeros_clip_and_infinity(case, gradient):
    edge = SCALE
    x = np.float32([0, -0.0, edge, -edge, 2 * edge, -2 * edge, 3e38, 1e-38, np.inf, -np.inf])
    x = np.resize(x, SIZE)
    for mu in MORE_MUS:
        operands = jnp.asarray(x), jnp.float32(mu), jnp.asarray(SCALE), jnp.ones(SIZE)
        for value in gradient_function(case, gradient)(*operands):
            assert np.all(np.isfinite(value))


@pytest.mark.parametrize("mu", [0.0, 5.0])
@pytest.mark.parametrize("case", FEW)
def test_clip_boundary_and_zero(case, mu):
    inner, outer = (np.nextafter(SCALE, np.float32(to)) for to in (0, np.inf))
    x = np.float32([inner, SCALE, outer, -inner, -SCALE, -outer, 0.0, -0.0])
    n, signed = len(x), case[1]
    operands = (jnp.asarray(np.resize(np.float32(a), EACH)) for a in (x, mu, SCALE, 1))
    in_x, in_mu, in_scale = (np.asarray(g)[:n] for g in gradient_function(case)(*operands))
    np.testing.assert_array_equal(in_x, [1, 0, 0, signed, 0, 0, signed, signed])
    if case[2] == "midtread":
        np.testing.assert_array_equal(in_mu[[1, 2, 4, 5, 6, 7]], np.zeros(6))
        np.testing.assert_array_equal(in_scale[[1, 2, 4, 5]], [1, 1, -signed, -signed])
        np.testing.assert_array_equal(in_scale[[6, 7]], [0, 0])
    else:
        level = np.asarray(cj.codebook(mu, 1.0, **spec(case))[0])[-1]
        np.testing.assert_allclose(in_scale[[1, 2, 4, 5]], [level, level, -level, -level])
        assert in_mu[1] == in_mu[2] == -in_mu[4] == -in_mu[5] != 0
    exact = oracle.gradients(x, oracle.exact(mu), oracle.exact(SCALE), *case)
    np.testing.assert_allclose(in_mu, exact[1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(in_scale, exact[2], rtol=1e-5, atol=1e-6)


@pytest.mark.quick
def test_unsigned_passes_nothing_at_and_below_zero():
    x = jnp.float32([-3, -1, -1e-3, -1e-30, -0.0, 0.0])
    ones = jnp.ones_like(x)
    for gradient in ("identity", "chain"):
        pull_back = gradient_function((4, False, "midtread"), gradient)
        for value in pull_back(x, 5 * ones, 2 * ones, ones):
            np.testing.assert_array_equal(value, np.zeros(6))


@pytest.mark.parametrize("case", THREE)
def test_per_channel_gradients_are_summed_over_the_other_axes(case):
    x = oracle.samples(6 * 5 * 40 * 7, SCALE, seed=12).reshape(6, 5, 40, 7)
    cotangent = np.random.default_rng(13).normal(size=x.shape).astype(np.float32)
    mu = np.float32(MUS).reshape(1, 1, 1, 7)
    scale = np.linspace(0.5, 2, 5).astype(np.float32).reshape(1, 5, 1, 1)
    grads = gradient_function(case)(*(jnp.asarray(a) for a in (x, mu, scale, cotangent)))
    exact = oracle.gradients(x, oracle.exact(mu), oracle.exact(scale), *case)
    np.testing.assert_array_equal(grads[0], exact[0] * cotangent)
    for got, terms, axes in (
        (grads[1], exact[1] * cotangent, (0, 1, 2)),
        (grads[2], exact[2] * cotangent, (0, 2, 3)),
    ):
        expected, size = (np.sum(a, axes, keepdims=True) for a in (terms, np.abs(terms)))
        assert got.shape == expected.shape
        assert np.all(np.abs(got - expected) <= 1e-3 * size)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("case", THREE)
def test_half_precision_sums_in_float32(case, dtype):
    x, cotangent = (jnp.asarray(a).astype(dtype) for a in data())
    for mu in (0.0, 5.0):
        grads = gradient_function(case)(x, jnp.float32(mu), jnp.asarray(SCALE), cotangent)
        assert [g.dtype for g in grads] == [dtype, jnp.float32, jnp.float32]
        exact_x, exact_cotangent = (np.asarray(a, np.float64) for a in (x, cotangent))
        exact = oracle.gradients(exact_x, oracle.exact(mu), oracle.exact(SCALE), *case)
        np.testing.assert_array_equal(
            np.asarray(grads[0], np.float64), exact[0] * np.where(exact[0], exact_cotangent, 0)
        )
        check_sum(grads[1], exact[1] * exact_cotangent)
        check_sum(grads[2], exact[2] * exact_cotangent)


def _rows(case):
    """Returns rows of x, their mu and scale, cotangents, and the exact gradients of each."""
    x, cotangent = (a[:14_000].reshape(7, 2000) for a in data())
    mu = np.float32(MUS)
    scale = np.linspace(0.5, 2, 7).astype(np.float32)
    exact = oracle.gradients(x, oracle.exact(mu)[:, None], oracle.exact(scale)[:, None], *case)
    operands = tuple(jnp.asarray(a) for a in (x, mu, scale, cotangent))
    return operands, [g * cotangent for g in exact]


def _loss(case):
    def loss(x, mu, scale, cotangent):
        return jnp.sum(cj.fake_quantize(x, mu, scale, **spec(case)) * cotangent)

    return loss


def _one_by_one(loss, operands):
    rows = [jax.grad(loss, (0, 1, 2))(*row) for row in zip(*operands, strict=True)]
    return tuple(jnp.stack(column) for column in zip(*rows, strict=True))


def _vmap_of_grad(loss, operands):
    return jax.vmap(jax.grad(loss, (0, 1, 2)))(*operands)


def _grad_of_vmap(loss, operands):
    return jax.grad(lambda *a: jnp.sum(jax.vmap(loss)(*a)), (0, 1, 2))(*operands)


def _jit_of_grad_of_vmap(loss, operands):
    return jax.jit(functools.partial(_grad_of_vmap, loss), compiler_options=QUICKLY)(operands)


def _grad_of_scan(loss, operands):
    def total(*operands):
        return jax.lax.scan(lambda sum_, row: (sum_ + loss(*row), None), 0.0, operands)[0]

    return jax.jit(jax.grad(total, (0, 1, 2)), compiler_options=QUICKLY)(*operands)


def _grad_of_remat(loss, operands):
    total = jax.checkpoint(lambda *a: jnp.sum(jax.vmap(loss)(*a)))
    return jax.jit(jax.grad(total, (0, 1, 2)), compiler_options=QUICKLY)(*operands)


TRANSFORMS = [_one_by_one, _vmap_of_grad, _grad_of_vmap, _jit_of_grad_of_vmap]
TRANSFORMS += [_grad_of_scan, _grad_of_remat]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", THREE[1:])
def test_is_the_same_under_every_transformation(case, transform):
    operands, exact = _rows(case)
    in_x, in_mu, in_scale = transform(_loss(case), operands)
    np.testing.assert_array_equal(in_x, exact[0])
    for got, terms in ((in_mu, exact[1]), (in_scale, exact[2])):
        expected, size = np.sum(terms, 1), np.sum(np.abs(terms), 1)
        assert got.shape == expected.shape
        assert np.all(np.abs(got - expected) <= 1e-3 * size)


@pytest.mark.parametrize("case", THREE)
def test_one_mu_shared_by_a_vmapped_stack_gets_the_sum(case):
    (x, _, _, cotangent), _ = _rows(case)

    def total(mu, scale):
        return jnp.sum(jax.vmap(_loss(case), (0, None, None, 0))(x, mu, scale, cotangent))

    in_mu, in_scale = jax.grad(total, (0, 1))(jnp.float32(5), jnp.asarray(SCALE))
    exact = oracle.gradients(np.asarray(x), 5.0, oracle.exact(SCALE), *case)
    check_sum(in_mu, exact[1] * cotangent)
    check_sum(in_scale, exact[2] * cotangent)


@pytest.mark.quick
@pytest.mark.parametrize(("platform", "by_complex"), [("cpu", True), ("cuda", False)])
def test_how_gradients_are_summed_depends_on_where_they_run(platform, by_complex):
    """And not on where they are traced: a CPU, here."""
    arguments = (*(jax.ShapeDtypeStruct(s, np.float32) for s in ((64, 3), (), (1, 3))),)
    pull_back = gradient_function((4, True, "midtread"))
    exported = jax.export.export(pull_back, platforms=[platform])(*arguments, arguments[0])
    text = exported.mlir_module()
    assert ("complex<f32>" in text) == by_complex
    assert "stablehlo.reduce" in text
