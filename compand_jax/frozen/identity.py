"""What a trace depends on besides arrays, made to be compared: models, options, Python numbers.

`jax.jit` keeps a trace for static values that are equal. Python's own equality is of no use for
that: 1 == 1.0 == True, arrays compare element by element, and a Linen module with an array among
its fields can be neither compared nor hashed.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Fixed:
    """A static value, equal to another one of the same type, structure and content.

    Arrays are compared by their values, objects that cannot be hashed by their identity.

    Args:
      value: Any; what is in it must not change.

    >>> Fixed(1) == Fixed(1), Fixed(1) == Fixed(1.0), Fixed(np.ones(2)) == Fixed(np.ones(2))
    (True, False, True)
    """

    def __init__(self, value: Any) -> None:
        self.value = value
        self._key = _key(value)
        self._hash = hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Fixed) or self._hash != other._hash:
            return False
        return self._key == other._key


@dataclasses.dataclass(frozen=True, eq=False)
class _Itself:
    """Equal to what holds the same object, which it keeps alive: an id is given away again."""

    value: Any

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value


def _key(value: Any) -> Any:
    """Returns what can be hashed and compared in place of a value."""
    kind = type(value)
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return kind, _array_key(value)
    if isinstance(value, float):
        return kind, repr(value)  # tells 0.0 from -0.0, and NaN is itself
    if isinstance(value, Mapping):
        return kind, tuple((_key(name), _key(item)) for name, item in value.items())
    if isinstance(value, tuple | list):
        return kind, tuple(map(_key, value))
    if isinstance(value, functools.partial):
        return kind, _key((value.func, value.args, value.keywords))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # a Linen module is one
        names = (field.name for field in dataclasses.fields(value) if field.name != "parent")
        return kind, tuple((name, _key(getattr(value, name, None))) for name in names)
    try:
        hash(value)
    except TypeError:
        return _Itself(value)
    return kind, value


def _array_key(x: Any) -> tuple:
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return str(x.dtype), _array_key(jax.random.key_data(x))
    host = np.asarray(x)
    if host.dtype.hasobject:
        return host.shape, tuple(map(_key, host.reshape(-1).tolist()))
    digest = hashlib.blake2b(np.ascontiguousarray(host).tobytes()).digest()
    return host.dtype.name, host.shape, getattr(x, "weak_type", False), digest
