"""Codes as packed bits, and back to levels.

A code of `bits` bits is an index into a table of levels. Packed, the codes are one stream of bits:
code i takes bits [i bits, (i + 1) bits) of it, its lowest bit first, and byte j holds bits
[8 j, 8 (j + 1)), again the lowest first; the last byte is filled up with zeros.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from compand_jax.core._mesh import sharded_as
from compand_jax.core._xla import take

# Up to so many levels a chain of selections is cheaper than a gather, and fuses.
_MAX_SELECTIONS = 16


def packed_bytes(count: int, bits: int) -> int:
    """Returns how many bytes `count` codes take: count bits / 8, rounded up.

    >>> packed_bytes(9, 3)
    4
    """
    return -(-count * bits // 8)


@sharded_as()
def pack(codes: UInt8[Array, "..."], bits: int) -> UInt8[Array, " bytes"]:
    """Returns the codes, flattened, as packed bits; `unpack` is the inverse.

    Args:
      codes: In [0, 2^bits), any shape.
      bits: Bits per code, 1 to 8.

    >>> print(pack(jnp.array([1, 2, 3], jnp.uint8), 4))
    [33  3]
    """
    # Eight codes are `bits` bytes.
    wide = _padded(codes.reshape(-1), 8).reshape(-1, 8).astype(jnp.uint32)
    columns = []
    for j in range(bits):
        # Of the eight, those with a bit in byte j: code i begins at bit i bits of the group.
        inside = [i for i in range(8) if i * bits < 8 * (j + 1) and (i + 1) * bits > 8 * j]
        shifted = [_shifted(wide[:, i], i * bits - 8 * j) for i in inside]
        columns.append((sum(shifted[1:], shifted[0]) & 255).astype(jnp.uint8))
    return jnp.stack(columns, axis=1).reshape(-1)[: packed_bytes(codes.size, bits)]


@sharded_as()
def unpack(
    packed: UInt8[Array, " bytes"], bits: int, shape: tuple[int, ...]
) -> UInt8[Array, "..."]:
    """Returns the codes that `pack` packed, in their shape.

    >>> print(unpack(jnp.array([33, 3], jnp.uint8), 4, (3,)))
    [1 2 3]
    """
    groups = _padded(packed, bits).reshape(-1, bits).astype(jnp.uint32)
    columns = []
    for i in range(8):
        j, start = divmod(i * bits, 8)
        code = groups[:, j] >> start
        if start + bits > 8:
            code |= groups[:, j + 1] << (8 - start)
        columns.append((code & (2**bits - 1)).astype(jnp.uint8))
    return jnp.stack(columns, axis=1).reshape(-1)[: math.prod(shape)].reshape(shape)


def _padded(x: Array, multiple: int) -> Array:
    return jnp.pad(x, (0, -x.size % multiple))


def _shifted(x: Array, by: int) -> Array:
    return x << by if by >= 0 else x >> -by


@sharded_as(0)
def expand(
    codes: UInt8[Array, "..."], levels: Float[Array, "... levels"], *, selections: bool = True
) -> Float[Array, "..."]:
    """Returns the level of each code.

    Args:
      codes: Indices into the table, any shape.
      levels: [levels] for all codes, or leading axes that broadcast against the codes', such as
        [1, channels, levels].
      selections: Whether to select among few levels, which XLA fuses, instead of gathering, which
        is one operation.
    """
    count = levels.shape[-1]
    if count > _MAX_SELECTIONS or not selections:
        return take(levels, codes.astype(jnp.int32))
    values = jnp.broadcast_to(levels[..., 0], codes.shape)
    for k in range(1, count):
        values = jnp.where(codes == k, levels[..., k], values)
    return values


# An array that only names codes: whatever computes with it, instead of expanding it, is an error,
# since 8-bit floats are promoted to no other type.
CARRIER = jnp.float8_e4m3fn


def as_carrier(codes: UInt8[Array, "..."]) -> Array:
    """Returns the codes as a type that no arithmetic takes; `from_carrier` is the inverse."""
    return lax.bitcast_convert_type(codes, CARRIER)


def from_carrier(carrier: Array) -> UInt8[Array, "..."]:
    """Returns the codes of a carrier."""
    return lax.bitcast_convert_type(carrier, jnp.uint8)


@sharded_as(0)
def nearest_level(
    x: Float[Array, "..."],
    levels: Float[Array, " levels"],
    thresholds: Float[Array, " thresholds"],
    signed: bool,
    *,
    selections: bool = True,
) -> Float[Array, "..."]:
    """Returns the level nearest each value: that of sign(x) #{k: |x| > t_k}, NaN where x is.

    Args:
      x: Values; computed in float32, returned in x's type.
      levels: All levels of a midtread grid, ascending, float32.
      thresholds: Those between them.
      signed: Whether values below zero have levels of their own.
      selections: As `expand`'s.
    """
    if signed:
        levels, thresholds = levels[levels.size // 2 :], thresholds[thresholds.size // 2 :]
    wide = x.astype(jnp.float32)
    magnitude = jnp.abs(wide) if signed else jnp.maximum(wide, 0)
    if levels.size <= _MAX_SELECTIONS and selections:
        level = jnp.broadcast_to(levels[0], x.shape)
        for k in range(thresholds.size):
            level = jnp.where(magnitude > thresholds[k], levels[k + 1], level)
    else:
        level = take(levels, _count_below(magnitude, thresholds))
    level = jnp.where(wide < 0, 0 - level, level) if signed else level
    return jnp.where(jnp.isnan(wide), wide, level).astype(x.dtype)


def _count_below(x: Array, thresholds: Array) -> Array:
    """Returns how many of the ascending thresholds are below each value, by bisection."""
    bits = thresholds.size.bit_length()
    padding = jnp.full(2**bits - 1 - thresholds.size, jnp.inf, thresholds.dtype)
    bounds = jnp.concatenate([thresholds, padding])
    count = jnp.zeros(x.shape, jnp.int32)
    for bit in reversed(range(bits)):
        further = count + 2**bit
        count = jnp.where(x > take(bounds, further - 1), further, count)
    return count
