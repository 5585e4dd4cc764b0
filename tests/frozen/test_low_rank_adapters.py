"""Low-rank adapters trained beside frozen, packed weights: that they learn, and in what memory.

As QLoRA does it (Dettmers et al., NeurIPS 2023).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import compand_jax as cj

KEY = jax.random.key(0)
WIDTH, RANK, LAYERS = 256, 2, 6
CONFIG = cj.QuantConfig(weight_bits=4, act_bits=None, weight_granularity=64, scale_dtype="uint8")
START = jax.random.normal(jax.random.key(1), (WIDTH, RANK)) / 4
DENSE = 4 * WIDTH * WIDTH  # bytes of a layer's weights in float32


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        down = self.variable("lora", "a", lambda: START).value
        up = self.variable("lora", "b", lambda: jnp.zeros((RANK, WIDTH))).value
        return x + 0.1 * nn.relu(nn.Dense(WIDTH, use_bias=False, name="base")(x) + x @ down @ up)


class Adapted(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(LAYERS):  # rematerialized, so that no layer's levels are kept
            x = nn.remat(Block)(name=f"block_{i}")(x)
        return x


def test_linen_adapters_learn_beside_packed_weights():
    x = jax.random.normal(KEY, (8, WIDTH))
    qmodel = cj.quantize_model(Adapted(), CONFIG)
    variables = jax.jit(qmodel.init)(KEY, x)
    frozen, lora = cj.freeze(qmodel, variables, x), variables["lora"]
    # What adapters of this rank can do: each block's own.
    moved = jax.tree.map(lambda leaf: leaf + 0.1 * leaf[::-1, ::-1] + 0.02, lora)
    target = frozen.with_state({"lora": moved}).apply(x)
    tx = optax.sgd(30.0)

    @jax.jit
    def step(frozen, lora, state):
        def loss(lora):
            return jnp.mean((frozen.with_state({"lora": lora}).apply(x) - target) ** 2)

        value, gradient = jax.value_and_grad(loss)(lora)
        updates, state = tx.update(gradient, state)
        return value, optax.apply_updates(lora, updates), state

    memory = step.lower(frozen, lora, tx.init(lora)).compile().memory_analysis()
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(lora))
    # 4 bits a weight, 8 for every 64, and tables of sixteen levels; never a layer in float32.
    packed = LAYERS * (DENSE // 8 + DENSE // 256 + 256)
    assert memory.argument_size_in_bytes < packed + trained + 4096
    # What is rematerialized has its codes in a byte each; levels are there layer by layer.
    unpacked = LAYERS * DENSE // 4
    assert memory.temp_size_in_bytes < unpacked + 3 * DENSE < LAYERS * DENSE
    state, losses = tx.init(lora), []
    for _ in range(20):
        value, lora, state = step(frozen, lora, state)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]


def test_nnx_adapters_learn_beside_packed_weights():
    x = jax.random.normal(KEY, (8, 32))
    target = jnp.roll(x, 1, axis=1)
    rngs = nnx.Rngs(0)
    model = nnx.LoRALinear(32, 32, lora_rank=4, rngs=rngs)
    config = cj.QuantConfig(weight_bits=4, act_bits=None, weight_granularity=16)
    qmodel = cj.nnx.quantize(model, config)
    frozen = cj.freeze(qmodel, x).model
    codes = nnx.state(frozen, nnx.Not(nnx.LoRAParam))
    before = jax.tree.map(np.array, codes)
    optimizer = nnx.Optimizer(frozen, optax.sgd(1.0), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean((model(x) - target) ** 2)

        value, gradient = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, gradient)
        return value

    losses = [float(step(frozen, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    after = nnx.state(frozen, nnx.Not(nnx.LoRAParam))
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, after))
