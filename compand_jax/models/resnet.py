"""ResNet for 32x32 images."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from compand_jax.models.layers import (
    BLOCK_ORDERS,
    ConvSpec,
    batch_norm,
    check_choice,
    classify,
    conv,
)

DEPTHS = (20, 32, 44, 56)
FEATURES = (16, 32, 64)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around which the input is carried.

    Attributes:
      features: channels of the output.
      stride: of the first convolution and of the shortcut.
      block_order: "conv_norm_act" is the original, with a relu after the sum; "norm_act_conv"
        the pre-activation block, with nothing after it.
      dtype: of the computation.
    """

    features: int
    stride: int
    block_order: str
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch h w c"], *, train: bool
    ) -> Float[Array, "batch h_out w_out features"]:
        """Returns [batch, h/stride, w/stride, features] of x [batch, h, w, c]."""
        specs = (ConvSpec(self.features, stride=self.stride), ConvSpec(self.features))
        post = self.block_order == "conv_norm_act"
        y = x
        for i, spec in enumerate(specs, start=1):
            if not post:
                y = nn.relu(batch_norm(y, train=train, name=f"norm{i}"))
            y = conv(spec, use_bias=False, dtype=self.dtype, name=f"conv{i}")(y)
            if post:
                y = batch_norm(y, train=train, name=f"norm{i}")
                y = nn.relu(y) if i == 1 else y
        y = y + shortcut(x, self.features, self.stride)
        return nn.relu(y) if post else y


class ResNet(nn.Module):
    """He et al.'s CIFAR ResNet: three stages of (depth - 2) / 6 blocks, with 16, 32, 64 features.

    Submodules: conv1, norm, stage{1,2,3}_block{1,2,...}, dense. `norm` stands after conv1 in
    "conv_norm_act", and before the pooling in "norm_act_conv". ResNet-20 has 269,722 parameters.

    Attributes:
      depth: 20, 32, 44 or 56.
      num_classes: number of logits.
      block_order: "conv_norm_act" or "norm_act_conv" (pre-activation).
      dtype: of the computation; parameters are float32.

    Source: He et al., CVPR 2016, arXiv 1512.03385, section 4.2, with shortcuts of option A as in
    https://github.com/akamaster/pytorch_resnet_cifar10; pre-activation from He et al., "Identity
    mappings in deep residual networks", ECCV 2016, arXiv 1603.05027.
    """

    depth: int = 20
    num_classes: int = 10
    block_order: str = "conv_norm_act"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch h w c"], *, train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Returns float32 logits [batch, num_classes] of normalized images x [batch, h, w, c]."""
        check_choice("depth", self.depth, DEPTHS)
        check_choice("block_order", self.block_order, BLOCK_ORDERS)
        first = conv(ConvSpec(FEATURES[0]), use_bias=False, dtype=self.dtype, name="conv1")
        x = first(x.astype(self.dtype))
        if self.block_order == "conv_norm_act":
            x = nn.relu(batch_norm(x, train=train, name="norm"))
        for s, features in enumerate(FEATURES, start=1):
            for b in range(1, (self.depth - 2) // 6 + 1):
                stride = 2 if s > 1 and b == 1 else 1
                name = f"stage{s}_block{b}"
                block = ResidualBlock(features, stride, self.block_order, self.dtype, name=name)
                x = block(x, train=train)
        if self.block_order == "norm_act_conv":
            x = nn.relu(batch_norm(x, train=train, name="norm"))
        return classify(x.mean(axis=(1, 2)), self.num_classes, self.dtype)


def shortcut(
    x: Float[Array, "batch h w c"], features: int, stride: int
) -> Float[Array, "batch h_out w_out features"]:
    """Returns every stride-th pixel of x, with as many zero channels added before as after it."""
    missing = features - x.shape[-1]
    before = missing // 2
    x = x[:, ::stride, ::stride]
    # Not jnp.pad, which jax2onnx does not convert for batches of any size.
    zeros = [jnp.zeros((*x.shape[:-1], n), x.dtype) for n in (before, missing - before)]
    return jnp.concatenate([zeros[0], x, zeros[1]], axis=-1)
