"""What is static about a quantizer: bits, sign, grid and family of levels."""

import numbers
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from compand_jax.core.families.base import Family
from compand_jax.core.families.registry import MU_LAW, family_of

GRIDS = ("midtread", "midrise")
ONE_BIT_REMEDY = "grid='midrise' or signed=False"


class Spec(NamedTuple):
    """What is static about a quantizer: it decides the table's shape and the codes' type."""

    bits: int
    signed: bool = True
    grid: str = "midtread"
    family: Family = MU_LAW

    @property
    def midrise(self) -> bool:
        """Whether there is a threshold, instead of a level, at zero."""
        return self.grid == "midrise"

    @property
    def steps(self) -> int:
        """M or H: the intervals that [0, 1] is divided into after compression."""
        return 2 ** (self.bits - self.signed) - (not self.midrise)

    @property
    def arguments(self) -> dict[str, Any]:
        """The keywords of the public functions."""
        quantizer = self.family.name
        return {"bits": self.bits, "signed": self.signed, "grid": self.grid, "quantizer": quantizer}

    @property
    def code_range(self) -> tuple[int, int]:
        """The least and the largest code."""
        return -self.steps if self.signed else 0, self.steps - self.midrise

    @property
    def code_dtype(self) -> Any:
        """int8 where signed, uint8 where not."""
        return jnp.int8 if self.signed else jnp.uint8


def check_spec(
    bits: Any, signed: bool = True, grid: str = "midtread", quantizer: str = "mu_law"
) -> Spec:
    """Returns the `Spec`; raises ValueError where the arguments are not those of one."""
    family = family_of(quantizer)
    if isinstance(bits, bool) or not isinstance(bits, numbers.Integral) or not 1 <= int(bits) <= 8:
        raise ValueError(f"`bits` must be an integer from 1 to 8, got {bits!r}: choose one")
    if not isinstance(signed, bool | np.bool_):
        raise ValueError(f"`signed` must be True or False, got {signed!r}: choose one")
    if grid not in GRIDS:
        raise ValueError(f"`grid` must be one of {', '.join(GRIDS)}, got {grid!r}: choose one")
    if grid not in family.grids:
        raise ValueError(
            f"`grid` must be {' or '.join(family.grids)} for quantizer={quantizer!r}, got "
            f"{grid!r}: choose another grid or quantizer"
        )
    if grid == "midrise" and not signed:
        raise ValueError("`grid` midrise is signed, got signed=False: use grid='midtread'")
    if grid == "midtread" and signed and bits == 1:
        raise ValueError(
            f"`bits` must be at least 2 for a signed midtread grid, got 1: use {ONE_BIT_REMEDY}"
        )
    return Spec(int(bits), bool(signed), grid, family)
