"""Blocks as those of Gemma and of t5x, which multiply by themselves, in Linen and in NNX."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

HANDS = {"quantize": lambda site, operand, x: x}


def by_hand(module, name, operand, x):
    """Quantizes, where it is tested against, what the library has to find by itself."""
    return HANDS["quantize"]("/".join((*module.path, name)), operand, x)


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


def parameter(*shape):
    """Returns a parameter of zeros, to be drawn."""
    return nnx.Param(jnp.zeros(shape))


class EinsumNNX(nnx.Module):
    def __init__(self, shape):
        self.w = parameter(*shape)

    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.w[...])


class RMSNormNNX(nnx.Module):
    def __init__(self, size):
        self.scale = nnx.Param(jnp.zeros(size))

    def __call__(self, x):
        x = x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
        return x * (1 + self.scale[...][None, None])


class GemmaAttentionNNX(nnx.Module):
    def __init__(self):
        self.qkv_einsum = EinsumNNX((3, 2, 4, 2))
        self.attn_vec_einsum = EinsumNNX((2, 2, 4))

    def __call__(self, x):
        q, k, v = self.qkv_einsum("BTD,SNDH->SBTNH", x)
        scores = jnp.einsum("BTNH,BSNH->BTNS", rotated(q), rotated(k))
        mask = jnp.tril(jnp.ones((x.shape[1],) * 2, bool))[None, :, None]
        p = jax.nn.softmax(jnp.where(mask, scores, -1e9))
        return self.attn_vec_einsum("BTNH,NHD->BTD", jnp.einsum("BTNS,BSNH->BTNH", p, v))


class GemmaFeedForwardNNX(nnx.Module):
    def __init__(self):
        self.gating_einsum = parameter(2, 4, 6)
        self.linear = parameter(6, 4)

    def __call__(self, x):
        gating = self.gating_einsum[...]
        return jnp.dot(nnx.gelu(jnp.dot(x, gating[0])) * jnp.dot(x, gating[1]), self.linear[...])


class GemmaBlockNNX(nnx.Module):
    def __init__(self, rngs):
        self.RMSNorm_0, self.RMSNorm_1 = RMSNormNNX(4), RMSNormNNX(4)
        self.attn, self.mlp = GemmaAttentionNNX(), GemmaFeedForwardNNX()
        self.adapter = nnx.Linear(4, 4, kernel_init=nn.initializers.zeros, rngs=rngs)

    def __call__(self, x):
        with jax.named_scope("block"), jax.named_scope("attn"):
            x = x + self.attn(self.RMSNorm_0(x))
        x = x + self.mlp(self.RMSNorm_1(x))
        return x + self.adapter(x)


class GemmaNNX(nnx.Module):
    """`Gemma`, its two blocks by `nnx.scan` and `nnx.remat`."""

    def __init__(self, rngs):
        self.embedding = parameter(7, 4)
        self.block = nnx.split_rngs(splits=2)(nnx.vmap(GemmaBlockNNX, in_axes=0))(rngs)

    def __call__(self, ids):
        run = nnx.remat(lambda block, x: block(x), prevent_cse=False)
        run = nnx.scan(run, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        x = run(self.block, self.embedding[...][ids] * 2)
        return jnp.einsum("btd,vd->btv", x, self.embedding[...])


class DenseGeneralNNX(nnx.Module):
    def __init__(self, inputs, features):
        self.inputs, self.features = inputs, features
        self.kernel = parameter(int(np.prod(inputs)), int(np.prod(features)))

    def __call__(self, x):
        kernel = jnp.asarray(self.kernel[...].reshape((*self.inputs, *self.features)), x.dtype)
        n = len(self.inputs)
        axes = tuple(range(x.ndim - n, x.ndim)), tuple(range(n))
        return lax.dot_general(x, kernel, (axes, ((), ())))


class T5BlockNNX(nnx.Module):
    """`T5Block`."""

    def __init__(self):
        for name in ("query", "key", "value"):
            setattr(self, name, DenseGeneralNNX((4,), (2, 2)))
        self.out = DenseGeneralNNX((2, 2), (4,))

    def __call__(self, x):
        x = x.astype(jnp.bfloat16)
        q, k, v = self.query(x), self.key(x), self.value(x)
        p = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        return self.out(jnp.einsum("bhqk,bkhd->bqhd", p, v))
