"""The encoder as an NNX module, its variables named as those of the Linen module."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sentence_encoder.architecture import Architecture, attend, sentence_vector


class Block(nnx.Module):
    """Attention and a feed-forward network, each with its input added and normalized."""

    def __init__(self, sizes: Architecture, *, rngs: nnx.Rngs) -> None:
        own, self.heads = sizes, sizes.heads
        self.query = nnx.Linear(own.width, own.width, rngs=rngs)
        self.key = nnx.Linear(own.width, own.width, rngs=rngs)
        self.value = nnx.Linear(own.width, own.width, rngs=rngs)
        self.output = nnx.Linear(own.width, own.width, rngs=rngs)
        self.attention_norm = nnx.LayerNorm(own.width, epsilon=own.epsilon, rngs=rngs)
        self.up = nnx.Linear(own.width, own.hidden, rngs=rngs)
        self.down = nnx.Linear(own.hidden, own.width, rngs=rngs)
        self.norm = nnx.LayerNorm(own.width, epsilon=own.epsilon, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch length width"], mask: Int[Array, "batch length"]
    ) -> Float[Array, "batch length width"]:
        """Returns every token's features."""
        mixed = attend(self.query(x), self.key(x), self.value(x), mask, self.heads)
        x = self.attention_norm(x + self.output(mixed))
        return self.norm(x + self.down(jax.nn.gelu(self.up(x), approximate=False)))


class Encoder(nnx.Module):
    """Tokens of sentences to vectors of length 1."""

    def __init__(self, sizes: Architecture, *, rngs: nnx.Rngs) -> None:
        self.words = nnx.Embed(sizes.vocabulary, sizes.width, rngs=rngs)
        self.places = nnx.Embed(sizes.positions, sizes.width, rngs=rngs)
        self.kinds = nnx.Embed(sizes.kinds, sizes.width, rngs=rngs)
        self.norm = nnx.LayerNorm(sizes.width, epsilon=sizes.epsilon, rngs=rngs)
        self.layers = sizes.layers
        for i in range(sizes.layers):
            setattr(self, f"block_{i}", Block(sizes, rngs=rngs))

    def __call__(
        self, tokens: Int[Array, "batch length"], mask: Int[Array, "batch length"]
    ) -> Float[Array, "batch width"]:
        """Returns a vector for each sentence; `mask` is 0 where it is filled up."""
        x = self.words(tokens) + self.places(jnp.arange(tokens.shape[1]))[None]
        x = self.norm(x + self.kinds(jnp.zeros_like(tokens)))
        for i in range(self.layers):
            x = getattr(self, f"block_{i}")(x, mask)
        return sentence_vector(x, mask)


def with_params(sizes: Architecture, params: dict) -> Encoder:
    """Returns the encoder with these variables, as the Linen module's "params" are."""
    model = nnx.eval_shape(lambda: Encoder(sizes, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)
