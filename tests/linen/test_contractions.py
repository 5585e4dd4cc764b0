"""Linen models that multiply by themselves: blocks as those of Gemma and of t5x."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contraction_models import HANDS, IDS, Gemma, T5Block
from small_models import BITS, KEY, assert_same, drawn, normal, pull_back_each

import compand_jax as cj

uncalibrated = pytest.mark.filterwarnings("ignore:the quantized model is not calibrated")


def quantized(model, **fields):
    fields = {"weight_bits": BITS, "act_bits": BITS, "contractions": "parameters"} | fields
    return cj.quantize_model(model, cj.QuantConfig(**fields))


def smooth(operand, x, mu, scale, *_):
    """Stands in for a quantizer: compiled fast, and no rounding makes another level of it."""
    return (x + jnp.sin(x) * scale) * (1 + mu)


@uncalibrated
def test_gemma_is_quantized_as_by_hand(monkeypatch):
    monkeypatch.setattr("compand_jax.layers.layer_quantizer.quantize_operand", smooth)
    qmodel = quantized(Gemma(), contractions="all")
    variables = drawn(qmodel, IDS)
    attention = variables["compand"]["block"]["attn"]
    assert {name: sorted(leaves) for name, leaves in attention.items() if ":" in name} == {
        f"product_{i}:{side}": ["act_mu", "act_scale"] for i in (0, 1) for side in ("left", "right")
    }
    # Its one layer of Flax is quantized as ever.
    layers = quantized(Gemma(), contractions="layers")

    def quantized_by_hand(variables, ids):
        def quantize(site, operand, x):
            leaves = variables["compand"]
            for key in site.split("/"):
                leaves = leaves[key]
            mu, scale = (leaves[f"{operand}_{name}"] for name in ("mu", "scale"))
            return smooth(operand, x, jnp.expm1(mu), jnp.exp(scale))

        monkeypatch.setitem(HANDS, "quantize", quantize)
        outputs = layers.apply(variables, ids)
        monkeypatch.undo()
        return outputs

    (found, grads), (outputs, expected) = pull_back_each(
        (qmodel.apply, quantized_by_hand), variables, IDS
    )
    assert_same(found, outputs, 1e-5)
    assert_same(grads, expected, 1e-5)
    assert all(np.any(grad) for grad in jax.tree.leaves(grads["compand"]))
    left = "weights not quantized: block/RMSNorm_0/scale, block/RMSNorm_1/scale"
    assert qmodel.summary(variables).endswith(left)


def test_t5x_calibrated():
    x = normal(2, 3, 4)
    model = T5Block()
    variables = model.init(KEY, x)
    qmodel = quantized(model, act_bits=None, weight_granularity="channel")
    qmodel, variables = qmodel.calibrate(variables, [x], calibration="absmax", mu=2.0)
    assert sorted(qmodel.sites) == [f"{name}/kernel" for name in ("key", "out", "query", "value")]
    params = nn.meta.unbox(variables["params"])
    scales = jax.tree.map(lambda kernel: abs(kernel).max(0, keepdims=True), params)
    hand = jax.tree.map(
        lambda kernel, scale: cj.fake_quantize(kernel, 2.0, scale, bits=BITS), params, scales
    )
    found = qmodel.quantizers(variables)["out/kernel"]["weight_scale"]
    assert_same(found, scales["out"]["kernel"])
    assert_same(qmodel.apply(variables, x), model.apply({"params": hand}, x), 0.02)


class Mixed(nn.Module):
    """A layer of Flax, statistics, a cache, and a parameter of its own."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(4, name="dense")(x))
        return {"y": jnp.tanh(x) @ self.param("w", nn.initializers.normal(), (4, 3)), "name": "own"}


def test_layers_and_contractions_are_told_apart():
    x = normal(5, 4)
    rules = (cj.Rule("dense", weight_bits=None, act_bits=None),)
    qmodel = quantized(Mixed(), rules=rules, mu_scope="single")
    variables = qmodel.model.init(KEY, x)
    qmodel, variables = qmodel.calibrate(variables, [x], calibration="absmax", batch_stats=True)
    assert sorted(qmodel.sites) == ["dense", "w"]
    assert set(qmodel.quantizers(variables)) == {"w"}
    found, updates = qmodel.apply(variables, x, train=True, mutable=["batch_stats"])
    assert found["name"] == "own"
    plain, expected = Mixed().apply(
        {name: variables[name] for name in ("params", "batch_stats")},
        x,
        train=True,
        mutable=["batch_stats"],
    )
    assert_same(updates, expected)
    assert not np.allclose(found["y"], plain["y"])
    # Without the option it is missed, and named.
    missed = quantized(Mixed(), contractions="layers")
    assert "weights not quantized: w" in missed.summary(missed.init(KEY, x))


def test_refused():
    with pytest.raises(ValueError, match="`act_site` must be 'input' for contractions, got 'outp"):
        quantized(Mixed(), act_site="output")
    qmodel = quantized(Mixed())
    with pytest.raises(ValueError, match="`qmodel` must have contractions='layers', got 'param"):
        cj.freeze(qmodel, {}, normal(5, 4))
    with pytest.raises(ValueError, match="found none: .*QuantConfig.contractions='parameters'"):
        quantized(T5Block(), contractions="layers").init(KEY, normal(2, 3, 4))
