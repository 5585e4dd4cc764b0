"""What is known of each kind of Linen layer: its output axes, and how it is a matrix product."""

from typing import Any

import flax.linen as nn

from compand_jax.layers.unrolling import Unrolling


def channel_axes(module: nn.Module, args: tuple, kwargs: dict) -> tuple[int, ...]:
    """Returns the kernel's axes that are output features, from the end."""
    if isinstance(module, nn.ConvTranspose) and module.transpose_kernel:
        return (-2,)
    if isinstance(module, nn.DenseGeneral):
        features = module.features
        return tuple(range(-(1 if isinstance(features, int) else len(features)), 0))
    if isinstance(module, nn.Einsum):
        equation = module.einsum_str or kwargs.get("einsum_str") or args[1]
        operands, result = equation.replace(" ", "").split("->")
        data, kernel = (operand.replace("...", "") for operand in operands.split(","))
        axes = [i for i, axis in enumerate(kernel) if axis in result and axis not in data]
        return tuple(i - len(kernel) for i in axes)
    return (-1,)


def unrolling_of(module: nn.Module) -> Unrolling | None:
    """Returns how a layer is unrolled, or None: it is no Dense, DenseGeneral or Conv."""
    if isinstance(module, nn.Conv):
        return _of_conv(module)
    if isinstance(module, nn.Dense):
        return Unrolling()
    if isinstance(module, nn.DenseGeneral) and not module.batch_dims:
        axis = module.axis
        return Unrolling(contracted=(axis,) if isinstance(axis, int) else tuple(axis))
    return None


def _of_conv(module: nn.Conv) -> Unrolling:
    size = module.kernel_size
    ndim = 1 if isinstance(size, int) else len(size)

    def for_each_axis(value: Any) -> tuple[int, ...]:
        value = 1 if value is None else value
        return (value,) * ndim if isinstance(value, int) else tuple(value)

    padding = module.padding
    if isinstance(padding, str):
        # The others have been carried out on what the layer multiplies.
        padding = padding if padding == "SAME" else "VALID"
    else:
        pads = (padding,) * ndim if isinstance(padding, int) else padding
        padding = tuple((p, p) if isinstance(p, int) else (p[0], p[1]) for p in pads)
    return Unrolling(
        strides=for_each_axis(module.strides),
        padding=padding,
        input_dilation=for_each_axis(module.input_dilation),
        kernel_dilation=for_each_axis(module.kernel_dilation),
        groups=module.feature_group_count,
    )
