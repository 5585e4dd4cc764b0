"""`calibrate`: what is seen of a model over batches, and what is made of it."""

import dataclasses
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import (
    KEY,
    Attention,
    NormedNet,
    SetUp,
    Stack,
    Tokens,
    assert_same,
    drawn,
    normal,
    shapes,
)

import compand_jax as cj
from compand_jax.calibration.fit import Group, fit_groups
from compand_jax.calibration.samples import sample_from_weights
from compand_jax.core.spec import Spec

X = normal(5, 4)
BATCHES = (X, normal(5, 4, seed=1), 2 * normal(3, 4, seed=2))  # the last one is smaller
THREE = Spec(3)


def quantized(model=None, **config):
    config = {"weight_bits": 3, "act_bits": 3, **config}
    return cj.quantize_model(model or SetUp(), cj.QuantConfig(**config))


def calibrated(model=None, batches=BATCHES, variables=None, calibration="absmax", **config):
    qmodel = quantized(model, **config)
    if variables is None:
        variables = drawn(qmodel.model, next(iter(batches)))
    return qmodel.calibrate(variables, batches, calibration=calibration)


def by_hand(params, batches=BATCHES):
    """Returns the tensors that the full-precision network's layers multiply."""
    hidden = [SetUp().apply({"params": params}, x, method="encode") for x in batches]
    return {
        ("first", "weight"): params["first"]["kernel"],
        ("first", "act"): jnp.concatenate(batches),
        ("second", "weight"): params["second"]["kernel"],
        ("second", "act"): jnp.concatenate(hidden),
    }


@pytest.mark.parametrize(
    ("scope", "calibration"),
    [("single", "mse"), ("single", "absmax"), ("separate", "absmax"), ("per_layer", "mse")],
)
def test_mu_and_scale_are_fitted_to_what_the_layers_see(scope, calibration):
    qmodel, variables = calibrated(mu_scope=scope, calibration=calibration)
    found, tensors = qmodel.quantizers(variables), by_hand(variables["params"])
    groups = {"single": lambda key: 0, "separate": lambda key: key[1], "per_layer": lambda key: key}
    for group in {groups[scope](key) for key in tensors}:
        members = [key for key in tensors if groups[scope](key) == group]
        samples = [sample_from_weights([tensors[key]]) for key in members]
        specs = [THREE] * len(members)
        ((mu, scales, _),) = fit_groups([Group(samples, specs)], calibration=calibration)
        for (site, operand), (scale,) in zip(members, scales, strict=True):
            assert float(found[site][f"{operand}_mu"]) == pytest.approx(mu, rel=1e-3, abs=1e-3)
            assert float(found[site][f"{operand}_scale"]) == pytest.approx(float(scale), rel=1e-3)


def test_outputs_are_seen_where_they_are_quantized():
    qmodel, variables = calibrated(act_site="output")
    params = variables["params"]["first"]
    outputs = [x @ params["kernel"] + params["bias"][None] for x in BATCHES]
    found = qmodel.quantizers(variables)
    top = max(np.abs(y).max() for y in outputs)
    assert float(found["first"]["act_scale"]) == pytest.approx(top, rel=1e-5)
    assert set(found["second"]) == {"weight_mu", "weight_scale"}


def test_channels_and_uniform():
    qmodel, variables = calibrated(weight_granularity="channel", quantizer="uniform")
    found = qmodel.quantizers(variables)
    for site in ("first", "second"):
        kernel = variables["params"][site]["kernel"]
        assert float(found[site]["weight_mu"]) == float(found[site]["act_mu"]) == 0
        top = np.abs(kernel).max(0, keepdims=True)
        np.testing.assert_allclose(found[site]["weight_scale"], top, rtol=1e-5)


@pytest.mark.parametrize("scope", ["single", "per_layer"])
def test_scales_at_a_mu_that_is_given(scope):
    qmodel = quantized(mu_scope=scope)
    variables = drawn(qmodel.model, X)
    qmodel, variables = qmodel.calibrate(variables, BATCHES, mu=255.0)
    found, tensors = qmodel.quantizers(variables), by_hand(variables["params"])
    for (site, operand), tensor in tensors.items():
        assert found[site][f"{operand}_mu"] == pytest.approx(255, rel=1e-5)
        scale, signed = float(found[site][f"{operand}_scale"]), bool(np.any(tensor < 0))

        def error(scale, x=tensor, signed=signed):
            return np.sum((x - cj.fake_quantize(x, 255.0, scale, bits=3, signed=signed)) ** 2)

        # Hardly better is any of a fine grid; of so few values the error is jagged.
        top = float(np.abs(tensor).max())
        assert error(scale) <= 1.1 * min(map(error, top * np.linspace(0.05, 1.1, 200)))


def test_one_pass_over_a_generator():
    taken = []

    def generate():
        for batch in BATCHES:
            taken.append(batch.shape[0])
            yield batch

    qmodel, variables = quantized(), drawn(SetUp(), X)
    _, once = qmodel.calibrate(variables, generate(), calibration="absmax")
    assert taken == [5, 5, 3]
    _, listed = qmodel.calibrate(variables, list(BATCHES), calibration="absmax")
    assert_same(once, listed, 0)
    taken.clear()
    normed = quantized(NormedNet())
    normed.calibrate(
        drawn(NormedNet(), X), generate(), calibration="absmax", batch_stats=True, train=False
    )
    assert taken == [5, 5, 3]


class Two(nn.Module):
    """Takes two arguments, one of them integers, and a keyword."""

    @nn.compact
    def __call__(self, x, ids, *, factor=1.0):
        return nn.Dense(3, name="dense")(factor * x + nn.Embed(7, 4, name="embed")(ids))


def test_a_tuple_is_a_models_arguments_and_keywords_go_to_it():
    ids = jnp.arange(5, dtype=jnp.int32)
    variables = drawn(Two(), X, ids)
    qmodel = quantized(Two(), weight_bits=None)
    tops = []
    for factor in (1.0, 3.0):
        calibrated, found = qmodel.calibrate(
            variables, [(X, ids)], calibration="absmax", factor=factor
        )
        tops.append(float(calibrated.quantizers(found)["dense"]["act_scale"]))
        summed = factor * X + variables["params"]["embed"]["embedding"][ids]
        assert tops[-1] == pytest.approx(float(np.abs(summed).max()), rel=1e-5)


def test_method_and_rngs_go_to_the_model():
    variables = drawn(SetUp(), X)
    qmodel, found = quantized().calibrate(
        variables, [X], calibration="absmax", method="encode", rngs={"dropout": KEY}
    )
    assert set(found["compand"]) == set(qmodel.sites) == {"first"}
    assert np.all(np.isfinite(qmodel.apply(found, X, method="encode")))


# Signs


class Rectified(nn.Module):
    """A shared layer that sees no negative value in its first call, and one behind a ReLU."""

    @nn.compact
    def __call__(self, x):
        shared = nn.Dense(4, name="shared")
        y = shared(jnp.tanh(shared(jnp.abs(x))))
        return nn.Dense(3, name="rectified")(nn.relu(y))


def test_signs_are_as_seen():
    qmodel, variables = calibrated(Rectified())
    assert {name: site.act_signed for name, site in qmodel.sites.items()} == {
        "shared": True,
        "rectified": False,
    }
    params, leaves = variables["params"], variables["compand"]["shared"]
    y = jnp.abs(X)
    for step in (jnp.tanh, nn.relu):  # signed levels in both calls
        kernel = cj.fake_quantize(
            params["shared"]["kernel"],
            jnp.expm1(leaves["weight_mu"]),
            jnp.exp(leaves["weight_scale"]),
            bits=3,
        )
        y = cj.fake_quantize(y, jnp.expm1(leaves["act_mu"]), jnp.exp(leaves["act_scale"]), bits=3)
        y = step(y @ kernel + params["shared"]["bias"][None])
    found = qmodel.quantizers(variables)["rectified"]
    y = cj.fake_quantize(y, found["act_mu"], found["act_scale"], bits=3, signed=False)
    kernel = cj.fake_quantize(
        params["rectified"]["kernel"], found["weight_mu"], found["weight_scale"], bits=3
    )
    assert_same(qmodel.apply(variables, X), y @ kernel + params["rectified"]["bias"][None], 5e-6)


@pytest.mark.quick
@pytest.mark.parametrize("last", [0.5, -0.5])
def test_one_negative_value_in_the_last_batch_is_a_sign(last):
    batches = [jnp.abs(X), jnp.abs(X), jnp.full((2, 4), last)]
    qmodel, _ = calibrated(nn.Dense(3), batches, weight_bits=None)
    assert qmodel.sites[""].act_signed == (last < 0)


@pytest.mark.parametrize("signed", [True, False])
def test_signs_as_configured(signed):
    batches = [-jnp.abs(X), jnp.abs(X)] if not signed else [jnp.abs(X)]
    qmodel, variables = calibrated(nn.Dense(3), batches, act_signed=signed, weight_bits=None)
    assert qmodel.sites[""].act_signed is signed
    top = float(np.abs(X).max())
    assert float(qmodel.quantizers(variables)[""]["act_scale"]) == pytest.approx(top, rel=1e-5)


def test_one_bit_goes_without_a_sign():
    match = r"site '': `act_bits` must be at least 2 for activations that have a sign, got 1"
    with pytest.raises(ValueError, match=match):
        calibrated(nn.Dense(3), [X], act_bits=1)
    qmodel, variables = calibrated(nn.Dense(3), [jnp.abs(X)], act_bits=1)
    assert np.all(np.isfinite(qmodel.apply(variables, jnp.abs(X))))


# What comes back


def test_the_model_differs_in_its_sites_alone():
    qmodel = quantized()
    before = drawn(SetUp(), X)
    after, variables = qmodel.calibrate(before, BATCHES, calibration="absmax")
    assert dataclasses.replace(after, sites=None) == qmodel
    assert qmodel.sites is None
    assert set(after.sites) == {"first", "second"}
    assert isinstance(hash(after), int)
    assert set(before) == {"params"}
    assert_same(variables["params"], before["params"], 0)
    again, same = after.calibrate(variables, BATCHES, calibration="absmax")  # once more
    assert again == after
    assert_same(same, variables, 0)
    found = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), variables)
    assert found == shapes(qmodel, X)


@pytest.mark.parametrize("model", [SetUp(), Stack("scan")])
def test_calibration_is_deterministic(model):
    a, b = (calibrated(model, calibration="mse") for _ in range(2))
    assert a[0] == b[0]
    assert_same(a[1], b[1], 0)


def test_stored_sites_go_with_stored_variables():
    after, variables = calibrated(Rectified())
    sites = cj.sites_from_json(cj.sites_to_json(after.sites))
    loaded = cj.quantize_model(Rectified(), after.config, sites=sites)
    assert loaded == after
    assert hash(loaded) == hash(after)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(loaded.apply(variables, X), after.apply(variables, X))


@pytest.mark.quick
def test_bad_input():
    variables = drawn(SetUp(), X)
    with pytest.raises(ValueError, match=r"`batches` must hold at least one batch, got none"):
        quantized().calibrate(variables, iter(()))
    with pytest.raises(ValueError, match=r"`calibration` must be one of mse, .* output, got 'max'"):
        quantized().calibrate(variables, [X], calibration="max")
    for mu in (-1.0, 256.0, float("nan"), True, jnp.asarray(True), np.ones(2)):
        with pytest.raises(ValueError, match=r"`mu` must be None or from 0 to 255, got"):
            quantized().calibrate(variables, [X], mu=mu)
    for percentile in (0, 101.0, True, np.ones(2)):
        with pytest.raises(ValueError, match=r"`percentile` must be in \(0, 100\], got"):
            quantized().calibrate(variables, [X], percentile=percentile)
    rules = (cj.Rule("third", weight_bits=2),)
    with pytest.raises(ValueError, match=r"'third' matches none of 'first', 'second'"):
        quantized(rules=rules).calibrate(variables, [X])
    with pytest.raises(ValueError, match=r"`model` must have a layer to quantize"):
        quantized(nn.LayerNorm()).calibrate(drawn(nn.LayerNorm(), X), [X])


@pytest.mark.quick
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_names_its_site(value):
    variables = drawn(SetUp(), X)
    second = variables["params"]["second"]
    kernel = second["kernel"].at[1, 2].set(value)
    variables = {"params": {**variables["params"], "second": {**second, "kernel": kernel}}}
    match = r"`variables` must be finite, the weight of site 'second' is not"
    with pytest.raises(ValueError, match=match):
        quantized().calibrate(variables, [X])


@pytest.mark.quick
def test_what_is_no_list_of_batches():
    variables, calibrate = drawn(SetUp(), X), quantized().calibrate
    for array in (X, np.asarray(X)):
        match = r"`batches` must be several, got an array of shape \(5, 4\): give a list"
        with pytest.raises(TypeError, match=match):
            calibrate(variables, array)
    with pytest.raises(TypeError, match=r"`batches` must be several, got dict: give a list"):
        calibrate(variables, {"image": X})
    match = r"`batches` must have an example each, got none in batch 1, counting from 0"
    with pytest.raises(ValueError, match=match):
        calibrate(variables, [X, X[:0]])


@pytest.mark.quick
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_batch_that_is_not_finite_is_named(value):
    variables, bad = drawn(SetUp(), X), X.at[1, 2].set(value)
    match = r"`batches` must be finite, got NaN or infinity in batch 2, counting from 0"
    for bits in (None, 3):  # the latter looks at activations
        with pytest.raises(ValueError, match=match):
            quantized(act_bits=bits).calibrate(variables, [X, X, bad], calibration="absmax")


class Logarithm(nn.Module):
    """Finite until the second layer sees the logarithm of what is negative, or zero."""

    stacked: bool = False

    @nn.compact
    def __call__(self, x):
        x = jnp.log(nn.Dense(4, name="first")(x))
        if self.stacked:
            return Stack("scan", name="second")(x)
        return nn.Dense(4, name="second")(x)


@pytest.mark.parametrize(("stacked", "zero"), [(False, False), (True, False), (False, True)])
def test_activations_that_are_not_finite_name_their_site(stacked, zero):
    model = Logarithm(stacked)
    first = {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}
    variables = drawn(model, X)
    variables = {"params": {**variables["params"], "first": first}}
    good, site = jnp.abs(X) + 1, "second/stack/dense" if stacked else "second"
    bad = jnp.zeros_like(X) if zero else -good
    match = rf"`batches` must give finite activations, .* infinity at site '{site}' in batch 1"
    with pytest.raises(ValueError, match=match):
        quantized(model).calibrate(variables, [good, bad], calibration="absmax")


@pytest.mark.quick
def test_calibration_is_not_to_be_transformed():
    variables, calibrate = drawn(SetUp(), X), quantized().calibrate
    match = r"`variables` must be arrays with values, got tracers: .* outside of jax.jit"
    with pytest.raises(TypeError, match=match):
        jax.jit(lambda variables: calibrate(variables, [X])[1])(variables)
    with pytest.raises(TypeError, match=r"`batches` must be arrays with values, got tracers"):
        jax.jit(lambda x: calibrate(variables, [x])[1])(X)


@pytest.mark.quick
@pytest.mark.parametrize("kind", [np.float32, jnp.float32, np.int64, np.asarray])
def test_numbers_of_other_libraries(kind):
    variables = drawn(nn.Dense(3), X)
    qmodel, found = quantized(nn.Dense(3), act_bits=None).calibrate(
        variables, [X], calibration="percentile", percentile=kind(100), mu=kind(3)
    )
    found = qmodel.quantizers(found)[""]
    assert float(found["weight_mu"]) == pytest.approx(3, rel=1e-5)
    top = float(jnp.abs(variables["params"]["kernel"]).max())
    assert float(found["weight_scale"]) == pytest.approx(top, rel=1e-5)


def test_activations_of_zeros_have_scale_one_and_weights_of_zeros_next_to_none():
    variables = {"params": jax.tree.map(jnp.zeros_like, drawn(nn.Dense(3), X)["params"])}
    for calibration in ("mse", "absmax"):
        qmodel, found = calibrated(nn.Dense(3), [0 * X], variables, calibration)
        values = qmodel.quantizers(found)[""]
        assert (float(values["weight_scale"]), float(values["act_scale"])) == (2.0**-110, 1)
        assert not np.any(qmodel.apply(found, X))


def test_attention_and_tokens():
    x = normal(2, 5, 4)
    qmodel, variables = calibrated(Attention(), [x, 3 * x])
    found = qmodel.quantizers(variables)
    assert len(found) == 4
    top = float(np.abs(3 * x).max())
    assert float(found["attention/query"]["act_scale"]) == pytest.approx(top, rel=1e-5)
    ids = jnp.arange(5, dtype=jnp.int32)
    qmodel, variables = calibrated(Tokens(), [ids, ids[:2]])
    assert np.all(np.isfinite(qmodel.apply(variables, ids)))
    assert qmodel.sites["embed"].act_bits == 3
