"""Codes, levels and fake-quantized values, against a float64 oracle and against each other.

Compiling costs more than running here: values come in one shape wherever the shape is free.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import CASES, FEW, MUS, spec

import compand_jax as cj

SCALE = np.float32(1.7)
SHAPE = (10, 300, 7)
SIZE = math.prod(SHAPE)
HALVES = [jnp.bfloat16, jnp.float16]
THREE = [(4, True, "midtread"), (8, False, "midtread"), (2, True, "midrise")]
ALL = [pytest.param(c, marks=pytest.mark.quick) if c == THREE[0] else c for c in CASES]


def raw(array):
    """Returns the bytes, so that -0.0 differs from 0.0 and NaN equals itself."""
    array = np.asarray(array)
    return array.view(f"u{array.dtype.itemsize}")


def run(function, values, mu, scale, case, **kwargs):
    """Returns function(values), computed in `SHAPE`."""
    values = np.asarray(values)
    padded = np.zeros(SIZE, values.dtype)
    padded[: values.size] = values
    x = jnp.asarray(padded.reshape(SHAPE))
    return np.asarray(function(x, mu, scale, **spec(case), **kwargs)).ravel()[: values.size]


@functools.cache
def million():
    x = oracle.samples(10**6, SCALE)
    return jnp.asarray(x), x.astype(np.float64)


@pytest.mark.parametrize("mu", MUS)
@pytest.mark.parametrize("case", ALL)
def test_codes_equal_the_oracle_on_a_million_values(case, mu):
    x, exact_x = million()
    codes = np.asarray(cj.quantize(x, mu, SCALE, **spec(case)))
    assert codes.dtype == (np.int8 if case[1] else np.uint8)
    numbers = (oracle.exact(mu), oracle.exact(SCALE), *case)
    expected = oracle.quantize(exact_x, *numbers)
    wrong = np.flatnonzero(codes != expected)
    assert len(wrong) < 1000
    assert np.all(oracle.near_threshold(exact_x[wrong], *numbers))
    assert np.all(np.abs(codes[wrong].astype(int) - expected[wrong]) == 1)
    assert np.array_equal(np.unique(codes), oracle.code_range(*case))


@pytest.mark.parametrize("mu", MUS)
@pytest.mark.parametrize("case", ALL)
def test_codebook_equals_the_oracle(case, mu):
    levels, thresholds = (np.asarray(a) for a in cj.codebook(mu, SCALE, **spec(case)))
    expected = oracle.codebook(oracle.exact(mu), oracle.exact(SCALE), *case)
    assert levels.dtype == thresholds.dtype == np.float32
    np.testing.assert_allclose(levels, expected[0], rtol=2e-6)
    np.testing.assert_allclose(thresholds, expected[1], rtol=2e-6)
    n = oracle.steps(*case)
    assert len(levels) == (2 * n if case[2] == "midrise" else 2 * n + 1 if case[1] else n + 1)
    assert len(thresholds) == len(levels) - 1
    assert np.all(levels[:-1] < thresholds)
    assert np.all(thresholds < levels[1:])
    if case[2] == "midtread":
        assert levels[-1] == SCALE  # the oracle's tolerance would not see the last bit


@pytest.mark.parametrize("mu", MUS)
@pytest.mark.parametrize("case", ALL)
def test_every_level_is_a_fixed_point_with_its_own_code(case, mu):
    levels = np.asarray(cj.codebook(mu, SCALE, **spec(case))[0])
    codes = run(cj.quantize, levels, mu, SCALE, case)
    np.testing.assert_array_equal(codes, oracle.code_range(*case))
    np.testing.assert_array_equal(run(cj.dequantize, codes, mu, SCALE, case), levels)
    np.testing.assert_array_equal(run(cj.fake_quantize, levels, mu, SCALE, case), levels)


@pytest.mark.parametrize("mu", MUS)
@pytest.mark.parametrize("case", ALL)
def test_ties_go_inwards_on_midtread_and_outwards_on_midrise(case, mu):
    levels, thresholds = (np.asarray(a) for a in cj.codebook(mu, SCALE, **spec(case)))
    codes = oracle.code_range(*case)
    lower_at_tie = (thresholds >= 0) == (case[2] == "midtread")
    below = np.nextafter(thresholds, np.float32(-np.inf))
    below[thresholds == 0] = -2e-38  # the float next to 0 is denormal, and flushed
    for x, lower in (
        (thresholds, lower_at_tie),
        (below, np.ones_like(lower_at_tie)),
        (np.nextafter(thresholds, np.float32(np.inf)), np.zeros_like(lower_at_tie)),
    ):
        got = run(cj.quantize, x, mu, SCALE, case)
        np.testing.assert_array_equal(got, np.where(lower, codes[:-1], codes[1:]))
        got = run(cj.fake_quantize, x, mu, SCALE, case)
        np.testing.assert_array_equal(got, np.where(lower, levels[:-1], levels[1:]))


@pytest.mark.parametrize("case", THREE)
def test_ties_are_ties_wherever_the_table_was_compiled(case):
    quantize, codebook = (functools.partial(f, **spec(case)) for f in (cj.quantize, cj.codebook))
    codes = oracle.code_range(*case)

    @jax.jit
    def codes_of_thresholds(mu, scale):
        return quantize(codebook(mu, scale)[1], mu, scale)

    for mu in MUS:
        thresholds = codebook(mu, SCALE)[1]
        lower_at_tie = (np.asarray(thresholds) >= 0) == (case[2] == "midtread")
        expected = np.where(lower_at_tie, codes[:-1], codes[1:])
        operands = jnp.float32(mu), jnp.asarray(SCALE)
        np.testing.assert_array_equal(codes_of_thresholds(*operands), expected)
        np.testing.assert_array_equal(jax.jit(quantize)(thresholds, *operands), expected)


@functools.cache
def _operands(channels, dtype):
    """Returns x with every special value, and what to quantize it with, one after the other."""
    x = jnp.asarray(oracle.samples(SIZE, SCALE, seed=1).reshape(SHAPE)).astype(dtype)
    if not channels:
        return x, [(jnp.float32(mu), jnp.asarray(SCALE)) for mu in MUS]
    scale = jnp.linspace(0.3, 2.0, 7, dtype=jnp.float32).reshape(1, 1, 7)
    return x, [(jnp.float32(MUS).reshape(1, 1, 7), scale)]


def _check_round_trip(case, x, parameters, *, each_jitted=True):
    """Codes and back, eagerly and in one program; and quantizing each way in a program of its own.

    The last two are the eager ones' in a wrapper: not every case needs them.
    """
    quantize, fake_quantize = (
        functools.partial(f, **spec(case)) for f in (cj.quantize, cj.fake_quantize)
    )
    dequantize = functools.partial(cj.dequantize, **spec(case), dtype=x.dtype)

    def round_trip(x, mu, scale):
        return dequantize(quantize(x, mu, scale), mu, scale)

    jit_round_trip, jit_dequantize, jit_fake = map(jax.jit, (round_trip, dequantize, fake_quantize))
    for mu, scale in parameters:
        faked = fake_quantize(x, mu, scale)
        assert faked.dtype == x.dtype
        assert faked.shape == x.shape
        codes = quantize(x, mu, scale)
        np.testing.assert_array_equal(raw(dequantize(codes, mu, scale)), raw(faked))
        np.testing.assert_array_equal(raw(jit_round_trip(x, mu, scale)), raw(faked))
        if each_jitted:
            np.testing.assert_array_equal(raw(jit_fake(x, mu, scale)), raw(faked))
            np.testing.assert_array_equal(raw(jit_dequantize(codes, mu, scale)), raw(faked))


@pytest.mark.parametrize("case", ALL)
def test_dequantized_codes_are_the_fake_quantized_values_bit_for_bit(case):
    _check_round_trip(case, *_operands(False, jnp.float32), each_jitted=case in FEW)


@pytest.mark.parametrize("case", FEW)
def test_bit_for_bit_per_channel_too(case):
    _check_round_trip(case, *_operands(True, jnp.float32))


@pytest.mark.parametrize(("dtype", "channels"), [(jnp.bfloat16, True), (jnp.float16, False)])
@pytest.mark.parametrize("case", THREE)
def test_bit_for_bit_in_half_precision_too(case, dtype, channels):
    _check_round_trip(case, *_operands(channels, dtype))


def test_bit_for_bit_where_only_one_of_the_two_is_per_channel():
    x, [(mu, scale)] = _operands(True, jnp.float32)
    _check_round_trip(THREE[0], x, [(mu, jnp.asarray(SCALE))])
    _check_round_trip(THREE[1], x, [(jnp.float32(5), scale)])


@pytest.mark.parametrize(("dtype", "channels"), [(jnp.bfloat16, True), (jnp.float16, False)])
@pytest.mark.parametrize("case", THREE)
def test_half_precision_is_float32_with_the_result_rounded(case, dtype, channels):
    x, parameters = _operands(channels, dtype)
    wide = x.astype(jnp.float32)
    for mu, scale in parameters:
        codes = cj.quantize(x, mu, scale, **spec(case))
        np.testing.assert_array_equal(codes, cj.quantize(wide, mu, scale, **spec(case)))
        got = cj.fake_quantize(x, mu, scale, **spec(case))
        expected = cj.fake_quantize(wide, mu, scale, **spec(case)).astype(dtype)
        np.testing.assert_array_equal(raw(got), raw(expected))


@pytest.mark.parametrize("mu", MUS)
@pytest.mark.parametrize("case", ALL)
def test_is_idempotent_monotone_bounded_and_odd(case, mu):
    x = np.sort(oracle.samples(SIZE, SCALE, seed=3))
    quantized = run(cj.fake_quantize, x, mu, SCALE, case)
    again = run(cj.fake_quantize, quantized, mu, SCALE, case)
    np.testing.assert_array_equal(raw(again), raw(quantized))
    assert np.all(np.diff(quantized) >= 0)
    assert np.max(np.abs(quantized)) <= SCALE
    if case[1]:
        x = x[x != 0] if case[2] == "midrise" else x
        mirrored = run(cj.fake_quantize, -x, mu, SCALE, case)
        np.testing.assert_array_equal(mirrored, -run(cj.fake_quantize, x, mu, SCALE, case))
    else:
        assert np.all(quantized[x <= 0] == 0)
        assert not np.any(run(cj.quantize, -np.abs(x), mu, SCALE, case))


@pytest.mark.parametrize("dtype", [jnp.float32, *HALVES])
@pytest.mark.parametrize("case", THREE)
def test_special_values(case, dtype):
    x = np.asarray(jnp.asarray([np.nan, np.inf, -np.inf, 0.0, -0.0], dtype))
    levels = np.asarray(cj.codebook(5.0, SCALE, **spec(case))[0])
    at_zero = levels[list(oracle.code_range(*case)).index(0)]
    expected = jnp.asarray([np.nan, levels[-1], levels[0], at_zero, at_zero]).astype(dtype)
    got = run(cj.fake_quantize, x, 5.0, SCALE, case)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.astype(np.float32), np.asarray(expected, np.float32))


@pytest.mark.parametrize("mu", [0.0, 5.0])
@pytest.mark.parametrize("case", THREE)
def test_max_pooling_commutes(case, mu):
    x = jnp.asarray(oracle.samples(4 * 12 * 12 * 3, SCALE, seed=4).reshape(4, 12, 12, 3))
    scale = jnp.float32([0.5, 1.7, 2.5]).reshape(1, 1, 1, 3)
    quantize = functools.partial(cj.fake_quantize, mu=mu, scale=scale, **spec(case))
    pool = functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))
    np.testing.assert_array_equal(quantize(pool(x)), pool(quantize(x)))


@pytest.mark.parametrize("case", ALL)
def test_mu_zero_is_uniform_exactly(case):
    _, signed, grid = case
    n = oracle.steps(*case)
    levels, thresholds = (np.asarray(a) for a in cj.codebook(0.0, SCALE, **spec(case)))
    codes = oracle.code_range(*case).astype(np.float64)
    y = (codes + 0.5) / n if grid == "midrise" else codes / n
    np.testing.assert_array_max_ulp(levels, np.float32(np.float64(SCALE) * y), maxulp=1)
    gaps = np.diff(thresholds.astype(np.float64))
    np.testing.assert_allclose(gaps, np.float64(SCALE) / n, rtol=3e-7 * n)
    # With a scale of n the levels are (half) integers: here even the rounding is plain.
    x = np.random.default_rng(5).uniform(-1.2 * n, 1.2 * n, 10_000).astype(np.float32)
    if grid == "midrise":
        plain = np.sign(x) * np.minimum(np.floor(np.abs(x)) + 0.5, n - 0.5)
    else:
        plain = np.clip(np.round(x), -n if signed else 0, n)
    got = run(cj.fake_quantize, x, 0.0, float(n), case)
    np.testing.assert_allclose(got, plain, rtol=1.5e-7)


@pytest.mark.parametrize("case", FEW)
def test_channels_are_quantized_each_with_its_own(case):
    x, [(mu, scale)] = _operands(True, jnp.float32)
    codes = np.asarray(cj.quantize(x, mu, scale, **spec(case)))
    levels, thresholds = cj.codebook(mu, scale, **spec(case))
    n = len(oracle.code_range(*case))
    assert levels.shape == (1, 1, 7, n)
    assert thresholds.shape == (1, 1, 7, n - 1)
    for channel in range(7):
        numbers = (oracle.exact(mu[0, 0, channel]), oracle.exact(scale[0, 0, channel]), *case)
        values = np.asarray(x[..., channel], np.float64)
        wrong = codes[..., channel] != oracle.quantize(values, *numbers)
        assert np.all(oracle.near_threshold(values[wrong], *numbers))
        table = oracle.codebook(*numbers)
        np.testing.assert_allclose(levels[0, 0, channel], table[0], rtol=2e-6)
        np.testing.assert_allclose(thresholds[0, 0, channel], table[1], rtol=2e-6)


def test_few_values_of_a_channel_are_looked_up_as_many_are():
    few = jax.random.normal(jax.random.key(0), (64, 3))
    many = jnp.tile(few, (2**13 // 64 + 1, 1))
    mu, scale = jnp.array([[0.0, 2.0, 255.0]]), jnp.array([[1.0, 2.0, 3.0]])
    found = [np.asarray(cj.fake_quantize(x, mu, scale, bits=8)) for x in (few, many)]
    np.testing.assert_array_equal(found[0], found[1][:64])


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 3e4, 1e20])
@pytest.mark.parametrize("case", FEW)
def test_any_scale_gives_the_codes_of_the_unit_scale(case, scale):
    scale = np.float32(scale)
    x = oracle.samples(SIZE, 1.0, seed=6, specials=False) * scale
    for mu in (0.0, 5.0):
        codes = run(cj.quantize, x, mu, scale, case)
        numbers = (np.float64(mu), np.float64(scale), *case)
        wrong = codes != oracle.quantize(x, *numbers)
        assert np.all(oracle.near_threshold(x[wrong].astype(np.float64), *numbers))


@pytest.mark.parametrize("case", THREE)
def test_values_are_the_same_under_vmap_and_scan(case):
    x = jnp.asarray(oracle.samples(7 * 3000, SCALE, seed=7).reshape(7, 3000))
    mus, scales = jnp.float32(MUS), jnp.linspace(0.5, 2, 7)

    def quantize(x, mu, scale):
        return cj.fake_quantize(x, mu, scale, **spec(case))

    expected = jnp.stack([quantize(*row) for row in zip(x, mus, scales, strict=True)])
    scanned = jax.lax.scan(lambda _, row: (None, quantize(*row)), None, (x, mus, scales))[1]
    np.testing.assert_allclose(jax.jit(jax.vmap(quantize))(x, mus, scales), expected, rtol=3e-7)
    np.testing.assert_allclose(scanned, expected, rtol=3e-7)


PROPERTY = settings(deadline=None, derandomize=True, max_examples=40)
ANY_CASE = st.sampled_from(CASES)
ANY_MU = st.floats(0, 255, width=32, allow_subnormal=False)
ANY_SCALE = st.floats(2.0**-10, 2.0**10, width=32)


@PROPERTY
@given(case=ANY_CASE, mu=ANY_MU, scale=ANY_SCALE, seed=st.integers(0, 1000))
def test_every_value_goes_to_the_level_between_its_thresholds(case, mu, scale, seed):
    x = oracle.samples(256, scale, seed, specials=False)
    levels, thresholds = (np.asarray(a) for a in cj.codebook(mu, scale, **spec(case)))
    got = run(cj.fake_quantize, x, mu, scale, case)
    edges = np.concatenate([[-np.inf], thresholds, [np.inf]])
    place = np.searchsorted(levels, got)
    np.testing.assert_array_equal(levels[place], got)
    assert np.all(edges[place] <= x)
    assert np.all(x <= edges[place + 1])


@PROPERTY
@given(case=ANY_CASE, mu=ANY_MU, scale=ANY_SCALE, power=st.integers(-8, 8))
def test_scaling_by_a_power_of_two_scales_the_result(case, mu, scale, power):
    x, factor = oracle.samples(256, scale, 8, specials=False), np.float32(2.0**power)
    got = run(cj.fake_quantize, x * factor, mu, scale * factor, case)
    np.testing.assert_array_equal(got, run(cj.fake_quantize, x, mu, scale, case) * factor)
