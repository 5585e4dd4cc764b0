"""A trained network under settings: what is evaluated is what `calibrate` gives a user."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import (  # noqa: F401
    TinyNet,
    quantized_to,
    standard_promotion,
    tiny_data,
    tiny_variables,
)

from compand_jax import Rule, quantize_model
from compand_jax.data.calibration_images import choose_calibration_images
from compand_jax.experiments.errors import UserError
from compand_jax.experiments.ptq.network import (
    evaluate_full_precision,
    observe_network,
    reestimated,
    require_finite,
)
from compand_jax.experiments.ptq.settings import (
    Setting,
    evaluate_setting,
    quantize_network,
    quantized_params,
    with_levels,
)
from compand_jax.training.steps import evaluate

CONV, DENSE = 3 * 3 * 1 * 4, 64 * 3


@pytest.fixture(scope="module")
def network():
    data = tiny_data()
    calibration = choose_calibration_images(data, 48, pad=1, flip=True, seed=0)
    return observe_network(TinyNet(), tiny_variables(), data, calibration)


def correct_by_hand(network, model, variables):
    """By the quantized model's own apply, and a comparison in NumPy."""
    data = network.data
    images = (data.test_images / np.float32(255) - np.float32(data.mean)) / np.float32(data.std)
    apply = jax.jit(lambda variables, x: model.apply(variables, x, train=False))
    logits = apply(variables, images.astype(np.float32))
    return int((np.argmax(logits, -1) == data.test_labels).sum())


SETTINGS = [
    quantized_to(3),
    quantized_to(2, weight_granularity="channel", grid="midrise", quantizer="uniform"),
    quantized_to(3, rules=(Rule("conv", weight_bits=8),), calibration="absmax"),
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_network_with_levels_is_the_quantized_model_bit_for_bit(network, setting):
    qmodel, variables = quantize_network(network, setting)
    params = quantized_params(qmodel, variables)
    x = next(iter(network.calibration))
    own = jax.jit(lambda variables, x: qmodel.apply(variables, x))(variables, x)
    plain = jax.jit(lambda variables, x: network.model.apply(variables, x))
    replaced = plain({**network.variables, "params": params}, x)
    np.testing.assert_array_equal(replaced, own)
    assert np.any(np.asarray(own) != np.asarray(plain(network.variables, x)))
    columns = np.asarray(params["dense"]["kernel"]).T
    assert max(len(np.unique(column)) for column in columns) <= 2**setting.quant.weight_bits
    np.testing.assert_array_equal(params["dense"]["bias"], variables["params"]["dense"]["bias"])


@pytest.mark.parametrize(
    "setting",
    [
        quantized_to(3, weight_granularity="channel"),
        quantized_to(4, 2, mu_scope="single", batch_stats=False, calibration="percentile"),
        quantized_to(2, grid="midrise", error_feedback=True, calibration="output"),
    ],
)
def test_result_is_that_of_calibrate(network, setting):
    result = evaluate_setting(network, setting)
    qmodel, variables = quantize_model(network.model, setting.quant).calibrate(
        network.variables,
        network.calibration,
        calibration=setting.calibration,
        error_feedback=setting.error_feedback,
        batch_stats=setting.batch_stats,
        train=False,
    )
    assert result["correct"] == correct_by_hand(network, qmodel, variables)
    assert result["total"] == 19
    assert result["accuracy"] == 100 * result["correct"] / 19
    assert result["mean_weight_bits"] == setting.quant.weight_bits
    assert setting.to_row().items() <= result.items()
    assert result["calibration_seconds"] > 0 <= result["evaluation_seconds"]
    # All operands that a quantizer has parameters for, at 4 bytes: mu and scale.
    scales = 4 + 3 if setting.quant.weight_granularity == "channel" else 2
    scales += 2 * (setting.quant.act_bits is not None)
    mus = {"single": 1, "per_layer": 2 + 2 * (setting.quant.act_bits is not None)}[
        setting.quant.mu_scope
    ]
    mus *= setting.quant.quantizer == "mu_law"
    packed = -(-CONV * setting.quant.weight_bits // 8) + -(-DENSE * setting.quant.weight_bits // 8)
    assert result["model_bytes"] == packed + 4 * (4 * 4 + 3 + scales + mus)
    kernels = [network.variables["params"][name]["kernel"] for name in ("conv", "dense")]
    levels = quantized_params(qmodel, variables)
    pairs = [(np.float64(w), np.float64(levels[name]["kernel"]))
             for name, w in zip(("conv", "dense"), kernels, strict=True)]  # fmt: skip
    power, noise = sum((w**2).sum() for w, _ in pairs), sum(((w - q) ** 2).sum() for w, q in pairs)
    assert result["weight_sqnr"] == pytest.approx(10 * np.log10(power / noise))


WITH_ACTIVATIONS = [
    quantized_to(3, 4),
    quantized_to(2, 4, mu_scope="single", grid="midrise", weight_granularity="channel"),
    quantized_to(8, 4, mu_scope="separate", rules=(Rule("conv", weight_bits=None),)),
    quantized_to(3, 2, quantizer="uniform", rules=(Rule("dense", act_bits=8, quantizer="mu_law"),)),
    quantized_to(4, rules=(Rule("conv", act_bits=3, weight_bits=2, grid="midrise"),)),
]


@pytest.mark.parametrize("setting", WITH_ACTIVATIONS)
def test_levels_with_quantized_activations_are_the_quantized_model_bit_for_bit(network, setting):
    setting = setting.changed(calibration="absmax")  # as good here, and fast
    qmodel, variables = quantize_network(network, setting)
    model, own = with_levels(qmodel, variables)
    x = next(iter(network.calibration))
    expected, found = (
        jax.jit(lambda v, x, one=one: one.apply(v, x))(v, x)
        for one, v in ((qmodel, variables), (model, own))
    )
    np.testing.assert_array_equal(found, expected)
    without = {name: leaf for name, leaf in own.items() if name != "compand"}
    assert np.any(np.asarray(network.model.apply(without, x)) != np.asarray(expected))


def test_model_with_levels_is_one_for_all_weights_and_scopes(network):
    settings = [
        quantized_to(3, 4, calibration="absmax"),
        quantized_to(8, 4, calibration="absmax", mu_scope="single"),
        quantized_to(2, 4, calibration="absmax", mu_scope="separate", grid="midrise"),
        quantized_to(4, 4, calibration="percentile", weight_granularity="channel"),
    ]
    pairs = [with_levels(*quantize_network(network, one)) for one in settings]
    assert len({model for model, _ in pairs}) == 1
    assert len({jax.tree.structure(variables) for _, variables in pairs}) == 1
    weights_only = quantize_network(network, quantized_to(3, calibration="absmax"))
    assert with_levels(*weights_only)[0] is network.model


def test_statistics_are_those_of_calibrate(network):
    setting = quantized_to(3)
    qmodel, variables = quantize_model(network.model, setting.quant).calibrate(
        network.variables, network.calibration, batch_stats=True, train=False
    )
    plain = {**network.variables, "params": quantized_params(qmodel, variables)}
    found = reestimated(network.model, plain, network.calibration)
    trees = [jax.tree.leaves(one["batch_stats"]) for one in (found, variables)]
    for own, theirs in zip(*trees, strict=True):
        np.testing.assert_allclose(own, theirs, rtol=1e-5, atol=1e-6)
    assert np.any(found["batch_stats"]["norm"]["mean"] != plain["batch_stats"]["norm"]["mean"])
    without = {"params": network.variables["params"]}
    assert reestimated(network.model, without, network.calibration) == without


def test_mean_bits_are_over_weights(network):
    rules = (Rule("conv", weight_bits=8),)
    result = evaluate_setting(network, quantized_to(4, rules=rules, calibration="absmax"))
    assert result["mean_weight_bits"] == (8 * CONV + 4 * DENSE) / (CONV + DENSE)


def test_full_precision(network):
    found = evaluate_full_precision(network)
    data = network.data
    assert found["correct"] == correct_by_hand(network, network.model, network.variables)
    assert found["model_bytes"] == 4 * (CONV + DENSE + 4 * 4 + 3)
    again = reestimated(network.model, network.variables, network.calibration)
    assert found["reestimated_correct"] == evaluate(
        network.model, again, data.test_images, data.test_labels,
        mean=data.mean, std=data.std, batch_size=19,
    )  # fmt: skip


@pytest.mark.quick
def test_numbers_that_are_not_finite_are_named_by_path():
    variables = tiny_variables()
    require_finite(variables)
    variables["params"]["conv"]["kernel"] = jnp.full((3, 3, 1, 4), jnp.nan)
    variables["batch_stats"]["norm"]["var"] = jnp.full(4, jnp.inf)
    message = (
        "`checkpoint` must hold finite numbers, got NaN or infinity in batch_stats/norm/var, "
        "params/conv/kernel: give one"
    )
    with pytest.raises(UserError, match=message):
        require_finite(variables)
    data = tiny_data()
    calibration = choose_calibration_images(data, 8, pad=0, flip=False, seed=0)
    with pytest.raises(UserError, match="NaN or infinity in batch_stats/norm/var, params/conv/k"):
        observe_network(TinyNet(), variables, data, calibration)


@pytest.mark.quick
def test_setting_with_a_wrong_field():
    with pytest.raises(ValueError, match="`weight_bits` must be an integer from 1 to 8, got 9"):
        quantized_to(9)
    message = "`quant` must vary in weight_bits, act_bits, .*, mu_scope and rules alone"
    with pytest.raises(ValueError, match=message):
        quantized_to(4, act_site="output").to_row()


@pytest.mark.quick
@pytest.mark.parametrize("one", [*SETTINGS, *WITH_ACTIVATIONS])
def test_a_row_has_all_of_a_setting(one):
    row = json.loads(json.dumps(one.to_row() | {"accuracy": 90.0}))
    assert Setting.from_row(row) == one
