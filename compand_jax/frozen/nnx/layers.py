"""What takes the places of a layer's weight and of its `promote_dtype` in a frozen NNX model."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array
from numpy.lib.mixins import NDArrayOperatorsMixin

from compand_jax.frozen.expansion import codes_after, expand_codes, quantize_activation
from compand_jax.frozen.packing import unpack
from compand_jax.frozen.tree import FrozenSite
from compand_jax.layers.groups import expanded_scales
from compand_jax.layers.observation import Layer
from compand_jax.layers.visitor import is_lookup, visited_operands
from compand_jax.nnx.layer_kinds import weight_name, weight_of
from compand_jax.nnx.quantized_model import layers_of, named_layers, set_static
from compand_jax.nnx.variables import Codes, Table

TABLES = {
    "codes": Codes,
    "levels": Table,
    "scales": Table,
    "scale_units": Table,
    "act_levels": Table,
    "act_thresholds": Table,
}
"""What a frozen layer has, as far as it needs it: kinds of `tree.Arrays`, and their variables."""


@dataclasses.dataclass(frozen=True)
class PackedWeight(NDArrayOperatorsMixin):
    """Stands where a weight was that its layer alone multiplies; nothing else can be done with it.

    Attributes:
      site: The layer's.
      shape: The weight's.
      dtype: The weight's.
    """

    site: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, index: Any) -> "PackedWeight":
        """Returns itself for [...], as layers ask for their weights."""
        if index is not Ellipsis:
            raise self._used_elsewhere()
        return self

    @property
    def ndim(self) -> int:
        """The weight's number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The weight's number of values."""
        return math.prod(self.shape)

    @property
    def value(self) -> "PackedWeight":
        """The same, for Flax 0.11."""
        return self

    def __len__(self) -> int:
        return self.shape[0]

    # A property, for jax to meet the error where it only asks whether there is such a method.
    @property
    def __jax_array__(self) -> Any:
        raise self._used_elsewhere()

    def __array_ufunc__(self, *args: Any, **kwargs: Any) -> Any:
        raise self._used_elsewhere()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python and numpy ask for what they can do without
            raise AttributeError(name)
        raise AttributeError(str(self._used_elsewhere()))

    def _used_elsewhere(self) -> ValueError:
        return ValueError(
            f"the weight of site {self.site!r} is in packed codes, for its layer alone, and is "
            "used otherwise too: give freeze a sample of the model's arguments that shows it, "
            "freeze(qmodel, x)"
        )


def take_weights(model: nnx.Module, layers: Iterable[Any]) -> set[int]:
    """Takes the weights out of layers of a model that nothing else in it has; returns their ids."""
    weights = {id(layer): weight_of(layer) for layer in layers}
    named = [(name, own) for name, own in named_layers(model).items() if id(own) in weights]
    for name, layer in named:
        x = weights[id(layer)]
        placed = PackedWeight(name, tuple(x.shape), jnp.dtype(x.dtype))
        set_static(layer, weight_name(layer), placed)
    left = {id(node) for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Variable)}
    for _, layer in named:
        weight = weights[id(layer)]
        if id(weight) in left:
            setattr(layer, weight_name(layer), nnx.data(weight))
    return {id(weight) for weight in weights.values()} - left


class Expansion(nnx.Module):
    """A layer's `promote_dtype` that gives it levels for codes, and quantizes what it multiplies.

    Attributes:
      promote: The layer's own.
      layer: What is known of the layer.
      site: What is static about its codes and its activations.
      stack: The axes that `nnx.vmap` put in front of the layer's weight.
      codes: The weight's, packed, those of each layer of a stack by themselves; None in full
        precision, as are the others that it does not need.
      levels: The table that the codes are indices into.
      scales: What the levels are multiplied with.
      scale_units: What scales of uint8 are multiples of.
      act_levels: The levels of activations.
      act_thresholds: What lies between them.
    """

    def __init__(
        self,
        promote: Callable,
        layer: Layer,
        site: FrozenSite,
        stack: tuple[int, ...],
        tables: Mapping[str, Array],
    ) -> None:
        self.promote = promote
        self.layer = layer
        self.site = site
        self.stack = stack
        for kind, variable in TABLES.items():
            found = variable(tables[kind]) if kind in tables else None
            setattr(self, kind, nnx.data(found))

    def __call__(self, operands: tuple, /, **kwargs: Any) -> Any:
        """Returns what the layer's own `promote_dtype` makes of the levels of the operands."""
        _check_one_layer(self)
        if self.site.weight is not None:
            at = not is_lookup(operands)
            expanded = expanded_weight(self, jnp.asarray(operands[0]) if at else None)
            _check_shape(self.layer.site, expanded, operands[at])
            operands = (*operands[:at], expanded, *operands[at + 1 :])
        return self.promote(visited_operands(_Activations(self), self.layer, operands), **kwargs)


# Functions beside the class: Flax tabulates whatever methods a module has.
def expanded_layers(model: nnx.Module) -> Iterator[tuple[Any, Expansion]]:
    """Yields the layers of a frozen model that have an `Expansion`, each with it."""
    for _, layer in layers_of(model):
        if isinstance(layer.promote_dtype, Expansion):
            yield layer, layer.promote_dtype


def tables_of(expansion: Expansion) -> dict[str, Array]:
    """Returns what an expansion has of `TABLES`."""
    found = {kind: getattr(expansion, kind) for kind in TABLES}
    return {kind: variable[...] for kind, variable in found.items() if variable is not None}


def expanded_weight(expansion: Expansion, after: Array | None = None) -> Array:
    """Returns the weight of a layer, in a stack of one of its layers, when `after` is at hand."""
    weight, tables = expansion.site.weight, tables_of(expansion)
    assert weight is not None
    shape = weight.shape[len(expansion.stack) :]
    codes = unpack(codes_after(after, tables["codes"]), weight.bits, shape)
    scales = tables.get("scales")
    if scales is not None:
        scales = expanded_scales(scales, tables.get("scale_units"))
    return expand_codes(weight, codes, tables["levels"], scales)


def _check_one_layer(expansion: Expansion) -> None:
    for kind in ("codes", "act_levels"):
        found = tables_of(expansion).get(kind)
        if found is not None and found.ndim != 1:
            raise ValueError(
                f"site {expansion.layer.site!r} must see the {kind} of one layer, of one axis, got "
                f"{found.shape}: what runs a stack of layers splits these variables as it does "
                "nnx.Param, such as "
                "nnx.StateAxes({(nnx.Param, compand_jax.nnx.Quantizer): 0, ...: None})"
            )


def _check_shape(name: str, expanded: Array, operand: Any) -> None:
    if not isinstance(operand, PackedWeight) and operand.shape != expanded.shape:
        raise ValueError(
            f"site {name!r} must multiply a weight of shape {expanded.shape}, as when it was "
            f"frozen, got {operand.shape}"
        )


class _Activations:
    """A visitor that quantizes activations, by the layer's `Expansion`."""

    def __init__(self, expansion: Expansion) -> None:
        self._own = expansion

    def operands(
        self, layer: Layer, activation: Array | None, weight: Array
    ) -> tuple[Array | None, Array]:
        """Returns the activation quantized, and the weight as it is."""
        tables = tables_of(self._own)
        if activation is not None and "act_levels" in tables:
            codebook = tables["act_levels"], tables["act_thresholds"]
            signed = self._own.site.act_signed
            activation = quantize_activation(layer.site, activation, codebook, signed)
        return activation, weight

    def output(self, layer: Layer, output: Array) -> Array:
        """Returns the output: a layer of NNX is not seen there."""
        return output
