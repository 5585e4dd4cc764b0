"""A function of parameters as a program: traced, planned, and run by a visitor."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from compand_jax.layers import parametrization as par
from compand_jax.layers.config import QuantConfig
from compand_jax.layers.contractions.evaluation import Evaluation
from compand_jax.layers.contractions.plan import BY_ITS_LAYER, Plan, plan_program
from compand_jax.layers.contractions.views import view_of
from compand_jax.layers.layer_quantizer import LayerQuantizer
from compand_jax.layers.observation import Layer, Observer
from compand_jax.layers.visitor import is_lookup


@dataclasses.dataclass(frozen=True)
class Program:
    """A function traced on parameters and arguments.

    Attributes:
      layers: what visitors are told of each site.
      weights: the parameters that are contracted, by site.
      ndims: how many axes each parameter has.
      plan: which equations are contractions.
      closed: the program.
      args: its arguments.
      returned: called with its results, what the function returns.
    """

    layers: Mapping[str, Layer]
    weights: Mapping[str, Array]
    ndims: Mapping[str, int]
    plan: Plan
    closed: Any
    args: Sequence[Array]
    returned: Callable[[Sequence[Array]], Any]

    def quantized(self, quantizer: LayerQuantizer) -> Any:
        """Returns what the function returns, of operands that are quantized."""
        return self.run(quantizer.weight, quantizer.activation)

    def observed(self, observer: Observer) -> Any:
        """Returns what the function returns, its operands shown to an observer."""
        observer.calls_back = True  # every inner trace of a program runs
        for site, weight in self.weights.items():
            observer.weight(self.layers[site], weight)
        return self.run(None, observer.activation)

    def run(self, weight: Callable | None, activation: Callable) -> Any:
        """Returns what the function returns, of the operands that `Evaluation` describes."""
        evaluation = Evaluation(self.layers, self.ndims, weight, activation)
        return self.returned(evaluation.program(self.plan, self.closed, self.args))


def marked(operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns a layer's operands, the weight marked as one that the layer quantizes."""
    i = 0 if is_lookup(operands) else 1
    return (*operands[:i], checkpoint_name(operands[i], BY_ITS_LAYER), *operands[i + 1 :])


def trace(
    function: Callable,
    params: Any,
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    products: bool,
    root: str = "",
) -> Program:
    """Returns function(params, *args, **kwargs) as a program. It is traced once.

    What is no array among the arguments, such as a flag, is a constant of the program.

    Args:
      function: the function.
      params: a tree, whose arrays are followed to contractions.
      args: further arguments.
      kwargs: likewise.
      products: whether products of two activations are sites.
      root: the outermost scope, where it is in no name of a product.
    """
    flat, tree = jax.tree_util.tree_flatten_with_path((params, args, dict(kwargs)))
    names = [leaf_name(path[1:]) if path[0].idx == 0 else None for path, _ in flat]
    leaves = [leaf for _, leaf in flat]
    places = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
    arrays = [jnp.asarray(leaves[i]) for i in places]
    views, ndims, weights = [], {}, {}
    for i, array in zip(places, arrays, strict=True):
        name = names[i]
        if name is None or not jnp.issubdtype(array.dtype, jnp.inexact):
            views.append(None)
            continue
        views.append(view_of(name, array.ndim))
        ndims[name], weights[name] = array.ndim, array
    returned: list = []

    def call(*arrays: Array) -> list[Array]:
        given = list(leaves)
        for i, array in zip(places, arrays, strict=True):
            given[i] = array
        own_params, own_args, own_kwargs = jax.tree.unflatten(tree, given)
        results, structure = jax.tree.flatten(function(own_params, *own_args, **own_kwargs))
        # What is no array the function computes as it is traced.
        fixed = [None if is_array(result) else result for result in results]
        returned.append((fixed, [is_array(result) for result in results], structure))
        return [result for result in results if is_array(result)]

    closed = jax.make_jaxpr(call)(*arrays)
    plan, planner = plan_program(closed, views, ndims, products=products, root=root)
    return Program(
        planner.layers(),
        {site: weights[site] for site in planner.uses},
        ndims,
        plan,
        closed,
        arrays,
        functools.partial(_with_arrays, *returned[-1]),
    )


def _with_arrays(fixed: list, is_result: list[bool], structure: Any, results: Sequence) -> Any:
    values = iter(results)
    leaves = [next(values) if own else leaf for leaf, own in zip(fixed, is_result, strict=True)]
    return jax.tree.unflatten(structure, leaves)


def require_inputs(config: QuantConfig) -> None:
    """Raises ValueError where activations are to be quantized at the output."""
    if config.act_site != "input":
        raise ValueError(
            f"`act_site` must be 'input' for contractions, got {config.act_site!r}: they can be "
            "reached at what they multiply alone"
        )


def is_array(x: Any) -> bool:
    """Returns whether a value is an array that JAX can compute with."""
    return isinstance(x, jax.Array) or (
        isinstance(x, np.ndarray | np.generic) and x.dtype.kind not in "OSU"
    )


def leaf_name(path: tuple) -> str:
    """Returns a parameter's path as the name of its site; "params" where it is all there is.

    A box is not in it, as Flax has them: `nnx.Variable`, `nn.Partitioned`.
    """
    if len(path) > 1 and getattr(path[-1], "name", None) == "value":
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/") or "params"


def nested_by_name(params: Any) -> dict[str, Any]:
    """Returns a tree of parameters as nested dictionaries, by the parts of the leaves' names."""
    nested: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if is_array(leaf):
            par.set_leaf(nested, par.site_path(leaf_name(path)), leaf)
    return nested
