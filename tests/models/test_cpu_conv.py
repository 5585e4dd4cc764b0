"""A strided convolution whose gradient goes by space to depth, against XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from compand_jax.models.cpu_conv import conv_general_dilated, space_to_depth_conv, strided_conv

NHWC = ("NHWC", "HWIO", "NHWC")
CASES = [  # height and width, kernel, stride, padding
    pytest.param((32, 32), (11, 11), 4, ((5, 5), (5, 5)), marks=pytest.mark.quick),
    ((9, 14), (5, 7), 2, ((2, 1), (0, 3))),
    ((7, 8), (3, 3), 2, ((0, 0), (1, 1))),
    ((8, 8), (11, 11), 4, ((5, 5), (5, 5))),
]


def operands(size, kernel, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (2, *size, 3), (*kernel, 3, 4)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def reference(x, kernel, stride, padding):
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=NHWC)


@pytest.mark.parametrize(("size", "kernel", "stride", "padding"), CASES)
def test_equals_lax_with_its_gradients(size, kernel, stride, padding):
    x, w = operands(size, kernel)
    wanted, pull_back = jax.vjp(lambda x, w: reference(x, w, stride, padding), x, w)
    got, own_pull_back = jax.vjp(lambda x, w: strided_conv(x, w, stride, padding), x, w)
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_allclose(
        space_to_depth_conv(x, w, stride, padding), wanted, rtol=1e-5, atol=1e-4
    )
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=wanted.shape), jnp.float32)
    for mine, theirs in zip(own_pull_back(cotangent), pull_back(cotangent), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.quick
def test_only_the_gradient_to_the_input_goes_another_way():
    x, w = operands((32, 32), (11, 11))

    def loss(x, w):
        y = conv_general_dilated(x, w, (4, 4), ((5, 5), (5, 5)), dimension_numbers=numbers(x, w))
        return (y**2).sum()

    def convs(argnums):
        text = jax.jit(jax.grad(loss, argnums)).lower(x, w).as_text()
        return text.count("stablehlo.convolution"), "4x4x4" in text or "x48x" in text

    assert convs(1) == (2, False)
    assert convs((0, 1))[1]


def numbers(x, w):
    return lax.conv_dimension_numbers(x.shape, w.shape, NHWC)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keeps_the_dtype(dtype):
    x, w = operands((12, 12), (5, 5), dtype)
    gradients = jax.grad(lambda x, w: strided_conv(x, w, 2, ((0, 0), (0, 0))).sum(), (0, 1))(x, w)
    assert {g.dtype for g in gradients} == {jnp.dtype(dtype)}
