"""VGG with batch norm and VGG-Small, for 32x32 images."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from compand_jax.models.layers import ConvSpec, check_choice, classify, conv_stack

FEATURES = (64, 128, 256, 512, 512)
# How many convolutions each of the five blocks has.
BLOCKS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
SMALL_CONVS = tuple(
    ConvSpec(features, pool=pool) for features in (128, 256, 512) for pool in (False, True)
)


class VGG(nn.Module):
    """VGG's 3x3 convolutions with batch norm, and one dense layer from 512 features.

    Attributes:
      depth: 11, 13, 16 or 19, the number of layers that the original had.
      num_classes: number of logits.
      block_order: "conv_norm_act" or "norm_act_conv"; see `compand_jax.models.layers`.
      dtype: of the computation; parameters are float32.

    Source: Simonyan, Zisserman, ICLR 2015, arXiv 1409.1556; in the variant of
    https://github.com/bearpaw/pytorch-classification (models/cifar/vgg.py), but that
    convolutions have no biases, which batch norm would subtract again.
    """

    depth: int = 19
    num_classes: int = 10
    block_order: str = "conv_norm_act"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch h w c"], *, train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Returns float32 logits [batch, num_classes] of normalized images x [batch, h, w, c]."""
        check_choice("depth", self.depth, tuple(BLOCKS))
        x = conv_stack(
            x,
            _convs(self.depth),
            norm="batch",
            block_order=self.block_order,
            dtype=self.dtype,
            train=train,
        )
        return classify(x, self.num_classes, self.dtype)


def _convs(depth: int) -> list[ConvSpec]:
    return [
        ConvSpec(features, pool=i == count - 1)
        for features, count in zip(FEATURES, BLOCKS[depth], strict=True)
        for i in range(count)
    ]


class VGGSmall(nn.Module):
    """The VGG of the low-bit literature: six 3x3 convolutions with batch norm, and one dense layer.

    Two have 128, two 256, two 512 features; a 2x2 max pool ends each pair. 4,660,106 parameters
    with ten classes.

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
            SMALL_CONVS,
            norm="batch",
            block_order=self.block_order,
            dtype=self.dtype,
            train=train,
        )
        return classify(x, self.num_classes, self.dtype)
