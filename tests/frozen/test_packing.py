"""Packed codes, against NumPy's own bits, and levels looked up, against its own indexing."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import compand_jax as cj
from compand_jax.frozen.packing import (
    CARRIER,
    as_carrier,
    expand,
    from_carrier,
    nearest_level,
    pack,
    packed_bytes,
    unpack,
)

BITS = range(1, 9)
CASES = list(itertools.product([2, 4, 5, 8], [True, False]))


def drawn(bits, shape, seed=0):
    return np.random.default_rng([seed, bits]).integers(0, 2**bits, shape).astype(np.uint8)


def bits_of(codes, bits):
    """Every code's bits, the lowest first, one after another, filled up to bytes."""
    stream = [code >> i & 1 for code in codes.reshape(-1).tolist() for i in range(bits)]
    return np.packbits(np.array(stream, np.uint8), bitorder="little")


@pytest.mark.parametrize("bits", BITS)
def test_packing_is_numpys(bits):
    for count in (0, 1, 2, 7, 8, 9, 16, 23, 40):
        codes = drawn(bits, count)
        packed = np.asarray(pack(jnp.asarray(codes), bits))
        assert packed.dtype == np.uint8
        np.testing.assert_array_equal(packed, bits_of(codes, bits))
        assert packed.size == packed_bytes(count, bits) == int(np.ceil(count * bits / 8))
        np.testing.assert_array_equal(unpack(jnp.asarray(packed), bits, (count,)), codes)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(BITS), st.lists(st.integers(0, 5), max_size=3), st.integers(0, 99))
def test_packing_and_back(bits, shape, seed):
    codes = drawn(bits, shape, seed)
    back = unpack(pack(jnp.asarray(codes), bits), bits, tuple(shape))
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("selections", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_expanding_is_indexing(bits, selections):
    codes = drawn(bits, (3, 5, 4))
    table = np.sort(np.random.default_rng(bits).normal(size=(4, 2**bits)).astype(np.float32))
    found = expand(jnp.asarray(codes), jnp.asarray(table[0]), selections=selections)
    np.testing.assert_array_equal(found, table[0][codes])
    found = expand(jnp.asarray(codes), jnp.asarray(table[None, None]), selections=selections)
    for channel in range(4):
        np.testing.assert_array_equal(found[..., channel], table[channel][codes[..., channel]])


@pytest.mark.parametrize("selections", [True, False])
@pytest.mark.parametrize(("bits", "signed"), [(1, False), *CASES])
def test_nearest_level_is_fake_quantize(bits, signed, selections):
    levels, thresholds = cj.codebook(2.5, 1.3, bits=bits, signed=signed)
    exact = np.concatenate([levels, thresholds, [0.0, -0.0, np.nan, np.inf, -np.inf, 9, -9]])
    around = [np.nextafter(thresholds, side) for side in (np.float32(-9), np.float32(9))]
    x = jnp.asarray(np.concatenate([exact, *around, -exact]), jnp.float32)
    find = jax.jit(lambda x: nearest_level(x, levels, thresholds, signed, selections=selections))
    expected = cj.fake_quantize(x, 2.5, 1.3, bits=bits, signed=signed)
    np.testing.assert_array_equal(find(x), expected)
    np.testing.assert_array_equal(np.signbit(find(x)), np.signbit(expected))


@pytest.mark.quick
def test_nothing_computes_with_a_carrier():
    codes = jnp.arange(256).astype(jnp.uint8)
    carrier = as_carrier(codes)
    assert carrier.dtype == CARRIER
    np.testing.assert_array_equal(from_carrier(carrier), codes)
    with (
        jax.numpy_dtype_promotion("standard"),
        pytest.raises(ValueError, match="no available implicit dtype promotion path"),
    ):
        carrier @ jnp.ones(256)
