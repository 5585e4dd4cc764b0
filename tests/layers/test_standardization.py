"""Weight standardization, Q_s(w) = m + s Q((w - m)/s): gradients, calibration, frozen form."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from small_models import KEY, Block, SetUp, Stack, normal, pull_back

import compand_jax as cj
from compand_jax.layers.standardization import moments

pytestmark = pytest.mark.filterwarnings("ignore:the quantized model is not calibrated")
CONFIG = cj.QuantConfig(weight_bits=3, act_bits=None, weight_standardization=True)
KERNEL = 0.1 * normal(16, 12) + 0.5  # its mean is far from zero


def dense(kernel, **fields):
    """Returns a quantized layer, its variables, and the input that gives its kernel back."""
    qmodel = cj.quantize_model(nn.Dense(kernel.shape[1]), cj.QuantConfig(**fields))
    variables = {"params": {"kernel": kernel, "bias": jnp.zeros(kernel.shape[1])}}
    x = jnp.eye(kernel.shape[0])
    return *qmodel.calibrate(variables, [x]), x


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("gradients", ["plain", "lsq"])
def test_values_and_gradients_are_the_equations(bits, gradients):
    grid = "midrise" if bits == 2 else "midtread"
    fields = {"weight_bits": bits, "act_bits": None, "grid": grid, "weight_standardization": True}
    fields |= {"mu_gradient": gradients, "scale_gradient": gradients}
    qmodel, variables, x = dense(KERNEL, **fields)
    theta, rho = math.log1p(1.3), math.log(1.9)
    variables["compand"] = {"weight_mu": jnp.float32(theta), "weight_scale": jnp.float32(rho)}
    quantized, found = pull_back(qmodel.apply, variables, x)

    w, n = np.asarray(KERNEL, np.float64), KERNEL.size
    mu, c, case = math.expm1(theta), math.exp(rho), (bits, True, grid)
    m, s = w.mean(), w.std()
    u = (w - m) / s
    assert not oracle.near_threshold(u, mu, c, *case).any()
    q = oracle.fake_quantize(u, mu, c, *case)
    np.testing.assert_allclose(quantized, m + s * q, rtol=2e-6)

    g = np.sin(np.arange(n) + 1.0).reshape(w.shape)  # what pull_back multiplies with
    passes, dmu, dscale = oracle.gradients(u, mu, c, *case)
    in_m, in_s = np.sum(g * (1 - passes)), np.sum(g * (q - u * passes))
    wanted = g * passes + in_m / n + in_s * (w - m) / (n * s)
    np.testing.assert_allclose(found["params"]["kernel"], wanted, atol=2e-5)
    factor = 1 / math.sqrt(n * oracle.steps(*case)) if gradients == "lsq" else 1
    own = found["compand"]
    np.testing.assert_allclose(own["weight_mu"], factor * s * np.sum(g * dmu) * (1 + mu), rtol=2e-4)
    np.testing.assert_allclose(own["weight_scale"], factor * s * np.sum(g * dscale) * c, rtol=2e-4)


def test_the_function_stays_what_it_was_as_bits_grow():
    qmodel, variables, x = dense(KERNEL, weight_bits=8, act_bits=None, weight_standardization=True)
    np.testing.assert_allclose(qmodel.apply(variables, x), KERNEL, atol=0.02 * KERNEL.std())


@pytest.mark.parametrize("calibration", ["mse", "output"])
def test_calibration_sees_the_standardized_weight(calibration):
    x = normal(32, 16, seed=5)
    qmodel = cj.quantize_model(nn.Dense(12, use_bias=False), CONFIG)
    found = []
    for kernel in (KERNEL, 40 * KERNEL - 3):  # the same, standardized
        variables = {"params": {"kernel": kernel}}
        found.append(qmodel.calibrate(variables, [x], calibration=calibration)[1]["compand"])
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, atol=2e-3)
    own = qmodel.quantizers({"params": {"kernel": KERNEL}, "compand": found[0]})[""]
    centred = KERNEL - KERNEL.mean()

    def error(mu, scale):  # in the units of the weight
        return np.sum((cj.fake_quantize(centred, mu, scale, bits=3) - centred) ** 2)

    if calibration == "mse":
        least = error(*cj.fit(centred, bits=3))
        assert error(own["weight_mu"], own["weight_scale"]) < 1.01 * least


@pytest.mark.parametrize("model", [SetUp(), Stack("scan")], ids=["layers", "stack"])
def test_frozen_is_the_same_with_the_mean_in_its_levels(model, tmp_path):
    x = normal(5, 4)
    config = cj.QuantConfig(weight_bits=3, act_bits=4, weight_standardization=True)
    variables = model.init(KEY, x)
    variables = jax.tree.map(lambda leaf: leaf + 0.2 if leaf.ndim > 1 else leaf, variables)
    qmodel, variables = cj.quantize_model(model, config).calibrate(variables, [x])
    expected = jax.jit(qmodel.apply)(variables, x)
    frozen = cj.freeze(qmodel, variables, x)
    np.testing.assert_allclose(frozen.apply(x), expected, atol=2e-6)
    frozen.save(tmp_path / "model.safetensors")
    loaded = cj.load_frozen(tmp_path / "model.safetensors", model)
    np.testing.assert_array_equal(loaded.apply(x), frozen.apply(x))
    site = next(iter(frozen.sites))
    levels = np.asarray(frozen.arrays["levels"][site])
    assert levels.shape == (7,)
    kernel = variables["params"]
    for name in site.split("/"):
        kernel = kernel[name]
    np.testing.assert_allclose(levels.mean(), kernel["kernel"].mean(), rtol=1e-5)
    assert set(qmodel.summary(variables).split()) >= set(qmodel.sites)


def test_a_stack_has_one_mean_and_deviation_for_all_its_layers():
    model, x = Stack("scan"), normal(5, 4)
    variables = model.init(KEY, x)
    kernel = variables["params"]["stack"]["dense"]["kernel"]
    kernel = kernel * jnp.arange(1.0, 4.0).reshape(3, 1, 1)
    variables["params"]["stack"]["dense"]["kernel"] = kernel
    qmodel, variables = cj.quantize_model(model, CONFIG).calibrate(variables, [x])
    leaves = variables["compand"]["stack"]["dense"]
    scale = jnp.exp(leaves["weight_scale"]) * kernel.std()
    own = cj.fake_quantize(
        kernel - kernel.mean(), jnp.expm1(leaves["weight_mu"]), scale, bits=3
    ) + kernel.mean()  # fmt: skip
    for w, b in zip(own, variables["params"]["stack"]["dense"]["bias"], strict=True):
        x = jnp.tanh(x @ w + b[None])
    np.testing.assert_allclose(qmodel.apply(variables, normal(5, 4)), x, atol=2e-6)


def test_gradients_reach_a_stack_through_its_moments():
    model, x = Stack("scan"), normal(5, 4)
    qmodel, variables = cj.quantize_model(model, CONFIG).calibrate(model.init(KEY, x), [x])
    _, found = pull_back(qmodel.apply, variables, x)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found))
    assert np.all(found["params"]["stack"]["dense"]["kernel"] != 0)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_weight_of_one_number_is_kept_and_trains(value):
    kernel = jnp.full((4, 3), value)
    qmodel, variables, x = dense(kernel, weight_bits=3, act_bits=None, weight_standardization=True)
    y, found = pull_back(qmodel.apply, variables, x)
    np.testing.assert_array_equal(y, kernel)
    np.testing.assert_array_equal(found["params"]["kernel"] != 0, True)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found))
    # As soon as it is more than that, the scale is three deviations of it.
    variables["params"]["kernel"] = 1e-3 * normal(4, 3)
    own = qmodel.quantizers(variables)[""]["weight_scale"]
    np.testing.assert_allclose(own, 3e-3 * normal(4, 3).std(), rtol=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_moments_of_any_magnitude(size):
    w = np.asarray(normal(6, 5), np.float32) * np.float32(size)
    wide = w.astype(np.float64)
    np.testing.assert_allclose(moments(jnp.asarray(w)), [wide.mean(), wide.std()], rtol=1e-5)


def test_error_feedback_leaves_a_standardized_kernel():
    model, x = nn.Dense(3), normal(8, 4)
    variables = model.init(KEY, x)
    _, found = cj.quantize_model(model, CONFIG).calibrate(variables, [x], error_feedback=True)
    np.testing.assert_array_equal(found["params"]["kernel"], variables["params"]["kernel"])


def test_before_calibration_the_clip_is_three_deviations():
    x = normal(5, 4)
    qmodel = cj.quantize_model(Block(), CONFIG)
    variables = qmodel.init(KEY, x)
    kernel = variables["params"]["dense"]["kernel"]
    found = qmodel.quantizers(variables)["dense"]["weight_scale"]
    np.testing.assert_allclose(found, 3 * kernel.std(), rtol=1e-5)


class NNXStack(nnx.Module):
    """Layers made by `nnx.vmap`, run by `nnx.scan`."""

    def __init__(self, rngs):
        make = nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs), in_axes=0)
        self.layers = nnx.split_rngs(splits=2)(make)(rngs)

    def __call__(self, x):
        run = nnx.scan(lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return run(self.layers, x)


def test_nnx_layers_of_a_stack_each_have_their_own_and_are_frozen_so():
    model, x = NNXStack(nnx.Rngs(0)), normal(5, 4)
    kernels = model.layers.kernel[...] * jnp.array([1.0, 5.0]).reshape(2, 1, 1) + 0.3
    model.layers.kernel[...] = kernels
    qmodel = cj.nnx.quantize(model, CONFIG)
    found = cj.nnx.quantizers(qmodel)["layers"]
    deviations = np.std(kernels, (1, 2))
    np.testing.assert_allclose(found["weight_scale"], 3 * deviations, rtol=1e-5)
    expected = x
    for kernel, scale in zip(kernels, found["weight_scale"], strict=True):
        mean = kernel.mean()
        own = mean + cj.fake_quantize(kernel - mean, CONFIG.mu_init, scale, bits=3)
        expected = expected @ own
    np.testing.assert_allclose(qmodel(x), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cj.freeze(qmodel)(x), expected, rtol=1e-4, atol=1e-5)
