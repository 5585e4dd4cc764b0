"""What the networks are built from: one composite block, in the two orders that are compared.

    conv_norm_act    conv, norm, relu, pool            (C-B-A-P)
    norm_act_conv    norm, relu, conv, pool            (B-A-C-P)

In the second order the first convolution sees the image itself, and the last norm and relu stand
before the dense layer. So a plain stack of convolutions is, in both, a sequence of the same
convolutions with a norm and a relu after each; the orders differ in whether the pool comes after
the relu or right after the convolution. A quantizer of a convolution's output, or of its input,
therefore sees other values; parameters have the same names and shapes.

Source of the names: Rastegari et al., "XNOR-Net", ECCV 2016, arXiv 1603.05279.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from compand_jax.models.small_map_conv import conv_general_dilated

BLOCK_ORDERS = ("conv_norm_act", "norm_act_conv")
NORMS = ("none", "batch")

HE_NORMAL = nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")


class ConvSpec(NamedTuple):
    """A convolution of a stack: `features` of size `kernel`, and a 2x2 max pool after it or not."""

    features: int
    kernel: int = 3
    stride: int = 1
    pool: bool = False


def conv(spec: ConvSpec, *, use_bias: bool, dtype: DTypeLike, name: str) -> nn.Conv:
    """Returns a Linen Conv padded by half its kernel, He-normal by the outgoing connections."""
    return nn.Conv(
        spec.features,
        (spec.kernel, spec.kernel),
        strides=(spec.stride, spec.stride),
        padding=spec.kernel // 2,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=HE_NORMAL,
        conv_general_dilated=conv_general_dilated,
        name=name,
    )


def batch_norm(x: Array, *, train: bool, name: str) -> Array:
    """Batch norm in float32 (momentum 0.9, epsilon 1e-5), returned in x's dtype."""
    norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name)
    return norm(x.astype(jnp.float32)).astype(x.dtype)


def max_pool(x: Array) -> Array:
    """Maximum over 2x2 windows that do not overlap."""
    return nn.max_pool(x, (2, 2), strides=(2, 2))


def classify(x: Array, num_classes: int, dtype: DTypeLike) -> Array:
    """The network's one dense layer, on all of x's features; logits in float32."""
    logits = nn.Dense(num_classes, dtype=dtype, name="dense")(x.reshape(x.shape[0], -1))
    return logits.astype(jnp.float32)


def conv_stack(
    x: Array,
    specs: Sequence[ConvSpec],
    *,
    norm: str,
    block_order: str,
    dtype: DTypeLike,
    train: bool,
) -> Array:
    """Applies conv1, norm1, relu, conv2, ... with the pools where `block_order` has them."""
    check_choice("norm", norm, NORMS)
    check_choice("block_order", block_order, BLOCK_ORDERS)
    x = x.astype(dtype)
    for i, spec in enumerate(specs, start=1):
        x = conv(spec, use_bias=norm == "none", dtype=dtype, name=f"conv{i}")(x)
        if spec.pool and block_order == "norm_act_conv":
            x = max_pool(x)
        if norm == "batch":
            x = batch_norm(x, train=train, name=f"norm{i}")
        x = nn.relu(x)
        if spec.pool and block_order == "conv_norm_act":
            x = max_pool(x)
    return x


def check_choice(argument: str, value: object, choices: Sequence[object]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        listed = ", ".join(map(str, choices))
        raise ValueError(f"`{argument}` must be one of {listed}; got {value!r}")
