"""Convolutions that XLA's CPU backend runs in a naive loop, computed otherwise there.

A kernel larger than the map, forward and to the input's gradient: 3x3 SAME on a 2x2 map, in the
last blocks of AlexNet and VGG at CIFAR's size, and 5x5 on a 4x4 map, in AlexNet's second. As matrix
products the same sums are 10 to 50 times faster.

The gradient of a strided convolution to its input, ten times slower than the forward pass. A first
layer needs it only where the scale of its input is learned: half of an AlexNet step went there.
With stride s, the s x s pixels of a block become channels of one pixel, and the convolution one of
stride 1, whose gradient is fast: space to depth.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.xla_metadata import set_xla_metadata

_NAMES = ("NHWC", "HWIO", "NHWC")
_NHWC = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
Pad = tuple[int, int]
_always_lax = contextvars.ContextVar("always_lax", default=False)


@contextlib.contextmanager
def plain_convolutions() -> Iterator[None]:
    """Leaves to `jax.lax` all that is traced in this context: for converters to other formats."""
    token = _always_lax.set(True)
    try:
        yield
    finally:
        _always_lax.reset(token)


def conv_general_dilated(
    lhs: Array, rhs: Array, window_strides: Any, padding: Any, **kwargs: Any
) -> Array:
    """Returns `jax.lax.conv_general_dilated(...)`, to rounding; the form that Linen's Conv calls.

    On a CPU, a plain convolution with a kernel larger than the map is computed as one matrix
    product for every output pixel, of the map's part that the kernel reaches and the kernel's
    part that reaches the map: nothing is multiplied with padding. One whose kernel is larger than
    two strides is a `strided_conv`. All else goes to `jax.lax`.

    Args:
      lhs: maps [batch, h, w, in].
      rhs: kernel [kh, kw, in, out].
      window_strides: (rows, columns).
      padding: "SAME", "VALID" or ((top, bottom), (left, right)).
      **kwargs: as in `jax.lax.conv_general_dilated`.

    Returns:
      [batch, h', w', out] in lhs's dtype. Gradient: that of the sums, to rounding.
    """
    if not _is_plain(**kwargs):
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **kwargs)
    precision = kwargs.get("precision")
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], window_strides, padding)
    rows, columns = ((int(low), int(high)) for low, high in padding)
    strides, sizes, taps = set(window_strides), lhs.shape[1:3], rhs.shape[:2]
    if len(strides) == 1 and 1 < window_strides[0] < min(taps) / 2:

        def on_cpu(lhs: Array, rhs: Array) -> Array:
            return strided_conv(lhs, rhs, window_strides[0], (rows, columns), precision)

    elif strides == {1} and (taps[0] > sizes[0] or taps[1] > sizes[1]):

        def on_cpu(lhs: Array, rhs: Array) -> Array:
            return _products(lhs, rhs, rows, columns, precision)

    else:
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **kwargs)

    def elsewhere(lhs: Array, rhs: Array) -> Array:
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **kwargs)

    # When it is lowered, not here: a function exported on a CPU may run elsewhere.
    return lax.platform_dependent(lhs, rhs, cpu=on_cpu, default=elsewhere)


def _products(lhs: Array, rhs: Array, rows: Pad, columns: Pad, precision: Any) -> Array:
    """Returns the convolution of stride 1, every output pixel as one matrix product.

    XLA would compute what makes an operand anew in each of the products that read a part of it, an
    optimization barrier notwithstanding: where that is a quantizer, a fifth of AlexNet's step went
    there. What is called and not inlined has its operands in buffers.
    """
    with set_xla_metadata(inlineable="false"):
        return _pixel_products(lhs, rhs, rows, columns, precision)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _pixel_products(lhs: Array, rhs: Array, rows: Pad, columns: Pad, precision: Any) -> Array:
    reached_rows, reached_columns = (
        _reaches(size, taps, *pad)
        for size, taps, pad in zip(lhs.shape[1:3], rhs.shape[:2], (rows, columns), strict=True)
    )
    with set_xla_metadata(inlineable=None):  # what is called in turn is inlined
        pixels = [
            jnp.einsum("bhwi,hwio->bo", lhs[:, y, x], rhs[v, u], precision=precision)
            for y, v in reached_rows
            for x, u in reached_columns
        ]
        shape = (lhs.shape[0], len(reached_rows), len(reached_columns), -1)
        return jnp.stack(pixels, axis=1).reshape(shape)


def _is_plain(
    lhs_dilation: Any = None,
    rhs_dilation: Any = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    **kwargs: Any,
) -> bool:
    """Whether it is as plain as is computed here."""
    return (
        not _always_lax.get()
        and dimension_numbers == _NHWC
        and all(set(factors or (1,)) == {1} for factors in (lhs_dilation, rhs_dilation))
        and feature_group_count == 1
        and kwargs.keys() <= {"precision"}
    )


def _reaches(size: int, taps: int, low: int, high: int) -> list[tuple[slice, slice]]:
    """For every output position along an axis: the inputs it sees, and the taps that see them."""
    starts = range(-low, size + high - taps + 1)
    return [
        (
            slice(_clip(start, size), _clip(start + taps, size)),
            slice(_clip(-start, taps), _clip(size - start, taps)),
        )
        for start in starts
    ]


def _clip(index: int, end: int) -> int:
    return min(max(index, 0), end)


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
        lhs, rhs, (stride, stride), padding, dimension_numbers=_NAMES, precision=precision
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
            lhs, rhs, (stride, stride), padding, dimension_numbers=_NAMES, precision=precision
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
        dimension_numbers=_NAMES,
        precision=precision,
    )
