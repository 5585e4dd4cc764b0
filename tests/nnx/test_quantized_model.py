"""Quantized NNX models: copies, sites, sharing, stacks, transforms, and what is refused."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nnx_models import RNGS, Block, Stack, Tied, draw, values_of, with_gradients, with_values
from small_models import BITS, assert_same, assert_trained, normal, quantize_by_hand

import compand_jax as cj

pytestmark = pytest.mark.filterwarnings(
    "ignore:site .* is not calibrated"  # mu and scales are drawn at random here
)

X = normal(5, 4)


def config(**kwargs):
    return cj.QuantConfig(**{"weight_bits": BITS, "act_bits": BITS, **kwargs})


SITES = ["blocks/layers/0/linear", "blocks/layers/1", "again"]


def test_the_copy_has_the_models_params_and_dequantize_gives_it_back():
    model = Tied(nnx.Rngs(0))
    before, y = nnx.to_pure_dict(nnx.state(model)), model(X)
    qmodel = cj.nnx.quantize(model, config())
    params = nnx.to_pure_dict(nnx.state(qmodel, nnx.Param))
    assert type(qmodel) is Tied
    assert jax.tree.structure(params) == jax.tree.structure(before)
    assert_same(params, before, 0)
    assert sorted(cj.nnx.sites(qmodel)) == sorted(SITES)
    assert not np.allclose(qmodel(X), y)
    draw(qmodel)
    assert_same(nnx.to_pure_dict(nnx.state(model)), before, 0)
    np.testing.assert_array_equal(model(X), y)
    plain = cj.nnx.dequantize(qmodel)
    assert nnx.graphdef(plain) == nnx.graphdef(model)
    assert hash(nnx.graphdef(plain)) == hash(nnx.graphdef(model))
    assert len(cj.nnx.sites(qmodel)) == 3
    assert_same(
        nnx.to_pure_dict(nnx.state(plain)), nnx.to_pure_dict(nnx.state(qmodel, nnx.Param)), 0
    )
    again = cj.nnx.quantize(plain, config())
    assert nnx.graphdef(again) == nnx.graphdef(qmodel)


def dense(values, x):
    leaves = values["promote_dtype"]
    kernel = quantize_by_hand(values["kernel"], leaves, "weight")
    return quantize_by_hand(x, leaves, "act") @ kernel + values["bias"][None]


@pytest.mark.parametrize("mu_scope", ["single", "separate", "per_layer"])
def test_a_layer_on_two_paths_is_one_site_in_every_scope(mu_scope):
    qmodel = cj.nnx.quantize(Tied(nnx.Rngs(0)), config(mu_scope=mu_scope))
    draw(qmodel)
    n_mu = {"single": 1, "separate": 2, "per_layer": 6}[mu_scope]
    assert len(jax.tree.leaves(nnx.state(qmodel, cj.nnx.Mu))) == n_mu
    assert len(jax.tree.leaves(nnx.state(qmodel, cj.nnx.Scale))) == 6
    assert len(jax.tree.leaves(nnx.state(qmodel, cj.nnx.Quantizer))) == 6 + n_mu

    def by_hand(values, x):
        found = {"again": values["again"], **values["blocks"]["layers"]}
        found = {"again": found["again"], "0": found[0]["linear"], "1": found[1]}
        for name, site in found.items():
            leaves = dict(site["promote_dtype"])
            for operand in ("weight", "act"):  # the first on the way has what they share
                shared = values["again"]["promote_dtype"]
                source = {"single": "act_mu", "separate": f"{operand}_mu"}.get(mu_scope)
                if source:
                    leaves[f"{operand}_mu"] = shared[source]
            found[name] = {**site, "promote_dtype": leaves}
        y = dense(found["again"], jnp.tanh(dense(found["again"], x)))
        return dense(found["1"], jnp.tanh(dense(found["0"], y))) @ values["own"]

    functions = [lambda values, x: with_values(qmodel, values)(x), by_hand]
    (y, gradients), (expected, expected_gradients) = with_gradients(functions, values_of(qmodel), X)
    assert_same(y, expected)
    assert_same(gradients, expected_gradients, 2e-5)
    assert_trained(gradients)


@pytest.mark.parametrize(("run", "granularity"), [("scan", "tensor"), ("vmap", "channel")])
def test_each_layer_of_a_stack_has_its_own(run, granularity):
    qmodel = cj.nnx.quantize(Stack(nnx.Rngs(0), run=run), config(weight_granularity=granularity))
    shape = (3, 1, 4) if granularity == "channel" else (3,)
    kernels = np.asarray(qmodel.blocks.linear.kernel[...])
    found = cj.nnx.quantizers(qmodel)["blocks/linear"]
    assert found["weight_scale"].shape == shape
    assert found["weight_mu"].shape == found["act_scale"].shape == (3,)
    axes = (1,) if granularity == "channel" else (1, 2)
    largest = np.max(np.abs(kernels), axes).reshape(shape)
    np.testing.assert_allclose(found["weight_scale"], largest, rtol=1e-6)
    draw(qmodel)

    def by_hand(values, x):
        parts, xs = values["blocks"]["linear"], []
        for i in range(3):
            y = jnp.tanh(dense(jax.tree.map(lambda leaf, i=i: leaf[i], parts), x))
            xs.append(y)
            x = y if run == "scan" else x
        return dense(values["head"], xs[-1] if run == "scan" else sum(xs[1:], xs[0]))

    functions = [lambda values, x: with_values(qmodel, values)(x), by_hand]
    (y, gradients), (expected, expected_gradients) = with_gradients(functions, values_of(qmodel), X)
    assert_same(y, expected, 5e-6)
    assert_same(gradients, expected_gradients, 5e-5)
    assert_trained(gradients)


def test_a_stack_that_shares_its_mu_broadcasts_it():
    axes = nnx.StateAxes({cj.nnx.Mu: None, ...: 0})
    qmodel = cj.nnx.quantize(Stack(nnx.Rngs(0), axes), config(mu_scope="single"))
    draw(qmodel)
    values = values_of(qmodel)
    (mu,) = jax.tree.leaves(nnx.state(qmodel, cj.nnx.Mu))
    x = X
    leaf = lambda leaf, i: leaf if leaf.ndim == 0 else leaf[i]  # noqa: E731
    for i in range(3):
        part = jax.tree.map(lambda x, i=i: leaf(x, i), values["blocks"]["linear"])
        part["promote_dtype"] |= {"weight_mu": mu, "act_mu": mu}
        x = jnp.tanh(dense(part, x))
    values["head"]["promote_dtype"] |= {"weight_mu": mu, "act_mu": mu}
    assert_same(nnx.jit(lambda model, x: model(x))(qmodel, X), dense(values["head"], x), 5e-6)


def test_a_stack_that_is_not_split_is_said_by_name():
    axes = nnx.StateAxes({nnx.Param: 0, ...: None})
    qmodel = cj.nnx.quantize(Stack(nnx.Rngs(0), axes), config())
    with pytest.raises(ValueError, match=r"site 'blocks/linear' must see the act_mu and act_scale"):
        qmodel(X)


def test_rules_grids_and_quantizers_by_site():
    rules = (
        cj.Rule("blocks/.*/linear", weight_bits=2, act_bits=None, grid="midrise"),
        cj.Rule("again", quantizer="uniform", weight_bits=8),
    )
    qmodel = cj.nnx.quantize(Tied(nnx.Rngs(0)), config(rules=rules))
    inner, again = (cj.nnx.sites(qmodel)[name] for name in (SITES[0], "again"))
    assert (inner.weight_bits, inner.act_bits, inner.grid) == (2, None, "midrise")
    assert (again.weight_bits, again.quantizer) == (8, "uniform")
    found = cj.nnx.quantizers(qmodel)
    assert set(found[SITES[0]]) == {"weight_mu", "weight_scale"}
    assert float(found["again"]["weight_mu"]) == 0
    assert qmodel.again.promote_dtype.weight_mu is None
    kernel = qmodel.blocks.layers[0].linear.kernel[...]
    seen = (
        qmodel.blocks.layers[0].linear(jnp.eye(4)) - qmodel.blocks.layers[0].linear.bias[...][None]
    )
    expected = cj.fake_quantize(kernel, 2.0, jnp.max(jnp.abs(kernel)), bits=2, grid="midrise")
    np.testing.assert_allclose(seen, expected, rtol=1e-5, atol=1e-6)


def test_a_jitted_function_is_traced_once_for_equal_models():
    traces = []

    @nnx.jit
    def run(model, x):
        traces.append(1)
        return model(x)

    model = Tied(nnx.Rngs(0))
    first, second = (cj.nnx.quantize(model, config()) for _ in range(2))
    np.testing.assert_array_equal(run(first, X), run(second, X))
    assert len(traces) == 1
    run(model, X)
    assert len(traces) == 2
    graphdef, state = nnx.split(first)
    split = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    np.testing.assert_allclose(split(state, X), run(first, X), rtol=1e-6, atol=1e-6)


def test_sites_go_with_a_checkpoint():
    model = Tied(nnx.Rngs(0))
    qmodel = cj.nnx.quantize(model, config())
    cj.nnx.calibrate(qmodel, [jnp.abs(X)], calibration="absmax")
    found = cj.nnx.sites(qmodel)
    assert not found["blocks/layers/1"].act_signed or found["again"].act_signed is not None
    stored = cj.sites_from_json(cj.sites_to_json(found))
    again = cj.nnx.quantize(model, config(), sites=stored)
    assert nnx.graphdef(again) == nnx.graphdef(qmodel)
    nnx.update(again, nnx.state(qmodel))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(again(X), qmodel(X))
    with pytest.raises(ValueError, match="`sites` must be this model's, 'other' is none of"):
        cj.nnx.quantize(model, config(), sites={**stored, "other": stored["again"]})
    with pytest.raises(ValueError, match="`sites` must be of the same config"):
        cj.nnx.quantize(model, config(weight_bits=5), sites=stored)


def test_uncalibrated_activations_are_warned_of():
    qmodel = cj.nnx.quantize(nnx.Linear(4, 2, rngs=RNGS), config())
    with pytest.warns(UserWarning, match="site '' is not calibrated"):
        qmodel(X)
    weights = cj.nnx.quantize(nnx.Linear(4, 2, rngs=RNGS), config(act_bits=None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights(X)


def test_what_is_refused_is_named():
    model = Tied(nnx.Rngs(0))
    qmodel = cj.nnx.quantize(model, config())
    unchecked = getattr(cj.nnx.quantize, "__wrapped__", cj.nnx.quantize)
    with pytest.raises(TypeError, match=r"`model` must be a flax.nnx Module, got Dense"):
        unchecked(nn.Dense(3), config())
    with pytest.raises(TypeError, match="`config` must be a QuantConfig, got int"):
        unchecked(model, 4)
    with pytest.raises(TypeError, match="`sites` must be a calibrated model's"):
        unchecked(model, config(), sites=3)
    with pytest.raises(ValueError, match="`act_site` must be 'input' for an NNX model"):
        cj.nnx.quantize(model, config(act_site="output"))
    with pytest.raises(ValueError, match="`model` must be in full precision, got a quantized one"):
        cj.nnx.quantize(qmodel, config())
    with pytest.raises(ValueError, match="`model` must be quantized, got one that is not"):
        cj.nnx.dequantize(model)
    with pytest.raises(ValueError, match="`model` must have a layer to quantize"):
        cj.nnx.quantize(nnx.BatchNorm(3, rngs=RNGS), config())
    with pytest.raises(ValueError, match=r"`rules` must each match a site, 'head' matches none of"):
        cj.nnx.quantize(model, config(rules=(cj.Rule("head"),)))
    einsum = nnx.Einsum("ab,bc->ac", (4, 3), rngs=RNGS)
    einsum.einsum_str = None
    with pytest.raises(ValueError, match="`model` must have the equation of each Einsum"):
        cj.nnx.quantize(einsum, config())
    complex_layer = cj.nnx.quantize(
        nnx.Linear(4, 3, param_dtype=jnp.complex64, rngs=RNGS), config(act_bits=None)
    )
    with pytest.raises(TypeError, match="site '' has weights of type complex64"):
        complex_layer(X)


def test_summary_has_every_site_and_names_what_is_missed():
    qmodel = cj.nnx.quantize(Tied(nnx.Rngs(0)), config())
    lines = cj.nnx.summary(qmodel).splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == sorted(SITES)
    assert lines[-1] == "weights not quantized: own"
    kernel = np.asarray(qmodel.again.kernel[...], np.float64)
    mu, scale = 2.0, np.max(np.abs(kernel))
    error = kernel - np.asarray(cj.fake_quantize(qmodel.again.kernel[...], mu, scale, bits=BITS))
    expected = 10 * np.log10(np.sum(kernel**2) / np.sum(error**2))
    row = lines[1].split()
    assert row[:2] == ["again", str(BITS)]
    assert float(row[4]) == pytest.approx(expected, abs=0.06)
    assert row[5:7] == [str(4 * 4 * BITS // 8), str(4 * 4 * 4)]
    lora = cj.nnx.quantize(nnx.LoRALinear(4, 6, lora_rank=2, rngs=RNGS), config())
    assert cj.nnx.summary(lora).endswith("weights not quantized: lora/lora_a, lora/lora_b")


def test_a_stack_in_the_summary():
    qmodel = cj.nnx.quantize(Stack(nnx.Rngs(0)), config())
    kernels = np.asarray(qmodel.blocks.linear.kernel[...], np.float64)
    noise = 0.0
    for kernel in kernels.astype(np.float32):
        quantized = cj.fake_quantize(jnp.asarray(kernel), 2.0, np.max(np.abs(kernel)), bits=BITS)
        noise += np.sum((kernel - np.asarray(quantized, np.float64)) ** 2)
    row = cj.nnx.summary(qmodel).splitlines()[1].split()
    assert row[0] == "blocks/linear"
    assert float(row[4]) == pytest.approx(10 * np.log10(np.sum(kernels**2) / noise), abs=0.06)


class Wrapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nnx.bridge.to_linen(nnx.Linear, 4, 3)(x))


@pytest.mark.parametrize("wrapped", [nnx.bridge.to_linen(nnx.Linear, 4, 3), Wrapped()])
def test_nnx_modules_in_linen_are_refused_by_name(wrapped):
    with pytest.raises(TypeError, match=r"got an NNX module in nnx.bridge.ToLinen.*nnx.quantize"):
        cj.quantize_model(wrapped, config()).init(jax.random.key(0), X)


def test_linen_modules_in_nnx_are_refused_by_name():
    model = nnx.bridge.ToNNX(nn.Dense(3), rngs=nnx.Rngs(0)).lazy_init(X)
    with pytest.raises(
        ValueError, match=r"found none: a Linen module in nnx.bridge.ToNNX, and what"
    ):
        cj.nnx.quantize(model, config())


def test_a_quantized_model_made_in_linen():
    weights = config(act_bits=None)
    qlayer = cj.nnx.quantize(nnx.Linear(4, 3, rngs=RNGS), weights)
    bridged = nnx.bridge.ToLinen(lambda rngs: cj.nnx.quantize(nnx.Linear(4, 3, rngs=rngs), weights))
    variables = bridged.init(jax.random.key(0), X)
    params = nnx.to_pure_dict(nnx.state(qlayer, nnx.Param))
    quantizer = nnx.to_pure_dict(nnx.state(qlayer, cj.nnx.Quantizer))["promote_dtype"]
    own = {name: {"promote_dtype": {f"weight_{name.lower()}": quantizer[f"weight_{name.lower()}"]}}
           for name in ("Mu", "Scale")}  # fmt: skip
    assert jax.tree.structure(variables) == jax.tree.structure({"params": params, **own})
    assert_same(bridged.apply({"params": params, **own}, X), qlayer(X))


def test_flax_tabulates_a_quantized_model():
    qmodel = cj.nnx.quantize(Block(nnx.Rngs(0)), config())
    table = nnx.tabulate(qmodel, X, console_kwargs={"force_terminal": False, "width": 200})
    assert "linear" in table
    assert "Mu" in table
    assert "Scale" in table
