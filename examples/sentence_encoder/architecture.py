"""What an encoder is: its sizes, read from a model's folder, and how its outputs become a vector.

The network is that of Devlin et al., "BERT: pre-training of deep bidirectional transformers for
language understanding", NAACL 2019. A sentence's vector is the mean of its tokens' outputs, of
length 1 (Reimers and Gurevych, "Sentence-BERT", EMNLP 2019).
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The sizes of a BERT encoder.

    Args:
      vocabulary: How many tokens there are.
      positions: The longest sentence, in tokens.
      kinds: How many kinds of token there are (first or second sentence).
      width: Features of a token.
      hidden: Features between the two layers of a feed-forward block.
      heads: Attention heads; they divide `width`.
      layers: Attention and feed-forward blocks.
      epsilon: Of the layer norms.
    """

    vocabulary: int = 30522
    positions: int = 512
    kinds: int = 2
    width: int = 384
    hidden: int = 1536
    heads: int = 12
    layers: int = 6
    epsilon: float = 1e-12


def read_architecture(folder: str | Path) -> Architecture:
    """Returns the sizes of the encoder in a folder, of its `config.json`.

    Raises:
      ValueError: it is no BERT with exact GELU and absolute positions.
    """
    found = json.loads((Path(folder) / "config.json").read_text())
    required = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
    }
    for name, value in required.items():
        if (got := found.get(name, value)) != value:
            raise ValueError(
                f"`folder` must be of an encoder with {name}={value!r}, got {got!r}: give another"
            )
    return Architecture(
        vocabulary=found["vocab_size"],
        positions=found["max_position_embeddings"],
        kinds=found["type_vocab_size"],
        width=found["hidden_size"],
        hidden=found["intermediate_size"],
        heads=found["num_attention_heads"],
        layers=found["num_hidden_layers"],
        epsilon=found["layer_norm_eps"],
    )


def attend(
    query: Float[Array, "batch length width"],
    key: Float[Array, "batch length width"],
    value: Float[Array, "batch length width"],
    mask: Int[Array, "batch length"],
    heads: int,
) -> Float[Array, "batch length width"]:
    """Returns softmax(q k^T / sqrt(d)) v of each head, with d features a head.

    Args:
      query: Of every token, all heads' features beside each other.
      key: Likewise.
      value: Likewise.
      mask: 1 where there is a token to attend to, 0 where a sentence is filled up.
      heads: How many.
    """
    batch, length, width = query.shape
    query, key, value = (
        x.reshape(batch, length, heads, width // heads) for x in (query, key, value)
    )
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / (width // heads) ** 0.5
    scores = jnp.where(mask[:, None, None, :] > 0, scores, jnp.finfo(scores.dtype).min)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)
    return mixed.reshape(batch, length, width)


def sentence_vector(
    tokens: Float[Array, "batch length width"], mask: Int[Array, "batch length"]
) -> Float[Array, "batch width"]:
    """Returns the mean of each sentence's tokens, divided by its length as a vector."""
    weights = mask[..., None].astype(tokens.dtype)
    mean = jnp.sum(tokens * weights, 1) / jnp.maximum(jnp.sum(weights, 1), 1)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)
