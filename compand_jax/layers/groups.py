"""Groups: a scale for every so many inputs of an output.

With the inputs of a weight one behind the other, g to a group, a weight of any shape is

    w[r, i, b]    r: what lies before, and the groups;  i < g: within a group;  b: what lies behind

and its scales are c[r, 0, b]. For a kernel [inputs, outputs], r counts groups and b outputs. The
reshape moves no number, so that codes and levels lie in memory as they did.

Source: one scale for a block of weights as in Dettmers et al., "QLoRA", NeurIPS 2023, section 3,
and along the inputs as in GPTQ (Frantar et al., ICLR 2023, section 4).
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SCALE_AXES = (-3, -1)
"""The axes of a grouped weight whose every index has a scale of its own."""


def grouped(weight: Any, scale_shape: tuple[int, ...], size: int | str | None) -> Any:
    """Returns a weight as its scales [..., r, 1, b] broadcast to it; itself where it has no groups.

    Args:
      weight: An array, one layer's or a stack's, whose layers have scales of their own or share
        them.
      scale_shape: Of the scales.
      size: How many inputs share a scale. What is no integer has no groups.
    """
    if not isinstance(size, int):
        return weight
    shape = (*scale_shape[:-2], size, scale_shape[-1])
    layers = weight.size // max(math.prod(shape), 1)
    return weight.reshape(shape if layers == 1 else (layers, *shape))


def has_groups(size: int | str | None) -> bool:
    """Whether a granularity is a number of inputs.

    >>> has_groups(64), has_groups("channel")
    (True, False)
    """
    return isinstance(size, int)


def group_scale_shape(weight_shape: tuple[int, ...], size: int, axis: int) -> tuple[int, int, int]:
    """Returns the shape of a weight's scales.

    Args:
      weight_shape: Of the weight.
      size: How many inputs share a scale.
      axis: The last of the axes that inputs run along, from the end.

    >>> group_scale_shape((3, 3, 64, 10), 32, -2)
    (18, 1, 10)
    """
    behind = math.prod(weight_shape[len(weight_shape) + axis + 1 :])
    return math.prod(weight_shape) // (size * behind), 1, behind


def stored_scales(
    scale: Float[Array, "..."], dtype: str, axes: tuple[int, ...]
) -> Float[Array, "..."]:
    """Returns scales as they are once they are stored.

        float16   the nearest one, from 2^-24 on
        uint8     u k, k = round(c/u) from 1 to 255, with one unit u = max(c)/255

    Args:
      scale: Positive. A single one stays as it is.
      dtype: "float32", "float16" or "uint8".
      axes: Those that have several scales, from the end; what lies before has units of its own.

    Gradient: 1, as if nothing was rounded.
    """
    if not scale.ndim or not axes or dtype == "float32":
        return scale
    rounded = expanded_scales(*packed_scales(scale, dtype, axes)).astype(scale.dtype)
    # Rounding passes its gradient; what is added is zero.
    return jax.lax.stop_gradient(rounded) + (scale - jax.lax.stop_gradient(scale))


def packed_scales(
    scale: Float[Array, "..."], dtype: str, axes: tuple[int, ...]
) -> tuple[Array, Array | None]:
    """Returns scales in the type that they are stored in, and their unit; None without one."""
    if dtype == "float16":
        info = jnp.finfo(jnp.float16)
        lowest, highest = float(info.smallest_subnormal), float(info.max)
        return jnp.clip(scale, lowest, highest).astype(jnp.float16), None
    if dtype == "uint8":
        unit = jnp.max(scale, axes, keepdims=True) / 255
        return jnp.clip(jnp.round(scale / unit), 1, 255).astype(jnp.uint8), unit
    return scale, None


def expanded_scales(stored: Array, unit: Array | None) -> Float[Array, "..."]:
    """Returns the scales that `packed_scales` packed, float32."""
    wide = stored.astype(jnp.float32)
    return wide if unit is None else wide * unit.astype(jnp.float32)


def bytes_of_scales(count: int, dtype: str) -> int:
    """Returns the bytes of so many scales of one weight, with their unit.

    >>> bytes_of_scales(6, "uint8")
    10
    """
    return count * {"float32": 4, "float16": 2, "uint8": 1}[dtype] + 4 * (dtype == "uint8")


def group_moments(
    rows: Float[Array, "matrices rows n"], moments: Float[Array, "matrices n n"], size: int
) -> tuple[Float[Array, "blocks rows size"], Float[Array, "blocks size size"]]:
    """Returns a layer's rows and second moments group by group.

    The products of inputs of different groups are left out: what each group adds to the output's
    error by itself is what its scale is found by.
    """
    matrices, count, n = rows.shape
    blocks = n // size
    by_group = rows.reshape(matrices, count, blocks, size).transpose(0, 2, 1, 3)
    square = moments.reshape(matrices, blocks, size, blocks, size)
    diagonal = jnp.moveaxis(jnp.diagonal(square, axis1=1, axis2=3), -1, 1)
    return by_group.reshape(-1, count, size), diagonal.reshape(-1, size, size)


def last_run(axes: Iterable[int]) -> tuple[int, ...]:
    """Returns those of some axes that lie one behind the other up to the last.

    >>> last_run((-5, -3, -2))
    (-3, -2)
    """
    found = sorted(axes)
    return tuple(axis for i, axis in enumerate(found) if found[-1] - axis == len(found) - 1 - i)


def require_divides(site: str, size: int, shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    """Raises ValueError where a group size does not divide a weight's inputs, saying which do.

    Args:
      site: The site's name.
      size: The group size.
      shape: Of the weight.
      axes: Those that its inputs run along, from the end; () where they are not known.
    """
    if not axes:
        raise ValueError(
            f"`weight_granularity` must be 'tensor' or 'channel' for site {site!r}, got {size}: it "
            "has no axis that is summed over alone; give "
            f"Rule({site!r}, weight_granularity='tensor')"
        )
    inputs = math.prod(shape[axis] for axis in axes)
    if size > inputs or inputs % size:
        divisors = ", ".join(str(n) for n in range(1, inputs + 1) if inputs % n == 0)
        raise ValueError(
            f"`weight_granularity` must divide the {inputs} inputs of site {site!r}, got {size}: "
            f"give one of {divisors}, or a Rule for this site"
        )
