"""What is known of each kind of Linen layer: its output axes, and how it is a matrix product."""

import flax.linen as nn

from compand_jax.layers.unrolling import (
    Unrolling,
    einsum_channel_axes,
    einsum_input_axes,
    unrolled_convolution,
)


def channel_axes(module: nn.Module, args: tuple, kwargs: dict) -> tuple[int, ...]:
    """Returns the kernel's axes that are output features, from the end."""
    if isinstance(module, nn.ConvTranspose) and module.transpose_kernel:
        return (-2,)
    if isinstance(module, nn.DenseGeneral):
        features = module.features
        return tuple(range(-(1 if isinstance(features, int) else len(features)), 0))
    if isinstance(module, nn.Einsum):
        return einsum_channel_axes(_equation(module, args, kwargs))
    return (-1,)


def input_axes(module: nn.Module, args: tuple, kwargs: dict) -> tuple[int, ...]:
    """Returns the kernel's axes that groups of inputs run along, from the end."""
    if isinstance(module, nn.Embed):
        return (-1,)
    if isinstance(module, nn.ConvTranspose) and module.transpose_kernel:
        return (-1,)
    if isinstance(module, nn.DenseGeneral):
        count = 1 if isinstance(module.axis, int) else len(module.axis)
        outputs = len(channel_axes(module, args, kwargs))
        return tuple(range(-outputs - count, -outputs))
    if isinstance(module, nn.Einsum):
        return einsum_input_axes(_equation(module, args, kwargs))
    return (-2,)


def _equation(module: nn.Einsum, args: tuple, kwargs: dict) -> str:
    return module.einsum_str or kwargs.get("einsum_str") or args[1]


def unrolling_of(module: nn.Module) -> Unrolling | None:
    """Returns how a layer is unrolled, or None: it is no Dense, DenseGeneral or Conv."""
    if isinstance(module, nn.Conv):
        return unrolled_convolution(module)
    if isinstance(module, nn.Dense):
        return Unrolling()
    if isinstance(module, nn.DenseGeneral) and not module.batch_dims:
        axis = module.axis
        return Unrolling(contracted=(axis,) if isinstance(axis, int) else tuple(axis))
    return None
