"""A call of a Linen model whose layers are visited."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jaxtyping import Array

from compand_jax.frozen.sample import Call
from compand_jax.frozen.tree import Path, nested
from compand_jax.layers.observation import Observer
from compand_jax.layers.visitor import Visitor
from compand_jax.linen.interception import intercept_layers
from compand_jax.linen.observation import observe_layers


class ObservedLinen(NamedTuple):
    """A call of a Linen model, as `origins.ObservedCall`."""

    model: nn.Module
    call: Call

    @property
    def random(self) -> Array:
        """The key of every stream."""
        return jax.random.key(0)

    def run(
        self, visitor: Visitor, variables: dict[Path, Any], arrays: list, random: Array
    ) -> tuple[Any, Any]:
        """Returns the outputs, and the collections that may change."""
        with intercept_layers(self.model, visitor) as intercepted:
            return self.call.run(intercepted, nested(variables.items()), arrays, random)

    def observe(
        self,
        make_observer: Callable[[bool], Observer],
        variables: dict[Path, Any],
        arrays: list,
        random: Array,
    ) -> Observer:
        """Returns an observer of the call."""
        observer, _ = observe_layers(
            self.model,
            lambda: make_observer(False),
            lambda model: self.call.run(model, nested(variables.items()), arrays, random),
        )
        return observer
