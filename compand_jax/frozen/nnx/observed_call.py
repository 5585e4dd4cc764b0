"""A call of a quantized NNX model whose layers are visited."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from compand_jax.frozen.nnx.state import named_leaves
from compand_jax.frozen.sample import Call, result_arrays
from compand_jax.frozen.tree import Path
from compand_jax.layers.observation import Observer
from compand_jax.layers.visitor import Visitor
from compand_jax.nnx.quantized_model import hooked_layers


class ObservedModule:
    """A call of a quantized NNX model, as `origins.ObservedCall`.

    Attributes:
      call: The arguments.
      random: The state of the model's random streams.
      variables: All other state, by name.
    """

    def __init__(self, model: nnx.Module, call: Call) -> None:
        self.call = call
        self._graphdef, rest, self.random = nnx.split(model, nnx.Not(nnx.RngState), ...)
        self._structure = jax.tree.structure(rest)
        self._names = [(name,) for name, _ in named_leaves(rest)]
        self.variables: dict[Path, Any] = dict(zip(self._names, jax.tree.leaves(rest), strict=True))

    def run(
        self, visitor: Visitor, variables: dict[Path, Any], arrays: list, random: Any
    ) -> tuple[Any, Any]:
        """Returns the outputs, and the model's state after the call."""
        leaves = [variables[name] for name in self._names]
        rest = jax.tree.unflatten(self._structure, leaves)
        model = nnx.merge(self._graphdef, rest, random)
        for _, promotion in hooked_layers(model):
            promotion.visitor = visitor
        return called(model, self.call, arrays), nnx.state(model)

    def observe(
        self,
        make_observer: Callable[[bool], Observer],
        variables: dict[Path, Any],
        arrays: list,
        random: Any,
    ) -> Observer:
        """Returns an observer of the call."""
        observer = make_observer(True)
        self.run(observer, variables, arrays, random)
        return observer


def called(model: nnx.Module, call: Call, arrays: list) -> Any:
    """Returns what a model makes of a call's arguments."""
    args, kwargs = call.with_arrays(arrays)
    method = call.method
    function = getattr(type(model), method) if isinstance(method, str) else method
    return function(model, *args, **kwargs)


def run_abstractly(model: nnx.Module, call: Call) -> None:
    """Runs a model on a call, without computing anything; raises what that raises."""
    graphdef, state = nnx.split(model)

    def run(state: Any, arrays: list) -> list:
        return result_arrays(called(nnx.merge(graphdef, state), call, arrays))

    jax.eval_shape(run, state, call.arrays())
