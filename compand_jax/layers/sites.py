"""What is static about a quantized layer: its bits, its grid, whether its activations have a sign.

It belongs to the model, not to its variables, and a checkpoint stores it beside them.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from compand_jax.core.families.registry import family_names
from compand_jax.core.spec import Spec, check_spec
from compand_jax.layers.config import (
    ACT_SITES,
    SCALE_DTYPES,
    QuantConfig,
    check_acts,
    check_group_size,
    check_weights,
    require_choice,
)
from compand_jax.layers.groups import (
    SCALE_AXES,
    bytes_of_scales,
    group_scale_shape,
    require_divides,
)
from compand_jax.layers.observation import Layer, Observer

_PRODUCT = re.compile(r"(.*/)?product_[0-9]+:(left|right)")


def checked_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a site's fields, axes as a tuple; raises ValueError where one is out of its range."""
    require_choice("quantizer", fields["quantizer"], family_names())
    check_weights(fields["weight_bits"], fields["grid"], fields["quantizer"])
    # One bit has no sign: that is checked where it is used, once calibration has decided.
    check_acts(fields["act_bits"], None)
    require_choice("act_site", fields["act_site"], ACT_SITES)
    require_choice("scale_dtype", fields["scale_dtype"], SCALE_DTYPES)
    if not isinstance(fields["act_signed"], bool):
        raise ValueError(f"`act_signed` must be True or False, got {fields['act_signed']!r}")
    if not isinstance(fields["weight_standardization"], bool):
        got = fields["weight_standardization"]
        raise ValueError(f"`weight_standardization` must be True or False, got {got!r}")
    axes = fields["scale_axes"]
    if not isinstance(axes, tuple | list) or not all(type(axis) is int for axis in axes):
        raise ValueError(f"`scale_axes` must be integers, got {axes!r}")
    if any(axis >= 0 for axis in axes) or len(set(axes)) < len(axes):
        raise ValueError(f"`scale_axes` must be negative, and each of them once, got {axes!r}")
    _check_group(fields["group_size"], fields["group_axis"], tuple(axes))
    return {**fields, "scale_axes": tuple(axes)}


def _check_group(size: Any, axis: Any, scale_axes: tuple[int, ...]) -> None:
    if size is not None:
        check_group_size("group_size", size)
    if axis is not None and (type(axis) is not int or axis >= 0 or size is None):
        raise ValueError(f"`group_axis` must be negative, and go with a group size, got {axis!r}")
    if size is not None and scale_axes != SCALE_AXES:
        raise ValueError(f"`scale_axes` must be (-3, -1) with groups, got {scale_axes!r}")


@dataclasses.dataclass(frozen=True)
class Site:
    """What is static about one quantized layer.

    Args:
      weight_bits: Bits per weight, 1 to 8. None is full precision.
      act_bits: Bits per activation, 1 to 8. None is full precision.
      quantizer: The family of levels.
      grid: The weights' grid, "midtread" or "midrise". Activations are always midtread.
      scale_axes: The weight's axes, counted from the end (-1 is the last), along which each index
        has a scale of its own. Without any, the weight has one scale.
      act_signed: Whether the activations can be negative.
      act_site: Which activations are quantized, the layer's "input" or its "output".
      weight_standardization: Whether the weight's scale counts its standard deviations.
      group_size: How many inputs share a scale, where `scale_axes` are those of a weight with an
        axis for its groups, (-3, -1) (`groups`); None without groups.
      group_axis: The last of the axes that inputs run along, from the end; None without groups.
      scale_dtype: What several scales are stored in.

    Raises:
      ValueError: a field is out of its range.
    """

    weight_bits: int | None
    act_bits: int | None
    quantizer: str = "mu_law"
    grid: str = "midtread"
    scale_axes: tuple[int, ...] = ()
    act_signed: bool = True
    act_site: str = "input"
    weight_standardization: bool = False
    group_size: int | None = None
    group_axis: int | None = None
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, value in checked_fields(vars(self)).items():
            object.__setattr__(self, name, value)

    def operands(self) -> tuple[str, ...]:
        """Returns which of "weight" and "act" are quantized."""
        bits = {"weight": self.weight_bits, "act": self.act_bits}
        return tuple(operand for operand in bits if bits[operand] is not None)

    def spec(self, operand: str) -> Spec:
        """Returns the quantizer of this site's "weight" or "act".

        Raises:
          ValueError: one bit for activations that have a sign.
        """
        if operand == "weight":
            return check_spec(self.weight_bits, True, self.grid, self.quantizer)
        if self.act_bits == 1 and self.act_signed:
            raise ValueError(
                "`act_bits` must be at least 2 for activations that have a sign, got 1: calibrate "
                "a model whose activations have none, or set act_signed=False"
            )
        return check_spec(self.act_bits, self.act_signed, "midtread", self.quantizer)

    def weight_bytes(self, size: int, scales: int, mus: int) -> int:
        """Returns the bytes of a weight that is stored: packed codes, scales, and mu.

        Args:
          size: How many weights there are.
          scales: How many scales.
          mus: How many mu of its own; it is of float32.
        """
        bits = self.spec("weight").bits
        several = scales > 1 and self.scale_axes
        of_scales = bytes_of_scales(scales, self.scale_dtype if several else "float32")
        return -(-size * bits // 8) + of_scales + 4 * mus

    def scale_shape(self, weight_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the weight's scale: () or the weight's, kept axes alone."""
        if self.group_size is not None and self.group_axis is not None:
            return group_scale_shape(weight_shape, self.group_size, self.group_axis)
        if not self.scale_axes:
            return ()
        ndim = len(weight_shape)
        return tuple(n if i - ndim in self.scale_axes else 1 for i, n in enumerate(weight_shape))


def site_from_config(
    config: QuantConfig, name: str, *, layer: Layer | None = None, has_act: bool = True
) -> Site:
    """Returns a site as it is configured, before calibration: its activations are signed.

    Without its layer, the axes that it has scales along are not known.
    """
    config = config.at(name)
    granularity = config.weight_granularity
    by_group = isinstance(granularity, int) and config.weight_bits is not None
    by_group = by_group and not is_product(name)
    channels, inputs = ((), ()) if layer is None else (layer.channel_axes, layer.input_axes)
    if by_group:
        channels = SCALE_AXES
    return Site(
        weight_bits=None if is_product(name) else config.weight_bits,
        act_bits=config.act_bits if has_act else None,
        quantizer=config.quantizer,
        grid=config.grid,
        scale_axes=channels if by_group or granularity == "channel" else (),
        act_signed=config.act_signed is not False,
        act_site=config.act_site,
        weight_standardization=config.weight_standardization,
        group_size=int(granularity) if by_group else None,
        group_axis=inputs[-1] if by_group and inputs else None,
        scale_dtype=config.scale_dtype if granularity != "tensor" else "float32",
    )


def first_spec(site: Site, operand: str) -> Spec:
    """Returns a quantizer before calibration, also of one bit, where this can show no sign."""
    if operand == "act" and site.act_bits == 1:
        site = dataclasses.replace(site, act_signed=False)
    return site.spec(operand)


def is_product(site: str) -> bool:
    """Returns whether a site is an operand of a product of two activations: it has no weight.

    >>> is_product("attention/product_0:left"), is_product("attention/query")
    (True, False)
    """
    return _PRODUCT.fullmatch(site) is not None


def sites_from_observers(config: QuantConfig, observers: Iterable[Observer]) -> dict[str, Site]:
    """Returns the sites of the layers that were observed.

    Raises:
      TypeError: what is to be quantized is complex.
      ValueError: there are none, or a rule of the config matches none of them.
    """
    observers = list(observers)
    layers: dict = {}
    with_act: set[str] = set()
    for observer in observers:
        layers.update(observer.layers)
        with_act |= observer.activations
        if config.act_site == "output":  # the last layer's output is the network's own
            with_act.discard(observer.last_site)
    if not layers:
        raise ValueError(
            "`model` must have a layer to quantize (Dense, DenseGeneral, Einsum, Conv, "
            "ConvTranspose, ConvLocal or Embed), found none: parameters that a module multiplies "
            "by itself are reached by QuantConfig(contractions='parameters')"
        )
    check_rules(config, layers)
    for layer in layers.values():
        _require_channels(config, layer)
    sites = {
        name: site_from_config(config, name, layer=layer, has_act=name in with_act)
        for name, layer in layers.items()
    }
    shapes = {name: x for observer in observers for name, x in observer.weight_shapes.items()}
    for name, site in sites.items():
        if site.group_size is not None and name in shapes:
            require_divides(name, site.group_size, shapes[name], layers[name].input_axes)
    for observer in observers:
        for name, types in observer.complex.items():
            for operand in types.keys() & sites[name].operands():
                require_real(name, operand, types[operand])
    return sites


def _require_channels(config: QuantConfig, layer: Layer) -> None:
    own = config.at(layer.site)
    is_asked = own.weight_granularity == "channel" and own.weight_bits is not None
    if is_asked and layer.mixed_axis is not None:
        raise ValueError(
            f"`weight_granularity` must be 'tensor' for site {layer.site!r}, got 'channel': its "
            f"axis {layer.mixed_axis} is summed over and is an output as well, in another "
            "contraction or after a reshape, so that it has no channels; give "
            f"Rule({layer.site!r}, weight_granularity='tensor')"
        )


def require_real(site: str, operand: str, dtype: Any) -> None:
    """Raises TypeError, naming the site, where what is to be quantized is complex."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        what = {"weight": "weights", "act": "activations"}[operand]
        raise TypeError(
            f"site {site!r} has {what} of type {jnp.dtype(dtype).name}, which cannot be quantized: "
            f"leave it in full precision by Rule({site!r}, weight_bits=None, act_bits=None)"
        )


def check_rules(config: QuantConfig, sites: Iterable[str]) -> None:
    """Raises ValueError, listing the sites, where a rule of the config matches none of them."""
    names = sorted(sites)
    for rule in config.rules:
        if not any(re.fullmatch(rule.pattern, name) for name in names):
            raise ValueError(
                f"`rules` must each match a site, {rule.pattern!r} matches none of "
                f"{', '.join(map(repr, names))}: correct its pattern, a regular expression"
            )


def check_signs(sites: Mapping[str, Site]) -> None:
    """Raises ValueError, naming the site, where activations of one bit have a sign."""
    for name, site in sites.items():
        if site.act_bits is not None:
            try:
                site.spec("act")
            except ValueError as error:
                raise ValueError(f"site {name!r}: {error}") from None


def check_sites(config: QuantConfig, sites: Mapping[str, Site]) -> None:
    """Raises ValueError, naming a site and a field, where a config contradicts calibrated sites.

    A site without activations may be one that has none to quantize (a look-up, the last layer), a
    product has no weight.
    """
    check_rules(config, sites)
    for name, site in sites.items():
        own = config.at(name)
        fields: dict[str, tuple[Any, Any]] = {}
        if not is_product(name):
            fields["weight_bits"] = site.weight_bits, own.weight_bits
        if site.operands():
            fields["quantizer"] = site.quantizer, own.quantizer
        if site.weight_bits is not None:
            fields["grid"] = site.grid, own.grid
            fields["weight_standardization"] = (
                site.weight_standardization,
                own.weight_standardization,
            )
        if site.weight_bits is not None and site.scale_axes:  # without, it may have no channels
            fields["weight_granularity"] = site.group_size or "channel", own.weight_granularity
            fields["scale_dtype"] = site.scale_dtype, own.scale_dtype
        if site.act_bits is not None:
            fields["act_bits"] = site.act_bits, own.act_bits
            fields["act_site"] = site.act_site, own.act_site
            if own.act_signed is not None:
                fields["act_signed"] = site.act_signed, own.act_signed
        for field, (calibrated, configured) in fields.items():
            if calibrated != configured:
                raise ValueError(
                    f"`sites` must be of the same config, site {name!r} was calibrated with "
                    f"{field}={calibrated!r}, the config has {configured!r}: give the config that "
                    "they were calibrated with, or calibrate again"
                )


def require_sites(sites: Any) -> None:
    """Raises TypeError where these are not sites by name."""
    if not isinstance(sites, Mapping):
        raise TypeError(
            f"`sites` must be a calibrated model's, got {type(sites).__name__}: calibrate it, or "
            "read them by sites_from_json"
        )
    for name, site in sites.items():
        if not isinstance(site, Site):
            raise TypeError(
                f"`sites` must be Site objects by name, got {type(site).__name__} at {name!r}: "
                "read them by sites_from_json"
            )
