"""Families without parameters: normal-float, and additive powers of two.

Sources: Dettmers, Pagnoni, Holtzman, Zettlemoyer, "QLoRA: efficient finetuning of quantized LLMs",
NeurIPS 2023, section 3, whose NF4 is, to the digit, that of bitsandbytes' `create_normal_map`; Li,
Dong, Wang, "Additive powers-of-two quantization", ICLR 2020, section 2.2, and for an odd number of
bits its authors' https://github.com/yhhhli/APoT_Quantization.
"""

from itertools import product
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from compand_jax.core.families.base import Family, nearest_thresholds

if TYPE_CHECKING:
    from compand_jax.core.spec import Spec


class Fixed(Family):
    """A table that depends on bits, sign and grid alone; thresholds are halfway between levels."""

    def levels(self, spec: "Spec") -> np.ndarray:
        """Returns the levels at x >= 0, ascending to 1."""
        raise NotImplementedError

    def table(self, p: Array, spec: "Spec") -> tuple[Array, Array]:
        """Returns the levels and the points halfway between them."""
        levels, thresholds = (jnp.asarray(x, p.dtype) for x in self.host_table(p, spec))
        return levels, thresholds

    def host_table(self, p: Any, spec: "Spec") -> tuple[np.ndarray, np.ndarray]:
        """Returns the table in float64."""
        levels = self.levels(spec)
        return _repeated(levels, p), _repeated(nearest_thresholds(levels), p)


def _repeated(table: np.ndarray, p: Any) -> np.ndarray:
    return np.broadcast_to(table, (*np.shape(p), len(table)))


class NormalFloat(Fixed):
    """Quantiles of a normal distribution, 1 at the end, the same below zero as above.

    NF4 itself has seven levels below zero and eight above. "midtread" has its seven on both sides,
    and zero: the half table is `normal_quantiles(8)`. "midrise" has as many levels as NF4, with
    none at zero: even probabilities between the two ends. Unsigned, the half table has 2^bits.
    """

    def levels(self, spec: "Spec") -> np.ndarray:
        """Returns quantiles: from the median up, or half a step from it."""
        if not spec.midrise:
            return normal_quantiles(spec.steps + 1)
        count = 2 * spec.steps
        share = (np.arange(spec.steps) + 0.5) / (spec.steps - 0.5)
        return _normal(0.5 + (_offset(count) - 0.5) * share)


def normal_quantiles(count: int, of: int | None = None) -> np.ndarray:
    """Returns levels from 0 to 1 at even probabilities, from the median to NF's last.

    Args:
      count: Of levels.
      of: The levels of the whole table, 2 count by default. NF4's upper half is
        `normal_quantiles(9, of=16)`, its lower half `-normal_quantiles(8, of=16)`.

    >>> print(normal_quantiles(8).round(3))
    [0.    0.091 0.185 0.284 0.395 0.525 0.696 1.   ]
    """
    return _normal(np.linspace(0.5, _offset(2 * count if of is None else of), count))


def _offset(levels: int) -> float:
    """Returns the probability of the last level: bitsandbytes' 0.9677083 of 16 levels."""
    return 1 - (1 / (2 * levels) + 1 / (2 * (levels - 1))) / 2


def _normal(probabilities: np.ndarray) -> np.ndarray:
    quantiles = np.array([NormalDist().inv_cdf(q) for q in probabilities])
    return quantiles / quantiles[-1]


class AdditivePowers(Fixed):
    """All sums of one number of each set, the sets holding 0 and powers of two.

    Of B bits without the sign there are B//2 sets {0, 2^-i, 2^-(i+n), 2^-(i+2n)}, n = B//2. With an
    odd bit comes a set {0, 2^-(2n+1)}, and what is less than that is halved once more. Levels are
    divided by the largest sum.
    """

    grids = ("midtread",)

    def levels(self, spec: "Spec") -> np.ndarray:
        """Returns the 2^B sums."""
        bits = spec.bits - spec.signed
        terms, odd = divmod(bits, 2)
        last = 2 * terms + odd
        sets = [
            [0.0, 2.0**-i, 2.0 ** -(i + terms), 2.0 ** -(i + last)] for i in range(1, terms + 1)
        ]
        sets += [[0.0, 2.0**-last]] * odd
        sums = np.sort([sum(chosen) for chosen in product(*sets)])
        return sums / sums[-1]
