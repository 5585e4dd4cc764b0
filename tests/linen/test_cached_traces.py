"""Models whose traces are kept from call to call: quantized all the same, and no leak."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import drawn, normal, pull_back, quantize_by_hand

import compand_jax as cj
from compand_jax.linen import interception, reach

pytestmark = pytest.mark.filterwarnings(
    "ignore:the quantized model is not calibrated"  # its mu and scales are drawn at random here
)
CONFIG = cj.QuantConfig(weight_bits=3, act_bits=3)
X = normal(5, 4)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="second")(jnp.tanh(nn.Dense(6, name="first")(x)))


class Decorated(nn.Module):
    """The same, its own method jitted."""

    @nn.jit
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="second")(jnp.tanh(nn.Dense(6, name="first")(x)))


JittedDense, JittedPlain = nn.jit(nn.Dense), nn.jit(Plain)


class JittedLayer(nn.Module):
    """The same, a layer's class jitted."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="second")(jnp.tanh(JittedDense(6, name="first")(x)))


class JittedField(nn.Module):
    """The same, in a jitted module that is handed in."""

    inner: nn.Module

    def __call__(self, x):
        return self.inner(x)


CACHED = {
    "method": (Decorated(), ["first", "second"]),
    "layer": (JittedLayer(), ["first", "second"]),
    "class": (JittedPlain(), ["first", "second"]),
    "field": (JittedField(JittedPlain()), ["inner/first", "inner/second"]),
}
EACH_CACHED = pytest.mark.parametrize("name", CACHED)


def cached(name):
    """Returns a model that nn.jit has traced in full precision, and its quantized model."""
    model, sites = CACHED[name]
    qmodel = cj.quantize_model(model, CONFIG)
    variables = drawn(qmodel, X)
    full_precision = model.apply({"params": variables["params"]}, X)
    return model, qmodel, variables, full_precision, sites


@EACH_CACHED
def test_a_warmed_up_nn_jit_is_quantized_and_leaks_nothing(name):
    model, qmodel, variables, full_precision, _ = cached(name)
    plain, inner = cj.quantize_model(Plain(), CONFIG), dict(variables)
    if name == "field":
        inner = {key: tree["inner"] for key, tree in variables.items()}
    expected, expected_gradients = pull_back(plain.apply, inner, X)

    y, gradients = pull_back(qmodel.apply, variables, X)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for g, want in zip(*map(jax.tree.leaves, (gradients, expected_gradients)), strict=True):
        np.testing.assert_allclose(g, want, rtol=1e-4, atol=1e-5)
    assert all(np.any(g != 0) for g in jax.tree.leaves(gradients["compand"]))
    for _ in range(2):
        again = model.apply({"params": variables["params"]}, X)
        np.testing.assert_array_equal(again, full_precision)
        np.testing.assert_allclose(qmodel.apply(variables, X), expected, atol=1e-5)


class EqualModules(nn.Module):
    """Two modules that nn.jit takes for one, and two more inside of a jitted one."""

    @nn.compact
    def __call__(self, x):
        x = JittedDense(4, name="a")(jnp.tanh(JittedDense(4, name="b")(x)))
        return JittedPair(name="pair")(x)


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return JittedDense(4, name="c")(jnp.tanh(JittedDense(4, name="d")(x)))


JittedPair = nn.jit(Pair)


def test_equal_modules_are_sites_of_their_own():
    qmodel = cj.quantize_model(EqualModules(), CONFIG)
    variables = drawn(qmodel, X)
    EqualModules().apply({"params": variables["params"]}, X)
    sites = {"a", "b", "pair/c", "pair/d"}
    assert set(qmodel.quantizers(variables)) == sites
    y, gradients = pull_back(qmodel.apply, variables, X)
    assert all(np.any(g != 0) for g in jax.tree.leaves(gradients["compand"]))

    params, compand = variables["params"], variables["compand"]
    params, compand = ({**t, **t["pair"]} for t in (params, compand))
    expected = X
    for i, site in enumerate(("b", "a", "d", "c")):
        x = quantize_by_hand(expected if i % 2 == 0 else jnp.tanh(expected), compand[site], "act")
        kernel = quantize_by_hand(params[site]["kernel"], compand[site], "weight")
        expected = x @ kernel + params[site]["bias"][None]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_a_trace_made_in_quantizing_is_not_the_full_precision_models():
    # Of this shape nothing has been traced before.
    model, x = JittedPlain(), normal(11, 4)
    qmodel = cj.quantize_model(model, CONFIG)
    variables = drawn(qmodel, x)
    quantized = qmodel.apply(variables, x)
    y = model.apply({"params": variables["params"]}, x)
    np.testing.assert_array_equal(y, Plain().apply({"params": variables["params"]}, x))
    assert np.any(y != quantized)
    other = jax.tree.map(lambda leaf: leaf + 0.3, variables["compand"])
    assert np.any(qmodel.apply({**variables, "compand": other}, x) != quantized)


@pytest.mark.parametrize("known", [False, True])
@EACH_CACHED
def test_a_site_that_is_not_reached_raises(name, known, monkeypatch):
    _, qmodel, variables, _, sites = cached(name)
    reach._layers_run.cache_clear()
    if known:  # which layers run has been found before
        qmodel.apply(variables, X)
    monkeypatch.setattr(interception, "trace_afresh", lambda *_: None)
    missed = sites[:1] if name == "layer" else sites
    named = ", ".join(f"'{site}'" for site in missed)
    with pytest.raises(ValueError, match=rf"site {named} runs but was not quantized: a trace of"):
        qmodel.apply(variables, X)


@jax.jit
def _kept_by_jax(params, x):
    return nn.Dense(6).apply({"params": params}, x)


class KeptByJax(nn.Module):
    """Applies a layer by itself, in a function whose trace outlives the call."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(), (4, 6))
        y = _kept_by_jax({"kernel": kernel, "bias": jnp.zeros(6)}, x)
        return nn.Dense(3, name="head")(y)


@pytest.mark.parametrize("size", [7, 8])
def test_a_trace_that_jax_keeps_is_refused(size):
    x, other = normal(7, 4), normal(size, 4)
    qmodel = cj.quantize_model(KeptByJax(), CONFIG)
    variables = drawn(qmodel, x)  # traces the function, for this size, under another visitor
    with pytest.raises(ValueError, match="site '' runs but was not quantized"):
        qmodel.apply(variables, other)
    y = KeptByJax().apply({"params": variables["params"]}, other)
    head = variables["params"]["head"]
    expected = other @ variables["params"]["kernel"] @ head["kernel"] + head["bias"][None]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


class JittedInEachCall(KeptByJax):
    """The same, in a function that is made anew: its trace is gone with it."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(), (4, 6))
        layer = nn.Dense(6, use_bias=False)
        y = jax.jit(lambda kernel, x: layer.apply({"params": {"kernel": kernel}}, x))(kernel, x)
        return nn.Dense(3, name="head")(y)


def test_a_function_that_is_jitted_in_each_call_is_quantized():
    qmodel = cj.quantize_model(JittedInEachCall(), CONFIG)
    variables = drawn(qmodel, X)
    full_precision = JittedInEachCall().apply({"params": variables["params"]}, X)
    y, gradients = pull_back(qmodel.apply, variables, X)
    assert np.any(y != full_precision)
    assert all(np.any(g != 0) for g in jax.tree.leaves(gradients["compand"]))
    again = JittedInEachCall().apply({"params": variables["params"]}, X)
    np.testing.assert_array_equal(again, full_precision)
