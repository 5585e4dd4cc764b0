"""Mu-law companding, and uniform levels, which are those of mu = 0.

Sources: Osama, Madian, Fouda, "Companding quantization for deep neural networks", Applied Soft
Computing 185, 113979, 2025, doi 10.1016/j.asoc.2025.113979; for uniform levels with a learned scale
Esser et al., "Learned step size quantization", ICLR 2020.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Array

from compand_jax.core._series import level_slope_in_mu
from compand_jax.core.companding import mu_law_compress, mu_law_expand
from compand_jax.core.families.base import Compander, positions

if TYPE_CHECKING:
    from compand_jax.core.spec import Spec


class MuLaw(Compander):
    """Levels G(y) = ((1 + mu)^y - 1)/mu; see `companding`."""

    parameter = "mu"
    required = "at least 0 and finite"
    has_even_buckets = True

    def compress(self, v: Array, p: Array) -> Array:
        """Returns F(v) = log(1 + mu v)/log(1 + mu)."""
        return mu_law_compress(v, p)

    def expand(self, y: Array, p: Array) -> Array:
        """Returns G(y)."""
        return mu_law_expand(y, p)

    def slope(self, v: Array, v_q: Array, p: Array, spec: "Spec") -> Array:
        """Returns dv_q/dmu in closed form, without cancellation or a logarithm of v."""
        return level_slope_in_mu(v, v_q, p, spec.steps)

    def chain(self, v: Array, v_q: Array, p: Array) -> Array:
        """Returns (1 + mu v_q)/(1 + mu v)."""
        return (1 + p * v_q) / (1 + p * v)

    def host_table(self, p: Any, spec: "Spec") -> tuple[np.ndarray, np.ndarray]:
        """Returns G at the grid's positions, in float64."""
        mu = np.asarray(p, np.float64)[..., None]
        levels, thresholds = positions(spec.steps, spec.midrise)
        return _expand(levels, mu), _expand(thresholds, mu)


class Uniform(MuLaw):
    """Even levels: mu-law's at mu = 0, which stays."""

    parameter = None


def _expand(y: np.ndarray, mu: np.ndarray) -> np.ndarray:
    curved = np.where(mu > 0, mu, 1)
    return np.where(mu > 0, np.expm1(y * np.log1p(curved)) / curved, y)
