"""Families of levels: their tables, and their gradients, against their sources in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import compand_jax as cj
from compand_jax.core.families.fixed import normal_quantiles
from compand_jax.core.spec import check_spec

FOUR = (4, True, "midtread")
FIVE_UNSIGNED = (5, False, "midtread")
MIDRISE = (3, True, "midrise")
CASES = (FOUR, FIVE_UNSIGNED, MIDRISE)
SCALE = 1.7
# https://github.com/bitsandbytes-foundation/bitsandbytes, functional.py, get_4bit_type("nf4")
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
# Sums of {0, 1, 1/2, 1/4, ...} by the paper, in units of the largest.
APOT = {
    (2, True): [0, 1],
    (3, True): np.array([0, 1, 2, 4]) / 4,
    (4, True): np.array([0, 1, 2, 3, 4, 6, 8, 10]) / 10,
    (5, True): np.unique(np.add.outer([0, 32, 8, 2], [0, 16, 4, 1])) / 48,
    (2, False): np.array([0, 1, 2, 4]) / 4,
    (3, False): np.array([0, 1, 2, 3, 4, 6, 8, 10]) / 10,
    (4, False): np.unique(np.add.outer([0, 32, 8, 2], [0, 16, 4, 1])) / 48,
    (5, False): np.unique(
        np.add.outer(np.add.outer([0, 64, 16, 2], [0, 32, 8, 1]), [0, 4]).ravel()
    ) / 100,
}  # fmt: skip


def half(quantizer, case, mu=None):
    """Returns the levels at x >= 0 and the thresholds above 0."""
    levels, thresholds = cj.codebook(mu, 1.0, **oracle.spec(case), quantizer=quantizer)
    return np.asarray(levels)[np.asarray(levels) >= 0], np.asarray(thresholds)[thresholds > 0]


def slopes():
    return np.exp(np.random.default_rng(3).normal(0, 0.7, 16)).astype(np.float32)


def gaps(case):
    count = oracle.steps(*case) + (case[2] == "midrise")
    return np.exp(np.random.default_rng(4).normal(0, 0.7, count)).astype(np.float32)


PARAMETERS = {
    "power": lambda case: np.float32(1.9),
    "normal_float": lambda case: None,
    "apot": lambda case: None,
    "piecewise": lambda case: slopes(),
    "free": gaps,
}


# The curves in float64, from the papers.
def power_compress(v, a):
    return v ** (1 / a)


def power_expand(y, a):
    return y**a


def piecewise_knots(s):
    return np.arange(17) / 16, np.concatenate([[0], np.cumsum(s) / np.sum(s)])


def piecewise_compress(v, s):
    return np.interp(v, *piecewise_knots(s))


def piecewise_expand(y, s):
    v, ends = piecewise_knots(s)
    return np.interp(y, ends, v) + np.maximum(y - 1, 0) / 16 / (1 - ends[-2])  # beyond 1 as below


CURVES = {
    "power": (power_compress, power_expand),
    "piecewise": (piecewise_compress, piecewise_expand),
}


def test_nf4_is_the_published_table():
    lower, upper = -normal_quantiles(8, of=16)[:0:-1], normal_quantiles(9, of=16)
    np.testing.assert_allclose(np.concatenate([lower, upper]), NF4, atol=1e-6)


def test_symmetric_normal_float():
    # Midtread: the seven levels that NF4 has below zero, on both sides.
    levels, thresholds = half("normal_float", FOUR)
    np.testing.assert_allclose(levels, -np.array(NF4[7::-1]), atol=1e-6)
    np.testing.assert_allclose(thresholds, (levels[1:] + levels[:-1]) / 2, atol=1e-7)
    # Midrise: even probabilities between NF's ends, which lie at 1.
    levels, _ = half("normal_float", MIDRISE)
    draws = np.random.default_rng(0).normal(size=1_000_000)
    end = 1 - (1 / 16 + 1 / 14) / 2
    wanted = np.quantile(draws, np.linspace(1 - end, end, 8))[4:]
    np.testing.assert_allclose(levels, wanted / wanted[-1], atol=5e-3)


@pytest.mark.parametrize(("bits", "signed"), APOT)
def test_apot_has_the_papers_sets(bits, signed):
    levels, thresholds = half("apot", (bits, signed, "midtread"))
    np.testing.assert_allclose(levels, APOT[bits, signed], atol=1e-7)
    np.testing.assert_allclose(thresholds, (levels[1:] + levels[:-1]) / 2, atol=1e-7)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("quantizer", CURVES)
def test_tables_of_curves(quantizer, case):
    p = PARAMETERS[quantizer](case)
    n, midrise = oracle.steps(*case), case[2] == "midrise"
    k = np.arange(n) + 0.5 if midrise else np.arange(n + 1)
    between = np.arange(1, n) if midrise else np.arange(n) + 0.5
    levels, thresholds = half(quantizer, case, p)
    expand = CURVES[quantizer][1]
    exact = np.asarray(p, np.float64)
    np.testing.assert_allclose(levels, expand(k / n, exact), rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(thresholds, expand(between / n, exact), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("quantizer", ["power", "piecewise", "free"])
def test_uniform_levels_are_the_start(quantizer):
    for case in CASES:
        start = check_spec(*case, quantizer).family.start(check_spec(*case, quantizer))
        levels, _ = half(quantizer, case, np.float32(start))
        np.testing.assert_allclose(levels, half("uniform", case)[0], atol=2e-7)


@pytest.mark.parametrize("case", [FIVE_UNSIGNED, MIDRISE])
@pytest.mark.parametrize("quantizer", PARAMETERS)
def test_all_functions_read_one_table(quantizer, case):
    if quantizer == "apot" and case == MIDRISE:
        return
    p, keywords = PARAMETERS[quantizer](case), {**oracle.spec(case), "quantizer": quantizer}
    x = oracle.samples(3000, SCALE, seed=1)
    levels, thresholds = (np.asarray(t) for t in cj.codebook(p, SCALE, **keywords))
    fake = cj.fake_quantize(x, p, SCALE, **keywords)
    codes = cj.quantize(x, p, SCALE, **keywords)
    np.testing.assert_array_equal(cj.dequantize(codes, p, SCALE, **keywords), fake)
    # Ties go inwards on midtread, outwards on midrise.
    magnitude = np.abs(x) if case[1] else np.maximum(x, 0)
    side = "right" if case == MIDRISE else "left"
    outer = thresholds[thresholds > 0]
    k = np.searchsorted(outer, magnitude, side)
    np.testing.assert_array_equal(np.abs(fake), levels[levels >= 0][k])
    assert np.all(np.diff(levels) > 0)


def gradient(quantizer, case, p, x, cotangent):
    def quantize(x, p, scale):
        return cj.fake_quantize(x, p, scale, **oracle.spec(case), quantizer=quantizer)

    return jax.jit(lambda *a: jax.vjp(quantize, *a)[1](jnp.asarray(cotangent)))(
        x, jnp.asarray(p), jnp.float32(SCALE)
    )


def moved(p, j, step):
    """Returns float64 parameters, one of them moved."""
    p = np.array(p, np.float64)
    p.reshape(-1)[j] += step
    return p


@pytest.mark.parametrize("case", [FIVE_UNSIGNED, MIDRISE])
@pytest.mark.parametrize("quantizer", ["power", "piecewise", "free"])
def test_gradients_are_differences_of_the_papers_formula(quantizer, case):
    """Of sum g sign(x) c G(F(v; p) + r; p), the rounding r held; of `free`, of the levels alone."""
    x = oracle.samples(4000, SCALE, seed=2)
    x = x[np.isfinite(x)]
    cotangent = np.random.default_rng(5).normal(size=x.shape).astype(np.float32)
    p = PARAMETERS[quantizer](case)
    in_x, in_p, in_scale = gradient(quantizer, case, p, x, cotangent)
    live = np.ones(x.shape, bool) if case[1] else x > 0
    magnitude = np.where(live, np.abs(x), 0).astype(np.float64)
    v = np.minimum(magnitude / SCALE, 1)
    levels, thresholds = half(quantizer, case, p)
    outer = case == MIDRISE
    k = np.searchsorted(np.float64(thresholds), v, "right" if outer else "left")
    n = oracle.steps(*case)
    y_q = (k + 0.5) / n if outer else k / n

    def level(p):
        if quantizer == "free":
            sums = np.cumsum(p) / np.sum(p)
            return (sums[:-1] if outer else np.append(0, sums))[k]
        compress, expand = CURVES[quantizer]
        exact = np.asarray(PARAMETERS[quantizer](case), np.float64)
        y = y_q + compress(v, p) - compress(v, exact)
        return np.sign(y) * expand(np.abs(y), p)  # the curve is odd

    weighted = np.where(live, cotangent * np.sign(x) * SCALE, 0)
    step = 1e-6
    got = np.asarray(in_p).reshape(-1)
    for j in range(got.size):
        change = (level(moved(p, j, step)) - level(moved(p, j, -step))) / (2 * step)
        assert abs(got[j] - weighted @ change) <= 1e-3 * np.abs(weighted) @ np.abs(change) + 1e-4
    v_q = np.float64(levels)[k]
    inside = np.abs(x) < SCALE
    np.testing.assert_array_equal(in_x, np.where(inside & live, cotangent, 0))
    in_c = np.where(live, cotangent * np.sign(x) * np.where(inside, v_q - v, v_q), 0)
    assert abs(in_scale - in_c.sum()) <= 1e-3 * np.abs(in_c).sum()


def test_families_without_parameters_have_gradients_in_x_and_scale():
    x = jnp.linspace(-2.0, 2.0, 9)
    in_x, in_scale = jax.grad(
        lambda x, c: cj.fake_quantize(x, None, c, bits=4, quantizer="normal_float").sum(), (0, 1)
    )(x, 1.2)
    np.testing.assert_array_equal(in_x, np.abs(x) < 1.2)
    assert np.isfinite(in_scale)


def test_many_tables_have_many_parameters():
    """One exponent, or sixteen slopes, for each column."""
    x = oracle.samples(400, SCALE, seed=3)[:300].reshape(100, 3)
    for quantizer, p in (("power", np.float32([[1.2, 1.7, 3.0]])), ("piecewise", slopes())):
        if quantizer == "piecewise":
            p = np.stack([np.roll(p, i) for i in range(3)])[None]
        together = gradient(quantizer, FOUR, p, x, np.ones_like(x))[1]
        for i in range(3):
            column = x[:, i]
            alone = gradient(quantizer, FOUR, p[0, i], column, np.ones_like(column))[1]
            np.testing.assert_allclose(together[0, i], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantizer", ["power", "piecewise", "free"])
def test_trainable_forms_stay_in_bounds_and_can_leave_them(quantizer):
    spec = check_spec(8, False, "midtread", quantizer)
    family = spec.family
    from_trainable = jax.jit(family.from_trainable)
    start = np.float32(family.start(spec))
    np.testing.assert_allclose(family.from_trainable(family.to_trainable(start)), start, rtol=1e-6)
    theta = jnp.asarray(np.where(np.arange(start.size) % 2, 99.0, -99.0), jnp.float32)
    theta = theta.reshape(start.shape)
    levels, _ = half(quantizer, (8, False, "midtread"), from_trainable(theta))
    assert np.all(np.diff(levels) > 0)
    assert levels[-1] == 1
    inwards = jax.jit(jax.grad(lambda theta: -jnp.sum(family.from_trainable(theta) ** 2)))(
        -abs(theta)
    )
    assert np.all(np.isfinite(inwards))


def test_chain_is_of_mu_law_alone():
    with pytest.raises(ValueError, match="`gradient` must be 'identity' for quantizer='power'"):
        cj.fake_quantize(1.0, 2.0, 1.0, bits=4, quantizer="power", gradient="chain")


@pytest.mark.parametrize(
    ("quantizer", "mu", "grid", "match"),
    [
        ("nope", 1.0, "midtread", "`quantizer` must be one of mu_law, uniform, power"),
        ("power", 0.5, "midtread", "`mu` must be the exponent of quantizer 'power', at least 1"),
        ("uniform", 2.0, "midtread", "`mu` must be None for quantizer='uniform'"),
        ("piecewise", np.ones(5), "midtread", "`mu` must be the 16 slopes"),
        ("piecewise", -np.ones(16), "midtread", "positive and finite in float32, got -1"),
        ("free", np.ones(5), "midtread", r"of shape \(7,\), behind the axes"),
        ("apot", None, "midrise", "`grid` must be midtread for quantizer='apot'"),
    ],
)
def test_wrong_arguments(quantizer, mu, grid, match):
    with pytest.raises(ValueError, match=match):
        cj.codebook(mu, 1.0, bits=4, grid=grid, quantizer=quantizer)
