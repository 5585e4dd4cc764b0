"""Quantizers as codebooks: levels, the thresholds between them, and straight-through gradients.

With scale c, v = min(|x|/c, 1) and the mu-law curve F and its inverse G (`companding`):

    midtread   M = 2^(bits-1) - 1 signed, 2^bits - 1 unsigned;  y_q = round(M F(v)) / M
    midrise    H = 2^(bits-1), signed only;                     y_q = (floor(H F(v)) + 1/2) / H
    Q(x) = sign(x) c G(y_q)

A quantizer is its table: levels l_k = c G(y_k) and the thresholds between them. `quantize`,
`dequantize` and `fake_quantize` all read the one table that `_half_table` makes, so that they
agree to the last bit; at a tie midtread takes the inner level and midrise the outer.

Source: Osama, Madian, Fouda, "Companding quantization for deep neural networks", Applied Soft
Computing 185, 113979, 2025, doi 10.1016/j.asoc.2025.113979; straight-through gradients after
Bengio, Leonard, Courville, 2013, arXiv 1308.3432, and, for the scale, Esser et al., "Learned
step size quantization", ICLR 2020.
"""

import functools
import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from compand_jax.companding import (
    compute_dtype,
    expm1_ratio,
    log1p_ratio,
    mu_law_compress,
    mu_law_expand,
    power_series,
)

GRIDS = ("midtread", "midrise")
GRADIENTS = ("identity", "chain")

# Up to so many thresholds a chain of comparisons is cheaper than one logarithm per element.
_MAX_COMPARISONS = 15


class Spec(NamedTuple):
    """What is static about a quantizer: it decides the table's shape and the codes' type."""

    bits: int
    signed: bool = True
    grid: str = "midtread"

    @property
    def midrise(self) -> bool:
        """Whether there is a threshold, instead of a level, at zero."""
        return self.grid == "midrise"

    @property
    def steps(self) -> int:
        """M or H: the intervals that [0, 1] is divided into after compression."""
        return 2 ** (self.bits - self.signed) - (not self.midrise)

    @property
    def code_dtype(self) -> Any:
        """int8 where signed, uint8 where not."""
        return jnp.int8 if self.signed else jnp.uint8


def check_spec(bits: Any, signed: bool = True, grid: str = "midtread") -> Spec:
    """Returns the `Spec`; raises ValueError where `bits`, `signed` and `grid` are none."""
    if isinstance(bits, bool) or not isinstance(bits, numbers.Integral) or not 1 <= bits <= 8:
        raise ValueError(f"`bits` must be an integer from 1 to 8, got {bits!r}")
    if grid not in GRIDS:
        raise ValueError(f"`grid` must be one of {', '.join(GRIDS)}, got {grid!r}")
    if grid == "midrise" and not signed:
        raise ValueError("`grid` midrise is signed, got signed=False: use grid='midtread'")
    if grid == "midtread" and signed and bits == 1:
        raise ValueError(
            "`bits` must be at least 2 for a signed midtread grid, got 1: "
            "use grid='midrise' or signed=False"
        )
    return Spec(int(bits), bool(signed), grid)


def codebook(
    mu: ArrayLike, scale: ArrayLike, *, bits: int, signed: bool = True, grid: str = "midtread"
) -> tuple[Float[Array, "... levels"], Float[Array, "... thresholds"]]:
    """Returns all levels of a quantizer and the thresholds between them, in ascending order.

    midtread: l_k = c G(k/M), k in [-M, M] (signed) or [0, M]; thresholds at c G((k - 1/2)/M).
    midrise: l_k = c G((k + 1/2)/H), k in [-H, H - 1]; thresholds at c G(k/H).

    Args:
      mu: Curvature, at least 0; a scalar or an array.
      scale: Clip c > 0, in the units of x; a scalar or an array that broadcasts with mu.
      bits: Bits per code, 1 to 8.
      signed: Whether x has a sign; where not, x <= 0 has code 0.
      grid: "midtread" (a level at zero) or "midrise" (a threshold at zero; signed only).

    Returns:
      float32 levels (2M + 1, M + 1 or 2H of them) and thresholds (one fewer) along a new last
      axis behind the broadcast shape of mu and scale. A value at a threshold belongs to the
      level nearer zero on midtread, farther from zero on midrise.

    Raises:
      ValueError: `bits`, `signed` and `grid` do not go together, or a concrete mu is negative
        or not finite, or a concrete scale is not positive and finite.

    >>> levels, thresholds = codebook(0.0, 3.0, bits=3)
    >>> print(levels, thresholds)
    [-3. -2. -1.  0.  1.  2.  3.] [-2.5 -1.5 -0.5  0.5  1.5  2.5]
    """
    spec = check_spec(bits, signed, grid)
    mu, scale = _check_parameters(mu, scale, dtype=compute_dtype(jnp.result_type(float)))
    return _codebook(mu, scale, spec)


def quantize(
    x: ArrayLike,
    mu: ArrayLike,
    scale: ArrayLike,
    *,
    bits: int,
    signed: bool = True,
    grid: str = "midtread",
) -> Int[Array, "..."]:
    """Returns the integer code of each value: how many thresholds lie between it and zero.

    Args:
      x: Values, floating, any shape; beyond the scale they are clipped. NaN has code 0.
      mu: Curvature, at least 0; a scalar or of x's rank, broadcast.
      scale: Clip c > 0, in the units of x; a scalar or of x's rank, broadcast.
      bits: Bits per code, 1 to 8.
      signed: Whether x has a sign; where not, x <= 0 has code 0.
      grid: "midtread" or "midrise".

    Returns:
      Codes of x's shape: int8 in [-M, M] (midtread) or [-H, H - 1] (midrise), uint8 in [0, M]
      where unsigned.

    Raises:
      TypeError: x is not floating.
      ValueError: as `codebook`, or mu or scale do not broadcast to x.

    >>> print(quantize(jnp.array([-2.0, -0.2, 0.0, 0.3, 0.9]), 2.0, 1.0, bits=3))
    [-3 -1  0  1  3]
    """
    spec = check_spec(bits, signed, grid)
    return _quantize(*_check_operands(x, mu, scale), spec)


def dequantize(
    codes: ArrayLike,
    mu: ArrayLike,
    scale: ArrayLike,
    *,
    bits: int,
    signed: bool = True,
    grid: str = "midtread",
    dtype: Any = jnp.float32,
) -> Float[Array, "..."]:
    """Returns the level of each code: sign(k) c G(|k|/M), or c G((k + 1/2)/H) on midrise.

    Args:
      codes: Codes as `quantize` returns them, int8 (signed) or uint8, any shape.
      mu: Curvature, at least 0; a scalar or of the codes' rank, broadcast.
      scale: Clip c > 0, in the units of x; a scalar or of the codes' rank, broadcast.
      bits: Bits per code, 1 to 8.
      signed: Whether the codes have a sign.
      grid: "midtread" or "midrise".
      dtype: Floating type of the result.

    Returns:
      Levels of the codes' shape, equal to `fake_quantize` of the values they came from.

    Raises:
      TypeError: the codes are not of the type that `quantize` returns.
      ValueError: as `quantize`, or a concrete code is out of range.

    >>> print(dequantize(jnp.array([-3, 0, 2], jnp.int8), 0.0, 3.0, bits=3))
    [-3.  0.  2.]
    """
    spec = check_spec(bits, signed, grid)
    codes = jnp.asarray(codes)
    if codes.dtype != spec.code_dtype:
        wanted = jnp.dtype(spec.code_dtype).name
        raise TypeError(f"`codes` must be {wanted} for signed={signed}, got {codes.dtype}")
    _check_codes(codes, spec)
    mu, scale = _check_parameters(
        mu, scale, dtype=compute_dtype(jnp.dtype(dtype)), like=("codes", codes.shape)
    )
    return _dequantize(codes, mu, scale, spec, jnp.dtype(dtype))


def fake_quantize(
    x: ArrayLike,
    mu: ArrayLike,
    scale: ArrayLike,
    *,
    bits: int,
    signed: bool = True,
    grid: str = "midtread",
    gradient: str = "identity",
) -> Float[Array, "..."]:
    """Returns each value moved to its level, Q(x) = sign(x) c G(y_q), differentiably.

    Args:
      x: Values, floating, any shape; beyond the scale they are clipped. NaN stays NaN.
      mu: Curvature, at least 0; a scalar or of x's rank, broadcast.
      scale: Clip c > 0, in the units of x; a scalar or of x's rank, broadcast.
      bits: Bits per value, 1 to 8.
      signed: Whether x has a sign; where not, x <= 0 gives 0 and passes no gradient.
      grid: "midtread" or "midrise".
      gradient: What dQ/dx is inside the clip: "identity" is 1, "chain" is the chain rule
        through both curves, (1 + mu v_q)/(1 + mu v).

    Returns:
      Levels, of x's shape and dtype; the table is float32 or wider.

    Gradient: rounding passes its own. With v_q = G(y_q) and y = F(v),
      in x: 1 for |x| < c, else 0;
      in mu: sign(x) (c/mu) [(1 + mu v_q)(y_q - y)/(1 + mu) + (v - v_q)/(1 + mu v)], its limit
        sign(x) c (v_q - v)(v_q + v - 1)/2 at mu = 0; outside the clip v = y = 1;
      in scale: sign(x) (v_q - v) for |x| < c, sign(x) v_q outside.

    Raises:
      TypeError: x is not floating.
      ValueError: as `quantize`, or `gradient` is unknown.

    >>> print(fake_quantize(jnp.array([-2.0, -0.6, 0.1, 0.8]), 0.0, 1.0, bits=2))
    [-1. -1.  0.  1.]
    >>> print(jax.grad(lambda c: fake_quantize(5.0, 2.0, c, bits=4))(1.0))
    1.0
    """
    spec = check_spec(bits, signed, grid)
    if gradient not in GRADIENTS:
        raise ValueError(f"`gradient` must be one of {', '.join(GRADIENTS)}, got {gradient!r}")
    return _fake_quantize(*_check_operands(x, mu, scale), spec, gradient == "chain")


# Checks. Static facts always; values only where they are at hand, so that a traced mu costs
# nothing.


def _check_operands(x: ArrayLike, mu: ArrayLike, scale: ArrayLike) -> tuple[Array, Array, Array]:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`x` must be floating, got {x.dtype}: convert it with x.astype(float)")
    return x, *_check_parameters(mu, scale, dtype=compute_dtype(x.dtype), like=("x", x.shape))


def _check_parameters(
    mu: ArrayLike, scale: ArrayLike, *, dtype: Any, like: tuple[str, tuple] | None = None
) -> tuple[Array, Array]:
    for name, value, valid, required in (
        ("mu", mu, lambda a: a >= 0, "at least 0 and finite"),
        ("scale", scale, lambda a: a > 0, "positive and finite"),
    ):
        if not isinstance(value, jax.core.Tracer):
            host = np.asarray(value, np.float64)
            if not np.all(valid(host) & np.isfinite(host)):
                raise ValueError(f"`{name}` must be {required}, got {value}")
    mu, scale = jnp.asarray(mu, dtype), jnp.asarray(scale, dtype)
    for name, value in (("mu", mu), ("scale", scale)):
        if like is not None and value.ndim and not _broadcasts_to(value.shape, like[1]):
            raise ValueError(
                f"`{name}` must be a scalar or broadcast to `{like[0]}` at the same rank, "
                f"got shape {value.shape} for {like[1]}"
            )
    return mu, scale


def _broadcasts_to(shape: tuple, target: tuple) -> bool:
    return len(shape) == len(target) and all(n in (1, m) for n, m in zip(shape, target, strict=True))


def _check_codes(codes: Array, spec: Spec) -> None:
    if isinstance(codes, jax.core.Tracer) or codes.size == 0:
        return
    top = spec.steps - spec.midrise
    low = -spec.steps if spec.signed else 0
    if int(codes.min()) < low or int(codes.max()) > top:
        raise ValueError(
            f"`codes` must be in [{low}, {top}] at {spec.bits} bits, "
            f"got {int(codes.min())} to {int(codes.max())}"
        )


# The table, and looking a value up in it.


def _positions(spec: Spec) -> tuple[np.ndarray, np.ndarray]:
    """Returns where the levels at x >= 0, and the thresholds above 0, lie after compression."""
    if spec.midrise:
        return (np.arange(spec.steps) + 0.5) / spec.steps, np.arange(1, spec.steps) / spec.steps
    return np.arange(spec.steps + 1) / spec.steps, (np.arange(spec.steps) + 0.5) / spec.steps


def _expand_positions(y: np.ndarray, mu: Array, scale: Array) -> Array:
    """Returns c G(y) along a new last axis behind the broadcast shape of mu and scale."""
    ndim = max(mu.ndim, scale.ndim)
    positions = jnp.asarray(y, mu.dtype).reshape((1,) * ndim + (-1,))
    mu, scale = (a[..., None] if a.ndim else a for a in (mu, scale))
    return scale * jnp.where(positions == 1, 1, mu_law_expand(positions, mu))


def _half_table(mu: Array, scale: Array, spec: Spec) -> tuple[Array, Array]:
    """Returns the levels at x >= 0 and the thresholds above 0."""
    levels, thresholds = _positions(spec)
    return _expand_positions(levels, mu, scale), _expand_positions(thresholds, mu, scale)


@functools.partial(jax.jit, static_argnums=2)
def _codebook(mu: Array, scale: Array, spec: Spec) -> tuple[Array, Array]:
    levels, thresholds = _half_table(mu, scale, spec)
    if not spec.signed:
        return levels, thresholds
    mirrored = levels if spec.midrise else levels[..., 1:]
    between = [jnp.zeros_like(levels[..., :1])] if spec.midrise else []
    return (
        jnp.concatenate([-mirrored[..., ::-1], levels], -1),
        jnp.concatenate([-thresholds[..., ::-1], *between, thresholds], -1),
    )


def _look_up(
    magnitude: Array, mu: Array, scale: Array, tables: tuple[Array, ...], spec: Spec
) -> tuple[Array, ...]:
    """Returns each table's entry for the number of thresholds that each magnitude lies beyond."""
    thresholds = _expand_positions(_positions(spec)[1], mu, scale)
    if thresholds.shape[-1] <= _MAX_COMPARISONS:
        return tuple(_compare_all(magnitude, thresholds, table, spec) for table in tables)
    index = _compress_and_correct(magnitude, mu, scale, thresholds, spec)
    return tuple(_take(table, index) for table in tables)


def _beyond(magnitude: Array, threshold: Array, spec: Spec) -> Array:
    return magnitude >= threshold if spec.midrise else magnitude > threshold


def _compare_all(magnitude: Array, thresholds: Array, table: Array, spec: Spec) -> Array:
    value = jnp.broadcast_to(table[..., 0], magnitude.shape)
    for k in range(thresholds.shape[-1]):
        value = jnp.where(_beyond(magnitude, thresholds[..., k], spec), table[..., k + 1], value)
    return value


def _compress_and_correct(
    magnitude: Array, mu: Array, scale: Array, thresholds: Array, spec: Spec
) -> Array:
    # The curve's float32 value lands within one step of the right one; the thresholds decide.
    magnitude = jnp.minimum(jnp.nan_to_num(magnitude, posinf=jnp.inf), scale)
    step = spec.steps * mu_law_compress(magnitude / scale, mu) + (0 if spec.midrise else 0.5)
    index = jnp.clip(step.astype(jnp.int32), 0, thresholds.shape[-1])
    end = jnp.full_like(thresholds[..., :1], jnp.inf)
    bounds = jnp.concatenate([-end, thresholds, end], -1)
    inside = _beyond(magnitude, _take(bounds, index), spec)
    over = _beyond(magnitude, _take(bounds, index + 1), spec)
    return index - 1 + inside.astype(jnp.int32) + over.astype(jnp.int32)


def _take(table: Array, index: Array) -> Array:
    """Returns table[..., index], the table's leading axes broadcast against the index."""
    if table.ndim == 1:
        return table.at[index].get(mode="promise_in_bounds")
    return jnp.take_along_axis(table, index[..., None], axis=-1, mode="promise_in_bounds")[..., 0]


def _magnitude(x: Array, spec: Spec) -> Array:
    """Returns |x| where signed, max(x, 0) where not."""
    return jnp.abs(x) if spec.signed else jnp.maximum(x, 0)


@functools.partial(jax.jit, static_argnums=3)
def _quantize(x: Array, mu: Array, scale: Array, spec: Spec) -> Array:
    x = x.astype(mu.dtype)
    counts = jnp.arange(len(_positions(spec)[0]), dtype=jnp.int32)
    (k,) = _look_up(_magnitude(x, spec), mu, scale, (counts,), spec)
    return jnp.where(x < 0, -k - spec.midrise, k).astype(spec.code_dtype)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _dequantize(codes: Array, mu: Array, scale: Array, spec: Spec, dtype: Any) -> Array:
    levels, _ = _half_table(mu, scale, spec)
    k = codes.astype(jnp.int32)
    magnitude = _take(levels, jnp.where(k < 0, -k - spec.midrise, k))
    return jnp.where(k < 0, -magnitude, magnitude).astype(dtype)


# Fake quantization and its straight-through gradients.


@functools.partial(jax.jit, static_argnums=(3, 4))
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _fake_quantize(x: Array, mu: Array, scale: Array, spec: Spec, chain: bool) -> Array:
    wide = x.astype(mu.dtype)
    levels, _ = _half_table(mu, scale, spec)
    (level,) = _look_up(_magnitude(wide, spec), mu, scale, (levels,), spec)
    signed = jnp.where(wide < 0, -level, level) if spec.signed else level
    return jnp.where(jnp.isnan(wide), wide, signed).astype(x.dtype)


def _fake_quantize_fwd(
    x: Array, mu: Array, scale: Array, spec: Spec, chain: bool
) -> tuple[Array, tuple]:
    return _fake_quantize(x, mu, scale, spec, chain), (x, mu, scale)


def _fake_quantize_bwd(spec: Spec, chain: bool, residuals: tuple, cotangent: Array) -> tuple:
    x, mu, scale = residuals
    g = cotangent.astype(mu.dtype)
    wide = x.astype(mu.dtype)
    magnitude = _magnitude(wide, spec)
    positions = jnp.asarray(_positions(spec)[0], mu.dtype)
    expanded = _expand_positions(_positions(spec)[0], mu, jnp.ones_like(scale))
    y_q, v_q = _look_up(magnitude, mu, scale, (positions, expanded), spec)

    v = jnp.minimum(magnitude / scale, 1)
    inside = magnitude < scale
    signed_g = jnp.where(wide < 0, -g, g)
    passes = inside if spec.signed else inside & (wide > 0)
    slope = (1 + mu * v_q) / (1 + mu * v) if chain else jnp.ones_like(v)
    dx = jnp.where(passes, slope * g, 0)
    dmu = signed_g * scale * _level_slope_in_mu(v, v_q, y_q, mu)
    dscale = signed_g * jnp.where(inside, v_q - v, v_q)
    return dx.astype(x.dtype), _sum_to(dmu, mu.shape), _sum_to(dscale, scale.shape)


def _level_slope_in_mu(v: Array, v_q: Array, y_q: Array, mu: Array) -> Array:
    """Returns dv_q/dmu with rounding passed through, without the cancellation at small mu.

    The textbook form (1/mu)[(1+mu v_q)(y_q-y)/(1+mu) + (v-v_q)/(1+mu v)] is 0/0 at mu = 0. With
    d = y_q - y, L = log(1+mu), q = L/mu and s(z) = (expm1(z) - z)/z^2 it equals

        d [(1 - q)/mu - (1 - v_q)/(1 + mu) - q^2 d s(d L)],

    in which every term is smooth through mu = 0, where it is (v_q - v)(v_q + v - 1)/2.
    """
    q = log1p_ratio(mu)
    d = y_q - mu_law_compress(v, mu)
    curvature = q * q * d * _second_ratio(d * jnp.log1p(mu))
    return d * (_one_minus_q_over_mu(mu) - (1 - v_q) / (1 + mu) - curvature)


def _one_minus_q_over_mu(mu: Array) -> Array:
    """Returns (mu - log1p(mu))/mu^2, 1/2 at mu = 0."""
    near = mu < 0.2
    safe = jnp.where(near, 1, mu)
    series = power_series(mu, tuple((-1.0) ** n / (n + 2) for n in range(12)))
    return jnp.where(near, series, (1 - log1p_ratio(safe)) / safe)


def _second_ratio(z: Array) -> Array:
    """Returns s(z) = (expm1(z) - z)/z^2, 1/2 at z = 0."""
    near = jnp.abs(z) < 0.5
    safe = jnp.where(near, 1, z)
    series = power_series(z, tuple(1 / math.factorial(n) for n in range(2, 10)))
    return jnp.where(near, series, (expm1_ratio(safe) - 1) / safe)


def _sum_to(x: Array, shape: tuple) -> Array:
    """Returns x summed over the axes that an operand of this shape was broadcast along."""
    if not shape:
        return jnp.sum(x)
    axes = tuple(i for i, n in enumerate(shape) if n == 1)
    return jnp.sum(x, axes, keepdims=True)


_fake_quantize.__wrapped__.defvjp(_fake_quantize_fwd, _fake_quantize_bwd)
