"""What a quantized model refuses, by name, with what was got and what to do."""

import flax.linen as nn
import numpy as np
import pytest
from flax import nnx
from small_models import KEY, SetUp, drawn, normal

import compand_jax as cj

pytestmark = [
    pytest.mark.quick,
    pytest.mark.filterwarnings("ignore:the quantized model is not calibrated"),
]
X = normal(5, 4)


def quantized(model=None, **config):
    config = {"weight_bits": 3, "act_bits": 3, **config}
    return cj.quantize_model(model or SetUp(), cj.QuantConfig(**config))


def test_a_model_is_a_module_and_a_config_a_config():
    quantize = getattr(cj.quantize_model, "__wrapped__", cj.quantize_model)
    with pytest.raises(TypeError, match=r"`model` must be a flax.linen Module, got function"):
        quantize(lambda x: x, cj.QuantConfig())
    with pytest.raises(TypeError, match="got the class Dense: give an instance of one"):
        quantize(nn.Dense, cj.QuantConfig())
    with pytest.raises(TypeError, match="got Linear: .* quantized by compand_jax.nnx.quantize"):
        quantize(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), cj.QuantConfig())
    with pytest.raises(TypeError, match=r"`config` must be a QuantConfig, got dict"):
        quantize(SetUp(), {"weight_bits": 4})


def test_compand_is_needed():
    qmodel = quantized()
    variables = drawn(qmodel, X)
    match = r"`variables` must hold the collection 'compand', got \['params'\]: make it with"
    with pytest.raises(ValueError, match=match):
        qmodel.apply({"params": variables["params"]}, X)
    with pytest.raises(ValueError, match=match):
        qmodel.quantizers({"params": variables["params"]})
    with pytest.raises(ValueError, match=match):
        qmodel.summary({"params": variables["params"]})


@pytest.mark.parametrize("made_by", ["single", "separate", "per_layer", "uniform"])
@pytest.mark.parametrize("applied_by", ["single", "separate", "per_layer"])
def test_variables_of_another_scope(made_by, applied_by):
    config = {"quantizer": "uniform"} if made_by == "uniform" else {"mu_scope": made_by}
    variables = drawn(quantized(**config), X)
    qmodel = quantized(mu_scope=applied_by)
    if made_by == applied_by:
        qmodel.apply(variables, X)
        return
    where = {"single": "_shared/mu", "separate": "_shared/act_mu", "per_layer": "first/act_mu"}
    match = rf"must hold compand/{where[applied_by]} for mu_scope='{applied_by}': .* another config"
    with pytest.raises(ValueError, match=match):
        qmodel.apply(variables, X)


def test_a_model_without_layers():
    match = r"`model` must have a layer to quantize \(Dense, .* Embed\), found none"
    with pytest.raises(ValueError, match=match):
        quantized(nn.LayerNorm()).init(KEY, X)


def test_a_rule_that_matches_nothing_lists_the_sites():
    rules = (cj.Rule("first", weight_bits=8), cj.Rule("thrid", weight_bits=8))
    match = r"`rules` must each match a site, 'thrid' matches none of 'first', 'second'"
    with pytest.raises(ValueError, match=match):
        quantized(rules=rules).init(KEY, X)
    with pytest.raises(ValueError, match=match):
        cj.quantize_model(SetUp(), cj.QuantConfig(rules=rules), sites={
            "first": cj.Site(4, 4), "second": cj.Site(4, 4)
        })  # fmt: skip


def test_one_bit_of_a_signed_activation():
    qmodel = quantized(act_bits=1)
    match = r"`act_bits` must be at least 2 for activations that have a sign, got 1: calibrate"
    with pytest.raises(ValueError, match=match):
        qmodel.apply(drawn(qmodel, X), X)
    unsigned = quantized(act_bits=1, act_signed=False)
    assert np.all(np.isfinite(unsigned.apply(drawn(unsigned, X), X)))
