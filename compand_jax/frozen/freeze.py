"""From the variables of a quantized model to a frozen one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from compand_jax.core.codebooks import Spec, codebook
from compand_jax.core.quantizers import quantize
from compand_jax.frozen.folded_norms import NORM_LEAVES, Norm, foldable_norms
from compand_jax.frozen.model import FrozenModel, make_frozen
from compand_jax.frozen.packing import pack
from compand_jax.frozen.sample import Call, abstract_call
from compand_jax.frozen.tree import (
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
from compand_jax.layers import parametrization as par
from compand_jax.layers.config import QuantConfig
from compand_jax.layers.observation import Observer
from compand_jax.linen.observation import observe_layers
from compand_jax.linen.quantized_model import QuantizedModel, compand_of
from compand_jax.linen.summary import WEIGHT_NAMES


def freeze(
    qmodel: QuantizedModel,
    variables: Mapping[str, Any],
    *sample: Any,
    fold_norms: bool = False,
    **kwargs: Any,
) -> FrozenModel:
    """Returns a quantized model for inference alone: packed codes and tables instead of kernels.

    The model is run on zeros of the sample's shapes. That tells the weights which layers compute
    from their parameters (WeightNorm), and the file what to know the model by.

    Args:
      qmodel: The quantized model.
      variables: As its `apply` takes them, with "compand".
      *sample: Arguments of the model, of which only shapes count, such as one batch of inputs;
        `jax.ShapeDtypeStruct` in place of arrays will do.
      fold_norms: Whether to fold every batch norm that sees nothing but a quantized layer's
        float32 output: its factor goes into the weight's scales, an addition is left of it. The
        model then runs in evaluation alone.
      **kwargs: Further arguments of the model's `apply`, such as `train=False` or `method`.

    Returns:
      A `FrozenModel`, whose `apply(*args, **kwargs)` returns what the jitted `qmodel.apply`
      returns on the same backend, to the last bit. With `fold_norms` to rounding, which can flip
      an activation's code.

    Raises:
      TypeError: `qmodel` is none, or does not take such a sample.
      ValueError: "compand" is missing; a weight is not finite, in float64, or differs between the
        layers of a stack that compute it from their parameters; or there is no batch norm to fold.

    >>> import compand_jax as cj
    >>> qmodel = cj.quantize_model(nn.Dense(3), cj.QuantConfig(weight_bits=4, act_bits=None))
    >>> x = jnp.ones((2, 8))
    >>> frozen = freeze(qmodel, qmodel.init(jax.random.key(0), x), x)
    >>> frozen.arrays["codes"][""].nbytes  # 24 weights of 4 bits
    12
    """
    if not isinstance(qmodel, QuantizedModel):
        raise TypeError(
            f"`qmodel` must be a QuantizedModel, got {type(qmodel).__name__}: make it with "
            "quantize_model"
        )
    model, config, site = qmodel.model, qmodel.config, qmodel.site
    call = abstract_call(model, sample, kwargs)
    compand = compand_of(variables)
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
    computed = _computed_weights(model, tree, call, owns)
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
        # Several scales have one table, of scale 1: a level of theirs is the same product.
        table_scale = jnp.ones(()) if scale.ndim else scale
        arrays["levels"][name], _ = codebook(mu, table_scale, bits=spec.bits, grid=spec.grid)
        if scale.ndim:
            arrays["scales"][name] = scale
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
    if fold_norms:
        _fold(sites, arrays, rest, _norms(model, config, tree, call, sites))
    arrays["variables"] = {join_path(path): value for path, value in rest.items()}
    return make_frozen(model, sites, config.act_site, _signature(call), arrays)


def _norms(
    model: nn.Module,
    config: QuantConfig,
    variables: dict,
    call: Call,
    sites: Mapping[str, FrozenSite],
) -> dict[str, Norm]:
    """Returns the batch norms to fold, by the site whose weight they are folded into."""
    norms = {
        name: norm
        for name, norm in foldable_norms(model, variables, call).items()
        if name in sites
        and sites[name].weight is not None
        and (config.act_site == "input" or sites[name].act_bits is None)
    }
    if not norms:
        raise ValueError(
            "`fold_norms` must find a batch norm that sees a quantized layer's unquantized output "
            "alone, got none: give freeze the evaluation's arguments, such as x, train=False, or "
            "leave it out"
        )
    return norms


def _fold(
    sites: dict[str, FrozenSite], arrays: Arrays, rest: dict, norms: Mapping[str, Norm]
) -> None:
    """Moves batch norms' variables into the scales and biases of the layers before, and shifts."""
    for name, norm in norms.items():
        weight = sites[name].weight
        assert weight is not None
        scale, bias, mean, var = (
            np.asarray(rest.pop((collection, *par.site_path(norm.name), leaf), default), np.float64)
            for (collection, leaf), default in zip(NORM_LEAVES, (1, 0, None, None), strict=True)
        )
        factor = scale / np.sqrt(var + norm.epsilon)
        if not np.all(np.isfinite(np.stack(np.broadcast_arrays(factor, bias, mean)))):
            raise ValueError(f"`variables` must be finite, batch norm {norm.name!r} is not")
        shape = weight.scale_shape or (1,) * (len(weight.shape) - 1) + factor.shape
        own = np.asarray(arrays["scales"].get(name, 1), np.float64)
        arrays["scales"][name] = (own * factor).astype(np.float32).reshape(shape)
        arrays["shifts"][name] = (bias - factor * mean).astype(np.float32)
        path = leaf_path(name, "bias")
        if path in rest:
            rest[path] = (np.asarray(rest[path], np.float64) * factor).astype(np.float32)
        weight = dataclasses.replace(weight, scale_shape=shape, norm=norm.name)
        sites[name] = dataclasses.replace(sites[name], weight=weight)


def _signature(call: Call) -> Signature | None:
    """Returns a call's signature; None where a file could not hold it."""
    if call.method != "__call__" or not all(isinstance(x, jax.ShapeDtypeStruct) for x in call.args):
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
    model: nn.Module, variables: dict, call: Call, owns: Mapping[str, str | None]
) -> dict[str, np.ndarray]:
    """Returns the weights that layers compute from their parameters, by site.

    Raises:
      ValueError: a layer without a parameter of its own did not run, or one computes several
        weights.
    """
    seen = _weights_seen(model, variables, call)
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
                f"site {name!r} has no kernel of its own, and does not run: freeze it with a "
                "sample that runs it"
            )
        if any(not np.array_equal(value, values[0]) for value in values):
            raise ValueError(
                f"site {name!r} computes several weights from its parameters, in a stack of "
                "layers: freeze a model that has the layers one by one"
            )
        computed[name] = values[0]
    return computed


def _weights_seen(
    model: nn.Module, variables: dict, call: Call
) -> dict[str, list[np.ndarray]]:
    """Returns what every layer multiplies with, when the model is called."""
    observers = []

    def run(variables: dict) -> dict[str, list]:
        observer, _ = observe_layers(
            model,
            lambda: Observer(weight=lambda weight: weight),
            lambda model: call.run(model, variables),
        )
        observers.append(observer)
        return observer.traced["weight"]

    seen = jax.device_get(jax.jit(run)(variables))
    jax.effects_barrier()
    for name, values in observers[-1].called_back["weight"].items():
        seen.setdefault(name, []).extend(values)
    return seen
