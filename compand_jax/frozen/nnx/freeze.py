"""From a quantized NNX model to a frozen one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from compand_jax.frozen.codes import act_tables, check_weight, pack_weight, require_layers
from compand_jax.frozen.nnx.layers import Expansion, take_weights
from compand_jax.frozen.nnx.model import FrozenModule
from compand_jax.frozen.nnx.observed_call import ObservedModule, run_abstractly
from compand_jax.frozen.nnx.state import copied, variable_names
from compand_jax.frozen.origins import computed_weights, find_origins
from compand_jax.frozen.sample import Call, Signature, abstract_call
from compand_jax.frozen.tree import FrozenSite, FrozenWeight
from compand_jax.nnx.contractions import contractions_of
from compand_jax.nnx.layer_kinds import weight_of
from compand_jax.nnx.promotion import HOOK, Promotion, parameters_of
from compand_jax.nnx.quantized_model import hooked_layers, set_static, stack_shape

Parameters = dict[str, tuple[Array, Array]]
"""mu and scale of "weight" and of "act", as far as they are quantized."""


class _Traced(NamedTuple):
    """What a call of the model shows.

    Attributes:
      computed: Weights that are not a layer's own parameter as it is, by site.
      used: Names of variables that are used past their layers.
    """

    computed: dict[str, Array]
    used: set[str]


def freeze_module(qmodel: nnx.Module, sample: tuple, kwargs: dict[str, Any]) -> FrozenModule:
    """Returns a quantized NNX model for inference alone; see `compand_jax.freeze`."""
    own = contractions_of(qmodel) if isinstance(qmodel, nnx.Module) else None
    if own is not None:
        require_layers(own.config)
    _check_calibrated(qmodel)
    call = abstract_call(qmodel, sample, kwargs, own_options=()) if sample or kwargs else None
    traced = _without_sample(qmodel) if call is None else _traced(qmodel, call)
    frozen, found = nnx.clone(qmodel), _parameters(qmodel, traced.computed)
    names, layers = variable_names(frozen), hooked_layers(frozen)
    weights = {own.layer.site: weight_of(layer) for layer, own in layers}
    stacks = {own.layer.site: stack_shape(layer) for layer, own in layers}
    taken = take_weights(frozen, [
        layer
        for layer, own in layers
        if "weight" in found[own.layer.site]
        and own.layer.site not in traced.computed
        and names[id(weights[own.layer.site])] not in traced.used
    ])  # fmt: skip
    for layer, promotion in layers:
        name = promotion.layer.site
        if not found[name]:
            set_static(layer, HOOK, promotion.promote)
            continue
        weight = weights[name]
        leaf = names.pop(id(weight), None) if id(weight) in taken else None
        value = traced.computed[name] if name in traced.computed else weight[...]
        own = _expansion(promotion, value, leaf, found[name], stacks[name])
        setattr(layer, HOOK, nnx.data(own))
    nnx.update(frozen, copied(nnx.state(frozen)))
    if call is not None:
        run_abstractly(frozen, call)
    return FrozenModule(frozen, Signature(call, None))


def _without_sample(qmodel: nnx.Module) -> _Traced:
    """Returns that every layer multiplies its own weight; ValueError where that is not so."""
    wrappers = tuple(
        getattr(nnx, kind) for kind in ("WeightNorm", "SpectralNorm") if hasattr(nnx, kind)
    )
    masked = any(getattr(layer, "mask", None) is not None for layer, _ in hooked_layers(qmodel))
    if masked or any(isinstance(node, wrappers) for _, node in nnx.iter_graph(qmodel)):
        raise ValueError(
            "`sample` must be given for a model that computes weights from its parameters (a "
            "mask, WeightNorm, SpectralNorm), got none: freeze(qmodel, x)"
        )
    return _Traced({}, set())


def _traced(qmodel: nnx.Module, call: Call) -> _Traced:
    """Returns what a call shows.

    Raises:
      ValueError: a weight depends on the inputs, or differs from call to call.
    """
    observed, names = ObservedModule(qmodel, call), variable_names(qmodel)
    own = {
        promotion.layer.site: (names[id(weight_of(layer))],)
        for layer, promotion in hooked_layers(qmodel)
        if "weight" in promotion.site.operands()
    }
    origins = find_origins(observed, observed.variables)
    origins.require_the_same(own)
    computed = {name for name, leaf in own.items() if origins.leaves.get(name, leaf) != leaf}
    values = computed_weights(observed, observed.variables, computed) if computed else {}
    return _Traced(values, {path[0] for path in origins.used})


def _check_calibrated(qmodel: nnx.Module) -> None:
    missing = [
        own.layer.site
        for _, own in hooked_layers(qmodel)
        if "act" in own.site.operands() and not own.is_calibrated
    ]
    if missing:
        raise ValueError(
            f"`qmodel` must be calibrated, site {', '.join(map(repr, missing))} is not: use "
            "nnx.calibrate, with the method that runs it, or leave its activations in full "
            "precision, Rule(..., act_bits=None)"
        )


def _parameters(qmodel: nnx.Module, computed: dict[str, Array]) -> dict[str, Parameters]:
    """Returns mu and scale of every site; some weights are computed."""
    graphdef, state = nnx.split(qmodel)

    def read(state: Any, computed: dict[str, Array]) -> dict[str, Parameters]:
        found = {}
        for layer, own in hooked_layers(nnx.merge(graphdef, state)):
            weight = computed.get(own.layer.site, weight_of(layer)[...])
            both = {
                "weight": parameters_of(own, "weight", weight),
                "act": parameters_of(own, "act"),
            }
            found[own.layer.site] = {name: x for name, x in both.items() if x is not None}
        return found

    # In one compiled function, as in the quantized model's: eagerly the last bit may differ.
    return jax.jit(read)(state, computed)


def _expansion(
    promotion: Promotion,
    weight: Array,
    leaf: str | None,
    parameters: Parameters,
    stack: tuple[int, ...],
) -> Expansion:
    """Returns what takes the place of a layer's `Promotion`."""
    name, site = promotion.layer.site, promotion.site
    tables: dict[str, Array] = {}
    frozen = FrozenSite()
    if "weight" in parameters:
        check_weight(name, weight)
        spec, (mu, scale) = site.spec("weight"), parameters["weight"]
        mu = jnp.broadcast_to(mu, (*stack, *spec.family.shape(spec)))
        scale_shape = scale.shape[len(stack) :]
        dtype = site.scale_dtype if scale_shape else "float32"
        layers = [pack_weight(weight[i], mu[i], scale[i], site) for i in np.ndindex(stack)]
        tables |= _stacked(layers, stack)
        shapes = weight.shape, weight.dtype.name, scale_shape
        own = {"group_size": site.group_size, "scale_dtype": dtype}
        frozen = FrozenSite(FrozenWeight(spec.bits, spec.grid, *shapes, leaf, **own))
    if "act" in parameters:
        spec, (mu, scale) = site.spec("act"), parameters["act"]
        mu = jnp.broadcast_to(mu, (*stack, *spec.family.shape(spec)))
        tables |= _stacked([act_tables(mu[i], scale[i], spec) for i in np.ndindex(stack)], stack)
        frozen = FrozenSite(frozen.weight, spec.bits, spec.signed)
    return Expansion(promotion.promote, promotion.layer, frozen, stack, tables)


def _stacked(layers: list[dict[str, Array]], stack: tuple[int, ...]) -> dict[str, Array]:
    return {
        kind: jnp.stack([own[kind] for own in layers]).reshape(*stack, *x.shape)
        for kind, x in layers[0].items()
    }
