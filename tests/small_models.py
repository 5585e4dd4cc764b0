"""Small networks, with variables drawn without compiling `init`, and quantizing by hand."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

import compand_jax as cj

KEY = jax.random.key(0)
BITS = 3  # few thresholds, little to compile
QUICKLY = {"xla_backend_optimization_level": 0}  # an option that every supported XLA has
QUICKLY_FLAGS = " ".join(f"--{name}={value}" for name, value in QUICKLY.items())


def normal(*shape, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(rng.normal(size=shape), dtype)


class Net(nn.Module):
    """A layer, tanh, and a dense head."""

    layer: nn.Module
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        y = self.layer.attend(x) if isinstance(self.layer, nn.Embed) else self.layer(x)
        return nn.Dense(3, dtype=self.dtype, name="head")(jnp.tanh(y))


class ScaledConv(nn.Conv):
    """A subclass that calls its parent's `__call__`."""

    def __call__(self, x):
        return super().__call__(x) * jnp.asarray(0.5, self.dtype or x.dtype)


class Block(nn.Module):
    """A dense layer and tanh; as a scan's body it takes and returns a carry."""

    features: int = 4
    carries: bool = False

    @nn.compact
    def __call__(self, x):
        y = jnp.tanh(nn.Dense(self.features, name="dense")(x))
        return (y, None) if self.carries else y


class SetUp(nn.Module):
    """Layers made in setup; `encode` runs the first of them alone."""

    def setup(self):
        self.first = nn.Dense(6)
        self.second = nn.Dense(3)

    def encode(self, x):
        return jnp.tanh(self.first(x))

    def __call__(self, x):
        return self.second(self.encode(x))


class Twice(nn.Module):
    """One layer that is run on two inputs."""

    @nn.compact
    def __call__(self, x):
        shared = nn.Dense(4, name="shared")
        return shared(jnp.tanh(shared(x)))


class Stack(nn.Module):
    """Blocks by scan, of own or of the same parameters, or by vmap."""

    kind: str

    @nn.compact
    def __call__(self, x):
        params = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        if self.kind == "vmap":
            return nn.vmap(Block, in_axes=0, **params)(name="stack")(x)
        if self.kind == "same":
            params = {"variable_broadcast": "params", "split_rngs": {"params": False}}
        return nn.scan(Block, length=3, **params)(carries=True, name="stack")(x)[0]


class InsideJit(nn.Module):
    """A plain function jitted between two layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="first")(x)
        return nn.Dense(3, name="second")(jax.jit(jax.nn.gelu)(x))


class Attention(nn.Module):
    """Self-attention."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(2, dtype=self.dtype, name="attention")(x)


class Tokens(nn.Module):
    """An embedding that is looked up and, tied, attended to."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(7, 6, name="embed")
        return embed.attend(nn.Dense(6, name="dense")(jnp.tanh(embed(ids))))


class VisionTransformer(nn.Module):
    """Patches, an encoder block, mean pooling."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (4, 4), strides=(4, 4), dtype=self.dtype, name="patches")(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        position = self.param("position", nn.initializers.normal(0.1), (1, *x.shape[1:]))
        x = x + position.astype(x.dtype)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        x = x + nn.MultiHeadDotProductAttention(2, dtype=self.dtype)(y)
        y = nn.Dense(16, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))
        x = x + nn.Dense(8, dtype=self.dtype)(nn.gelu(y))
        return nn.Dense(3, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x.mean(1)))


class NormedNet(nn.Module):
    """Dropout, batch norm and two layers, in training or not."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(6, name="first")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(3, name="second")(x)


def shapes(model, *args, **kwargs):
    return jax.eval_shape(lambda key, *args: model.init(key, *args, **kwargs), KEY, *args)


def drawn(model, *args, **kwargs):
    """Returns variables with every leaf random, and mu and scales that leave no layer dead."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        name = path[-1].key
        if name.endswith("mu"):
            value = rng.uniform(0.4, 1.4, leaf.shape)
        elif path[0].key == "compand":
            value = np.log(rng.uniform(0.7, 1, leaf.shape) * (3 if name == "act_scale" else 1))
        else:
            value = 0.35 * rng.normal(size=leaf.shape)
            value = np.abs(value) + 0.5 if name.endswith(("scale", "var")) else value
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes(model, *args, **kwargs))


def quantize_by_hand(w, leaves, operand, bits=BITS, **kwargs):
    """Returns `w` quantized by the mu and scale of a site's leaves, theta and rho undone."""
    scale = jnp.exp(leaves[f"{operand}_scale"])
    if scale.ndim:  # a stack of kernels that share their channels' scales
        scale = scale.reshape((1,) * (w.ndim - scale.ndim) + scale.shape)
    return cj.fake_quantize(w, jnp.expm1(leaves[f"{operand}_mu"]), scale, bits=bits, **kwargs)


def weights_by_hand(variables, bits=BITS):
    """Returns "params" with the kernel of every site that has a weight's scale quantized."""
    params = traverse_util.flatten_dict(variables["params"])
    compand = traverse_util.flatten_dict(variables["compand"])
    for path in compand:
        if path[-1] != "weight_scale":
            continue
        site = path[:-1]
        leaves = {name: compand[(*site, name)] for name in ("weight_mu", "weight_scale")}
        name = next(n for n in ("kernel", "embedding") if (*site, n) in params)
        params[(*site, name)] = quantize_by_hand(params[(*site, name)], leaves, "weight", bits)
    return traverse_util.unflatten_dict(params)


def assert_same(actual, expected, tolerance=2e-6):
    """Every leaf equal to within `tolerance` of its largest magnitude, or 1 % of the tree's."""

    def largest(leaf):
        return np.max(np.abs(np.asarray(leaf, np.float64)), initial=0.0)

    floor = max(1e-30, *(0.01 * largest(leaf) for leaf in jax.tree.leaves(expected)))

    def compare(path, a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        top = max(largest(b), floor)
        np.testing.assert_allclose(
            a / top, b / top, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path)
        )

    jax.tree_util.tree_map_with_path(compare, actual, expected)


def assert_trained(gradients):
    """Every leaf's gradient finite, and not zero but in a few of its entries."""
    for path, g in jax.tree_util.tree_leaves_with_path(gradients):
        g, name = np.asarray(g, np.float64), jax.tree_util.keystr(path)
        assert np.all(np.isfinite(g)), name
        assert np.mean(g != 0) > 0.5, name


def pull_back(function: Callable, variables, x):
    """Returns `function(variables, x)` and the gradients of its product with fixed numbers."""
    (found,) = pull_back_each((function,), variables, x)
    return found


def pull_back_each(functions, variables, x):
    """Returns what `pull_back` does of each; what they have in common is compiled once."""

    def run(function, variables, x):
        def total(trained):
            y = function({**variables, **trained}, x)
            weights = jnp.sin(jnp.arange(y.size, dtype=jnp.float32) + 1).reshape(y.shape)
            return jnp.sum(y.astype(jnp.float32) * weights), y

        trained = {name: variables[name] for name in ("params", "compand")}
        gradients, y = jax.grad(total, has_aux=True)(trained)
        return y, gradients

    run_all = lambda variables, x: [run(f, variables, x) for f in functions]  # noqa: E731
    return jax.jit(run_all, compiler_options=QUICKLY)(variables, x)


def elements(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
