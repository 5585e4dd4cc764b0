"""Functions of parameters, quantized: by hand, against Linen, calibrated, trained and refused."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax import lax
from small_models import BITS, QUICKLY, assert_same, normal, pull_back, quantize_by_hand

import compand_jax as cj

uncalibrated = pytest.mark.filterwarnings("ignore:the quantized model is not calibrated")
X = normal(5, 4)


def plain(w, x):
    return x


def mlp(params, x, w=plain, a=plain):
    """A layer, two layers of a stack, and a head that is tied to the first."""
    first = w("embed/w", params["embed"]["w"])
    x = jnp.tanh(a("embed/w", x) @ first + params["embed"]["b"][None])
    x, _ = lax.scan(
        lambda x, v: (jnp.tanh(a("stack", x) @ w("stack", v)), None), x, params["stack"]
    )
    return jnp.einsum("bf,df->bd", a("embed/w", x), first)


PARAMS = {
    "embed": {"w": normal(4, 6), "b": normal(6)},
    "stack": normal(2, 6, 6),
    "unused": normal(2, 3),
}


def quantized(function=mlp, **fields):
    return cj.quantize_function(
        function, cj.QuantConfig(**{"weight_bits": 3, "act_bits": 3} | fields)
    )


@pytest.fixture(scope="module")
def calibrated():
    """A calibrated function, with mu and scales that no value is as large as."""
    qmlp, variables = quantized(act_signed=True).calibrate({"params": PARAMS}, [X], mu=2.0)
    compand = jax.tree.map(lambda leaf: leaf - 0.123, variables["compand"])
    return qmlp, {**variables, "compand": compand}


def test_outputs_and_gradients_are_those_by_hand(calibrated):
    qmlp, variables = calibrated

    def by_hand(variables, x):
        def quantize(operand):
            def quantize_operand(site, x):
                leaves = variables["compand"]
                for key in site.split("/"):
                    leaves = leaves[key]
                return quantize_by_hand(x, leaves, operand)

            return quantize_operand

        return mlp(variables["params"], x, quantize("weight"), quantize("act"))

    found, grads = pull_back(qmlp.apply, variables, X)
    outputs, expected = pull_back(by_hand, variables, X)
    assert_same(found, outputs)
    assert_same(grads, expected)
    assert all(jnp.all(leaf != 0) for leaf in jax.tree.leaves(grads["compand"]))
    tx = cj.partition_optimizer(optax.sgd(0.1), mu=optax.sgd(0.1), scale=optax.sgd(0.1))
    tx.update(grads, tx.init(variables), variables)


def test_weights_and_activations_are_those_of_the_oracle():
    params = {"w": PARAMS["embed"]["w"]}
    qdot, variables = quantized(lambda params, x: x @ params["w"]).calibrate(
        {"params": params}, [X]
    )
    found = {name: float(x) for name, x in qdot.quantizers(variables)["w"].items()}
    w, x = (
        oracle.fake_quantize(v, found[f"{kind}_mu"], found[f"{kind}_scale"], 3, True, "midtread")
        for v, kind in ((params["w"], "weight"), (X, "act"))
    )
    np.testing.assert_allclose(qdot.apply(variables, X), x @ w, rtol=1e-5, atol=1e-5)
    mu, scale = cj.fit(params["w"], bits=3)
    assert found["weight_mu"] == pytest.approx(float(mu), rel=1e-5)
    assert found["weight_scale"] == pytest.approx(float(scale), rel=1e-5)


def test_calibration_is_that_of_the_same_linen_model():
    model = nn.Dense(3, use_bias=False)
    params = {"kernel": normal(4, 3)}
    config = cj.QuantConfig(weight_bits=3, act_bits=3, weight_granularity="channel")
    qmodel = cj.quantize_model(model, config)
    _, expected = qmodel.calibrate({"params": params}, [X, X[:2]], calibration="output")
    qdot = cj.quantize_function(lambda params, x: x @ params["kernel"], config)
    _, found = qdot.calibrate({"params": params}, [X, X[:2]], calibration="output")
    assert_same(found["compand"]["kernel"], expected["compand"])


def test_it_is_traced_once_and_transformed(calibrated):
    qmlp, variables = calibrated
    traces = []

    def counted(params, x):
        traces.append(x.shape)
        return mlp(params, x)

    qcounted = cj.quantize_function(counted, qmlp.config, sites=qmlp.sites)
    mapped = jax.jit(
        jax.vmap(qcounted.apply, in_axes=(None, 0)), compiler_options=QUICKLY
    )  # an example at a time
    found = [mapped(variables, X[:, None]) for _ in range(2)]
    assert traces == [(1, 4)]
    np.testing.assert_allclose(found[0][:, 0], qmlp.apply(variables, X), rtol=1e-4, atol=1e-5)


@uncalibrated
def test_init_and_scopes():
    params = {"w": normal(4, 3), "zeros": jnp.zeros((3, 2))}
    config = {"mu_scope": "separate", "rules": (cj.Rule("zeros", act_bits=None),)}
    qfunction = quantized(lambda params, x: x @ params["w"] @ params["zeros"], **config)
    variables = jax.jit(qfunction.init)(params, X)
    found = qfunction.quantizers(variables)
    assert found["w"]["weight_scale"] == pytest.approx(float(abs(params["w"]).max()))
    assert found["w"]["act_scale"] == pytest.approx(float(abs(X).max()))
    assert set(found["zeros"]) == {"weight_mu", "weight_scale"}
    assert set(variables["compand"]["_shared"]) == {"weight_mu", "act_mu"}
    assert not np.any(qfunction.apply(variables, X))


def test_summary_and_stored_sites(calibrated):
    qmlp, variables = calibrated
    summary = qmlp.summary(variables)
    assert summary.splitlines()[-1] == "weights not quantized: unused"
    assert [line.split()[0] for line in summary.splitlines()[1:-1]] == ["embed/w", "stack"]
    sites = cj.sites_from_json(cj.sites_to_json(qmlp.sites))
    again = cj.quantize_function(mlp, qmlp.config, sites=sites)
    assert again == qmlp
    assert hash(again) == hash(qmlp)


@uncalibrated
def test_one_array_is_a_tree():
    qdot = quantized(lambda w, x: x @ w, act_bits=None)
    variables = qdot.init(PARAMS["embed"]["w"], X)
    weight = quantize_by_hand(PARAMS["embed"]["w"], variables["compand"]["params"], "weight")
    assert_same(qdot.apply(variables, X), X @ weight)
    assert qdot.summary(variables).endswith("weights not quantized: none")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    """A module that is a tree, as those of Equinox are."""

    weight: jax.Array
    bias: jax.Array
    activation: str = dataclasses.field(metadata={"static": True})

    def __call__(self, x, scale=1.0, *, training=False):
        y = self.weight @ x + self.bias
        y = jnp.tanh(y) if self.activation == "tanh" else y
        return {"y": y * scale, "training": training, "name": "linear"}


@uncalibrated
def test_modules_that_are_trees():
    modules = [Linear(normal(4, 4), normal(4), "tanh"), Linear(normal(3, 4), normal(3), "none")]

    def network(modules, x, **kwargs):
        for module in modules:
            found = module(x, **kwargs)
            x = found["y"]
        return found

    qnetwork = quantized(network, weight_granularity="channel", act_bits=None)
    variables = qnetwork.init(modules, X[0])
    found = qnetwork.apply(variables, X[0], training=True)
    assert (found["training"], found["name"]) == (True, "linear")
    leaves = [variables["compand"][i]["weight"] for i in "01"]
    assert [leaf["weight_scale"].shape for leaf in leaves] == [(4, 1), (3, 1)]
    by_hand = [
        dataclasses.replace(module, weight=quantize_by_hand(module.weight, leaf, "weight"))
        for module, leaf in zip(modules, leaves, strict=True)
    ]
    assert_same(found["y"], network(by_hand, X[0])["y"])


def test_leaves_may_be_functions():
    params = {"weight": normal(4, 3), "activation": jnp.tanh}  # as in a module of Equinox
    qlayer = quantized(lambda layer, x: layer["activation"](x @ layer["weight"]), act_bits=None)
    qlayer, variables = qlayer.calibrate({"params": params}, [X], calibration="absmax", mu=2.0)
    assert variables["params"]["activation"] is jnp.tanh
    weight = quantize_by_hand(params["weight"], variables["compand"]["weight"], "weight")
    assert_same(qlayer.apply(variables, X), jnp.tanh(X @ weight))


def attention(params, x):
    with jax.named_scope("attention"):
        q, k, v = jnp.einsum("td,sdh->sth", x, params["qkv"])
        p = jax.nn.softmax(jnp.einsum("th,sh->ts", q, k))
        return jnp.einsum("ts,sh->th", p, v)


def test_products_of_activations():
    params = {"qkv": normal(3, 4, 2)}
    bits = {"weight_bits": None, "act_bits": None, "contractions": "all"}
    rule = cj.Rule(r"attention/product_\d:(left|right)", act_bits=BITS)
    qattention = quantized(attention, **bits, rules=(rule,))
    qattention, variables = qattention.calibrate({"params": params}, [X])
    names = [f"attention/product_{i}:{side}" for i in range(2) for side in ("left", "right")]
    assert sorted(qattention.sites) == [*names, "qkv"]
    signs = [qattention.sites[name].act_signed for name in names]
    assert signs == [True, True, False, True]  # a softmax has no sign
    leaves = [variables["compand"]["attention"][name.split("/")[1]] for name in names]
    q, k, v = jnp.einsum("td,sdh->sth", X, params["qkv"])
    q, k = (quantize_by_hand(x, own, "act") for x, own in zip((q, k), leaves[:2], strict=True))
    p = quantize_by_hand(jax.nn.softmax(q @ k.T), leaves[2], "act", signed=False)
    assert_same(qattention.apply(variables, X), p @ quantize_by_hand(v, leaves[3], "act"))
    assert cj.sites_from_json(cj.sites_to_json(qattention.sites)) == qattention.sites
    # They are no sites unless they are asked for.
    few, _ = quantized(attention).calibrate({"params": params}, [X])
    assert list(few.sites) == ["qkv"]


def refused(function, params, *args, **fields):
    return quantized(function, **fields).calibrate({"params": params}, [args])


def test_channels_that_are_none():
    square = {"w": normal(4, 4)}
    match = (
        r"`weight_granularity` must be 'tensor' for site 'w', got 'channel': its axis 0 is summed "
        r"over and is an output as well.*Rule\('w', weight_granularity='tensor'\)"
    )

    def twice(params, x):
        return x @ params["w"] @ params["w"].T

    with pytest.raises(ValueError, match=match):
        refused(twice, square, X, weight_granularity="channel")
    with pytest.raises(ValueError, match=match):  # rows of two halves of its rows
        refused(
            lambda params, x: x[:, :2] @ params["w"].reshape(2, 8),
            square,
            X,
            weight_granularity="channel",
        )
    rule = cj.Rule("w", weight_granularity="tensor")
    assert refused(twice, square, X, weight_granularity="channel", rules=(rule,))


def test_errors():
    config = cj.QuantConfig()
    quantize = getattr(cj.quantize_function, "__wrapped__", cj.quantize_function)
    with pytest.raises(TypeError, match="`function` must be called with params, got dict: give"):
        quantize({}, config)
    with pytest.raises(TypeError, match="`config` must be a QuantConfig, got dict: give"):
        quantize(mlp, {})
    with pytest.raises(TypeError, match="`sites` must be a calibrated model's, got list"):
        quantize(mlp, config, sites=[])
    with pytest.raises(ValueError, match="`act_site` must be 'input' for contractions, got 'out"):
        quantized(act_site="output")
    with pytest.raises(ValueError, match="`contractions` must be one of layers, parameters, all"):
        quantized(contractions="some")
    with pytest.raises(ValueError, match="`function` must contract a parameter, .* found none"):
        quantized(lambda params, x: x * params["w"]).init({"w": X}, X)
    with pytest.raises(ValueError, match="`variables` must hold the collection 'compand'"):
        quantized().apply({"params": PARAMS}, X)
    with pytest.raises(ValueError, match="`variables` must hold the parameters as 'params', got"):
        quantized().calibrate(PARAMS, [X])
    with pytest.raises(ValueError, match="`rules` must each match a site, 'head' matches none of"):
        quantized(rules=(cj.Rule("head"),)).init(PARAMS, X)
    with pytest.raises(TypeError, match=r"`batches` must hold the 1 positional arguments .* got 2"):
        quantized(lambda params, x: x @ params["w"]).calibrate({"params": {"w": X}}, [(X.T, X)])
    with pytest.raises(TypeError, match="site 'w' has (weights|activations) of type complex64"):
        quantized(lambda params, x: x @ params["w"]).init(
            {"w": X.T.astype(jnp.complex64)}, X.astype(jnp.complex64)
        )
