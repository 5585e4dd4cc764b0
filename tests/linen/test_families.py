"""Families of levels in models: calibrated, trained, frozen, in Linen and NNX alike."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import compand_jax as cj
import compand_jax.nnx as cnnx

LEAVES = {"power": ("exponent", ()), "normal_float": (None, None), "free": ("gaps", (3,))}
X = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="out")(nn.relu(nn.Dense(8, name="hidden")(x)))


class Module(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.out = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


def config(quantizer, **fields):
    return cj.QuantConfig(weight_bits=3, act_bits=3, quantizer=quantizer, **fields)


@pytest.mark.parametrize("quantizer", LEAVES)
def test_a_model_is_calibrated_trained_and_frozen(quantizer, tmp_path):
    """NNX equals Linen, before training and frozen; a step moves what the family learns."""
    parameter, shape = LEAVES[quantizer]
    qmodel = cj.quantize_model(Net(), config(quantizer))
    variables = jax.jit(qmodel.init)(jax.random.key(0), X)
    qmodel, variables = qmodel.calibrate(variables, [X])
    own = variables["compand"]["out"]
    names = {"weight_scale", "act_scale"}
    if parameter is not None:
        names |= {f"weight_{parameter}", f"act_{parameter}"}
        assert own[f"weight_{parameter}"].shape == shape
    assert own.keys() == names
    assert names == qmodel.quantizers(variables)["out"].keys()
    apply = jax.jit(qmodel.apply)

    model = Module(nnx.Rngs(0))
    for name in ("hidden", "out"):
        layer, params = getattr(model, name), variables["params"][name]
        layer.kernel[...], layer.bias[...] = params["kernel"], params["bias"]
    qmodule = cnnx.quantize(model, config(quantizer))
    cnnx.calibrate(qmodule, [X])
    outputs = nnx.jit(Module.__call__)(qmodule, X)
    np.testing.assert_allclose(outputs, apply(variables, X), rtol=1e-5, atol=1e-6)
    assert (parameter or "-") in qmodel.summary(variables) + "-"

    rates = {name: optax.sgd(0.1) for name in ("weights", "mu", "scale")}
    tx = cj.partition_optimizer(**rates)

    @jax.jit
    def step(variables):
        grads = jax.grad(lambda v: jnp.mean((qmodel.apply(v, X) - X[:, :3]) ** 2))(variables)
        updates, _ = tx.update(grads, tx.init(variables), variables)
        return optax.apply_updates(variables, updates)

    moved = step(variables)
    for name in names:
        assert np.any(np.asarray(moved["compand"]["out"][name]) != own[name])
    cj.freeze(qmodel, moved, X).save(tmp_path / "net.safetensors")
    frozen = cj.load_frozen(tmp_path / "net.safetensors", Net())
    exact = np.asarray(apply(moved, X))
    np.testing.assert_allclose(jax.jit(frozen.apply)(X), exact, rtol=1e-6, atol=1e-6)


def test_slopes_are_shared():
    qmodel = cj.quantize_model(Net(), config("piecewise", mu_scope="single"))
    _, variables = qmodel.calibrate({"params": Net().init(jax.random.key(0), X)["params"]}, [X])
    assert variables["compand"]["_shared"].keys() == {"slopes"}
    assert np.std(variables["compand"]["_shared"]["slopes"]) > 0.01


def test_error_feedback_rounds_to_the_familys_levels():
    qmodel = cj.quantize_model(Net(), config("free", weight_granularity="channel"))
    variables = {"params": Net().init(jax.random.key(0), X)["params"]}
    qmodel, variables = qmodel.calibrate(variables, [X], error_feedback=True)
    own, kernel = qmodel.quantizers(variables)["out"], variables["params"]["out"]["kernel"]
    keywords = qmodel.sites["out"].spec("weight").arguments
    again = cj.fake_quantize(kernel, own["weight_gaps"], own["weight_scale"], **keywords)
    np.testing.assert_array_equal(again, kernel)


def test_what_does_not_go_together():
    with pytest.raises(ValueError, match="`mu_scope` must be 'per_layer' for quantizer='free'"):
        config("free", mu_scope="single")
    with pytest.raises(ValueError, match="`mu_scope` must be 'per_layer' for quantizer='free'"):
        config("mu_law", mu_scope="single", rules=(cj.Rule("out", quantizer="free"),))
    with pytest.raises(ValueError, match="`grid` must be midtread for quantizer='apot'"):
        config("apot", grid="midrise")
