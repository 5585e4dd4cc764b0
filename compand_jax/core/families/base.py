"""What a family of levels is: a table of positions in [0, 1], made from parameters.

Every quantizer is Q(x) = sign(x) c l[k], with the scale c and the levels 0 <= l_0 < l_1 < ... <= 1
of its family, k being the number of thresholds that |x|/c lies beyond. Looking up, the gradients in
x and c, packing and files are the same for all.

Straight-through gradients in the parameters p, with v = min(|x|/c, 1) and v_q the level of v:

    levels alone   dl_k/dp
    companders     d/dp G(F(v; p) + r; p), the rounding r = y_q - F(v; p) being a constant
"""

import abc
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from compand_jax.core.families._trainable import bounded_expm1, bounded_log, bounded_softmax

if TYPE_CHECKING:
    from compand_jax.core.spec import Spec


class Family(abc.ABC):
    """A way to place levels; objects of it are kept by `register_quantizer`.

    Attributes:
      name: As in `QuantConfig(quantizer=...)`. Registering sets it.
      parameter: What its parameters are called, one word; None without any.
      required: What is required of them, for errors.
      lowest: The least that they may be.
      grids: The grids that it has tables for.
      is_shared: Whether tensors of other bits and signs can have the same parameters.
      has_even_buckets: Whether its thresholds are even under mu-law's curve: a faster look-up.
    """

    name: str = ""
    parameter: str | None = None
    required: str = "positive and finite"
    lowest: float = 0.0
    grids: tuple[str, ...] = ("midtread", "midrise")
    is_shared: bool = True
    has_even_buckets: bool = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    def shape(self, spec: "Spec") -> tuple[int, ...]:
        """Returns the shape of its parameters: () is one number."""
        return ()

    def start(self, spec: "Spec") -> np.ndarray:
        """Returns its parameters before training and calibration, float64."""
        return np.zeros(self.shape(spec))

    @abc.abstractmethod
    def table(self, p: Array, spec: "Spec") -> tuple[Array, Array]:
        """Returns the levels at x >= 0 and the thresholds above 0, for a scale of 1.

        Args:
          p: The parameters; axes in front of their own are those of several tables.
          spec: Of the quantizer.

        Returns:
          Two arrays of p's dtype, ascending along the last axis, behind the axes of tables.
        """

    def host_table(self, p: Any, spec: "Spec") -> tuple[np.ndarray, np.ndarray]:
        """Returns the table as float64 on the host, for calibration."""
        levels, thresholds = _jitted_table(jnp.asarray(p, jnp.float32), spec)
        return np.asarray(levels, np.float64), np.asarray(thresholds, np.float64)

    def from_trainable(self, theta: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the parameters of what an optimizer moves, which may be any numbers."""
        return theta

    def to_trainable(self, p: Any) -> Float[Array, "..."]:
        """Returns what an optimizer moves, float32; `from_trainable` is its inverse."""
        return jnp.asarray(p, jnp.float32)

    def slope(self, v: Array, v_q: Array, p: Array, spec: "Spec") -> Array | None:
        """Returns dv_q/dp of each value, of a family of one parameter; None: levels alone."""
        return None

    def passed_on(self, g: Array, v: Array, slopes: Array, p: Array) -> Array | None:
        """Returns what rounding passes on to several parameters; None: levels alone.

        Args:
          g: The gradient in each v_q.
          v: The magnitudes, in units of the scale, at most 1.
          slopes: dG/dy at the level of each.
          p: The parameters.
        """
        return None

    def expand_slopes(self, p: Array, spec: "Spec") -> Array | None:
        """Returns dG/dy at the levels of the table, where `passed_on` needs it."""
        return None

    def chain(self, v: Array, v_q: Array, p: Array) -> Any:
        """Returns dv_q/dv by the chain rule through both curves; None where it is not offered."""
        return None


class Compander(Family):
    """Levels that are even after a curve: l = G(y; p), at the y of the grid.

    `compress` is the curve F(v; p) on [0, 1], `expand` its inverse G(y; p). Both have one
    parameter, which ranges from `lowest`, where the levels are uniform, to `highest`. What is
    trained is theta = log(1 + p - lowest).
    """

    highest: float = 255.0

    @abc.abstractmethod
    def compress(self, v: Array, p: Array) -> Array:
        """Returns F(v; p), p broadcasting to v."""

    @abc.abstractmethod
    def expand(self, y: Array, p: Array) -> Array:
        """Returns G(y; p), p broadcasting to y."""

    @property
    def theta_max(self) -> float:
        """The theta of the highest parameter."""
        return float(np.log1p(self.highest - self.lowest))

    def start(self, spec: "Spec") -> np.ndarray:
        """Returns the parameter of uniform levels."""
        return np.asarray(self.lowest, np.float64)

    def table(self, p: Array, spec: "Spec") -> tuple[Array, Array]:
        """Returns G at the grid's positions; at 1 it is 1 exactly."""
        return split_table(spec, p, len(self.shape(spec)), self.expand)

    def from_trainable(self, theta: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns lowest + expm1(clip(theta, 0, theta_max))."""
        grown = bounded_expm1(theta, self.theta_max)
        return self.lowest + grown if self.lowest else grown

    def to_trainable(self, p: Any) -> Float[Array, "..."]:
        """Returns log(1 + p - lowest)."""
        return jnp.log1p(jnp.asarray(p, jnp.float32) - self.lowest)

    def slope(self, v: Array, v_q: Array, p: Array, spec: "Spec") -> Array | None:
        """Returns dv_q/dp, by differentiating G(F(v) + constant)."""
        v, v_q, p = jnp.broadcast_arrays(v, v_q, p)
        rounding = self.compress(v_q, p) - self.compress(v, p)

        def rounded(p: Array) -> Array:
            return self.expand(self.compress(v, p) + rounding, p)

        return jax.jvp(rounded, (p,), (jnp.ones_like(p),))[1]


class Gaps(Family):
    """A family of several positive numbers of which only the ratios matter.

    What is trained are their logarithms, within +-4, and what is made of these has the mean 1.
    """

    required = "positive and finite"
    lowest = float(np.finfo(np.float32).tiny)

    def start(self, spec: "Spec") -> np.ndarray:
        """Returns ones."""
        return np.ones(self.shape(spec))

    def from_trainable(self, theta: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns n softmax(clip(theta, -4, 4)) over the last axis, of n numbers."""
        # Else what it is compiled with decides on the last bit, and frozen levels would differ.
        return jax.lax.optimization_barrier(theta.shape[-1] * bounded_softmax(theta))

    def to_trainable(self, p: Any) -> Float[Array, "..."]:
        """Returns log(p/mean(p)), within +-4."""
        return bounded_log(jnp.asarray(p, jnp.float32))


def positions(steps: int, midrise: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns where the levels at x >= 0, and the thresholds above 0, lie on an even grid."""
    if midrise:
        return (np.arange(steps) + 0.5) / steps, np.arange(1, steps) / steps
    return np.arange(steps + 1) / steps, (np.arange(steps) + 0.5) / steps


def split_table(spec: "Spec", p: Array, own_axes: int, expand: Any) -> tuple[Array, Array]:
    """Returns G at the grid's levels and thresholds, behind p's axes of tables."""
    levels, thresholds = positions(spec.steps, spec.midrise)
    tables = p.ndim - own_axes
    y = jnp.asarray(np.concatenate([levels, thresholds]), p.dtype).reshape((1,) * tables + (-1,))
    along = jnp.expand_dims(p, tables) if tables else p
    table = jnp.where(y == 1, 1, expand(y, along))
    return table[..., : len(levels)], table[..., len(levels) :]


def nearest_thresholds(levels: Any) -> Any:
    """Returns the points halfway between neighbouring levels, along the last axis."""
    return (levels[..., :-1] + levels[..., 1:]) / 2


def _table(p: Array, spec: "Spec") -> tuple[Array, Array]:
    return spec.family.table(p, spec)


_jitted_table = jax.jit(_table, static_argnums=1)
