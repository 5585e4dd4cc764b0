"""Every kind of layer, and networks around them, by name."""

import flax.linen as nn
import jax.numpy as jnp
from small_models import (
    Attention,
    Block,
    InsideJit,
    ScaledConv,
    SetUp,
    Stack,
    Tokens,
    Twice,
    VisionTransformer,
    normal,
)

REMAT, JITTED = nn.remat(nn.Dense), nn.jit(nn.Dense)
VMAPPED = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})
IMAGE = (2, 5, 5, 4)

# The layer, the shape of its input, and the axes of its kernel that are output channels.
LAYERS = {
    "dense": (lambda **k: nn.Dense(6, **k), (5, 4), (-1,)),
    "dense_general": (lambda **k: nn.DenseGeneral((2, 3), axis=(-2, -1), **k), (5, 4, 2), (-2, -1)),
    "dense_general_batch": (
        lambda **k: nn.DenseGeneral(6, batch_dims=(0,), **k),
        (5, 2, 4),
        (-1,),
    ),
    "einsum": (lambda **k: nn.Einsum((4, 2, 3), "...d,dhk->...hk", **k), (5, 4), (-2, -1)),
    "conv": (lambda **k: nn.Conv(6, (3, 3), **k), IMAGE, (-1,)),
    "conv_depthwise": (lambda **k: nn.Conv(4, (3, 3), feature_group_count=4, **k), IMAGE, (-1,)),
    "conv_grouped": (lambda **k: nn.Conv(6, (3, 3), feature_group_count=2, **k), IMAGE, (-1,)),
    "conv_transpose": (lambda **k: nn.ConvTranspose(6, (3, 3), (2, 2), **k), IMAGE, (-1,)),
    "conv_transpose_kernel": (
        lambda **k: nn.ConvTranspose(6, (3, 3), (2, 2), transpose_kernel=True, **k),
        IMAGE,
        (-2,),
    ),
    "conv_local": (lambda **k: nn.ConvLocal(6, (3, 3), **k), IMAGE, (-1,)),
    "conv_subclass": (lambda **k: ScaledConv(6, (3, 3), **k), IMAGE, (-1,)),
    "attend": (lambda **k: nn.Embed(7, 4, **k), (5, 4), (-1,)),
    "remat": (lambda **k: REMAT(6, **k), (5, 4), (-1,)),
    "nn_jit": (lambda **k: JITTED(6, **k), (5, 4), (-1,)),
    "vmap": (lambda **k: VMAPPED(6, **k), (3, 5, 4), (-1,)),
    "weight_norm": (lambda **k: nn.WeightNorm(nn.Dense(6, **k)), (5, 4), (-1,)),
}
PLAIN = {"remat": nn.Dense, "nn_jit": nn.Dense}
CELLS = [
    (jnp.float32, "input", "tensor"),
    (jnp.float32, "output", "channel"),
    (jnp.bfloat16, "input", "channel"),
]

PROJECTIONS = [f"attention/{name}" for name in ("key", "out", "query", "value")]
NETWORKS = {
    "set_up": (SetUp, (5, 4), ["first", "second"]),
    "twice": (Twice, (5, 4), ["shared"]),
    "scan": (lambda: Stack("scan"), (5, 4), ["stack/dense"]),
    "scan_same": (lambda: Stack("same"), (5, 4), ["stack/dense"]),
    "vmap": (lambda: Stack("vmap"), (3, 5, 4), ["stack/dense"]),
    "remat": (lambda: nn.remat(Block)(6), (5, 4), ["dense"]),
    "inside_jit": (InsideJit, (5, 4), ["first", "second"]),
    "attention": (Attention, (2, 5, 4), PROJECTIONS),
    "attention_bfloat16": (lambda: Attention(jnp.bfloat16), (2, 5, 4), PROJECTIONS),
    "tokens": (Tokens, None, ["dense", "embed"]),
    "lstm": (
        lambda: nn.RNN(nn.LSTMCell(4), name="rnn"),
        (2, 5, 4),
        [f"cell/{a}{b}" for a in "hi" for b in "fgio"],
    ),
    "vision_transformer": (VisionTransformer, (2, 8, 8, 3), None),
    "vision_transformer_bfloat16": (lambda: VisionTransformer(jnp.bfloat16), (2, 8, 8, 3), None),
}  # fmt: skip


def network(name):
    make, shape, sites = NETWORKS[name]
    x = jnp.arange(10, dtype=jnp.int32).reshape(2, 5) % 7 if shape is None else normal(*shape)
    return make(), x, sites
