"""What is static about a quantized layer: its bits, its grid, whether its activations have a sign.

It belongs to the model, not to its variables, and a checkpoint stores it beside them.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from compand_jax.core.codebooks import Spec, check_spec
from compand_jax.layers.config import QuantConfig
from compand_jax.layers.observation import Observer


@dataclasses.dataclass(frozen=True)
class Site:
    """One quantized layer. Bits are None where it is in full precision.

    Args:
      weight_bits: Bits per weight.
      act_bits: Bits per activation.
      quantizer: "mu_law" or "uniform".
      grid: The weights' grid, "midtread" or "midrise"; activations are midtread.
      scale_axes: The weight's axes, from the end, that have a scale of their own each.
      act_signed: Whether the activations have a sign.
    """

    weight_bits: int | None
    act_bits: int | None
    quantizer: str = "mu_law"
    grid: str = "midtread"
    scale_axes: tuple[int, ...] = ()
    act_signed: bool = True

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
            return check_spec(self.weight_bits, True, self.grid)
        if self.act_bits == 1 and self.act_signed:
            raise ValueError(
                "`act_bits` must be at least 2 for activations that have a sign, got 1: calibrate "
                "a model whose activations have none, or set act_signed=False"
            )
        return check_spec(self.act_bits, self.act_signed)

    def scale_shape(self, weight_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the weight's scale: () or the weight's, kept axes alone."""
        if not self.scale_axes:
            return ()
        ndim = len(weight_shape)
        return tuple(n if i - ndim in self.scale_axes else 1 for i, n in enumerate(weight_shape))


def site_from_config(
    config: QuantConfig, name: str, *, channel_axes: tuple[int, ...] = (), has_act: bool = True
) -> Site:
    """Returns a site as it is configured, before calibration: its activations are signed."""
    config = config.at(name)
    return Site(
        weight_bits=config.weight_bits,
        act_bits=config.act_bits if has_act else None,
        quantizer=config.quantizer,
        grid=config.grid,
        scale_axes=channel_axes if config.weight_granularity == "channel" else (),
        act_signed=config.act_signed is not False,
    )


def sites_from_observers(config: QuantConfig, observers: Iterable[Observer]) -> dict[str, Site]:
    """Returns the sites of the layers that were observed.

    Raises:
      ValueError: there are none, or a rule of the config matches none of them.
    """
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
            "ConvTranspose, ConvLocal or Embed), found none"
        )
    check_rules(config, layers)
    return {
        name: site_from_config(
            config, name, channel_axes=layer.channel_axes, has_act=name in with_act
        )
        for name, layer in layers.items()
    }


def check_rules(config: QuantConfig, sites: Iterable[str]) -> None:
    """Raises ValueError, listing the sites, where a rule of the config matches none of them."""
    names = sorted(sites)
    for rule in config.rules:
        if not any(re.fullmatch(rule.pattern, name) for name in names):
            raise ValueError(
                f"`rules` must each match a site, {rule.pattern!r} matches none of "
                f"{', '.join(map(repr, names))}"
            )


def check_signs(sites: Mapping[str, Site]) -> None:
    """Raises ValueError, naming the site, where activations of one bit have a sign."""
    for name, site in sites.items():
        if site.act_bits is not None:
            try:
                site.spec("act")
            except ValueError as error:
                raise ValueError(f"site {name!r}: {error}") from None


def sites_to_json(sites: Mapping[str, Site]) -> dict[str, dict[str, Any]]:
    """Returns sites as what JSON can hold; `sites_from_json` is the inverse."""
    return {name: dataclasses.asdict(site) for name, site in sites.items()}


def sites_from_json(data: Mapping[str, Mapping[str, Any]]) -> dict[str, Site]:
    """Returns the sites that `sites_to_json` wrote."""
    return {
        name: Site(**{**fields, "scale_axes": tuple(fields["scale_axes"])})  # JSON has lists only
        for name, fields in data.items()
    }
