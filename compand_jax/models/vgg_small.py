"""VGG-Small, the seven-layer VGG of the low-bit literature, for 32x32 images."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from compand_jax.models.layers import ConvSpec, classify, conv_stack

CONVS = tuple(
    ConvSpec(features, pool=pool) for features in (128, 256, 512) for pool in (False, True)
)


class VGGSmall(nn.Module):
    """Two 3x3 convolutions with 128, two with 256, two with 512 features, and one dense layer.

    A 2x2 max pool ends each pair; 4,660,106 parameters with ten classes.

    Attributes:
      num_classes: number of logits.
      block_order: "conv_norm_act" or "norm_act_conv"; see `compand_jax.models.layers`.
      dtype: of the computation; parameters are float32.

    Source: Zhang et al., "LQ-Nets", ECCV 2018, arXiv 1807.10029, section 5.1; after the network of
    Courbariaux et al., "BinaryConnect", NeurIPS 2015, with one dense layer instead of three.
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
