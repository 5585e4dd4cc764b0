"""A small network for 8x8 digits."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from compand_jax.models.layers import ConvSpec, classify, conv_stack

CONVS = (ConvSpec(32), ConvSpec(32, pool=True), ConvSpec(64, pool=True))


class CNN(nn.Module):
    """Three 3x3 convolutions with batch norm and one dense layer: 30,762 parameters.

    For scikit-learn's 8x8 digits: it trains in seconds on a CPU, and is small enough for 4-bit
    quantization to be felt.

    Attributes:
      num_classes: number of logits.
      block_order: "conv_norm_act" or "norm_act_conv"; see `compand_jax.models.layers`.
      dtype: of the computation; parameters are float32.
    """

    num_classes: int = 10
    block_order: str = "conv_norm_act"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch h w c"], *, train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Returns float32 logits [batch, num_classes] of normalized images x [batch, h, w, c]."""
        x = conv_stack(
            x,
            CONVS,
            norm="batch",
            block_order=self.block_order,
            dtype=self.dtype,
            train=train,
        )
        return classify(x, self.num_classes, self.dtype)
