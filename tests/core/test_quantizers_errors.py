"""Bad arguments: each refused by name, with what was required and what was got."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compand_jax as cj

X = jnp.linspace(-1, 1, 12).reshape(4, 3)
CODES = jnp.zeros((4, 3), jnp.int8)
# Unwrapped: outside pytest there is no beartype, and a float for `bits` reaches the library.
codebook, quantize, dequantize, fake_quantize = map(
    inspect.unwrap, (cj.codebook, cj.quantize, cj.dequantize, cj.fake_quantize)
)
FUNCTIONS = {
    "codebook": lambda mu=1.0, scale=1.0, **kwargs: codebook(mu, scale, **kwargs),
    "quantize": lambda mu=1.0, scale=1.0, **kwargs: quantize(X, mu, scale, **kwargs),
    "dequantize": lambda mu=1.0, scale=1.0, **kwargs: dequantize(CODES, mu, scale, **kwargs),
    "fake_quantize": lambda mu=1.0, scale=1.0, **kwargs: fake_quantize(X, mu, scale, **kwargs),
}
EACH = pytest.mark.parametrize("call", FUNCTIONS.values(), ids=FUNCTIONS)
ELEMENTWISE = pytest.mark.parametrize("call", list(FUNCTIONS.values())[1:], ids=list(FUNCTIONS)[1:])
pytestmark = pytest.mark.quick


@EACH
@pytest.mark.parametrize("bits", [0, 9, -3, 2.5, 4.0, True, "4", None])
def test_bits(call, bits):
    with pytest.raises((ValueError, TypeError), match=rf"`bits` must be .* got {bits!r}"):
        call(bits=bits)


@EACH
def test_one_signed_bit_has_no_midtread(call):
    with pytest.raises(ValueError, match=r"`bits` must be .*2.* got 1.*midrise"):
        call(bits=1)


@EACH
def test_midrise_is_signed(call):
    with pytest.raises(ValueError, match=r"`grid`.*midrise.*signed"):
        call(bits=4, signed=False, grid="midrise")


@EACH
@pytest.mark.parametrize("grid", ["mid-tread", "", "MIDTREAD"])
def test_unknown_grid(call, grid):
    with pytest.raises(ValueError, match=rf"`grid` must be .*midtread.*midrise.* got '{grid}'"):
        call(bits=4, grid=grid)


@pytest.mark.parametrize("gradient", ["straight", ""])
def test_unknown_gradient(gradient):
    match = rf"`gradient` must be .*identity.*chain.* got '{gradient}'"
    with pytest.raises(ValueError, match=match):
        fake_quantize(X, 1.0, 1.0, bits=4, gradient=gradient)


@EACH
@pytest.mark.parametrize("mu", [-1.0, -1e-6, float("nan"), float("inf")])
@pytest.mark.parametrize("convert", [float, np.float32, jnp.float32])
def test_mu(call, mu, convert):
    with pytest.raises(ValueError, match=r"`mu` must be .* got .*(-|nan|inf)"):
        call(mu=convert(mu), bits=4)


@EACH
@pytest.mark.parametrize("scale", [0.0, -0.0, -2.0, float("nan"), float("inf")])
@pytest.mark.parametrize("convert", [float, np.float32, jnp.float32])
def test_scale(call, scale, convert):
    with pytest.raises(ValueError, match=r"`scale` must be .* got .*(0|-2|nan|inf)"):
        call(scale=convert(scale), bits=4)


@ELEMENTWISE
@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_one_bad_channel_is_enough(call, bad):
    channels = jnp.float32([[1, bad, 1]])
    with pytest.raises(ValueError, match=r"`mu` must be"):
        call(mu=channels, bits=4)
    with pytest.raises(ValueError, match=r"`scale` must be"):
        call(scale=channels, bits=4)


@ELEMENTWISE
@pytest.mark.parametrize("shape", [(3,), (1,), (1, 1, 3), (1, 2), (4, 4)])
def test_mu_and_scale_are_scalars_or_broadcast_at_the_same_rank(call, shape):
    ones = jnp.ones(shape)
    for static in (
        call,
        lambda **kwargs: jax.eval_shape(functools.partial(call, bits=4), **kwargs),
    ):
        kwargs = {"bits": 4} if static is call else {}
        with pytest.raises(ValueError, match=rf"`mu` must be a scalar or .*got.*{shape[0]}"):
            static(mu=ones, **kwargs)
        with pytest.raises(ValueError, match=rf"`scale` must be a scalar or .*got.*{shape[0]}"):
            static(scale=ones, **kwargs)


@pytest.mark.parametrize("function", [quantize, fake_quantize])
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_, jnp.complex64])
def test_x_is_floating(function, dtype):
    x = jnp.ones((4, 3), dtype)
    with pytest.raises(TypeError, match=rf"`x` must be floating.* got {jnp.dtype(dtype).name}"):
        function(x, 1.0, 1.0, bits=4)
    with pytest.raises(TypeError, match=r"`x` must be floating"):
        jax.eval_shape(functools.partial(function, mu=1.0, scale=1.0, bits=4), x)


@pytest.mark.parametrize(("function", "name"), [(cj.mu_law_compress, "x"), (cj.mu_law_expand, "y")])
def test_the_curve_takes_floating_values(function, name):
    with pytest.raises(TypeError, match=rf"`{name}` must be floating.* got int32.*{name}\.astype"):
        function(jnp.arange(3), 1.0)


@pytest.mark.parametrize(
    ("dtype", "signed"),
    [
        (jnp.uint8, True),
        (jnp.int8, False),
        (jnp.int32, True),
        (jnp.float32, True),
        (jnp.bool_, False),
    ],
)
def test_codes_have_the_type_of_quantize(dtype, signed):
    wanted = "int8" if signed else "uint8"
    match = rf"`codes` must be {wanted}.* got {jnp.dtype(dtype).name}"
    with pytest.raises(TypeError, match=match):
        dequantize(jnp.zeros((4, 3), dtype), 1.0, 1.0, bits=4, signed=signed)


def test_codes_closed_over_by_a_jitted_function():
    levels = jax.jit(lambda mu: dequantize(CODES, mu, 1.0, bits=4))(1.0)
    np.testing.assert_array_equal(levels, np.zeros(CODES.shape))


@pytest.mark.parametrize("code", [-8, 8])
def test_codes_in_range(code):
    codes = CODES.at[1, 1].set(code)
    with pytest.raises(ValueError, match=rf"`codes` must be in \[-7, 7\].* got .*{code}"):
        dequantize(codes, 1.0, 1.0, bits=4)


@pytest.mark.parametrize("function", [quantize, fake_quantize])
def test_traced_values_are_not_checked_but_static_facts_are(function):
    at = functools.partial(function, bits=4)
    assert jax.jit(at)(X, -0.5, 1.0).shape == X.shape
    assert jax.jit(at)(X, 1.0, -1.0).shape == X.shape
    with pytest.raises(ValueError, match="`bits`"):
        jax.jit(functools.partial(function, bits=9))(X, 1.0, 1.0)
    # A concrete mu is checked inside a jitted function as well.
    with pytest.raises(ValueError, match="`mu`"):
        jax.jit(lambda x: at(x, -0.5, 1.0))(X)


def test_messages_are_one_line():
    for call, arguments in (
        (FUNCTIONS["quantize"], {"bits": 9}),
        (FUNCTIONS["quantize"], {"bits": 1}),
        (FUNCTIONS["quantize"], {"bits": 4, "grid": "x"}),
        (FUNCTIONS["quantize"], {"bits": 4, "mu": -1.0}),
        (FUNCTIONS["quantize"], {"bits": 4, "scale": 0.0}),
        (FUNCTIONS["quantize"], {"bits": 4, "scale": jnp.zeros((4, 3))}),
    ):
        with pytest.raises(ValueError, match="`") as caught:
            call(**arguments)
        assert "\n" not in str(caught.value)


def test_forward_mode_is_refused():
    def quantized(x):
        return fake_quantize(x, 1.0, 1.0, bits=4)

    with pytest.raises(TypeError, match=r"forward-mode autodiff.*custom_vjp"):
        jax.jvp(quantized, (0.3,), (1.0,))
    with pytest.raises(TypeError, match=r"forward-mode autodiff.*custom_vjp"):
        jax.jacfwd(quantized)(0.3)
