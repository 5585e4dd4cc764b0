"""From packed codes back to weights, layer by layer, while the model runs."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from compand_jax.core._mesh import sharded_as
from compand_jax.frozen.folded_norms import NORM_LEAVES, shift_norms
from compand_jax.frozen.packing import (
    CARRIER,
    as_carrier,
    expand,
    from_carrier,
    nearest_level,
    unpack,
)
from compand_jax.frozen.tree import Arrays, FrozenSite, FrozenWeight, Path, nested, split_path
from compand_jax.layers.groups import expanded_scales, grouped
from compand_jax.layers.observation import Layer
from compand_jax.layers.parametrization import get_leaf
from compand_jax.linen.interception import intercept_layers
from compand_jax.linen.reach import layers_run, require_reached


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of a frozen model.

    Args:
      sites: What is static, by site.
      arrays: As `tree.Arrays`.
    """

    sites: Mapping[str, FrozenSite]
    arrays: Arrays

    def variables(self, *, dense: bool = False) -> dict[str, Any]:
        """Returns the model's variables; where a kernel would be, its levels or carriers of codes.

        Args:
          dense: Whether to expand the codes.
        """
        items = {split_path(name): value for name, value in self.arrays["variables"].items()}
        for site, path, weight in self.leaves():
            if weight.computed:  # its shape and type are looked at; a use of its values shows
                items[path] = jnp.full(weight.leaf_shape, jnp.nan, weight.leaf_dtype)
            elif dense:
                items[path] = self.weight(site, selections=False)
            else:
                items[path] = as_carrier(
                    unpack(self.arrays["codes"][site], weight.bits, weight.shape)
                )
        return {"params": {}} | nested(items.items())

    def leaves(self) -> list[tuple[str, Path, FrozenWeight]]:
        """Returns the sites that a variable is left out for, with its path."""
        weights = {name: site.weight for name, site in self.sites.items()}
        return [(name, split_path(w.leaf), w) for name, w in weights.items() if w and w.leaf]

    def weight(self, site: str, *, selections: bool = True, after: Array | None = None) -> Array:
        """Returns a site's weight, expanded from its codes.

        Args:
          site: Its name.
          selections: As `packing.expand`'s.
          after: What is to be computed before.

        Raises:
          ValueError: the site's weight is in full precision.
        """
        weight = self.sites.get(site, FrozenSite()).weight
        if weight is None:
            raise ValueError(
                f"`site` must have a quantized weight, got {site!r} without one: its weight is "
                "among the variables"
            )
        packed = codes_after(after, self.arrays["codes"][site])
        codes = unpack(packed, weight.bits, weight.shape)
        return self.expand(site, codes, selections=selections)

    def expand(self, site: str, codes: Array, *, selections: bool = True) -> Array:
        """Returns the levels of a site's codes, or of those of one layer of a stack."""
        weight = self.sites[site].weight
        assert weight is not None
        levels, scales = self.arrays["levels"][site], scales_of(self.arrays, site)
        return expand_codes(weight, codes, levels, scales, selections=selections)

    def shifts(self) -> dict[str, Array]:
        """Returns what is added in the place of every batch norm that is folded, by its path."""
        norms = {name: site.weight.norm for name, site in self.sites.items() if site.weight}
        return {norm: self.arrays["shifts"][name] for name, norm in norms.items() if norm}

    def shapes(self) -> dict[str, Any]:
        """Returns variables of the quantized model's shapes and types, of other values."""
        items = {split_path(name): value for name, value in self.arrays["variables"].items()}
        for _, path, weight in self.leaves():
            shape = weight.shape if weight.leaf_shape is None else weight.leaf_shape
            items[path] = jnp.zeros(shape, weight.leaf_dtype or weight.dtype)
        for name, shift in self.shifts().items():
            for collection, leaf in NORM_LEAVES:
                items[collection, *split_path(name), leaf] = shift
        return {"params": {}} | nested(items.items())


def run_expanded(
    model: nn.Module,
    weights: Weights,
    act_site: str,
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    dense: bool = False,
) -> Any:
    """Returns what `model.apply` does with quantized activations and weights from their codes.

    Args:
      model: The Linen module.
      weights: The frozen model's.
      act_site: Which activations are quantized, "input" or "output".
      args: The model's arguments.
      kwargs: Further arguments of `apply`.
      dense: Whether weights are expanded before the model runs, and not layer by layer.
    """
    options = {"mutable": False, **kwargs}
    others = {name: value for name, value in options.items() if name != "mutable"}
    runs = set()
    if not dense:
        runs = layers_run(model, weights.shapes(), args, options["mutable"], others)
    variables = weights.variables(dense=dense)
    visitor = Expander(weights, act_site, variables, dense=dense)
    with intercept_layers(model, visitor) as intercepted, shift_norms(weights.shifts()):
        output = intercepted.apply(variables, *args, **options)
    require_reached(runs, visitor.visited)
    return output


class Expander:
    """The visitor that gives every layer its levels in place of its codes.

    Args:
      weights: The frozen model's.
      act_site: Which activations are quantized, "input" or "output".
      variables: What the model is applied to.
      dense: Whether the variables hold weights in place of carriers.
    """

    def __init__(
        self, weights: Weights, act_site: str, variables: dict, *, dense: bool = False
    ) -> None:
        self._weights, self._act_site = weights, act_site
        self._variables, self._dense = variables, dense
        self.visited: set[str] = set()

    def operands(
        self, layer: Layer, activation: Array | None, weight: Array
    ) -> tuple[Array | None, Array]:
        """Returns the activation quantized, if it is at the input, and the weight expanded."""
        self.visited.add(layer.site)
        frozen = self._weights.sites.get(layer.site, FrozenSite()).weight
        if frozen is not None:
            expanded = self._expand(layer.site, frozen, weight, activation)
            if expanded.shape != weight.shape:
                raise ValueError(
                    f"site {layer.site!r} must multiply a weight of shape {expanded.shape}, as "
                    f"when it was frozen, got {weight.shape}"
                )
            weight = expanded
        if activation is not None and self._act_site == "input":
            activation = self._quantize(layer.site, activation)
        return activation, weight

    def output(self, layer: Layer, output: Array) -> Array:
        """Returns the output, quantized where activations are taken there."""
        return output if self._act_site == "input" else self._quantize(layer.site, output)

    def _expand(
        self, name: str, weight: FrozenWeight, operand: Array, activation: Array | None
    ) -> Array:
        if self._dense:
            return self._weights.weight(name, selections=False) if weight.computed else operand
        if weight.computed:
            return self._weights.weight(name, after=activation)
        assert weight.leaf is not None
        if operand is get_leaf(self._variables, split_path(weight.leaf)):
            return self._weights.weight(name, after=activation)
        if operand.dtype != CARRIER:
            raise ValueError(
                f"site {name!r} computes its weight from its parameters, and did not when the "
                "model was frozen: freeze it with a sample that runs it so"
            )
        # A part of the leaf in scan or vmap, or the leaf in a trace of its own.
        return self._weights.expand(name, codes_after(activation, from_carrier(operand)))

    def _quantize(self, name: str, x: Array) -> Array:
        site = self._weights.sites.get(name, FrozenSite())
        if site.act_bits is None:
            return x
        arrays = self._weights.arrays
        tables = arrays["act_levels"][name], arrays["act_thresholds"][name]
        return quantize_activation(name, x, tables, site.act_signed, selections=not self._dense)


def expand_codes(
    weight: FrozenWeight,
    codes: Array,
    levels: Array,
    scales: Array | None,
    *,
    selections: bool = True,
) -> Array:
    """Returns the levels of a weight's codes, or of those of one layer of a stack.

    Args:
      weight: What is static about it.
      codes: In the shape of the weight.
      levels: The table.
      scales: What its levels are multiplied with, if there is something.
      selections: As `packing.expand`'s.
    """
    values = expand(codes, levels, selections=selections)
    if scales is not None:
        values = grouped(values, scales.shape, weight.group_size)
        values *= scales.reshape((1,) * (values.ndim - scales.ndim) + scales.shape)
    return values.reshape(codes.shape).astype(weight.dtype)


def scales_of(arrays: Arrays, site: str, default: Any = None) -> Any:
    """Returns what a site's levels are multiplied with, float32; the default for nothing."""
    if site not in arrays["scales"]:
        return default
    return expanded_scales(arrays["scales"][site], arrays["scale_units"].get(site))


def quantize_activation(
    name: str, x: Array, tables: tuple[Array, Array], signed: bool, *, selections: bool = True
) -> Array:
    """Returns the level of every activation of a site.

    Args:
      name: The site's.
      x: The activations.
      tables: Levels and thresholds.
      signed: Whether values below zero have levels of their own.
      selections: As `packing.expand`'s.

    Raises:
      TypeError: they are of float64.
    """
    if x.dtype == jnp.float64:
        raise TypeError(
            f"activations must be of at most 32 bits in a frozen model, site {name!r} got "
            "float64: its tables are float32, and the quantized model's would not be; cast "
            "the inputs to float32"
        )
    return nearest_level(x, *tables, signed, selections=selections)


def codes_after(x: Array | None, codes: Array) -> Array:
    """Returns the codes, at hand only when x is: or XLA expands all layers before the first.

    Its own means, `optimization_barrier`, is gone when the CPU backend orders operations. So the
    codes are combined with a zero of which only x tells that it is one.
    """
    return codes if x is None or x.size == 0 else _with_zero(lax.stop_gradient(x), codes)


@jax.custom_batching.custom_vmap
@sharded_as(1)
def _with_zero(x: Array, codes: Array) -> Array:
    first = x.reshape(-1)[0]
    return codes ^ ((first != first) & (first == first)).astype(codes.dtype)


@_with_zero.def_vmap
def _with_zero_of_batch(axis_size: int, batched: list, x: Array, codes: Array) -> tuple:
    if batched[1]:
        return codes, True
    return _with_zero(x, codes), False  # of all examples' x the first number does as well
