"""What visits the layers of a model, and how it is shown what a layer multiplies."""

from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from compand_jax.layers.observation import Layer


@runtime_checkable
class Visitor(Protocol):
    """What is called at every layer, in the trace that the layer runs in."""

    def operands(
        self, layer: Layer, activation: Array | None, weight: Array
    ) -> tuple[Array | None, Array]:
        """Returns the operands to use; the activation is None where integers are looked up."""
        ...

    def output(self, layer: Layer, output: Array) -> Array:
        """Returns the output to pass on; not called where integers are looked up."""
        ...


class Unchanged:
    """A visitor that leaves layers as they are."""

    def operands(
        self, layer: Layer, activation: Array | None, weight: Array
    ) -> tuple[Array | None, Array]:
        """Returns the operands."""
        return activation, weight

    def output(self, layer: Layer, output: Array) -> Array:
        """Returns the output."""
        return output


def is_lookup(operands: tuple[Any, ...]) -> bool:
    """Returns whether a layer looks integers up: they are not among what it promotes."""
    return len(operands) == 1


def visited_operands(visitor: Visitor, layer: Layer, operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the operands to use of a layer's: its input (unless looked up), weight and bias."""
    looked_up = is_lookup(operands)
    given = (None, *operands) if looked_up else operands[:2]
    shown = None if looked_up else _inexact(operands[0]), _inexact(operands[not looked_up])
    found = visitor.operands(layer, *shown)
    # What the visitor leaves alone is passed on as it was, whatever its type.
    used = [old if new is seen else new
            for old, seen, new in zip(given, shown, found, strict=True)]  # fmt: skip
    return (*used[looked_up:], *operands[2:])


def _inexact(x: ArrayLike) -> Array:
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)
