"""AlexNet for 32x32 images."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from compand_jax.models.layers import ConvSpec, classify, conv_stack

CONVS = (
    ConvSpec(64, kernel=11, stride=4, pool=True),
    ConvSpec(192, kernel=5, pool=True),
    ConvSpec(384),
    ConvSpec(256),
    ConvSpec(256, pool=True),
)


class AlexNet(nn.Module):
    """AlexNet's five convolutions and one dense layer, for CIFAR.

    Convolutions 64 11x11/4, pool, 192 5x5, pool, 384, 256, 256 3x3, pool: 2,472,266 parameters
    with `norm="none"` and ten classes. No dropout, no local response normalization.

    Attributes:
      num_classes: number of logits.
      norm: "none" (convolutions have biases) or "batch" (they have none).
      block_order: "conv_norm_act" or "norm_act_conv", which differ with batch norm only; see
        `compand_jax.models.layers`.
      dtype: of the computation; parameters are float32.

    Source: Krizhevsky, Sutskever, Hinton, NeurIPS 2012; in the variant of
    https://github.com/bearpaw/pytorch-classification (models/cifar/alexnet.py).
    """

    num_classes: int = 10
    norm: str = "none"
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
            norm=self.norm,
            block_order=self.block_order,
            dtype=self.dtype,
            train=train,
        )
        return classify(x, self.num_classes, self.dtype)
