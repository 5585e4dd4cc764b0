"""From a file to a frozen NNX model; a model that is another one is refused."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from compand_jax.frozen.check import line
from compand_jax.frozen.description import from_file
from compand_jax.frozen.file import read_sealed
from compand_jax.frozen.nnx.layers import TABLES, Expansion, take_weights
from compand_jax.frozen.nnx.model import FrozenModule
from compand_jax.frozen.nnx.observed_call import run_abstractly
from compand_jax.frozen.nnx.state import (
    copied,
    layer_by_layer,
    set_variables,
    variable_names,
    variables_of,
)
from compand_jax.frozen.sample import Call, abstract_call
from compand_jax.frozen.tree import Arrays, FrozenSite
from compand_jax.nnx.layer_kinds import weight_of
from compand_jax.nnx.promotion import HOOK
from compand_jax.nnx.quantized_model import described, named_layers, stack_shape


def load_module(
    path: str | Path, model: nnx.Module, sample: tuple, kwargs: dict[str, Any]
) -> FrozenModule:
    """Returns the frozen model of a file; see `compand_jax.load_frozen`."""
    try:
        given = abstract_call(model, sample, kwargs, own_options=()) if sample or kwargs else None
    except TypeError as error:
        raise ValueError(str(error)) from error
    description, stored = read_sealed(path)
    sites, act_site, signature, arrays = from_file(path, description, stored)
    try:
        if act_site != "input" or any(s.weight and s.weight.norm for s in sites.values()):
            raise _OtherModelError("of NNX: the file has what Linen models alone can have")
        signature = signature._replace(call=signature.call or given)
        frozen = _frozen(model, sites, arrays)
        if signature.call is not None:
            _check_runs(frozen, signature.call)
        return FrozenModule(frozen, signature)
    except _OtherModelError as error:
        raise ValueError(
            f"`model` must be the one that {path} was made of, got one {error}"
        ) from None


class _OtherModelError(Exception):
    """What a model is, and the one that was frozen is not."""


def _require(condition: bool, found: str) -> None:
    if not condition:
        raise _OtherModelError(found)


def _check_runs(frozen: nnx.Module, call: Call) -> None:
    try:
        run_abstractly(frozen, call)
    except Exception as error:  # whatever a model of other variables raises
        raise _OtherModelError(f"that does not run on its variables: {line(error)}") from error


def _frozen(model: nnx.Module, sites: Mapping[str, FrozenSite], arrays: Arrays) -> nnx.Module:
    frozen = nnx.clone(model)
    layers, names = named_layers(frozen), variable_names(frozen)
    hooked = any(isinstance(own.promote_dtype, nnx.Module) for own in layers.values())
    _require(not hooked, "that is quantized: give nnx.dequantize of it")
    for name, site in sites.items():
        _require(name in layers, f"without the layer {name!r}")
        layer = layers[name]
        _check_site(name, site, layer, names.get(id(weight_of(layer))), arrays)
    quantized = [layers[name] for name, site in sites.items() if site.weight is not None]
    leaves = {site.weight.leaf for site in sites.values() if site.weight} - {None}
    stacks = {name: stack_shape(layers[name]) for name in sites}
    take_weights(frozen, [own for own in quantized if names.get(id(weight_of(own))) in leaves])
    _check_variables(variables_of(frozen), arrays["variables"])
    set_variables(frozen, arrays["variables"])
    for name, site in sites.items():
        tables = {kind: jnp.asarray(arrays[kind][name]) for kind in TABLES if name in arrays[kind]}
        if site.weight is not None:
            tables["codes"] = layer_by_layer(tables["codes"], site.weight, stacks[name])
        layer = layers[name]
        kind = described(name, layer)
        own = Expansion(layer.promote_dtype, kind, site, stacks[name], tables)
        setattr(layer, HOOK, nnx.data(own))
    state = copied(nnx.state(frozen))
    _require(
        not any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(state)),
        "of shapes alone that draws random numbers: make it with its random streams",
    )
    nnx.update(frozen, state)
    return frozen


def _check_site(name: str, site: FrozenSite, layer: Any, leaf: str | None, arrays: Arrays) -> None:
    """Raises _OtherModelError unless a layer can be a site of a file."""
    stack, weight = stack_shape(layer), site.weight
    for kind in ("levels", "act_levels"):
        if name in arrays[kind]:
            found = arrays[kind][name].shape[:-1]
            _require(found == stack, f"with {name!r} in a stack of {stack}, not {found}")
    if weight is None:
        return
    own = weight_of(layer)
    _require(weight.leaf_shape is None, f"whose layer {name!r} does not compute its weight")
    _require(weight.leaf in (None, leaf), f"whose layer {name!r} has another weight than its own")
    same = own.shape == weight.shape
    _require(same, f"whose layer {name!r} has a weight of shape {own.shape}, not {weight.shape}")
    of_layer = own.shape[len(stack) :]
    if weight.group_size is not None:
        count = weight.group_size * math.prod(weight.scale_shape)
        _require(count == math.prod(of_layer), f"with another stack of {name!r}")
        return
    rank = len(weight.scale_shape) or len(of_layer)
    _require(rank == len(of_layer), f"with another stack of {name!r}")


def _check_variables(own: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    for name in sorted(own.keys() | found.keys()):
        shapes = [np.shape(x[name]) if name in x else None for x in (own, found)]
        _require(shapes[0] == shapes[1], f"with {name} of shape {shapes[0]}, not {shapes[1]}")
        types = [getattr(x[name], "dtype", type(x[name])) for x in (own, found)]
        kinds = [jnp.issubdtype(dtype, jnp.floating) for dtype in types]
        _require(kinds[0] == kinds[1], f"with {name} of {types[0]}, not {types[1]}")
