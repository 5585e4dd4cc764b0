"""Reaching the operands of an unmodified Linen model's layers.

Every Linen linear layer (Dense, DenseGeneral, Einsum, Conv, ConvTranspose, ConvLocal, Embed)
passes its operands through its own field `promote_dtype` just before its op. `intercept_layers`
swaps that field for the duration of a call, so that a visitor sees, and may replace, what the
layer multiplies and what it returns, while its `params` stay as they are.

A site is such a layer, named "/".join(module.path), the model itself by "". A layer that is used
twice, scanned or vmapped is one site.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
from flax.core import Scope

from compand_jax.layers.contractions.program import marked
from compand_jax.layers.observation import Layer
from compand_jax.layers.visitor import Visitor, is_lookup, visited_operands
from compand_jax.linen.layer_kinds import channel_axes, input_axes, unrolling_of
from compand_jax.linen.traces import trace_afresh


class _Promotion:
    """Stands in for a layer's `promote_dtype` while the layer runs."""

    def __init__(self, visitor: Visitor, layer: Layer, promote: Callable, marks: bool) -> None:
        self._visitor, self._layer, self._promote = visitor, layer, promote
        self._marks = marks
        self.saw_activation = False

    def __call__(self, *operands: Any, **kwargs: Any) -> Any:
        self.saw_activation = not is_lookup(operands)
        used = visited_operands(self._visitor, self._layer, operands)
        if self._marks:
            used = marked(used)
        return self._promote(*used, **kwargs)


@contextlib.contextmanager
def intercept_layers(
    model: nn.Module, visitor: Visitor, *, marks: bool = False
) -> Iterator[nn.Module]:
    """Shows every layer that runs inside this context, in this thread, to the visitor.

    Enter it inside the function that is jitted, around `init` or `apply`: an outer `jax.jit` does
    not see an interceptor entered outside of it. Nothing is left behind, also after an exception.
    With `marks`, each layer's weight is marked as `marked` does it.

    Yields:
      The model to call `init` or `apply` of: what `nn.jit` traced outside of this context is not
      used in it, nor the reverse.
    """

    def clone(**kwargs: Any) -> nn.Module:
        if isinstance(scope := kwargs.get("parent"), Scope):
            trace_afresh(scope)
        return model.clone(**kwargs)

    # Both bind a clone to the scope that they make, which is before any other scope is made.
    bound_afresh = model.clone()
    object.__setattr__(bound_afresh, "clone", clone)

    def interceptor(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        refuse_nnx(module)
        if module.scope is not None:
            trace_afresh(module.scope)
        promote = getattr(module, "promote_dtype", None)
        # A subclass that calls super().__call__ comes by twice, and so does a lifted layer.
        if promote is None or isinstance(promote, _Promotion) or context.method_name == "setup":
            return next_fun(*args, **kwargs)
        layer = Layer(
            "/".join(module.path),
            channel_axes(module, args, kwargs),
            unrolling_of(module),
            input_axes=input_axes(module, args, kwargs),
        )
        promotion = _Promotion(visitor, layer, promote, marks)
        object.__setattr__(module, "promote_dtype", promotion)
        try:
            output = next_fun(*args, **kwargs)
        finally:
            object.__setattr__(module, "promote_dtype", promote)
        return visitor.output(layer, output) if promotion.saw_activation else output

    with nn.intercept_methods(interceptor):
        yield bound_afresh


def refuse_nnx(module: Any) -> None:
    """Raises TypeError where a Linen module is an NNX module in disguise."""
    # By name: Flax's NNX takes long to import, for those who do not use it.
    if any(
        kind.__name__ == "ToLinen" and kind.__module__.startswith("flax.nnx.")
        for kind in type(module).__mro__
    ):
        raise TypeError(
            "`model` must be made of Linen layers, got an NNX module in nnx.bridge.ToLinen: "
            "quantize the NNX module by compand_jax.nnx.quantize"
        )
