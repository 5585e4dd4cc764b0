"""Linen models that multiply by themselves: blocks as those of Gemma and of t5x."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from small_models import BITS, KEY, assert_same, drawn, normal, pull_back_each

import compand_jax as cj

HANDS = {"quantize": lambda site, operand, x: x}


def by_hand(module, name, operand, x):
    """Quantizes, where it is tested against, what the library has to find by itself."""
    return HANDS["quantize"]("/".join((*module.path, name)), operand, x)


uncalibrated = pytest.mark.filterwarnings("ignore:the quantized model is not calibrated")


class Einsum(nn.Module):
    """A parameter `w` and an einsum, as Gemma has it."""

    shape: tuple

    @nn.compact
    def __call__(self, equation, x):
        w = self.param("w", nn.initializers.normal(), self.shape)
        return jnp.einsum(equation, by_hand(self, "w", "act", x), by_hand(self, "w", "weight", w))


class RMSNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.zeros_init(), x.shape[-1:])
        x = x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
        return x * (1 + scale[None, None])


def rotated(x):
    """Rotary position embedding."""
    half = x.shape[-1] // 2
    places = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None]
    angles = places * 10.0 ** -jnp.arange(half, dtype=jnp.float32)[None]
    sin, cos = jnp.sin(angles)[None, :, None], jnp.cos(angles)[None, :, None]
    first, second = jnp.split(x, 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


class GemmaAttention(nn.Module):
    heads: int = 2
    size: int = 2

    @nn.compact
    def __call__(self, x):
        shape = (3, self.heads, x.shape[-1], self.size)
        q, k, v = Einsum(shape, name="qkv_einsum")("BTD,SNDH->SBTNH", x)
        q = by_hand(self, "product_0:left", "act", rotated(q))
        k = by_hand(self, "product_0:right", "act", rotated(k))
        scores = jnp.einsum("BTNH,BSNH->BTNS", q, k)
        mask = jnp.tril(jnp.ones((x.shape[1],) * 2, bool))[None, :, None]
        p = jax.nn.softmax(jnp.where(mask, scores, -1e9))
        # This einsum is a dot_general of v and p.
        p, v = (
            by_hand(self, f"product_1:{side}", "act", x) for x, side in ((p, "right"), (v, "left"))
        )
        encoded = jnp.einsum("BTNS,BSNH->BTNH", p, v)
        shape = (self.heads, self.size, x.shape[-1])
        return Einsum(shape, name="attn_vec_einsum")("BTNH,NHD->BTD", encoded)


class GemmaFeedForward(nn.Module):
    @nn.compact
    def __call__(self, x):
        normal = nn.initializers.normal()
        gating = self.param("gating_einsum", normal, (2, x.shape[-1], 6))
        gating = by_hand(self, "gating_einsum", "weight", gating)
        linear = self.param("linear", normal, (6, x.shape[-1]))
        x = by_hand(self, "gating_einsum", "act", x)
        gate = nn.gelu(jnp.dot(x, gating[0])) * jnp.dot(x, gating[1])
        gate = by_hand(self, "linear", "act", gate)
        return jnp.dot(gate, by_hand(self, "linear", "weight", linear))


class GemmaBlock(nn.Module):
    """A decoder block, whose last layer is one of Flax's."""

    @nn.compact
    def __call__(self, x, _=None):
        x = x + GemmaAttention(name="attn")(RMSNorm()(x))
        x = x + GemmaFeedForward(name="mlp")(RMSNorm()(x))
        return x + nn.Dense(x.shape[-1], name="adapter")(x), None


class Gemma(nn.Module):
    """A tied embedding, and two blocks by remat and scan."""

    @nn.compact
    def __call__(self, ids):
        table = self.param("embedding", nn.initializers.normal(), (7, 4))
        block = nn.scan(
            nn.remat(GemmaBlock, prevent_cse=False),
            length=2,
            variable_axes={"params": 0},
            split_rngs={"params": True},
        )
        x, _ = block(name="block")(table[ids] * 2, None)
        x = by_hand(self, "embedding", "act", x)
        return jnp.einsum("btd,vd->btv", x, by_hand(self, "embedding", "weight", table))


class DenseGeneral(nn.Module):
    """As t5x has it: a kernel of two axes, reshaped, and `lax.dot_general`."""

    features: tuple
    axes: int = 1

    @nn.compact
    def __call__(self, x):
        inputs = x.shape[-self.axes :]
        flat = int(np.prod(inputs)), int(np.prod(self.features))
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(nn.initializers.normal(), ("embed", "joined_kv")),
            flat,
        )
        kernel = jnp.asarray(kernel.reshape((*inputs, *self.features)), x.dtype)
        axes = tuple(range(x.ndim - self.axes, x.ndim)), tuple(range(self.axes))
        return lax.dot_general(x, kernel, (axes, ((), ())))


class T5Block(nn.Module):
    """Attention of t5x, in bfloat16."""

    @nn.compact
    def __call__(self, x):
        x = x.astype(jnp.bfloat16)
        q, k, v = (DenseGeneral((2, 2), name=name)(x) for name in ("query", "key", "value"))
        p = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        x = jnp.einsum("bhqk,bkhd->bqhd", p, v)
        return DenseGeneral((4,), axes=2, name="out")(x)


IDS = jnp.array([[1, 5, 2], [6, 0, 1]])


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
