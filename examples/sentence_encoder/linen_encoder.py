"""The encoder as a Linen module."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sentence_encoder.architecture import Architecture, attend, sentence_vector


class Block(nn.Module):
    """Attention and a feed-forward network, each with its input added and normalized."""

    sizes: Architecture

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"], mask: Int[Array, "batch length"]
    ) -> Float[Array, "batch length width"]:
        """Returns every token's features."""
        own = self.sizes
        query, key, value = (nn.Dense(own.width, name=n)(x) for n in ("query", "key", "value"))
        mixed = nn.Dense(own.width, name="output")(attend(query, key, value, mask, own.heads))
        x = nn.LayerNorm(own.epsilon, name="attention_norm")(x + mixed)
        hidden = jax.nn.gelu(nn.Dense(own.hidden, name="up")(x), approximate=False)
        down = nn.Dense(own.width, name="down")(hidden)
        return nn.LayerNorm(own.epsilon, name="norm")(x + down)


class Encoder(nn.Module):
    """Tokens of sentences to vectors of length 1."""

    sizes: Architecture = Architecture()

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "batch length"], mask: Int[Array, "batch length"]
    ) -> Float[Array, "batch width"]:
        """Returns a vector for each sentence; `mask` is 0 where it is filled up."""
        own = self.sizes
        x = nn.Embed(own.vocabulary, own.width, name="words")(tokens)
        x = x + nn.Embed(own.positions, own.width, name="places")(jnp.arange(tokens.shape[1]))[None]
        x = x + nn.Embed(own.kinds, own.width, name="kinds")(jnp.zeros_like(tokens))
        x = nn.LayerNorm(own.epsilon, name="norm")(x)
        for i in range(own.layers):
            x = Block(own, name=f"block_{i}")(x, mask)
        return sentence_vector(x, mask)
