"""A quantizer as its codebook: the levels, the thresholds between them, and looking a value up.

With scale c, v = min(|x|/c, 1) and the mu-law curve F and its inverse G (`companding`):

    midtread   M = 2^(bits-1) - 1 signed, 2^bits - 1 unsigned;  y_q = round(M F(v)) / M
    midrise    H = 2^(bits-1), signed only;                     y_q = (floor(H F(v)) + 1/2) / H

the levels are c G(y_q), and the thresholds are c G at the points halfway between. Every quantizer
reads the one table that `half_table` makes, so that all of them agree to the last bit; at a tie
midtread takes the inner level and midrise the outer. Other families of levels (`families`) differ
in how the table is made, and in nothing else.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from compand_jax.core._checks import check_parameters, compute_dtype
from compand_jax.core.spec import Spec, check_spec

# The scale of what is zero. Every level and threshold of any quantizer is then still a normal
# float32 number: processors take smaller ones for zero. What does not exceed it counts as zero.
SMALLEST_SCALE = 2.0**-110


def codebook(
    mu: ArrayLike | None,
    scale: ArrayLike,
    *,
    bits: int,
    signed: bool = True,
    grid: str = "midtread",
    quantizer: str = "mu_law",
) -> tuple[Float[Array, "... levels"], Float[Array, "... thresholds"]]:
    """Returns the levels of a quantizer and the thresholds between them, each in ascending order.

    With G as `mu_law_expand`, M = 2^(bits-1) - 1 (signed) or 2^bits - 1, and H = 2^(bits-1):

        midtread   levels c G(k/M), k in [-M, M] or [0, M];    thresholds +-c G((k - 1/2)/M), k > 0
        midrise    levels c G((k + 1/2)/H), k in [-H, H - 1];  thresholds c G(k/H)

    A value at a threshold belongs to the level nearer to zero on midtread, and to the one farther
    from zero on midrise.

    Args:
      mu: Curvature, at least 0; a scalar or an array.
      scale: Clip c > 0, in the units of x; a scalar or an array that broadcasts with mu.
      bits: Bits per code, 1 to 8.
      signed: Whether x can be negative. If not, there are no levels below zero.
      grid: "midtread" (a level at zero) or "midrise" (a threshold at zero; signed only).
      quantizer: Another family of levels: `mu` then takes its parameters (docs/families.md).

    Returns:
      Levels and thresholds, float32 (under `jax_enable_x64` float64, but where mu and scale are
      float32), along a new last axis after the shape that mu and scale broadcast to. Of
      levels there are 2M + 1, M + 1 (unsigned) or 2H, of thresholds one fewer.

    Gradient: of these formulas, in mu and in scale.

    Raises:
      ValueError: `bits`, `signed` and `grid` do not go together, or a concrete mu is negative
        or not finite, or a concrete scale is not positive and finite.

    >>> levels, thresholds = codebook(0.0, 3.0, bits=3)
    >>> print(levels, thresholds)
    [-3. -2. -1.  0.  1.  2.  3.] [-2.5 -1.5 -0.5  0.5  1.5  2.5]
    """
    spec = check_spec(bits, signed, grid, quantizer)
    given = [x for x in (mu, scale) if x is not None]
    narrow = all(getattr(x, "dtype", None) == jnp.float32 for x in given)
    dtype = compute_dtype(jnp.result_type(jnp.float32 if narrow else float))
    mu, scale = check_parameters(mu, scale, spec, dtype=dtype)
    return _codebook(mu, scale, spec)


def _scaled(table: Array, scale: Array) -> Array:
    """Returns a table times the scale, along the last axis."""
    missing = max(scale.ndim - (table.ndim - 1), 0)
    table = table.reshape((1,) * missing + table.shape)
    return (scale[..., None] if scale.ndim else scale) * table


@functools.partial(jax.jit, static_argnums=2)  # so that it is traced once, for all sites
def half_table(mu: Array, scale: Array, spec: Spec) -> tuple[Array, Array]:
    """Returns the levels at x >= 0 and the thresholds above 0."""
    levels, thresholds = spec.family.table(mu, spec)
    table = _scaled(jnp.concatenate([levels, thresholds], -1), scale)
    return table[..., : levels.shape[-1]], table[..., levels.shape[-1] :]


@functools.partial(jax.jit, static_argnums=2)
def _codebook(mu: Array, scale: Array, spec: Spec) -> tuple[Array, Array]:
    levels, thresholds = half_table(mu, scale, spec)
    if not spec.signed:
        return levels, thresholds
    mirrored = levels if spec.midrise else levels[..., 1:]
    between = [jnp.zeros_like(levels[..., :1])] if spec.midrise else []
    return (
        jnp.concatenate([-mirrored[..., ::-1], levels], -1),
        jnp.concatenate([-thresholds[..., ::-1], *between, thresholds], -1),
    )
