"""Batch norms that can be folded into the layer before them, and a model run without them.

In evaluation a batch norm is y = s (x - mean) + bias with s = scale / sqrt(var + epsilon), so that
of a layer's output it is the same layer with s times its weight and its own bias, and a shift of
bias - s mean after it.
"""

import collections
import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from compand_jax.frozen.sample import Call, result_arrays
from compand_jax.frozen.tree import join_path, split_path
from compand_jax.layers.observation import Observer
from compand_jax.layers.parametrization import get_leaf
from compand_jax.linen.interception import intercept_layers
from compand_jax.linen.traces import no_trace_from_before

NORM_LEAVES = (
    ("params", "scale"),
    ("params", "bias"),
    ("batch_stats", "mean"),
    ("batch_stats", "var"),
)
"""Collection and name of what a batch norm may have."""

# A subclass may do more than this in its call, and Einsum put its features anywhere.
_LAYERS = (nn.Dense, nn.DenseGeneral, nn.Conv, nn.ConvTranspose, nn.ConvLocal)


class Norm(NamedTuple):
    """A batch norm behind a layer.

    Attributes:
      name: Its path, joined by `join_path`.
      epsilon: Its epsilon.
      axis: The axis of the layer's weight, from the end, along which its features are.
    """

    name: str
    epsilon: float
    axis: int = -1


def foldable_norms(model: nn.Module, variables: Mapping[str, Any], call: Call) -> dict[str, Norm]:
    """Returns the batch norms in evaluation that see a layer's output, by the layer's site.

    Nothing else may see that output, and it must be in float32, features last, both of them run
    once and neither in a stack (scan, vmap) with parameters of its own.

    Args:
      model: The Linen module.
      variables: Its variables, without "compand".
      call: Arguments to run it with.
    """
    norms: dict[str, Norm] = {}
    axes: dict[str, int] = {}

    def run(variables: Any, arrays: list, key: Array) -> list:
        marker = nn.intercept_methods(_marker(norms, axes))
        with intercept_layers(model, Observer()) as intercepted, marker:
            return result_arrays(call.run(intercepted, variables, arrays, key))

    with no_trace_from_before():
        program = jax.make_jaxpr(run)(variables, call.arrays(), jax.random.key(0))
    stacked = {  # seen from within, a norm in a stack is as one alone
        name
        for name in norms
        if get_leaf(variables, ("batch_stats", *split_path(name), "mean")).ndim != 1
    }
    return {
        site: norms[norm]._replace(axis=axes[site])
        for site, norm in _pairs(program.jaxpr).items()
        if norm not in stacked
    }


def _marker(norms: dict[str, Norm], axes: dict[str, int]) -> Callable:
    """Returns an interceptor that names layers' outputs and batch norms' inputs in the trace.

    Args:
      norms: The batch norms by name; added to.
      axes: The axis of each layer's features, by site; added to.
    """

    def mark(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module, site = context.module, "/".join(context.module.path)
        if context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        if type(module) in _LAYERS and isinstance(module.features, int):
            axes[site] = -2 if getattr(module, "transpose_kernel", False) else -1
            return checkpoint_name(next_fun(*args, **kwargs), f"layer {site}")
        if type(module) is nn.BatchNorm and _is_plain(module, args, kwargs):
            name = join_path(module.path)
            norms[name] = Norm(name, float(module.epsilon))
            args = checkpoint_name(args[0], f"norm {name}"), *args[1:]
        return next_fun(*args, **kwargs)

    return mark


def _is_plain(norm: nn.BatchNorm, args: tuple, kwargs: dict) -> bool:
    """Whether a call is in evaluation, over the last axis, in float32, without a mask."""
    options = dict(zip(("use_running_average",), args[1:], strict=False)) | kwargs
    average = options.pop("use_running_average", None)
    average = norm.use_running_average if average is None else average
    variables = norm.variables
    mean = variables.get("batch_stats", {}).get("mean")
    own_types = {leaf.dtype for leaf in jax.tree.leaves(variables)}
    return (
        average is True
        and not options
        and len(args) in (1, 2)
        and _axes(norm) in ((-1,), (args[0].ndim - 1,))
        and args[0].dtype == jnp.float32
        and norm.dtype in (None, jnp.float32)
        and own_types == {jnp.dtype(jnp.float32)}
        and mean is not None
        and mean.shape == (args[0].shape[-1],)
    )


def _axes(norm: nn.BatchNorm) -> tuple[int, ...]:
    return (norm.axis,) if isinstance(norm.axis, int) else tuple(norm.axis)


def _pairs(jaxpr: Any) -> dict[str, str]:
    """Returns {layer: norm} where the layer's output, met once, goes to the norm alone."""
    layers: dict[str, list[str]] = {}
    inputs: list[str] = []
    for inner in _jaxprs(jaxpr):
        named = [(eqn, *_mark(eqn)) for eqn in inner.eqns]
        users = collections.defaultdict(list)
        for eqn, kind, name in named:
            for var in eqn.invars:
                users[id(var)].append(name if kind == "norm" else "")
        for var in inner.outvars:
            users[id(var)].append("")
        inputs += [name for _, kind, name in named if kind == "norm"]
        for eqn, kind, name in named:
            if kind == "layer":
                norms = users[id(eqn.outvars[0])]
                layers.setdefault(name, []).append(norms[0] if len(norms) == 1 else "")
    found = {layer: norms[0] for layer, norms in layers.items() if len(norms) == 1 and norms[0]}
    return {layer: norm for layer, norm in found.items() if inputs.count(norm) == 1}


def _mark(eqn: Any) -> tuple[str, str]:
    """Returns the kind and the name that `_marker` gave to an equation's output, or two blanks."""
    text = eqn.params["name"] if eqn.primitive.name == "name" else ""
    kind, _, name = text.partition(" ")
    return (kind, name) if kind in ("layer", "norm") else ("", "")


def _jaxprs(jaxpr: Any) -> Iterator[Any]:
    """Yields a jaxpr and those within it, once for every equation that calls them."""
    yield jaxpr
    for eqn in jaxpr.eqns:
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from _jaxprs(getattr(value, "jaxpr", value))


def _is_jaxpr(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")


@contextlib.contextmanager
def shift_norms(shifts: Mapping[str, Array]) -> Iterator[None]:
    """Runs these batch norms, by path, as an addition: what is left of one that was folded."""

    def shift(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        name = join_path(module.path)
        if context.method_name != "__call__" or name not in shifts:
            return next_fun(*args, **kwargs)
        options = dict(zip(("use_running_average",), args[1:], strict=False)) | kwargs
        average = options.get("use_running_average")
        if not (getattr(module, "use_running_average", None) if average is None else average):
            raise ValueError(
                f"batch norm {name!r} is folded, so it must run in evaluation "
                "(use_running_average): freeze the model without fold_norms"
            )
        return args[0] + shifts[name].reshape((1,) * (args[0].ndim - 1) + (-1,))

    with nn.intercept_methods(shift):
        yield
