"""Power-law companding.

Source: Yvinec, Dapogny, Cord, Bailly, "PowerQuant: automorphism search for non-uniform
quantization", ICLR 2023, whose exponent, of compressing, is 1/a here. There it is found by the
least error of reconstruction; here it is a parameter that can be trained, too.
"""

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jaxtyping import Array

from compand_jax.core.families.base import Compander

if TYPE_CHECKING:
    from compand_jax.core.spec import Spec


class Power(Compander):
    """Levels G(y) = y^a, with the exponent a in [1, 4]: y is even at a = 1."""

    parameter = "exponent"
    required = "the exponent of quantizer 'power', at least 1 and finite"
    lowest = 1.0
    highest = 4.0

    def compress(self, v: Array, p: Array) -> Array:
        """Returns F(v) = v^(1/a)."""
        return v ** (1 / p)

    def expand(self, y: Array, p: Array) -> Array:
        """Returns y^a."""
        return y**p

    def slope(self, v: Array, v_q: Array, p: Array, spec: "Spec") -> Array:
        """Returns dv_q/da = y_q^(a-1) (y_q log y_q - y log y), with y = F(v), y_q = F(v_q).

        It is 0 at y_q = 0, and log y = log(v)/a.
        """
        return v_q ** (1 - 1 / p) * (_y_log_y(v_q, p) - _y_log_y(v, p))


def _y_log_y(v: Array, a: Array) -> Array:
    safe = jnp.where(v > 0, v, 1)
    return jnp.where(v > 0, safe ** (1 / a) * jnp.log(safe), 0) / a
