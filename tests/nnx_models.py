"""Small NNX networks, with variables drawn at random, and functions of their values."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from small_models import QUICKLY

import compand_jax as cj

RNGS = nnx.Rngs(0)
TRAINED = nnx.Any(nnx.Param, cj.nnx.Quantizer)


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
