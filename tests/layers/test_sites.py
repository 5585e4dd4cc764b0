"""Who shares a mu, what rules change, where activations are quantized, and what sites store."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import (
    KEY,
    NormedNet,
    SetUp,
    Stack,
    Tokens,
    Twice,
    assert_same,
    drawn,
    normal,
    pull_back,
    quantize_by_hand,
    weights_by_hand,
)

import compand_jax as cj
from compand_jax.layers.parametrization import mu_from_theta

pytestmark = pytest.mark.filterwarnings(
    "ignore:the quantized model is not calibrated"  # these draw their mu and scales
)
X = normal(5, 4)
SCOPES = ("single", "separate", "per_layer")


def quantized(model=None, **config):
    config = {"weight_bits": 3, "act_bits": 3, **config}
    return cj.quantize_model(model or SetUp(), cj.QuantConfig(**config))


def names(compand):
    found = jax.tree_util.tree_leaves_with_path(compand)
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in found}


SCALES = {f"{s}/{o}_scale" for s in ("first", "second") for o in ("weight", "act")}
MUS = {
    "single": {"_shared/mu"},
    "separate": {"_shared/weight_mu", "_shared/act_mu"},
    "per_layer": {f"{s}/{o}_mu" for s in ("first", "second") for o in ("weight", "act")},
}


@pytest.mark.quick
@pytest.mark.parametrize("scope", SCOPES)
def test_leaves_of_a_scope(scope):
    compand = drawn(quantized(mu_scope=scope), X)["compand"]
    assert names(compand) == SCALES | MUS[scope]
    for leaf in jax.tree.leaves(compand):
        assert leaf.dtype == jnp.float32


@pytest.mark.quick
@pytest.mark.parametrize("scope", SCOPES)
def test_uniform_has_no_mu(scope):
    qmodel = quantized(mu_scope=scope, quantizer="uniform")
    variables = drawn(qmodel, X)
    assert names(variables["compand"]) == SCALES
    found = qmodel.quantizers(variables)
    assert {float(found[site][f"{o}_mu"]) for site in found for o in ("weight", "act")} == {0.0}
    first, scale = variables["params"]["first"], found["first"]["weight_scale"]
    kernel = cj.fake_quantize(first["kernel"], 0.0, scale, bits=3)
    x = cj.fake_quantize(X, 0.0, found["first"]["act_scale"], bits=3)
    y = jnp.tanh(nn.Dense(6).apply({"params": {**first, "kernel": kernel}}, x))
    assert_same(qmodel.apply(variables, X, method="encode"), y)


def test_a_shared_mus_gradient_is_the_sum_of_its_layers():
    variables = {scope: drawn(quantized(mu_scope=scope), X) for scope in SCOPES}
    same = variables["per_layer"]
    for site, operand in (path.split("/") for path in MUS["per_layer"]):
        same["compand"][site][operand] = jnp.float32(0.9)
    gradients = {}
    for scope in SCOPES:
        compand = {**same["compand"], "_shared": {}}
        if scope != "per_layer":
            shared = variables[scope]["compand"]["_shared"]
            compand["_shared"] = {name: jnp.float32(0.9) for name in shared}
        y, gradients[scope] = pull_back(
            quantized(mu_scope=scope).apply, {**same, "compand": compand}, X
        )
        if scope == "single":
            expected = y
        np.testing.assert_allclose(y, expected, atol=1e-6)
    each = gradients["per_layer"]["compand"]
    weight = each["first"]["weight_mu"] + each["second"]["weight_mu"]
    act = each["first"]["act_mu"] + each["second"]["act_mu"]
    separate = gradients["separate"]["compand"]["_shared"]
    assert float(separate["weight_mu"]) == pytest.approx(float(weight), rel=1e-4)
    assert float(separate["act_mu"]) == pytest.approx(float(act), rel=1e-4)
    single = gradients["single"]["compand"]["_shared"]["mu"]
    assert float(single) == pytest.approx(float(weight + act), rel=1e-4)
    for scope in SCOPES:
        assert_same(gradients[scope]["params"], gradients["single"]["params"], 1e-5)


@pytest.mark.quick
def test_quantizers_are_in_the_users_units():
    qmodel = quantized(mu_scope="separate", weight_granularity="channel", act_bits=None)
    variables = drawn(qmodel, X)
    compand = variables["compand"]
    found = qmodel.quantizers(variables)
    assert set(found) == {"first", "second"}
    for site, size in (("first", 6), ("second", 3)):
        assert set(found[site]) == {"weight_mu", "weight_scale"}
        mu = np.expm1(compand["_shared"]["weight_mu"])
        assert float(found[site]["weight_mu"]) == pytest.approx(mu)
        assert found[site]["weight_scale"].shape == (1, size)
        np.testing.assert_allclose(
            found[site]["weight_scale"], np.exp(compand[site]["weight_scale"]), rtol=1e-6
        )
    clipped = {**variables, "compand": {**compand, "_shared": {"weight_mu": jnp.float32(9.0)}}}
    assert float(qmodel.quantizers(clipped)["first"]["weight_mu"]) == pytest.approx(255)


@pytest.mark.quick
def test_mu_init():
    for mu in (0.0, 3.5, 255.0):
        found = quantized(mu_init=mu, mu_scope="single").init(KEY, X)["compand"]["_shared"]["mu"]
        assert float(mu_from_theta(found)) == pytest.approx(mu, rel=1e-5)


# Rules


def test_rules_are_applied_site_by_site():
    rules = (
        cj.Rule("first", weight_bits=2, act_bits=None, grid="midrise"),
        cj.Rule("sec.*", quantizer="uniform", weight_granularity="channel", act_bits=5),
        cj.Rule(".*", weight_bits=None),
    )
    qmodel = quantized(rules=rules)
    variables = drawn(qmodel, X)
    params, compand = variables["params"], variables["compand"]
    assert names(compand) == {
        "first/weight_mu", "first/weight_scale", "second/weight_scale", "second/act_scale"
    }  # fmt: skip
    assert compand["second"]["weight_scale"].shape == (1, 3)

    first, second = params["first"], params["second"]
    kernel = quantize_by_hand(first["kernel"], compand["first"], "weight", 2, grid="midrise")
    y = jnp.tanh(nn.Dense(6).apply({"params": {**first, "kernel": kernel}}, X))
    y = cj.fake_quantize(y, 0.0, jnp.exp(compand["second"]["act_scale"]), bits=5)
    scale = jnp.exp(compand["second"]["weight_scale"])
    kernel = cj.fake_quantize(second["kernel"], 0.0, scale, bits=3)
    expected = nn.Dense(3).apply({"params": {**second, "kernel": kernel}}, y)
    assert_same(qmodel.apply(variables, X), expected)


@pytest.mark.quick
def test_a_site_in_full_precision_has_no_leaves():
    qmodel = quantized(rules=(cj.Rule("first|.*/none", weight_bits=None, act_bits=None),))
    variables = drawn(qmodel, X)
    assert set(variables["compand"]) == {"second"}
    assert set(qmodel.quantizers(variables)) == {"second"}
    assert_same(
        qmodel.apply(variables, X, method="encode"),
        SetUp().apply({"params": variables["params"]}, X, method="encode"),
        0,
    )


@pytest.mark.quick
def test_a_rule_may_bring_the_only_quantizer():
    qmodel = quantized(weight_bits=None, act_bits=None, rules=(cj.Rule("second", weight_bits=4),))
    variables = drawn(qmodel, X)
    assert names(variables["compand"]) == {"second/weight_mu", "second/weight_scale"}
    expected = SetUp().apply({"params": weights_by_hand(variables, bits=4)}, X)
    assert_same(qmodel.apply(variables, X), expected)


# Where activations are quantized


@pytest.mark.quick
def test_outputs_leave_inputs_alone_and_the_last_one():
    qmodel = quantized(act_site="output", weight_bits=None)
    variables = drawn(qmodel, X)
    assert names(variables["compand"]) == {"first/act_mu", "first/act_scale"}
    params = variables["params"]
    y = nn.Dense(6).apply({"params": params["first"]}, X)
    y = jnp.tanh(quantize_by_hand(y, variables["compand"]["first"], "act"))
    assert_same(qmodel.apply(variables, X), nn.Dense(3).apply({"params": params["second"]}, y))


@pytest.mark.parametrize(("model", "last"), [(Twice(), "shared"), (Stack("scan"), "stack/dense")])
def test_a_site_that_runs_last_has_no_output_quantizer(model, last):
    found = quantized(model, act_site="output").init(KEY, X)["compand"]
    assert names(found) == {f"{last}/weight_mu", f"{last}/weight_scale"}


@pytest.mark.quick
def test_inputs_and_outputs_may_be_unsigned():
    for act_site in ("input", "output"):
        qmodel = quantized(act_site=act_site, act_signed=False, weight_bits=None)
        variables = drawn(qmodel, X)
        leaves, params = variables["compand"]["first"], variables["params"]["first"]
        x = quantize_by_hand(X, leaves, "act", signed=False) if act_site == "input" else X
        y = nn.Dense(6).apply({"params": params}, x)
        if act_site == "output":
            y = quantize_by_hand(y, leaves, "act", signed=False)
        assert_same(qmodel.apply(variables, X, method="encode"), jnp.tanh(y))


# Gradients of the scale as in LSQ


def test_scale_gradients_as_in_lsq():
    plain, lsq = (quantized(scale_gradient=name) for name in ("plain", "lsq"))
    variables = drawn(plain, X)
    y, expected = pull_back(plain.apply, variables, X)
    y_lsq, found = pull_back(lsq.apply, variables, X)
    np.testing.assert_allclose(y_lsq, y, atol=1e-6)
    sizes = {"first": (4 * 6, 5 * 4), "second": (6 * 3, 5 * 6)}
    for site, counts in sizes.items():
        for operand, size in zip(("weight", "act"), counts, strict=True):
            name = f"{operand}_scale"
            factor = 1 / np.sqrt(size * 3)  # M = 3 at 3 bits
            want = factor * np.asarray(expected["compand"][site].pop(name))
            np.testing.assert_allclose(found["compand"][site].pop(name), want, rtol=1e-3)
    assert_same(found, expected, 1e-5)  # all else as it is


# Sites as values


@pytest.mark.quick
def test_the_shape_of_a_sites_scale():
    assert cj.Site(4, 4).scale_shape((3, 3, 4, 6)) == ()
    assert cj.Site(4, 4, scale_axes=(-1,)).scale_shape((3, 3, 4, 6)) == (1, 1, 1, 6)
    assert cj.Site(4, 4, scale_axes=(-3, -1)).scale_shape((2, 4, 3)) == (2, 1, 3)


def test_batch_statistics_are_the_quantized_models_own():
    qmodel = quantized(NormedNet(), act_bits=None)
    variables = drawn(qmodel, X)
    y = qmodel.apply(variables, X)
    expected = NormedNet().apply({**variables, "params": weights_by_hand(variables)}, X)
    assert_same(y, expected)


@pytest.mark.quick
def test_a_tied_embedding_is_quantized_alike_in_both_uses():
    ids = jnp.arange(5, dtype=jnp.int32)
    qmodel = quantized(Tokens(), act_bits=None)
    variables = drawn(qmodel, ids)
    expected = Tokens().apply({"params": weights_by_hand(variables)}, ids)
    assert_same(qmodel.apply(variables, ids), expected)
