"""What is known of each kind of NNX layer: its weight, its output axes, its matrix product."""

from typing import Any

from flax import nnx

from compand_jax.layers.unrolling import (
    Unrolling,
    einsum_channel_axes,
    einsum_input_axes,
    unrolled_convolution,
)

LAYERS = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, nnx.ConvTranspose, nnx.Embed)
"""The layers that pass their operands through their own `promote_dtype`."""


def weight_of(layer: Any) -> nnx.Variable:
    """Returns a layer's own weight."""
    return getattr(layer, weight_name(layer))


def weight_name(layer: Any) -> str:
    """Returns the attribute of a layer that its weight is."""
    return "embedding" if isinstance(layer, nnx.Embed) else "kernel"


def weight_ndim(layer: Any) -> int:
    """Returns how many axes one layer's weight has; a stack's has more."""
    if isinstance(layer, nnx.LinearGeneral):
        return len(layer.batch_axis) + len(layer.in_features) + len(layer.out_features)
    if isinstance(layer, (nnx.Linear, nnx.Embed)):
        return 2
    return len(layer.kernel_shape)


def channel_axes(layer: Any) -> tuple[int, ...]:
    """Returns the weight's axes that are output features, from the end."""
    if isinstance(layer, nnx.ConvTranspose) and layer.transpose_kernel:
        return (-2,)
    if isinstance(layer, nnx.LinearGeneral):
        return tuple(range(-len(layer.out_features), 0))
    if isinstance(layer, nnx.Einsum):
        if layer.einsum_str is None:
            raise ValueError(
                "`model` must have the equation of each Einsum, one has einsum_str=None: give it "
                "to the layer, not to its calls"
            )
        return einsum_channel_axes(layer.einsum_str)
    return (-1,)


def input_axes(layer: Any) -> tuple[int, ...]:
    """Returns the weight's axes that groups of inputs run along, from the end."""
    if isinstance(layer, nnx.Embed):
        return (-1,)
    if isinstance(layer, nnx.ConvTranspose) and layer.transpose_kernel:
        return (-1,)
    if isinstance(layer, nnx.LinearGeneral):
        outputs = len(layer.out_features)
        return tuple(range(-outputs - len(layer.in_features), -outputs))
    if isinstance(layer, nnx.Einsum):
        assert layer.einsum_str is not None  # channel_axes has asked for it
        return einsum_input_axes(layer.einsum_str)
    return (-2,)


def unrolling_of(layer: Any) -> Unrolling | None:
    """Returns how a layer is unrolled, or None: it is no Linear, LinearGeneral or Conv."""
    if isinstance(layer, nnx.Conv):
        return unrolled_convolution(layer)
    if isinstance(layer, nnx.Linear):
        return Unrolling()
    if isinstance(layer, nnx.LinearGeneral) and not layer.batch_axis:
        return Unrolling(contracted=tuple(layer.axis))
    return None
