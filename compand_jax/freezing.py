"""From the variables of a quantized model to a frozen one."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from compand_jax import parametrization as par
from compand_jax.calls import Call
from compand_jax.codebooks import Spec, codebook
from compand_jax.config import QuantConfig
from compand_jax.frozen_model import FrozenModel, make_frozen
from compand_jax.frozen_tree import (
    KINDS,
    WEIGHT_TYPES,
    Arrays,
    FrozenSite,
    FrozenWeight,
    Signature,
    flatten,
    join_path,
    leaf_path,
)
from compand_jax.interception import Observer, intercept_layers
from compand_jax.packing import pack
from compand_jax.quantizers import quantize
from compand_jax.sites import Site
from compand_jax.summary import WEIGHT_NAMES


def freeze(
    model: nn.Module,
    config: QuantConfig,
    variables: Mapping[str, Any],
    site: Callable[[str], Site],
    calls: Mapping[str, Call],
) -> FrozenModel:
    """Returns the frozen model of a quantized model's variables.

    Args:
      model: The Linen module.
      config: Of the quantized model.
      variables: Its variables, with "compand".
      site: Gives what is static about a site.
      calls: Arguments to run the model's methods with, by name, where that tells what a layer
        computes its weight to be; without, it is taken to be the layer's parameter.

    Raises:
      ValueError: a weight is not finite, not in one of the types that a file holds, or is not
        known without an input.
    """
    compand = variables["compand"]
    tree = nn.meta.unbox({name: tree for name, tree in variables.items() if name != "compand"})
    rest = dict(flatten(tree))
    owns = {
        name: next((leaf for leaf in WEIGHT_NAMES if leaf_path(name, leaf) in rest), None)
        for name, operand in par.quantized_operands(compand)
        if operand == "weight"
    }
    for name, leaf in owns.items():
        if leaf is not None:
            _check_weight(name, jnp.asarray(rest[leaf_path(name, leaf)]))
    computed = _computed_weights(model, tree, calls, owns)
    # In one compiled function, as in the quantized model's: eagerly the last bit may differ.
    parameters = jax.jit(
        lambda compand: [
            par.read_parameters(compand, *key, config) for key in par.quantized_operands(compand)
        ]
    )(compand)
    sites: dict[str, FrozenSite] = {}
    arrays: Arrays = {kind: {} for kind in KINDS}
    for (name, operand), (mu, scale) in zip(
        par.quantized_operands(compand), parameters, strict=True
    ):
        found, spec = sites.get(name, FrozenSite()), site(name).spec(operand)
        if operand == "act":
            table = codebook(mu, scale, bits=spec.bits, signed=spec.signed)
            arrays["act_levels"][name], arrays["act_thresholds"][name] = table
            sites[name] = dataclasses.replace(found, act_bits=spec.bits, act_signed=spec.signed)
            continue
        leaf = owns[name]
        own = None if leaf is None else rest.pop(leaf_path(name, leaf))
        weight = jnp.asarray(computed.get(name, own))
        arrays["codes"][name] = _packed_codes(weight, mu, scale, spec)
        levels, _ = codebook(mu, scale, bits=spec.bits, grid=spec.grid)
        arrays["levels"][name] = levels.reshape(-1, levels.shape[-1]) if scale.ndim else levels
        frozen = FrozenWeight(
            spec.bits,
            spec.grid,
            weight.shape,
            weight.dtype.name,
            scale.shape,
            leaf,
            own.shape if name in computed and own is not None else None,
        )
        sites[name] = dataclasses.replace(found, weight=frozen)
    arrays["variables"] = {join_path(path): value for path, value in rest.items()}
    return make_frozen(model, sites, config.act_site, _signature(calls.get("__call__")), arrays)


def _signature(call: Call | None) -> Signature | None:
    """Returns a call's signature; None where a file could not hold it."""
    if call is None or not all(isinstance(x, jax.ShapeDtypeStruct) for x in call.args):
        return None
    options = tuple(sorted(call.kwargs.items()))
    if not all(isinstance(value, bool | int | float | str | None) for _, value in options):
        return None
    return Signature(tuple((x.shape, x.dtype.name) for x in call.args), options)


def _check_weight(name: str, weight: Array) -> None:
    if weight.dtype.name not in WEIGHT_TYPES:
        raise ValueError(
            f"`variables` must hold weights of at most 32 bits, site {name!r} has one of "
            f"{weight.dtype}: convert it"
        )
    if not jnp.all(jnp.isfinite(weight)):
        raise ValueError(f"`variables` must be finite, the weight of site {name!r} is not")


def _packed_codes(weight: Array, mu: Array, scale: Array, spec: Spec) -> Array:
    """Returns the packed indices of a weight's levels in the ascending table."""
    stacked = weight.ndim - scale.ndim if scale.ndim else 0  # scan and vmap stack in front
    scale = scale.reshape((1,) * stacked + scale.shape)
    codes = quantize(weight, mu, scale, bits=spec.bits, grid=spec.grid)
    return pack((codes.astype(jnp.int32) + spec.steps).astype(jnp.uint8), spec.bits)


def _computed_weights(
    model: nn.Module, variables: dict, calls: Mapping[str, Call], owns: Mapping[str, str | None]
) -> dict[str, np.ndarray]:
    """Returns the weights that layers compute from their parameters, by site.

    Raises:
      ValueError: a layer without a parameter of its own did not run, or one computes several
        weights.
    """
    seen: dict[str, list[np.ndarray]] = {}
    for method, call in calls.items():
        for name, values in _weights_seen(model, variables, method, call).items():
            seen.setdefault(name, []).extend(values)
    flat = dict(flatten(variables))
    computed = {}
    for name, leaf in owns.items():
        values = seen.get(name, [])
        if leaf is not None:
            own = np.unique(np.asarray(flat[leaf_path(name, leaf)]))
            if all(np.isin(np.unique(value), own).all() for value in values):
                continue  # it is the parameter, or a part of it where scan or vmap stacked it
        if not values:
            raise ValueError(
                f"site {name!r} has no kernel of its own: freeze it with an input, "
                "freeze(variables, x)"
            )
        if any(not np.array_equal(value, values[0]) for value in values):
            raise ValueError(
                f"site {name!r} computes several weights from its parameters, in a stack of "
                "layers: freeze a model that has the layers one by one"
            )
        computed[name] = values[0]
    return computed


def _weights_seen(
    model: nn.Module, variables: dict, method: str, call: Call
) -> dict[str, list[np.ndarray]]:
    """Returns what every layer multiplies with, when a method of the model is called."""
    observers = []

    def run(variables: dict) -> dict[str, list]:
        observer = Observer(weight=lambda weight: weight)
        observers.append(observer)
        args, kwargs = call.zeros()
        kwargs = {"rngs": jax.random.key(0), "mutable": True, "method": method} | kwargs
        with intercept_layers(model, observer) as intercepted:
            intercepted.apply(variables, *args, **kwargs)
        return observer.traced["weight"]

    seen = jax.device_get(jax.jit(run)(variables))
    jax.effects_barrier()
    for name, values in observers[-1].called_back["weight"].items():
        seen.setdefault(name, []).extend(values)
    return seen
