"""What a frozen NNX model holds, as a file has it: arrays by kind and name."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import variablelib
from jaxtyping import Array

from compand_jax.frozen.nnx.layers import expanded_layers, tables_of
from compand_jax.frozen.packing import pack, unpack
from compand_jax.frozen.sample import is_array
from compand_jax.frozen.tree import KINDS, Arrays, FrozenWeight, join_path
from compand_jax.nnx.variables import Quantizer

KEPT = nnx.Not(nnx.Any(nnx.RngState, Quantizer))
"""Of a model's state, what a file holds in full precision: not the state of random streams."""


def arrays_of(model: nnx.Module) -> Arrays:
    """Returns a frozen model's arrays."""
    arrays: Arrays = {kind: {} for kind in KINDS}
    for _, own in expanded_layers(model):
        for kind, x in tables_of(own).items():
            arrays[kind][own.layer.site] = x
        if own.site.weight is not None and own.stack:
            codes = arrays["codes"][own.layer.site]
            arrays["codes"][own.layer.site] = _as_one_stream(codes, own.site.weight)
    arrays["variables"] = variables_of(model)
    return arrays


def variables_of(model: nnx.Module) -> dict[str, Any]:
    """Returns the rest of a model's state, by variable type and path."""
    return dict(named_leaves(nnx.state(model, KEPT)))


def named_leaves(state: Any) -> list[tuple[str, Any]]:
    """Returns the arrays of a state with their names, in the order of its leaves."""
    flat = nnx.to_flat_state(state)
    return [leaf for path, variable in flat for leaf in _named(path, variable)]


def set_variables(model: nnx.Module, values: Mapping[str, Any]) -> None:
    """Puts such values into a model; they have all the names of its own."""
    found = []
    for path, variable in nnx.to_flat_state(nnx.state(model, KEPT)):
        leaves = [values[name] for name, _ in _named(path, variable)]
        found.append((path, jax.tree.unflatten(jax.tree.structure(variable), leaves)))
    nnx.update(model, nnx.from_flat_state(found))


def variable_names(model: nnx.Module) -> dict[int, str]:
    """Returns by its id the name of every variable that a model has."""
    return {
        id(node): variable_name(path, node)
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Variable)
    }


def variable_name(path: tuple, variable: Any) -> str:
    """Returns the name of a variable in a file: its type's collection in Linen, and its path."""
    kind = type(variable) if isinstance(variable, nnx.Variable) else nnx.Variable
    try:
        collection = variablelib.variable_name_from_type(kind)
    except ValueError:  # of the model's own
        collection = kind.__name__
    return join_path((collection, *map(str, path)))


def _named(path: tuple, variable: Any) -> list[tuple[str, Any]]:
    """Returns the name and value of what a variable holds; it is mostly one array."""
    name, leaves = variable_name(path, variable), jax.tree.leaves(variable)
    if len(leaves) == 1:
        return [(name, leaves[0])]
    return [(f"{name}/{i}", leaf) for i, leaf in enumerate(leaves)]


def _as_one_stream(codes: Array, weight: FrozenWeight) -> Array:
    """Returns a stack's codes, packed layer by layer, packed as those of one weight."""
    rows = codes.reshape(-1, codes.shape[-1])
    shape = (weight.size // len(rows),) if len(rows) else (0,)
    return pack(jnp.stack([unpack(row, weight.bits, shape) for row in rows]), weight.bits)


def layer_by_layer(codes: Array, weight: FrozenWeight, stack: tuple[int, ...]) -> Array:
    """Returns a stack's codes, packed as those of one weight, packed layer by layer."""
    if not stack:
        return codes
    rows = unpack(codes, weight.bits, weight.shape).reshape(*stack, -1)
    packed = [pack(row, weight.bits) for row in rows.reshape(-1, rows.shape[-1])]
    return jnp.stack(packed).reshape(*stack, -1)


def copied(state: Any) -> Any:
    """Returns a state with arrays of its own, on the device."""
    return jax.tree.map(lambda x: jnp.array(x) if is_array(x) else x, state)
