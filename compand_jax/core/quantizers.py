"""Quantize, dequantize, and fake quantization with straight-through gradients.

    Q(x) = sign(x) c G(y_q)

with the scale c, the inverse G of the mu-law curve F, and y_q the nearest grid point to F(|x|/c),
all in `codebooks`.

Source: Osama, Madian, Fouda, "Companding quantization for deep neural networks", Applied Soft
Computing 185, 113979, 2025, doi 10.1016/j.asoc.2025.113979; straight-through gradients after
Bengio, Leonard, Courville, 2013, arXiv 1308.3432, and, for the scale, Esser et al., "Learned
step size quantization", ICLR 2020.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer

from compand_jax.core._checks import check_codes, check_operands, check_parameters, compute_dtype
from compand_jax.core._mesh import sharded_as, sum_over_mesh
from compand_jax.core._parameter_gradients import slope_of_one, sum_of_many
from compand_jax.core._xla import look_up, sum_both, sum_to, take
from compand_jax.core.codebooks import half_table
from compand_jax.core.families.base import Family
from compand_jax.core.spec import Spec, check_spec

GRADIENTS = ("identity", "chain")


def quantize(
    x: ArrayLike,
    mu: ArrayLike | None,
    scale: ArrayLike,
    *,
    bits: int,
    signed: bool = True,
    grid: str = "midtread",
    quantizer: str = "mu_law",
) -> Integer[Array, "..."]:
    """Returns the integer code of each value: how many thresholds lie between it and zero.

    The codes k are those of `codebook`'s levels, and `dequantize` returns these levels.

    Args:
      x: Values, floating, any shape. Values beyond the scale are clipped, and NaN has code 0.
      mu: Curvature, at least 0; a scalar, or an array of x's rank that broadcasts to x.
      scale: Clip c > 0, in the units of x; a scalar, or an array of x's rank that broadcasts to x.
      bits: Bits per code, 1 to 8.
      signed: Whether x can be negative. If not, x <= 0 has code 0.
      grid: "midtread" or "midrise".
      quantizer: Another family of levels: `mu` then takes its parameters (docs/families.md).

    Returns:
      Codes of x's shape: int8 in [-M, M] (midtread) or [-H, H - 1] (midrise), or uint8 in [0, M]
      if not signed, with M = 2^(bits-1) - 1 (signed) or 2^bits - 1, and H = 2^(bits-1).

    Not differentiable: codes are integers. `fake_quantize` is.

    Raises:
      TypeError: x is not floating.
      ValueError: as `codebook`, or mu or scale does not broadcast to x.

    >>> print(quantize(jnp.array([-2.0, -0.2, 0.0, 0.3, 0.9]), 2.0, 1.0, bits=3))
    [-3 -1  0  1  3]
    """
    spec = check_spec(bits, signed, grid, quantizer)
    return _quantize(*check_operands(x, mu, scale, spec), spec)


def dequantize(
    codes: ArrayLike,
    mu: ArrayLike | None,
    scale: ArrayLike,
    *,
    bits: int,
    signed: bool = True,
    grid: str = "midtread",
    quantizer: str = "mu_law",
    dtype: Any = jnp.float32,
) -> Float[Array, "..."]:
    """Returns the level of each code: sign(k) c G(|k|/M), or c G((k + 1/2)/H) on midrise.

    Args:
      codes: Codes as `quantize` returns them, int8 (signed) or uint8, any shape.
      mu: Curvature, at least 0; a scalar, or an array of the codes' rank that broadcasts to them.
      scale: Clip c > 0, in the units of x; likewise.
      bits: Bits per code, 1 to 8.
      signed: Whether the codes are those of values that can be negative.
      grid: "midtread" or "midrise".
      quantizer: Another family of levels: `mu` then takes its parameters (docs/families.md).
      dtype: Floating type of the result.

    Returns:
      Levels of the codes' shape. They equal `fake_quantize` of the values that were quantized.

    Gradient: in mu and scale, that of the levels.

    Raises:
      TypeError: the codes are not of the type that `quantize` returns, or `dtype` is not floating.
      ValueError: as `quantize`, or a concrete code is out of range.

    >>> print(dequantize(jnp.array([-3, 0, 2], jnp.int8), 0.0, 3.0, bits=3))
    [-3.  0.  2.]
    """
    spec = check_spec(bits, signed, grid, quantizer)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`dtype` must be floating, got {dtype}: take jnp.float32")
    codes = jnp.asarray(codes)
    if codes.dtype != spec.code_dtype:
        wanted = jnp.dtype(spec.code_dtype).name
        raise TypeError(
            f"`codes` must be {wanted} for signed={signed}, got {codes.dtype}: give the codes of "
            "quantize with the same signed"
        )
    check_codes(codes, *spec.code_range, spec.bits)
    mu, scale = check_parameters(
        mu, scale, spec, dtype=compute_dtype(jnp.dtype(dtype)), like=("codes", codes.shape)
    )
    return _dequantize(codes, mu, scale, spec, jnp.dtype(dtype))


def fake_quantize(
    x: ArrayLike,
    mu: ArrayLike | None,
    scale: ArrayLike,
    *,
    bits: int,
    signed: bool = True,
    grid: str = "midtread",
    quantizer: str = "mu_law",
    gradient: str = "identity",
) -> Float[Array, "..."]:
    """Returns each value moved to its level, Q(x) = sign(x) c G(y_q), differentiably.

    y_q is F(v) rounded to the grid, with v = min(|x|/c, 1); F is `mu_law_compress`, and G its
    inverse.

    Args:
      x: Values, floating, any shape. Values beyond the scale are clipped, and NaN stays NaN.
      mu: Curvature, at least 0; a scalar, or an array of x's rank that broadcasts to x.
      scale: Clip c > 0, in the units of x; a scalar, or an array of x's rank that broadcasts to x.
      bits: Bits per value, 1 to 8.
      signed: Whether x can be negative. If not, x <= 0 gives 0 and passes no gradient.
      grid: "midtread" or "midrise".
      quantizer: Another family of levels: `mu` then takes its parameters (docs/families.md).
      gradient: What dQ/dx is inside the clip: "identity" is 1, "chain" is the chain rule
        through both curves, (1 + mu v_q)/(1 + mu v).

    Returns:
      Levels, of x's shape and dtype; computed in float32 or wider.

    Gradient: straight-through, which means that rounding passes its gradient on. With v_q = G(y_q)
      and y = F(v),
      in x: 1 for |x| < c, else 0;
      in mu: sign(x) (c/mu) [(1 + mu v_q)(y_q - y)/(1 + mu) + (v - v_q)/(1 + mu v)], where v = y = 1
        outside the clip; at mu = 0 its limit, sign(x) c (v_q - v)(v_q + v - 1)/2;
      in scale: sign(x) (v_q - v) for |x| < c, sign(x) v_q outside.
      In another family's parameters it is that of its levels, and of the rounding where it has a
      curve. It is of reverse mode: `jax.jvp` and `jax.jacfwd` raise a TypeError.

    Raises:
      TypeError: x is not floating.
      ValueError: as `quantize`, or `gradient` is unknown.

    >>> print(fake_quantize(jnp.array([-2.0, -0.6, 0.1, 0.8]), 0.0, 1.0, bits=2))
    [-1. -1.  0.  1.]
    >>> print(jax.grad(lambda c: fake_quantize(5.0, 2.0, c, bits=4))(1.0))
    1.0
    """
    spec = check_spec(bits, signed, grid, quantizer)
    if gradient not in GRADIENTS:
        raise ValueError(
            f"`gradient` must be one of {', '.join(GRADIENTS)}, got {gradient!r}: choose one"
        )
    if gradient == "chain" and type(spec.family).chain is Family.chain:
        raise ValueError(
            f"`gradient` must be 'identity' for quantizer={quantizer!r}, got 'chain': it has none"
        )
    return _straight_through(*check_operands(x, mu, scale, spec), spec, gradient == "chain")


# What is jitted: mu and scale are arguments of it also when called eagerly, so that a table is
# the same to the last bit in all of them.


def _magnitude(x: Array, spec: Spec) -> Array:
    """Returns |x| where signed, max(x, 0) where not."""
    return jnp.abs(x) if spec.signed else jnp.maximum(x, 0)


def _look_up(magnitude: Array, mu: Array, scale: Array, table: Array, spec: Spec) -> Array:
    """Returns the table's entry at the level of each magnitude."""
    _, thresholds = half_table(mu, scale, spec)
    curve = mu if spec.family.has_even_buckets else None
    return look_up(magnitude, table, thresholds, curve, scale, outer=spec.midrise)


def _indices(magnitude: Array, mu: Array, scale: Array, spec: Spec) -> Array:
    """Returns the place in the table of the level of each magnitude."""
    counts = jnp.arange(spec.steps + (not spec.midrise), dtype=jnp.int32)
    return _look_up(magnitude, mu, scale, counts, spec)


@functools.partial(jax.jit, static_argnums=3)
@sharded_as(0)
def _quantize(x: Array, mu: Array, scale: Array, spec: Spec) -> Array:
    x = x.astype(mu.dtype)
    k = _indices(_magnitude(x, spec), mu, scale, spec)
    return jnp.where(x < 0, -k - int(spec.midrise), k).astype(spec.code_dtype)


@functools.partial(jax.jit, static_argnums=(3, 4))
@sharded_as(0)
def _dequantize(codes: Array, mu: Array, scale: Array, spec: Spec, dtype: Any) -> Array:
    levels, _ = half_table(mu, scale, spec)
    k = codes.astype(jnp.int32)
    magnitude = take(levels, jnp.where(k < 0, -k - int(spec.midrise), k))
    return jnp.where(k < 0, 0 - magnitude, magnitude).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _straight_through(x: Array, mu: Array, scale: Array, spec: Spec, chain: bool) -> Array:
    return _nearest_level(x, mu, scale, spec)


@functools.partial(jax.jit, static_argnums=3)
@sharded_as(0)
def _nearest_level(x: Array, mu: Array, scale: Array, spec: Spec) -> Array:
    wide = x.astype(mu.dtype)
    levels, _ = half_table(mu, scale, spec)
    level = _look_up(_magnitude(wide, spec), mu, scale, levels, spec)
    # 0 - level, not -level: the level at zero has one sign, as its code has.
    signed = jnp.where(wide < 0, 0 - level, level) if spec.signed else level
    return jnp.where(jnp.isnan(wide), wide, signed).astype(x.dtype)


def _straight_through_fwd(
    x: Array, mu: Array, scale: Array, spec: Spec, chain: bool
) -> tuple[Array, tuple]:
    return _nearest_level(x, mu, scale, spec), (x, mu, scale)


def _straight_through_bwd(spec: Spec, chain: bool, residuals: tuple, cotangent: Array) -> tuple:
    gradients = _pull_back(*residuals, cotangent, spec, chain)
    return tuple(map(sum_over_mesh, gradients, residuals))


@functools.partial(jax.jit, static_argnums=(4, 5))
@sharded_as(0, 1, 2)
def _pull_back(
    x: Array, mu: Array, scale: Array, cotangent: Array, spec: Spec, chain: bool
) -> tuple[Array, Array, Array]:
    g = cotangent.astype(mu.dtype)
    wide = x.astype(mu.dtype)
    magnitude = _magnitude(wide, spec)
    table, _ = half_table(mu, jnp.ones_like(scale), spec)
    v = jnp.minimum(magnitude / scale, 1)
    v_q = _look_up(magnitude, mu, scale, table, spec)

    inside = magnitude < scale
    passes = inside if spec.signed else inside & (wide > 0)
    slope = spec.family.chain(v, v_q, mu) if chain else 1
    dx = jnp.where(passes, slope * g, 0).astype(x.dtype)
    signed_g = jnp.where(wide < 0, -g, g)
    dscale = signed_g * jnp.where(inside, v_q - v, v_q)
    level_slope = slope_of_one(v, v_q, mu, spec, lambda x: _look_up(magnitude, mu, scale, x, spec))
    if level_slope is not None:
        return dx, *sum_both(signed_g * scale * level_slope, dscale, mu.shape, scale.shape)
    dmu = jnp.zeros_like(mu)
    if spec.family.parameter is not None:
        dmu = sum_of_many(signed_g * scale, v, _indices(magnitude, mu, scale, spec), mu, spec)
    return dx, dmu, sum_to(dscale, scale.shape)


_straight_through.defvjp(_straight_through_fwd, _straight_through_bwd)
