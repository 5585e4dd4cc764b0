"""A quantizer as its codebook: the levels, the thresholds between them, and looking a value up.

With scale c, v = min(|x|/c, 1) and the mu-law curve F and its inverse G (`companding`):

    midtread   M = 2^(bits-1) - 1 signed, 2^bits - 1 unsigned;  y_q = round(M F(v)) / M
    midrise    H = 2^(bits-1), signed only;                     y_q = (floor(H F(v)) + 1/2) / H

the levels are c G(y_q), and the thresholds are c G at the points halfway between. Every quantizer
reads the one table that `half_table` makes, so that all of them agree to the last bit; at a tie
midtread takes the inner level and midrise the outer. Another family of levels (power of two, say)
would differ only in how the table is made.
"""

import functools
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from compand_jax.core._checks import check_parameters, compute_dtype
from compand_jax.core.companding import mu_law_expand

GRIDS = ("midtread", "midrise")
# The scale of what is zero. Every level and threshold of any quantizer is then still a normal
# float32 number: processors take smaller ones for zero. What does not exceed it counts as zero.
SMALLEST_SCALE = 2.0**-110
ONE_BIT_REMEDY = "grid='midrise' or signed=False"


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
    def code_range(self) -> tuple[int, int]:
        """The least and the largest code."""
        return -self.steps if self.signed else 0, self.steps - self.midrise

    @property
    def code_dtype(self) -> Any:
        """int8 where signed, uint8 where not."""
        return jnp.int8 if self.signed else jnp.uint8


def check_spec(bits: Any, signed: bool = True, grid: str = "midtread") -> Spec:
    """Returns the `Spec`; raises ValueError where `bits`, `signed` and `grid` are none."""
    if isinstance(bits, bool) or not isinstance(bits, numbers.Integral) or not 1 <= int(bits) <= 8:
        raise ValueError(f"`bits` must be an integer from 1 to 8, got {bits!r}: choose one")
    if not isinstance(signed, bool | np.bool_):
        raise ValueError(f"`signed` must be True or False, got {signed!r}: choose one")
    if grid not in GRIDS:
        raise ValueError(f"`grid` must be one of {', '.join(GRIDS)}, got {grid!r}: choose one")
    if grid == "midrise" and not signed:
        raise ValueError("`grid` midrise is signed, got signed=False: use grid='midtread'")
    if grid == "midtread" and signed and bits == 1:
        raise ValueError(
            f"`bits` must be at least 2 for a signed midtread grid, got 1: use {ONE_BIT_REMEDY}"
        )
    return Spec(int(bits), bool(signed), grid)


def codebook(
    mu: ArrayLike, scale: ArrayLike, *, bits: int, signed: bool = True, grid: str = "midtread"
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
    spec = check_spec(bits, signed, grid)
    narrow = all(getattr(x, "dtype", None) == jnp.float32 for x in (mu, scale))
    dtype = compute_dtype(jnp.result_type(jnp.float32 if narrow else float))
    mu, scale = check_parameters(mu, scale, dtype=dtype)
    return _codebook(mu, scale, spec)


def positions(spec: Spec) -> tuple[np.ndarray, np.ndarray]:
    """Returns where the levels at x >= 0, and the thresholds above 0, lie after compression."""
    if spec.midrise:
        return (np.arange(spec.steps) + 0.5) / spec.steps, np.arange(1, spec.steps) / spec.steps
    return np.arange(spec.steps + 1) / spec.steps, (np.arange(spec.steps) + 0.5) / spec.steps


def _expand_positions(y: Any, mu: Array, scale: Array) -> Array:
    """Returns c G(y) along a new last axis behind the broadcast shape of mu and scale."""
    ndim = max(mu.ndim, scale.ndim)
    y = jnp.asarray(y, mu.dtype).reshape((1,) * ndim + (-1,))
    mu, scale = (a[..., None] if a.ndim else a for a in (mu, scale))
    return scale * jnp.where(y == 1, 1, mu_law_expand(y, mu))


@functools.partial(jax.jit, static_argnums=2)  # so that it is traced once, for all sites
def half_table(mu: Array, scale: Array, spec: Spec) -> tuple[Array, Array]:
    """Returns the levels at x >= 0 and the thresholds above 0."""
    levels, thresholds = positions(spec)
    table = _expand_positions(np.concatenate([levels, thresholds]), mu, scale)
    return table[..., : len(levels)], table[..., len(levels) :]


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
