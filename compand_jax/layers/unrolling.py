"""A layer's op as a matrix product: rows of weights with columns of inputs.

A layer that is linear in its weight computes, for each output feature r and each place t (an
example, a pixel), y_rt = sum_k w_rk x_tk. The quadratic error that a change e of a row makes at the
output is then sum_t (e . x_t)^2 = e^T H e, with the second moments H = sum_t x_t x_t^T.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from compand_jax.core._mesh import sharded_as
from compand_jax.layers.groups import last_run


@dataclasses.dataclass(frozen=True)
class Unrolling:
    """How a weight and an input are written as matrices.

    Args:
      contracted: the input's axes that are summed over, where there is no window.
      strides: of the window, one for each of its axes; () where there is no window.
      padding: "SAME", "VALID" or (low, high) for each axis of the window.
      input_dilation: of the input, one for each axis of the window.
      kernel_dilation: of the window, likewise.
      groups: groups of input features that have output features of their own.
    """

    contracted: tuple[int, ...] = (-1,)
    strides: tuple[int, ...] = ()
    padding: str | tuple[tuple[int, int], ...] = ()
    input_dilation: tuple[int, ...] = ()
    kernel_dilation: tuple[int, ...] = ()
    groups: int = 1

    def inputs(self, weight_shape: tuple[int, ...]) -> int:
        """Returns n, how many weights a row has."""
        axes = len(self.strides) + 1 if self.strides else len(self.contracted)
        return math.prod(weight_shape[:axes])

    def rows(self, weight: Float[Array, "..."]) -> Float[Array, "groups rows n"]:
        """Returns a weight as a matrix for each group, an output feature's weights being a row."""
        n = self.inputs(weight.shape)
        return weight.reshape(n, self.groups, -1).transpose(1, 2, 0)

    def weight(
        self, rows: Float[Array, "groups rows n"], shape: tuple[int, ...]
    ) -> Float[Array, "..."]:
        """Returns the weight of that shape whose `rows` these are."""
        return rows.transpose(2, 0, 1).reshape(shape)

    @sharded_as()
    def moments(
        self, x: Float[Array, "..."], weight_shape: tuple[int, ...]
    ) -> Float[Array, "groups n n"]:
        """Returns H = sum_t x_t x_t^T of each group, x being the layer's input."""
        n, x = self.inputs(weight_shape), x.astype(jnp.float32)
        if self.strides:
            columns = self._patches(x, weight_shape[: len(self.strides)])
        else:
            columns = jnp.moveaxis(x, self.contracted, range(-len(self.contracted), 0))
            columns = columns.reshape(-1, 1, n)
        window, features = columns.shape[-2:]
        columns = columns.reshape(-1, window, self.groups, features // self.groups)
        columns = columns.transpose(2, 0, 1, 3).reshape(self.groups, -1, n)
        return jnp.matmul(columns.swapaxes(1, 2), columns, precision="highest")

    def _patches(self, x: Array, window: tuple[int, ...]) -> Float[Array, "... window features"]:
        """Returns what the window covers at each of its places."""
        dilation, strides = np.array(self.kernel_dilation), np.array(self.strides)
        sizes = (np.array(x.shape[1:-1]) - 1) * self.input_dilation + 1
        spans = (np.array(window) - 1) * dilation + 1
        padding = self.padding
        if isinstance(padding, str):
            padding = jax.lax.padtype_to_pads(sizes, spans, self.strides, padding)
        edges = [(low, high, d - 1)
                 for (low, high), d in zip(padding, self.input_dilation, strict=True)]  # fmt: skip
        x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
        last = np.array(x.shape[1:-1]) - spans
        parts = []
        for place in np.ndindex(*window):
            begin = place * dilation
            cut = map(slice, begin, begin + last + 1, strides)
            parts.append(x[:, *cut])
        return jnp.stack(parts, -2)


def unrolled_convolution(module: Any) -> Unrolling:
    """Returns how a convolution of Flax is unrolled; Linen and NNX name its fields alike."""
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


def einsum_channel_axes(equation: str) -> tuple[int, ...]:
    """Returns the second operand's axes that are output features, from the end.

    >>> einsum_channel_axes("...td, dhk -> ...thk")
    (-2, -1)
    """
    data, kernel, result = _terms(equation)
    axes = [i for i, axis in enumerate(kernel) if axis in result and axis not in data]
    return tuple(i - len(kernel) for i in axes)


def einsum_input_axes(equation: str) -> tuple[int, ...]:
    """Returns the second operand's axes that are summed over, up to the last, from the end.

    >>> einsum_input_axes("bthk, hkd -> btd")
    (-3, -2)
    """
    data, kernel, result = _terms(equation)
    axes = [i for i, axis in enumerate(kernel) if axis in data and axis not in result]
    return last_run(i - len(kernel) for i in axes)


def _terms(equation: str) -> tuple[str, str, str]:
    operands, result = equation.replace(" ", "").split("->")
    data, kernel = (operand.replace("...", "") for operand in operands.split(","))
    return data, kernel, result
