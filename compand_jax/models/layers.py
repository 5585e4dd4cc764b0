"""What the networks are built from: one composite block, in the two orders that are compared.

    conv_norm_act    conv, norm, relu, pool            (C-B-A-P)
    norm_act_conv    norm, relu, conv, pool            (B-A-C-P)

In the second order the first convolution sees the image itself, and the last norm and relu stand
before the dense layer. A plain stack of convolutions is thus, in both, the same convolutions with
a norm and a relu after each, under the same parameters; the orders differ in whether the pool
comes after the relu or right after the convolution, so in what batch norm takes its statistics
from. Without a norm they compute the same, since relu and maximum commute.

Source of the names: Rastegari et al., "XNOR-Net", ECCV 2016, arXiv 1603.05279.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from compand_jax.models.cpu_conv import conv_general_dilated

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


def batch_norm(
    x: Float[Array, "batch h w c"], *, train: bool, name: str
) -> Float[Array, "batch h w c"]:
    """Returns x normalized (momentum 0.9, epsilon 1e-5): computed in float32, in x's dtype."""
    norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name)
    return norm(x.astype(jnp.float32)).astype(x.dtype)


def max_pool(x: Float[Array, "batch h w c"]) -> Float[Array, "batch h//2 w//2 c"]:
    """Returns the maximum over 2x2 windows that do not overlap, an odd last row or column left out.

    Equals `nn.max_pool(x, (2, 2), (2, 2))`, whose gradient takes XLA's CPU backend 10 to 40 times
    as long.

    Gradient: goes to the first maximum of a window, in row-major order.

    Raises:
      ValueError: when x is less than two pixels high or wide.
    """
    batch, h, w, channels = x.shape
    if min(h, w) < 2:
        raise ValueError(
            f"`x` must have at least 2x2 pixels where it is pooled; got {h}x{w}: "
            "give this network larger images"
        )
    x = x[:, : h // 2 * 2, : w // 2 * 2].reshape(batch, h // 2, 2, w // 2, 2, channels)
    x = _first_maximum(x[:, :, :, :, 0], x[:, :, :, :, 1])
    return _first_maximum(x[:, :, 0], x[:, :, 1])


def _first_maximum(first: Array, second: Array) -> Array:
    return jnp.where((first >= second) | jnp.isnan(first), first, second)


def classify(
    x: Float[Array, "batch *features"], num_classes: int, dtype: DTypeLike
) -> Float[Array, "batch classes"]:
    """Returns float32 logits of the network's one dense layer, which sees all of x's features."""
    logits = nn.Dense(num_classes, dtype=dtype, name="dense")(x.reshape(x.shape[0], -1))
    return logits.astype(jnp.float32)


def conv_stack(
    x: Float[Array, "batch h w c"],
    specs: Sequence[ConvSpec],
    *,
    norm: str,
    block_order: str,
    dtype: DTypeLike,
    train: bool,
) -> Float[Array, "batch h_out w_out c_out"]:
    """Returns what conv1, norm1, relu, conv2, ... make of x, pools where `block_order` has them.

    Args:
      x: images.
      specs: the convolutions, in order; submodules are named conv1, norm1, conv2, ...
      norm: "none" (convolutions have biases) or "batch" (they have none).
      block_order: "conv_norm_act" or "norm_act_conv".
      dtype: of the computation, and of what is returned.
      train: whether batch norm uses, and updates, the batch's own statistics.

    Raises:
      ValueError: for a norm or block order that is not known.
    """
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
        raise ValueError(f"`{argument}` must be one of {listed}, got {value!r}: choose one")
