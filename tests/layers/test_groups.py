"""Scales by groups of inputs, in every layer: equal to quantizing by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

import compand_jax as cj
from compand_jax.layers.groups import expanded_scales, packed_scales

pytestmark = pytest.mark.filterwarnings("ignore:the quantized model is not calibrated")
KEY = jax.random.key(0)
SIZE = 4
CONFIG = cj.QuantConfig(weight_bits=3, act_bits=None, weight_granularity=SIZE)
# The layer, its input's shape, and its weight as [before and groups, SIZE, behind].
LINEN = {
    "DenseGeneral": (nn.DenseGeneral((2, 3), axis=(-2, -1)), (3, 2, 8), (4, SIZE, 6)),
    "Einsum": (nn.Einsum((2, 8, 5), "bhd,hdk->bk", False), (3, 2, 8), (4, SIZE, 5)),
    "Conv": (nn.Conv(6, (3, 3)), (2, 5, 5, 8), (18, SIZE, 6)),
    "Embed": (nn.Embed(5, 8), None, (10, SIZE, 1)),
}


def by_hand(weight, mu, scale, grouped_shape):
    values = np.asarray(weight, np.float64).reshape(grouped_shape)
    levels = oracle.fake_quantize(values, float(mu), np.asarray(scale), 3, True, "midtread")
    return levels.reshape(weight.shape)


@pytest.mark.parametrize("kind", LINEN)
def test_linen_layers_multiply_the_levels_of_their_groups(kind):
    model, shape, grouped_shape = LINEN[kind]
    x = jnp.arange(5) if shape is None else jax.random.normal(KEY, shape)
    variables = jax.jit(model.init)(KEY, x)
    qmodel, quantized = cj.quantize_model(model, CONFIG).calibrate(
        variables, [x], calibration="absmax"
    )
    own = qmodel.quantizers(quantized)[""]
    assert own["weight_scale"].shape == (grouped_shape[0], 1, grouped_shape[2])
    name = "embedding" if kind == "Embed" else "kernel"
    weight = variables["params"][name]
    largest = np.abs(np.reshape(weight, grouped_shape)).max(1, keepdims=True)
    np.testing.assert_allclose(own["weight_scale"], largest, rtol=1e-6)
    levels = by_hand(weight, own["weight_mu"], own["weight_scale"], grouped_shape)
    levels = jnp.asarray(levels, jnp.float32)
    expected = jax.jit(model.apply)({"params": {**variables["params"], name: levels}}, x)
    found = jax.jit(qmodel.apply)(quantized, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["LinearGeneral", "Conv"])
def test_nnx_layers_have_the_numbers_of_linen(kind):
    rngs = nnx.Rngs(0)
    layer, of_linen, shape = {
        "LinearGeneral": (
            nnx.LinearGeneral((2, 8), (2, 3), axis=(-2, -1), rngs=rngs),
            nn.DenseGeneral((2, 3), axis=(-2, -1)),
            (3, 2, 8),
        ),
        "Conv": (nnx.Conv(8, 6, (3, 3), rngs=rngs), nn.Conv(6, (3, 3)), (2, 5, 5, 8)),
    }[kind]
    x = jax.random.normal(KEY, shape)
    params = {name: getattr(layer, name)[...] for name in ("kernel", "bias")}
    qmodel, variables = cj.quantize_model(of_linen, CONFIG).calibrate({"params": params}, [x])
    qlayer = cj.nnx.quantize(layer, CONFIG)
    cj.nnx.calibrate(qlayer, [x])
    np.testing.assert_array_equal(
        cj.nnx.quantizers(qlayer)[""]["weight_scale"],
        qmodel.quantizers(variables)[""]["weight_scale"],
    )
    found, expected = nnx.jit(qlayer)(x), jax.jit(qmodel.apply)(variables, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_group_size_that_does_not_divide_says_which_do():
    x = jnp.ones((1, 12))
    config = cj.QuantConfig(act_bits=None, weight_granularity=5)
    match = "must divide the 12 inputs of site '', got 5: give one of 1, 2, 3, 4, 6, 12, or a Rule"
    with pytest.raises(ValueError, match=match):
        cj.quantize_model(nn.Dense(3), config).init(KEY, x)
    with pytest.raises(ValueError, match=match):
        cj.nnx.quantize(nnx.Linear(12, 3, rngs=nnx.Rngs(0)), config)
    rule = cj.Rule("", weight_granularity=6)
    cj.quantize_model(nn.Dense(3), cj.QuantConfig(weight_granularity=5, rules=(rule,))).init(KEY, x)


@pytest.mark.parametrize("size", [0, -1, 2.5, True])
def test_what_is_no_group_size(size):
    with pytest.raises(ValueError, match=rf"`weight_granularity` must be a number of .*{size!r}"):
        untyped(cj.QuantConfig)(weight_granularity=size)


def untyped(kind):
    """Returns a class that makes its dataclass without the types that the tests check."""

    def make(**fields):
        made = object.__new__(kind)
        for name, value in {**vars(kind()), **fields}.items():
            object.__setattr__(made, name, value)
        kind.__post_init__(made)
        return made

    return make


def test_levels_without_calibration_and_sites_of_a_checkpoint():
    x, model = jax.random.normal(KEY, (3, 8)), nn.Dense(6)
    qmodel = cj.quantize_model(model, CONFIG)
    variables = qmodel.init(KEY, x)
    own = variables["compand"]
    levels = by_hand(variables["params"]["kernel"], 2.0, np.exp(own["weight_scale"]), (2, SIZE, 6))
    found = qmodel.apply(variables, x)
    np.testing.assert_allclose(found, x @ jnp.asarray(levels, jnp.float32), rtol=1e-5, atol=1e-6)
    calibrated, _ = qmodel.calibrate(variables, [x])
    sites = cj.sites_from_json(cj.sites_to_json(calibrated.sites))
    assert sites == dict(calibrated.sites)
    other = cj.QuantConfig(weight_bits=3, act_bits=None, weight_granularity=2)
    with pytest.raises(ValueError, match="weight_granularity=4, the config has 2"):
        cj.quantize_model(model, other, sites=sites)
    with pytest.raises(ValueError, match=r"for weight_granularity=2, got one of shape \(2, 1, 6\)"):
        cj.quantize_model(model, other).apply(variables, x)


def test_error_feedback_keeps_the_scales_and_lessens_the_outputs_error():
    x = jax.random.normal(KEY, (256, 32)) @ jax.random.normal(jax.random.key(1), (32, 32))
    model = nn.Dense(16, use_bias=False)
    variables = model.init(KEY, x)
    qmodel = cj.quantize_model(model, CONFIG)
    plain = qmodel.calibrate(variables, [x])[1]
    calibrated, fed = qmodel.calibrate(variables, [x], error_feedback=True)
    np.testing.assert_array_equal(fed["compand"]["weight_scale"], plain["compand"]["weight_scale"])
    exact = model.apply(variables, x)
    errors = [np.mean((qmodel.apply(v, x) - exact) ** 2) for v in (plain, fed)]
    assert errors[1] < 0.9 * errors[0]
    own = calibrated.quantizers(fed)[""]
    kernel = fed["params"]["kernel"]
    levels = by_hand(kernel, own["weight_mu"], own["weight_scale"], (8, SIZE, 16))
    np.testing.assert_allclose(kernel, levels, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_frozen_with_scales_as_they_are_stored(dtype, tmp_path):
    x = jax.random.normal(KEY, (3, 64))
    model = nn.Dense(32, use_bias=False)
    config = cj.QuantConfig(weight_bits=4, act_bits=None, weight_granularity=16, scale_dtype=dtype)
    qmodel, variables = cj.quantize_model(model, config).calibrate(model.init(KEY, x), [x])
    frozen = cj.freeze(qmodel, variables, x)
    scales = frozen.arrays["scales"][""]
    assert (scales.dtype, scales.shape) == (jnp.dtype(dtype), (4, 1, 32))
    np.testing.assert_array_equal(frozen.apply(x), jax.jit(qmodel.apply)(variables, x))
    frozen.save(tmp_path / "grouped.safetensors")
    loaded = cj.load_frozen(tmp_path / "grouped.safetensors", model)
    np.testing.assert_array_equal(loaded.apply(x), frozen.apply(x))
    # 2048 codes of 4 bits, 128 scales, of uint8 a unit, mu; a frozen table has levels for mu.
    bits = 8 * (1024 + 128 * scales.dtype.itemsize + 4 * (dtype == "uint8") + 4) / 2048
    assert qmodel.summary(variables).splitlines()[1].split()[-1] == f"{bits:.3g}"
    qlayer = cj.nnx.quantize(nnx.Linear(64, 32, use_bias=False, rngs=nnx.Rngs(0)), config)
    cj.nnx.calibrate(qlayer, [x])
    frozen = cj.freeze(qlayer)
    np.testing.assert_allclose(frozen.apply(x), qlayer(x), rtol=1e-5, atol=1e-6)


def test_scales_of_eight_bits_are_multiples_of_a_unit():
    scale = jnp.array([0.5, 1.0, 2.55, 1e-6])
    codes, unit = packed_scales(scale, "uint8", (-1,))
    np.testing.assert_array_equal(codes, [50, 100, 255, 1])
    np.testing.assert_allclose(expanded_scales(codes, unit), [0.5, 1.0, 2.55, 0.01], rtol=1e-6)


def test_gradients_reach_each_groups_scale():
    x = jax.random.normal(KEY, (3, 8))
    qmodel = cj.quantize_model(nn.Dense(6), CONFIG)
    variables = qmodel.init(KEY, x)

    def loss(compand):
        return jnp.sum(qmodel.apply({**variables, "compand": compand}, x) ** 2)

    gradient = jax.grad(loss)(variables["compand"])
    assert gradient["weight_scale"].shape == (2, 1, 6)
    assert jnp.all(gradient["weight_scale"] != 0)
