"""Quantizing an NNX model: a copy of it whose layers quantize what they multiply."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from compand_jax.core.codebooks import SMALLEST_SCALE
from compand_jax.layers import parametrization as par
from compand_jax.layers.config import QuantConfig, require_config
from compand_jax.layers.groups import grouped, require_divides
from compand_jax.layers.observation import Layer
from compand_jax.layers.parameters import first_rho
from compand_jax.layers.sites import (
    Site,
    check_rules,
    check_sites,
    first_spec,
    is_product,
    require_sites,
    site_from_config,
)
from compand_jax.layers.summary import summarize
from compand_jax.nnx.contractions import (
    contractions_of,
    hook,
    own_parameters,
    own_quantizers,
    set_sites,
    unhook,
)
from compand_jax.nnx.layer_kinds import LAYERS, channel_axes, input_axes, unrolling_of
from compand_jax.nnx.layer_kinds import weight_ndim as weight_ndim
from compand_jax.nnx.layer_kinds import weight_of as weight_of
from compand_jax.nnx.promotion import HOOK, Promotion, parameters_of, theta_name
from compand_jax.nnx.variables import Mu, Scale

M = TypeVar("M", bound=nnx.Module)


def quantize(model: M, config: QuantConfig, *, sites: Mapping[str, Site] | None = None) -> M:
    """Returns a copy of an NNX model with its layers quantized; the model itself is not changed.

    Quantized are Linear, LinearGeneral, Einsum, Conv, ConvTranspose and Embed, wherever they are
    in the model, in attention and recurrent cells too. A layer on several paths is one site, named
    by the first of them. With the config's `contractions`, the parameters that the model's own
    code multiplies are sites as well, named by their paths: `calibrate` finds them, and the copy
    is not run before. The copy is a model of the same class, used as ever. Its `nnx.Param` are
    those of the model; mu and scale are further variables, `Mu` and `Scale`. As `nnx.clone` does
    it, both share their arrays until one of them is changed.

    mu is the config's `mu_init`, a weight's scale its largest magnitude, and an activation's scale
    1, until `calibrate` replaces them. What `nnx.vmap` made a stack has them for each of its
    layers.

    Args:
      model: Any `flax.nnx` module.
      config: What to quantize and how, with activations at the layers' input.
      sites: A calibrated model's, to go with a checkpoint of its state: what
        `compand_jax.nnx.sites` returned, stored by `sites_to_json`. None for a model to be
        calibrated.

    Returns:
      The quantized copy.

    Gradient: straight-through, as `fake_quantize`, in the weights, theta and rho.

    Raises:
      TypeError: `model` is no NNX module, `config` no QuantConfig, or `sites` no sites.
      ValueError: the model has no layer to quantize, or is quantized already; a rule matches none;
        `sites` are those of another model or config; or `config` asks for what an NNX model cannot
        have.

    >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    >>> qmodel = quantize(model, QuantConfig(weight_bits=3, act_bits=None))
    >>> len(jnp.unique(qmodel(jnp.eye(4)) / jnp.max(jnp.abs(model.kernel[...])))) <= 7
    True
    """
    _check_arguments(model, config)
    if sites is not None:
        require_sites(sites)
        check_sites(config, sites)
    qmodel = nnx.clone(model)
    layers = named_layers(qmodel)
    own = config.contractions != "layers"
    params = own_parameters(qmodel) if own else {}
    if not layers and not params:
        raise ValueError(
            "`model` must have a layer to quantize (Linear, LinearGeneral, Einsum, Conv, "
            "ConvTranspose or Embed), found none: a Linen module in nnx.bridge.ToNNX, and what a "
            "module multiplies by itself, are reached by "
            "QuantConfig(contractions='parameters')"
        )
    if not own:
        check_rules(config, layers)
    if sites is not None and (unknown := _unknown(sites, {*layers, *params}, config)):
        raise ValueError(
            f"`sites` must be this model's, {', '.join(map(repr, unknown))} is none of "
            f"{', '.join(map(repr, sorted({*layers, *params})))}"
        )
    shared: dict[tuple[str, ...], Mu] = {}
    for name, layer in layers.items():
        _hook(layer, name, config, None if sites is None else sites.get(name), shared)
    if own:
        contractions = hook(qmodel, config)
        found = {name: site for name, site in (sites or {}).items() if name not in layers}
        set_sites(contractions, found, _first_parameters(found, params, config), shared)
    return qmodel


def dequantize(model: M) -> M:
    """Returns a copy of a quantized model in full precision, its layers as they were.

    Its graphdef is that of the model that `quantize` was given; its weights are the quantized
    model's own, before rounding.

    Args:
      model: A model that `quantize` returned.

    Raises:
      ValueError: `model` is not quantized.
    """
    plain = nnx.clone(model)
    for layer, promotion in hooked_layers(plain):
        set_static(layer, HOOK, promotion.promote)
    unhook(plain)
    return plain


def sites(model: nnx.Module) -> dict[str, Site]:
    """Returns what is static about each quantized layer of a model, by site.

    `sites_to_json` writes them, to go with a checkpoint of the model's state.

    Args:
      model: A model that `quantize` returned.

    Raises:
      ValueError: `model` is not quantized.
    """
    found = {promotion.layer.site: promotion.site for _, promotion in hooked_layers(model)}
    own = contractions_of(model)
    return found if own is None else {**found, **own.sites}


def quantizers(model: nnx.Module) -> dict[str, dict[str, Array]]:
    """Returns mu and scale of every site: {site: {"weight_mu": ..., "act_scale": ..., ...}}.

    Args:
      model: A model that `quantize` returned.

    Returns:
      By site, "weight_mu", "weight_scale", "act_mu" and "act_scale", float32. mu has no unit, and
      is 0 for a uniform quantizer; in its place another family has its own parameters, or nothing.
      A scale is in the units of what it clips. A stack's have its axes in front. A weight or an
      activation in full precision has no entry.

    Raises:
      ValueError: `model` is not quantized.
    """
    found: dict[str, dict[str, Array]] = {}
    for layer, promotion in hooked_layers(model):
        own = found.setdefault(promotion.layer.site, {})
        for operand in ("weight", "act"):
            weight = weight_of(layer)[...] if operand == "weight" else None
            if (parameters := parameters_of(promotion, operand, weight)) is not None:
                mu, own[f"{operand}_scale"] = parameters
                spec, quantizer = promotion.site.spec(operand), promotion.site.quantizer
                if (key := par.entry_name(operand, quantizer)) is not None:
                    shape = *stack_shape(layer), *spec.family.shape(spec)
                    own[key] = jnp.broadcast_to(mu, shape)
    for name, _, entries in own_quantizers(model):
        found.setdefault(name, {}).update(entries)
    return found


def summary(model: nnx.Module) -> str:
    """Returns a table of the sites as text, and the names of the weights not quantized.

    Its rows and columns are those of `QuantizedModel.summary`. Named below the table are the
    parameters of two axes and more that are no site's weight: what the model, or a layer of its
    own, multiplies by itself, and the Linen modules in it.

    Args:
      model: A model that `quantize` returned.

    Raises:
      ValueError: `model` is not quantized.
    """
    params: dict[str, Any] = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        par.set_leaf(params, tuple(map(str, path)), leaf[...])
    return summarize(params, quantizers(model), sites(model))


def hooked_layers(model: nnx.Module) -> list[tuple[Any, Promotion]]:
    """Returns the quantized layers of a model, each with what quantizes it.

    Raises:
      TypeError: `model` is no NNX module.
      ValueError: it is not quantized.
    """
    _require_module(model)
    found = [
        (layer, layer.promote_dtype)
        for _, layer in layers_of(model)
        if isinstance(layer.promote_dtype, Promotion)
    ]
    if not found and contractions_of(model) is None:
        raise ValueError(
            "`model` must be quantized, got one that is not, or is frozen already: use "
            "nnx.quantize, on the model in full precision"
        )
    return found


def described(name: str, layer: Any) -> Layer:
    """Returns what a visitor is told of a layer, by its site's name."""
    return Layer(name, channel_axes(layer), unrolling_of(layer), None, input_axes(layer))


def stack_shape(layer: Any) -> tuple[int, ...]:
    """Returns the axes that `nnx.vmap` put in front of a layer's weight; () for one layer."""
    shape = weight_of(layer).shape
    return tuple(shape[: len(shape) - weight_ndim(layer)])


def _check_arguments(model: Any, config: Any) -> None:
    _require_module(model)
    require_config(config)
    if config.act_site != "input":
        raise ValueError(
            f"`act_site` must be 'input' for an NNX model, got {config.act_site!r}: its layers "
            "can be reached at what they multiply alone"
        )
    # A `Promotion`, or what a frozen model has.
    modules = (node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Module))
    if any(contractions_of(module) is not None for module in modules) or any(
        isinstance(layer.promote_dtype, nnx.Module) for _, layer in layers_of(model)
    ):
        raise ValueError(
            "`model` must be in full precision, got a quantized one: dequantize it, or give the "
            "one that it was made of"
        )
    mode = getattr(nnx, "set_graph_mode", None)
    if mode is not None and not mode.current_value() and config.mu_scope != "per_layer":
        raise ValueError(
            "`mu_scope` must be 'per_layer' in Flax's tree mode, where no variable is shared, got "
            f"{config.mu_scope!r}: use nnx.set_graph_mode(True)"
        )


def _require_module(model: Any) -> None:
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"`model` must be a flax.nnx Module, got {type(model).__name__}: a Linen module is "
            "quantized by quantize_model"
        )


def layers_of(model: nnx.Module) -> Iterator[tuple[tuple, Any]]:
    """Yields the layers that can be quantized, each with its path."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, LAYERS):
            yield path, node


def named_layers(model: nnx.Module) -> dict[str, Any]:
    """Returns the layers that can be quantized, by site."""
    return {"/".join(map(str, path)): layer for path, layer in layers_of(model)}


def _hook(
    layer: Any, name: str, config: QuantConfig, site: Site | None, shared: dict[tuple, Mu]
) -> None:
    """Puts a `Promotion` into a layer; `shared` has each mu that several sites share."""
    kind = described(name, layer)
    found = site or site_from_config(config, name, layer=kind)
    is_calibrated = site is not None
    promotion = Promotion(layer.promote_dtype, kind, found, config, is_calibrated)
    stack = stack_shape(layer)
    if found.group_size is not None:
        shape = tuple(weight_of(layer).shape[len(stack) :])
        require_divides(name, found.group_size, shape, kind.input_axes)
    for operand in found.operands():
        rho = jnp.zeros(stack, jnp.float32)
        if operand == "weight":
            rho = _first_rho(weight_of(layer)[...], found, kind.channel_axes, stack)
        setattr(promotion, f"{operand}_scale", Scale(rho))
        path = par.parameter_path(name, operand, config)
        if path is None:
            continue
        theta = par.first_theta(config, first_spec(found, operand))
        if path[0] != par.SHARED:
            theta = Mu(jnp.broadcast_to(theta, (*stack, *theta.shape)))
        else:
            theta = shared.setdefault(path, Mu(theta))
        setattr(promotion, theta_name(promotion, operand), theta)
    setattr(layer, HOOK, nnx.data(promotion))


def _unknown(sites: Mapping[str, Site], names: set[str], config: QuantConfig) -> list[str]:
    """Returns the sites that no model with such layers and parameters has."""
    products = {name for name in sites if config.contractions == "all" and is_product(name)}
    return sorted(set(sites) - names - products)


def _first_parameters(
    sites: Mapping[str, Site], params: Mapping[str, nnx.Variable], config: QuantConfig
) -> dict[str, Any]:
    """Returns theta and rho of a model's own contractions, before they are calibrated."""
    compand: dict[str, Any] = {}
    for name, site in sites.items():
        for operand in site.operands():
            rho = jnp.zeros((), jnp.float32)
            if operand == "weight":
                channels = site.scale_axes if site.group_size is None else ()
                rho = _first_rho(params[name][...], site, channels or (-1,), ())
            par.set_leaf(compand, par.scale_path(name, operand), rho)
            if (path := par.parameter_path(name, operand, config)) is not None:
                par.set_leaf(compand, path, par.first_theta(config, first_spec(site, operand)))
    return compand


def _first_rho(
    weight: Array, site: Site, channel_axes: tuple[int, ...], stack: tuple[int, ...]
) -> Array:
    """Returns rho of the largest magnitude of each layer's weight, or of each of its channels."""
    own = weight.shape[len(stack) :]
    of_zeros = first_rho(site, own, channel_axes)
    values = grouped(weight, stack + site.scale_shape(own), site.group_size)
    axes = tuple(i for i in range(len(stack) - values.ndim, 0) if i not in site.scale_axes)
    largest = jnp.max(jnp.abs(values), axes, initial=0.0, keepdims=bool(site.scale_axes))
    largest = largest.astype(jnp.float32)
    if site.weight_standardization:
        return jnp.full(largest.shape, of_zeros, jnp.float32)
    return jnp.where(largest > SMALLEST_SCALE, par.rho_from_scale(largest), of_zeros)


def set_static(module: Any, name: str, value: Any) -> None:
    """Sets an attribute of a module that was data before and is static now."""
    if hasattr(nnx, "static"):
        setattr(module, name, nnx.static(value))
        return
    # Flax 0.11 knows an attribute that was data as data ever after.
    object.__setattr__(module, "_pytree__nodes", module._pytree__nodes - {name})
    setattr(module, name, value)
