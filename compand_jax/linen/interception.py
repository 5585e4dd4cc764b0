"""Reaching the operands of an unmodified Linen model's layers.

Every Linen linear layer (Dense, DenseGeneral, Einsum, Conv, ConvTranspose, ConvLocal, Embed)
passes its operands through its own field `promote_dtype` just before its op. `intercept_layers`
swaps that field for the duration of a call, so that a visitor sees, and may replace, what the
layer multiplies and what it returns, while its `params` stay as they are.

A site is such a layer, named "/".join(module.path), the model itself by "". A layer that is used
twice, scanned or vmapped is one site.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import Scope
from flax.core.tracers import current_trace
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array

from compand_jax.layers.unrolling import Unrolling, unrolling_of


@dataclasses.dataclass(frozen=True)
class Layer:
    """What a visitor is told about a layer.

    Attributes:
      site: its name.
      channel_axes: the weight's output axes, from the end.
      unrolling: how it is a matrix product, or None where it is not known to be one.
    """

    site: str
    channel_axes: tuple[int, ...]
    unrolling: Unrolling | None = None


@runtime_checkable
class Visitor(Protocol):
    """What `intercept_layers` calls at every layer, in the trace that the layer runs in."""

    def operands(
        self, layer: Layer, activation: Array | None, weight: Array
    ) -> tuple[Array | None, Array]:
        """Returns the operands to use; the activation is None where integers are looked up."""
        ...

    def output(self, layer: Layer, output: Array) -> Array:
        """Returns the output to pass on; not called where integers are looked up."""
        ...


class _Promotion:
    """Stands in for a layer's `promote_dtype` while the layer runs."""

    def __init__(self, visitor: Visitor, layer: Layer, promote: Callable) -> None:
        self._visitor, self._layer, self._promote = visitor, layer, promote
        self.saw_activation = False

    def __call__(self, *operands: Array | None, **kwargs: Any) -> Any:
        first, *rest = operands
        if not rest:  # Embed looks up integers, which are not in the list
            _, weight = self._visitor.operands(self._layer, None, _floating(first))
            return self._promote(weight, **kwargs)
        self.saw_activation = True
        weight, *biases = rest
        return self._promote(
            *self._visitor.operands(self._layer, _floating(first), _floating(weight)),
            *biases,
            **kwargs,
        )


def _floating(x: Array | None) -> Array:
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)


@contextlib.contextmanager
def intercept_layers(model: nn.Module, visitor: Visitor) -> Iterator[nn.Module]:
    """Shows every layer that runs inside this context, in this thread, to the visitor.

    Enter it inside the function that is jitted, around `init` or `apply`: an outer `jax.jit` does
    not see an interceptor entered outside of it. Nothing is left behind, also after an exception.

    Yields:
      The model to call `init` or `apply` of: what `nn.jit` traced outside of this context is not
      used in it, nor the reverse.
    """
    def clone(**kwargs: Any) -> nn.Module:
        if isinstance(scope := kwargs.get("parent"), Scope):
            _trace_afresh(scope)
        return model.clone(**kwargs)

    # Both bind a clone to the scope that they make, which is before any other scope is made.
    bound_afresh = model.clone()
    object.__setattr__(bound_afresh, "clone", clone)

    def interceptor(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        if module.scope is not None:
            _trace_afresh(module.scope)
        promote = getattr(module, "promote_dtype", None)
        # A subclass that calls super().__call__ comes by twice, and so does a lifted layer.
        if promote is None or isinstance(promote, _Promotion) or context.method_name == "setup":
            return next_fun(*args, **kwargs)
        layer = Layer(
            "/".join(module.path), _channel_axes(module, args, kwargs), unrolling_of(module)
        )
        promotion = _Promotion(visitor, layer, promote)
        object.__setattr__(module, "promote_dtype", promotion)
        try:
            output = next_fun(*args, **kwargs)
        finally:
            object.__setattr__(module, "promote_dtype", promote)
        return visitor.output(layer, output) if promotion.saw_activation else output

    with nn.intercept_methods(interceptor):
        yield bound_afresh


_tokens = itertools.count()


class _NeverTheSame:
    """An object whose hash is another one whenever it is asked for."""

    def __hash__(self) -> int:
        return next(_tokens)


def no_trace_from_before() -> contextlib.AbstractContextManager:
    """Returns a context in which `jax.jit` uses no trace that it made outside of it."""
    return set_xla_metadata(compand_jax=str(next(_tokens)))  # it is in the key of jit's caches


def _trace_afresh(scope: Scope) -> None:
    # nn.jit keeps its traces, from call to call and from one of two equal modules to the other. A
    # trace made without this interceptor would skip it, one made with it would leak it. The key is
    # a hash in which the scope's flags are, and those of a scope are its submodules' as well.
    if "compand_jax" not in scope.flags:
        scope.flags = scope.flags.copy({"compand_jax": _NeverTheSame()})


def _channel_axes(module: nn.Module, args: tuple, kwargs: dict) -> tuple[int, ...]:
    """Returns the kernel's axes that are output features, from the end."""
    if isinstance(module, nn.ConvTranspose) and module.transpose_kernel:
        return (-2,)
    if isinstance(module, nn.DenseGeneral):
        features = module.features
        return tuple(range(-(1 if isinstance(features, int) else len(features)), 0))
    if isinstance(module, nn.Einsum):
        equation = module.einsum_str or kwargs.get("einsum_str") or args[1]
        operands, result = equation.replace(" ", "").split("->")
        data, kernel = (operand.replace("...", "") for operand in operands.split(","))
        axes = [i for i, axis in enumerate(kernel) if axis in result and axis not in data]
        return tuple(i - len(kernel) for i in axes)
    return (-1,)


class Observer:
    """A visitor that changes nothing and records, per site, what is computed from its tensors.

    Args:
      activation: Called with an activation; what it returns (a tree of arrays) is recorded.
      weight: Called with a weight, likewise.
      moments: Called with a layer, its input and its weight, likewise; None is not recorded.
      at_output: Whether a site's activation is its output, instead of its input.

    Values of the trace that the observer was made in are kept as they are, in `traced`, for the
    function that it is in to return. Inside scan, vmap and remat they belong to an inner trace:
    they go through a callback to `called_back`, as host arrays, complete after
    `jax.effects_barrier()`. Only `observe_layers` knows which of the inner traces are run.
    """

    def __init__(
        self,
        *,
        activation: Callable[[Array], Any] | None = None,
        weight: Callable[[Array], Any] | None = None,
        moments: Callable[[Layer, Array, Array], Any] | None = None,
        at_output: bool = False,
    ) -> None:
        self._functions = {"activation": activation, "weight": weight}
        self._moments = moments
        self._at_output = at_output
        self._trace = current_trace()
        self.layers: dict[str, Layer] = {}
        self.weight_shapes: dict[str, tuple[int, ...]] = {}
        self.activations: set[str] = set()
        self.last_site: str | None = None
        kinds = ("activation", "weight", "moments")
        self.traced: dict[str, dict[str, list]] = {kind: {} for kind in kinds}
        self.called_back: dict[str, dict[str, list]] = {kind: {} for kind in kinds}
        # Inner traces' values in the order that they come in: those that call back, by name, or
        # None where each is marked by its name instead.
        self.run_names: frozenset[str] | None = None
        self._inner_names = map("compand_jax value {}".format, itertools.count())
        self._marked: list[Array] = []

    def operands(
        self, layer: Layer, activation: Array | None, weight: Array
    ) -> tuple[Array | None, Array]:
        """Records the layer, its weight and, unless it is taken at the output, its input."""
        self.layers.setdefault(layer.site, layer)
        self.weight_shapes.setdefault(layer.site, weight.shape)
        self.last_site = layer.site
        self._compute("weight", layer.site, weight)
        if activation is not None and not self._at_output:
            self._compute("activation", layer.site, activation)
        if activation is not None and self._moments is not None:
            self._record("moments", layer.site, self._moments(layer, activation, weight))
        return activation, weight

    def output(self, layer: Layer, output: Array) -> Array:
        """Records the layer's output, where activations are taken there."""
        if self._at_output:
            self._compute("activation", layer.site, output)
        return output

    def values(self, what: str, site: str) -> list:
        """Returns what was recorded of a site's "activation", "weight" or "moments"."""
        return self.traced[what].get(site, []) + self.called_back[what].get(site, [])

    def _compute(self, what: str, site: str, x: Array) -> None:
        if what == "activation":
            self.activations.add(site)
        if (function := self._functions[what]) is not None:
            self._record(what, site, function(x))

    def _record(self, what: str, site: str, value: Any) -> None:
        if value is None:
            return
        if current_trace() == self._trace:
            values = self.traced[what].setdefault(site, [])
            if what == "weight":  # the same in every call, but that WeightNorm's init has a raw one
                values.clear()
            values.append(value)
            return
        name, values = next(self._inner_names), self.called_back[what].setdefault(site, [])
        if self.run_names is None:  # jax drops of a trace what nobody holds
            self._marked.append(checkpoint_name(jax.tree.leaves(value)[0], name))
        elif name in self.run_names:
            jax.debug.callback(lambda tree: values.append(jax.tree.map(np.asarray, tree)), value)


def layers_run(
    model: nn.Module, variables: Any, args: tuple, mutable: Any, kwargs: dict[str, Any]
) -> set[str]:
    """Returns the sites of the layers that `model.apply` runs with these arguments.

    It is found by an abstract evaluation, so that nothing is computed, and remembered. Every
    function that the model jits is traced afresh for it, whatever was cached.

    Raises:
      ValueError: a layer runs in a function whose trace `jax.jit` keeps from call to call.
    """
    leaves, structure = jax.tree.flatten((variables, args, kwargs))
    signature = tuple(
        jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=getattr(x, "weak_type", False))
        if isinstance(x, (jax.Array, np.ndarray, np.generic))
        else x
        for x in leaves
    )
    mutable = tuple(mutable) if isinstance(mutable, list) else mutable
    try:
        return _layers_run(model, structure, signature, mutable)
    except TypeError:  # a leaf, or a field of the model, that cannot be hashed
        return _layers_run.__wrapped__(model, structure, signature, mutable)


@functools.lru_cache(maxsize=1024)
def _layers_run(model: nn.Module, structure: Any, signature: tuple, mutable: Any) -> set[str]:
    arrays = [leaf for leaf in signature if isinstance(leaf, jax.ShapeDtypeStruct)]

    def call(arrays: list, observer: Observer) -> Any:
        values = iter(arrays)
        leaves = [
            next(values) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf for leaf in signature
        ]
        variables, args, kwargs = jax.tree.unflatten(structure, leaves)
        with intercept_layers(model, observer) as intercepted:
            return intercepted.apply(variables, *args, mutable=mutable, **kwargs)

    observers = Observer(), Observer()
    with no_trace_from_before():
        for observer in observers:
            jax.eval_shape(functools.partial(call, observer=observer), arrays)
    # What is not traced again would be quantized by what is left of an earlier call, and leak.
    require_reached(observers[0].layers, observers[1].layers)
    return set(observers[0].layers)


def require_reached(run: Iterable[str], reached: Iterable[str]) -> None:
    """Raises ValueError, naming them, where layers that run were not reached."""
    if missed := set(run) - set(reached):
        raise ValueError(
            f"site {', '.join(map(repr, sorted(missed)))} runs but was not quantized: a trace of "
            "it that outlives the call was used; call it without its own jit"
        )
