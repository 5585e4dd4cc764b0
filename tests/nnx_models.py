"""NNX layers and small networks, with variables drawn at random, and functions of their values."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from small_models import QUICKLY

import compand_jax as cj

RNGS = nnx.Rngs(0)
TRAINED = nnx.Any(nnx.Param, cj.nnx.Quantizer)
IMAGE = (2, 5, 5, 4)

# The NNX layer, the Linen one, the shape of the input, and the weight's output axes.
LAYERS = {
    "linear": (lambda **k: nnx.Linear(4, 6, **k), lambda **k: nn.Dense(6, **k), (5, 4), (-1,)),
    "linear_general": (
        lambda **k: nnx.LinearGeneral((4, 2), (2, 3), axis=(-2, -1), **k),
        lambda **k: nn.DenseGeneral((2, 3), axis=(-2, -1), **k),
        (5, 4, 2),
        (-2, -1),
    ),
    "linear_general_batch": (
        lambda **k: nnx.LinearGeneral(4, 6, batch_axis={0: 5}, **k),
        lambda **k: nn.DenseGeneral(6, batch_dims=(0,), **k),
        (5, 2, 4),
        (-1,),
    ),
    "einsum": (
        lambda **k: nnx.Einsum("...d,dhk->...hk", (4, 2, 3), (2, 3), **k),
        lambda **k: nn.Einsum((4, 2, 3), "...d,dhk->...hk", **k),
        (5, 4),
        (-2, -1),
    ),
    "conv": (
        lambda **k: nnx.Conv(4, 6, (3, 3), **k),
        lambda **k: nn.Conv(6, (3, 3), **k),
        IMAGE,
        (-1,),
    ),
    "conv_depthwise": (
        lambda **k: nnx.Conv(4, 4, (3, 3), feature_group_count=4, **k),
        lambda **k: nn.Conv(4, (3, 3), feature_group_count=4, **k),
        IMAGE,
        (-1,),
    ),
    "conv_grouped": (
        lambda **k: nnx.Conv(4, 6, (3, 3), feature_group_count=2, **k),
        lambda **k: nn.Conv(6, (3, 3), feature_group_count=2, **k),
        IMAGE,
        (-1,),
    ),
    "conv_transpose": (
        lambda **k: nnx.ConvTranspose(4, 6, (3, 3), (2, 2), **k),
        lambda **k: nn.ConvTranspose(6, (3, 3), (2, 2), **k),
        IMAGE,
        (-1,),
    ),
    "conv_transpose_kernel": (
        lambda **k: nnx.ConvTranspose(4, 6, (3, 3), (2, 2), transpose_kernel=True, **k),
        lambda **k: nn.ConvTranspose(6, (3, 3), (2, 2), transpose_kernel=True, **k),
        IMAGE,
        (-2,),
    ),
    "attend": (lambda **k: nnx.Embed(7, 4, **k), lambda **k: nn.Embed(7, 4, **k), (5, 4), (-1,)),
    "lora": (
        lambda **k: nnx.LoRALinear(4, 6, lora_rank=2, lora_dtype=k.get("dtype"), **k),
        None,
        (5, 4),
        (-1,),
    ),
}


def run(layer, x):
    return layer.attend(x) if isinstance(layer, nnx.Embed) else layer(x)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.linear(x))


class Tied(nnx.Module):
    """A layer on two paths, a list, and a product that no hook reaches."""

    def __init__(self, rngs):
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.again = self.first
        self.blocks = nnx.Sequential(Block(rngs), nnx.Linear(4, 2, rngs=rngs))
        self.own = nnx.Param(jnp.ones((2, 3)))

    def __call__(self, x):
        return self.blocks(self.again(jnp.tanh(self.first(x)))) @ self.own[...]


class Stack(nnx.Module):
    """Blocks that `nnx.vmap` makes, run by `nnx.scan` or by `nnx.vmap`."""

    def __init__(self, rngs, axes=0, run="scan"):
        self.axes, self.run = axes, run
        make = nnx.vmap(Block, in_axes=0)
        self.blocks = nnx.split_rngs(splits=3)(make)(rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        if self.run == "scan":
            run = nnx.scan(
                lambda block, x: block(x), in_axes=(self.axes, nnx.Carry), out_axes=nnx.Carry
            )
            return self.head(run(self.blocks, x))
        run = nnx.vmap(lambda block, x: block(x), in_axes=(self.axes, None))
        return self.head(jnp.sum(run(self.blocks, x), 0))


class Transformer(nnx.Module):
    """The `VisionTransformer` of Linen's tests."""

    def __init__(self, rngs, dtype=None):
        kwargs = {"dtype": dtype, "rngs": rngs}
        self.patches = nnx.Conv(3, 8, (4, 4), strides=(4, 4), **kwargs)
        self.position = nnx.Param(jnp.zeros((1, 4, 8)))
        self.LayerNorm_0 = nnx.LayerNorm(8, **kwargs)
        self.MultiHeadDotProductAttention_0 = nnx.MultiHeadAttention(2, 8, decode=False, **kwargs)
        self.LayerNorm_1 = nnx.LayerNorm(8, **kwargs)
        self.Dense_0 = nnx.Linear(8, 16, **kwargs)
        self.Dense_1 = nnx.Linear(16, 8, **kwargs)
        self.LayerNorm_2 = nnx.LayerNorm(8, **kwargs)
        self.Dense_2 = nnx.Linear(8, 3, **kwargs)

    def __call__(self, x):
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = x + self.position[...].astype(x.dtype)
        x = x + self.MultiHeadDotProductAttention_0(self.LayerNorm_0(x))
        x = x + self.Dense_1(nnx.gelu(self.Dense_0(self.LayerNorm_1(x))))
        return self.Dense_2(self.LayerNorm_2(x.mean(1)))


class Decoder(nnx.Module):
    """Tied embedding, causal attention with a cache of keys and values."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.dense = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, ids, decode=False):
        x, mask = self.embed(ids), None if decode else nnx.make_causal_mask(ids)
        x = x + self.attention(x, mask=mask, decode=decode)
        return self.embed.attend(nnx.gelu(self.dense(x)))


def values_of(model):
    """Returns what is trained of a model, as a dictionary of arrays."""
    return nnx.to_pure_dict(nnx.state(model, TRAINED))


def with_values(model, values):
    """Returns a copy of a model with these values."""
    copy = nnx.clone(model)
    nnx.update(copy, values)
    return copy


def draw(model, seed=1):
    """Draws what is trained, mu and scales such that no layer is dead."""
    rng = np.random.default_rng(seed)

    def number(path, leaf):
        keys = [entry.key for entry in path]
        if "promote_dtype" not in keys:
            value = 0.6 * rng.normal(size=leaf.shape)
        elif keys[-1].endswith("mu"):
            value = rng.uniform(0.4, 1.4, leaf.shape)
        else:
            value = np.log(rng.uniform(0.7, 1, leaf.shape) * (3 if "act" in keys[-1] else 1))
        return jnp.asarray(value, leaf.dtype)

    nnx.update(model, jax.tree_util.tree_map_with_path(number, values_of(model)))


def split_linens(values):
    """Returns values of an NNX model as Linen's params and compand."""
    params, compand = {}, {}
    for name, leaf in values.items():
        if name == "promote_dtype":
            compand |= leaf
        elif isinstance(leaf, dict):
            params[name], inner = split_linens(leaf)
            compand |= {name: inner} if inner else {}
        else:
            params[name] = leaf
    return params, compand


def with_gradients(functions, values, x):
    """Returns, of each function, its output and the gradients of the output's fixed product."""

    def one(function, values, x):
        def total(values):
            y = function(values, x)
            weights = jnp.sin(jnp.arange(y.size, dtype=jnp.float32) + 1).reshape(y.shape)
            return jnp.sum(y.astype(jnp.float32) * weights), y

        gradients, y = jax.grad(total, has_aux=True)(values)
        return y, gradients

    run_all = lambda values, x: [one(f, values, x) for f in functions]  # noqa: E731
    return jax.jit(run_all, compiler_options=QUICKLY)(values, x)
