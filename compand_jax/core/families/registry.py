"""The families by name."""

import re
from typing import Any

from compand_jax.core.families.base import Family
from compand_jax.core.families.fixed import AdditivePowers, NormalFloat
from compand_jax.core.families.free import Free
from compand_jax.core.families.mu_law import MuLaw, Uniform
from compand_jax.core.families.piecewise import Piecewise
from compand_jax.core.families.power import Power

_FAMILIES: dict[str, Family] = {}


def register_quantizer(name: str, family: Any) -> None:
    """Makes a family of levels known by a name, for `QuantConfig(quantizer=name)` and all else.

    Args:
      name: A word of lower-case letters, digits and underscores.
      family: An object of a subclass of `Compander` (a curve and its inverse) or `Family` (any
        table). It belongs to that name from then on, and must not change.

    Raises:
      TypeError: `family` is no object of such a class.
      ValueError: the name is no such word, or is taken, or the family's `parameter` is none or is
        "scale".
    """
    if not isinstance(family, Family):
        raise TypeError(
            f"`family` must be an object of a subclass of Family or Compander, got {family!r}: "
            "give an instance"
        )
    for what, word in (("name", name), ("family.parameter", family.parameter or "none")):
        if not isinstance(word, str) or not re.fullmatch("[a-z][a-z0-9_]*", word):
            raise ValueError(
                f"`{what}` must be a word of lower-case letters, digits and underscores, got "
                f"{word!r}: choose one"
            )
    if family.parameter == "scale":
        raise ValueError("`family.parameter` must not be 'scale', got it: all families have one")
    if name in _FAMILIES or family.name:
        raise ValueError(
            f"`name` must be new, and the family in no use, got {name!r} for {family!r}: choose "
            "another name, or make another object"
        )
    family.name = name
    _FAMILIES[name] = family


def family_of(quantizer: str) -> Family:
    """Returns the family of that name; raises ValueError where there is none."""
    if not isinstance(quantizer, str) or quantizer not in _FAMILIES:
        raise ValueError(
            f"`quantizer` must be one of {', '.join(_FAMILIES)}, got {quantizer!r}: choose one, "
            "or add it by register_quantizer"
        )
    return _FAMILIES[quantizer]


def family_names() -> tuple[str, ...]:
    """Returns the families' names."""
    return tuple(_FAMILIES)


def parameter_names() -> tuple[str, ...]:
    """Returns what the families' parameters are called."""
    return tuple({f.parameter: None for f in _FAMILIES.values() if f.parameter is not None})


MU_LAW = MuLaw()
for _name, _family in (
    ("mu_law", MU_LAW),
    ("uniform", Uniform()),
    ("power", Power()),
    ("normal_float", NormalFloat()),
    ("apot", AdditivePowers()),
    ("piecewise", Piecewise()),
    ("free", Free()),
):
    register_quantizer(_name, _family)
