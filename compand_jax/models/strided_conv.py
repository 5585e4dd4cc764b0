"""Strided convolutions with a fast gradient to their input, by space to depth.

XLA's CPU backend computes that gradient in a naive loop, ten times slower than the forward pass. A
first layer needs it only where the scale of its input is learned: half of an AlexNet step went
there. With stride s, the s x s pixels of a block become channels of one pixel, and the convolution
one of stride 1, whose gradient is fast.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

_NHWC = ("NHWC", "HWIO", "NHWC")
Pad = tuple[int, int]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def strided_conv(
    lhs: Array, rhs: Array, stride: int, padding: tuple[Pad, Pad], precision: Any = None
) -> Array:
    """Returns `lax.conv_general_dilated(lhs, rhs, (stride, stride), padding)`.

    Args:
      lhs: maps [batch, h, w, in].
      rhs: kernel [kh, kw, in, out].
      stride: of rows and columns, in pixels.
      padding: zeros ((top, bottom), (left, right)), in pixels; not negative.
      precision: as in `lax.conv_general_dilated`.

    Returns:
      [batch, h', w', out] in lhs's dtype. Gradient: that of the sums, to rounding; in reverse mode.
    """
    return lax.conv_general_dilated(
        lhs, rhs, (stride, stride), padding, dimension_numbers=_NHWC, precision=precision
    )


def _strided_conv_fwd(lhs: Array, rhs: Array, *static: Any) -> tuple[Array, tuple[Array, Array]]:
    return strided_conv(lhs, rhs, *static), (lhs, rhs)


def _strided_conv_bwd(
    stride: int, padding: tuple[Pad, Pad], precision: Any, operands: tuple, cotangent: Array
) -> tuple[Array, Array]:
    lhs, rhs = operands

    def of_maps(lhs):
        return space_to_depth_conv(lhs, rhs, stride, padding, precision)

    def of_kernel(rhs):
        return lax.conv_general_dilated(
            lhs, rhs, (stride, stride), padding, dimension_numbers=_NHWC, precision=precision
        )

    return jax.vjp(of_maps, lhs)[1](cotangent) + jax.vjp(of_kernel, rhs)[1](cotangent)


strided_conv.defvjp(_strided_conv_fwd, _strided_conv_bwd)


def space_to_depth_conv(
    lhs: Array, rhs: Array, stride: int, padding: tuple[Pad, Pad], precision: Any = None
) -> Array:
    """Returns what `strided_conv` does, as a convolution of stride 1 over blocks of pixels."""
    batch, in_features = lhs.shape[0], lhs.shape[-1]
    taps = [-(-size // stride) for size in rhs.shape[:2]]  # in blocks
    blocks, pads = [], []
    for size, tap, kernel, (low, high) in zip(
        lhs.shape[1:3], taps, rhs.shape[:2], padding, strict=True
    ):
        blocks.append((size + low + high - kernel) // stride + tap)
        # What no window reaches is cut off: a negative pad.
        pads.append((low, blocks[-1] * stride - size - low, 0))
    kernel_pads = [
        (0, tap * stride - size, 0) for tap, size in zip(taps, rhs.shape[:2], strict=True)
    ]
    zero, none = jnp.zeros((), lhs.dtype), (0, 0, 0)
    lhs = lax.pad(lhs, zero, (none, *pads, none))
    rhs = lax.pad(rhs, zero.astype(rhs.dtype), (*kernel_pads, none, none))
    lhs = lhs.reshape(batch, blocks[0], stride, blocks[1], stride, in_features)
    rhs = rhs.reshape(taps[0], stride, taps[1], stride, in_features, -1)
    return lax.conv_general_dilated(
        lhs.transpose(0, 1, 3, 2, 4, 5).reshape(batch, *blocks, -1),
        rhs.transpose(0, 2, 1, 3, 4, 5).reshape(*taps, stride * stride * in_features, -1),
        (1, 1),
        "VALID",
        dimension_numbers=_NHWC,
        precision=precision,
    )
