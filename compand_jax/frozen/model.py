"""A quantized model for inference alone: packed codes and tables of levels, no kernels."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jax import lax
from jaxtyping import Array

from compand_jax.frozen.description import from_file, to_file
from compand_jax.frozen.file import read_sealed, write_sealed, wrong_file
from compand_jax.frozen.folded_norms import NORM_LEAVES, shift_norms
from compand_jax.frozen.packing import (
    CARRIER,
    as_carrier,
    expand,
    from_carrier,
    nearest_level,
    unpack,
)
from compand_jax.frozen.summary import summarize_frozen
from compand_jax.frozen.tree import (
    Arrays,
    FrozenSite,
    FrozenWeight,
    Signature,
    flatten,
    join_path,
    leaf_path,
    split_path,
)
from compand_jax.layers.observation import Layer
from compand_jax.layers.parametrization import get_leaf, set_leaf, site_path
from compand_jax.linen.interception import intercept_layers
from compand_jax.linen.reach import layers_run, require_reached


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["arrays"],
    meta_fields=["model", "sites", "act_site", "signature"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class FrozenModel:
    """A quantized model as packed codes and tables, made by `compand_jax.freeze`.

    It is a value without state, and a pytree: given to a jitted function as an argument, its
    packed bytes are arguments of the compiled function. They are expanded layer by layer.

    Args:
      model: The Linen module.
      sites: What is static, by site.
      act_site: Which activations are quantized, "input" or "output".
      signature: Arguments that the model takes, where known.
      arrays: Codes, tables, and what stays in full precision; see `frozen_tree.Arrays`.
    """

    model: nn.Module
    sites: Mapping[str, FrozenSite]
    act_site: str
    signature: Signature | None
    arrays: Arrays

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the quantized model's jitted `apply` returns, bit for bit.

        It is compiled once for each shape of the arguments.

        Args:
          *args: The Linen module's arguments; arrays are traced, all else is static.
          **kwargs: As the Linen module's `apply` (`method`, `rngs`, `train=False`, ...).

        Raises:
          ValueError: a layer computes its weight from its parameters, and was frozen without an
            input to find it with; or a layer that the model runs was not reached.
        """
        leaves, structure = jax.tree.flatten((args, kwargs))
        is_array = tuple(isinstance(leaf, jax.Array | np.ndarray | np.generic) for leaf in leaves)
        traced = [leaf for leaf, traced in zip(leaves, is_array, strict=True) if traced]
        static = tuple(leaf for leaf, traced in zip(leaves, is_array, strict=True) if not traced)
        return _run(self, traced, structure, is_array, static)

    def apply_dense(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what `apply` does, not compiled, with weights expanded before the model runs.

        For converters, which know neither the types nor the calls that `apply` uses.
        """
        variables = self.variables(dense=True)
        visitor = _Expander(self, variables, dense=True)
        with intercept_layers(self.model, visitor) as model, shift_norms(self.shifts()):
            return model.apply(variables, *args, **kwargs)

    def variables(self, *, dense: bool = False) -> dict[str, Any]:
        """Returns the model's variables; where a kernel would be, its levels or carriers of codes.

        Args:
          dense: Whether to expand the codes.
        """
        tree: dict = {"params": {}}
        for name, value in self.arrays["variables"].items():
            set_leaf(tree, split_path(name), value)
        for site, frozen in self.sites.items():
            weight = frozen.weight
            if weight is None or weight.leaf is None:
                continue
            if weight.leaf_shape is not None:  # only its shape is looked at
                value = jnp.zeros(weight.leaf_shape, weight.dtype)
            elif dense:
                value = self.weight(site, selections=False)
            else:
                value = as_carrier(unpack(self.arrays["codes"][site], weight.bits, weight.shape))
            set_leaf(tree, leaf_path(site, weight.leaf), value)
        return tree


    def weight(
        self, site: str, *, selections: bool = True, after: Array | None = None
    ) -> Array:
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
            raise ValueError(f"`site` must have a quantized weight, got {site!r} without one")
        packed = _after(after, self.arrays["codes"][site])
        codes = unpack(packed, weight.bits, weight.shape)
        return self.expand(site, codes, selections=selections)

    def expand(self, site: str, codes: Array, *, selections: bool = True) -> Array:
        """Returns the levels of a site's codes, or of those of one layer of a stack."""
        weight = self.sites[site].weight
        assert weight is not None
        values = expand(codes, self.arrays["levels"][site], selections=selections)
        if weight.scale_shape:
            shape = (1,) * (codes.ndim - len(weight.scale_shape)) + weight.scale_shape
            values *= self.arrays["scales"][site].reshape(shape)
        return values.astype(weight.dtype)

    def shifts(self) -> dict[str, Array]:
        """Returns what is added in the place of every batch norm that is folded, by its name."""
        norms = {name: site.weight.norm for name, site in self.sites.items() if site.weight}
        return {norm: self.arrays["shifts"][name] for name, norm in norms.items() if norm}

    def summary(self) -> str:
        """Returns a table of sizes: a row per weight, one for what is in full precision, and all.

        Packed bytes and their tables' bytes; the entropy of the codes in bits, and the bytes that
        they would take under an ideal coder; the bytes in float32, and how many times as many
        those are. A file has a header besides.
        """
        return summarize_frozen(self.sites, self.arrays)

    def save(
        self, path: str | Path, *, compress: bool = False, info: Mapping[str, Any] | None = None
    ) -> None:
        """Writes the model to a safetensors file, which `load_frozen` reads.

        Args:
          path: Of the file; it is complete, or as it was before.
          compress: Whether to store codes by zlib where that takes fewer bytes.
          info: What else to write into its description, as JSON, such as how to make the model.

        Raises:
          OSError: the file cannot be written.
          ValueError: variables are of a type that the file does not hold, or `info` is no JSON.
        """
        description, arrays = to_file(
            self.sites, self.act_site, self.signature, self.arrays, compress
        )
        write_sealed(path, description | {"info": dict(info or {})}, arrays)


def load_frozen(path: str | Path, model: nn.Module) -> FrozenModel:
    """Returns the frozen model of a file that `FrozenModel.save` wrote.

    Args:
      path: Of the file; it is not trusted.
      model: The Linen module that was frozen.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is damaged, of another version or of another model.
    """
    description, stored = read_sealed(path)
    frozen = make_frozen(model, *from_file(path, description, stored))
    _check_model(path, frozen)
    return frozen


def read_info(path: str | Path) -> dict[str, Any]:
    """Returns the `info` that a file was saved with.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is damaged or of another version.
    """
    description, _ = read_sealed(path)
    if not isinstance(description.get("info"), dict):
        raise wrong_file(path, "no info")
    return description["info"]


def _check_model(path: str | Path, frozen: FrozenModel) -> None:
    """Raises ValueError where the model has other variables than the file, if that is known."""
    signature = frozen.signature
    if signature is None:
        return
    inputs = [jax.ShapeDtypeStruct(*row) for row in signature.inputs]
    options = dict(signature.options)

    def init(*args: Any) -> Any:
        return nn.meta.unbox(frozen.model.init(jax.random.key(0), *args, **options))

    try:
        variables = jax.eval_shape(init, *inputs)
    except Exception as error:  # whatever a model of other inputs raises
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"`model` must be the one that {path} was made of, got one that does not take its "
            f"inputs {signature.inputs}: {text}"
        ) from error
    own = {path: leaf.shape for path, leaf in flatten(variables)}
    found = jax.eval_shape(lambda: _with_all(frozen, frozen.variables()))
    got = {path: leaf.shape for path, leaf in flatten(found)}
    for name in frozen.shifts():  # it may have had no scale or bias
        for leaf in ("scale", "bias"):
            if ("params", *site_path(name), leaf) not in own:
                del got["params", *site_path(name), leaf]
    for name in sorted(own.keys() | got.keys()):
        if own.get(name) != got.get(name):
            raise ValueError(
                f"`model` must be the one that {path} was made of, got one with "
                f"{join_path(name)} of shape {own.get(name)}, not {got.get(name)}"
            )


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _run(frozen: FrozenModel, traced: list, structure: Any, is_array: tuple, static: tuple) -> Any:
    arrays, rest = iter(traced), iter(static)
    leaves = [next(arrays) if traced else next(rest) for traced in is_array]
    args, kwargs = jax.tree.unflatten(structure, leaves)
    variables = frozen.variables()
    mutable = kwargs.pop("mutable", False)
    runs = layers_run(frozen.model, _with_all(frozen, variables), args, mutable, kwargs)
    visitor = _Expander(frozen, variables)
    with intercept_layers(frozen.model, visitor) as model, shift_norms(frozen.shifts()):
        output = model.apply(variables, *args, mutable=mutable, **kwargs)
    require_reached(runs, visitor.visited)
    return output


def _with_all(frozen: FrozenModel, variables: dict) -> dict:
    """Returns the variables with kernels of their own type and with the batch norms' variables.

    For what looks at shapes and types alone.
    """
    kernels = jax.tree.map(lambda x: x, variables)
    for site, found in frozen.sites.items():
        if found.weight is not None and found.weight.leaf is not None:
            path = leaf_path(site, found.weight.leaf)
            shape = get_leaf(variables, path).shape
            set_leaf(kernels, path, jnp.zeros(shape, found.weight.dtype))
    for name, shift in frozen.shifts().items():
        for collection, leaf in NORM_LEAVES:
            set_leaf(kernels, (collection, *site_path(name), leaf), shift)
    return kernels


class _Expander:
    """The visitor that gives every layer its levels in place of its codes."""

    def __init__(self, frozen: FrozenModel, variables: dict, *, dense: bool = False) -> None:
        self._frozen, self._variables, self._dense = frozen, variables, dense
        self.visited: set[str] = set()

    def operands(
        self, layer: Layer, activation: Array | None, weight: Array
    ) -> tuple[Array | None, Array]:
        self.visited.add(layer.site)
        site = self._frozen.sites.get(layer.site, FrozenSite())
        if site.weight is not None:
            weight = self._expand(layer.site, site.weight, weight, activation)
        if activation is not None and self._frozen.act_site == "input":
            activation = self._quantize(layer.site, activation)
        return activation, weight

    def output(self, layer: Layer, output: Array) -> Array:
        return output if self._frozen.act_site == "input" else self._quantize(layer.site, output)

    def _expand(
        self, name: str, weight: FrozenWeight, operand: Array, activation: Array | None
    ) -> Array:
        if self._dense:
            return self._frozen.weight(name, selections=False) if weight.computed else operand
        if weight.computed or operand is self._leaf(name, weight):
            return self._frozen.weight(name, after=activation)
        if operand.dtype != CARRIER:
            raise ValueError(
                f"site {name!r} computes its weight from its parameters, and did not run when the "
                "model was frozen: freeze it with a sample that runs it"
            )
        # A part of the leaf in scan or vmap, or the leaf in a trace of its own.
        return self._frozen.expand(name, _after(activation, from_carrier(operand)))

    def _leaf(self, name: str, weight: FrozenWeight) -> Any:
        assert weight.leaf is not None
        return get_leaf(self._variables, leaf_path(name, weight.leaf))

    def _quantize(self, name: str, x: Array) -> Array:
        site = self._frozen.sites.get(name, FrozenSite())
        if site.act_bits is None:
            return x
        arrays = self._frozen.arrays
        levels, thresholds = arrays["act_levels"][name], arrays["act_thresholds"][name]
        return nearest_level(
            x, levels, thresholds, site.act_signed, selections=not self._dense
        )


def _after(x: Array | None, codes: Array) -> Array:
    """Returns the codes, at hand only when x is: or XLA expands all layers before the first.

    Its own means, `optimization_barrier`, is gone when the CPU backend orders operations. So the
    codes are combined with a zero of which only x tells that it is one.
    """
    return codes if x is None or x.size == 0 else _with_zero(lax.stop_gradient(x), codes)


@jax.custom_batching.custom_vmap
def _with_zero(x: Array, codes: Array) -> Array:
    first = x.reshape(-1)[0]
    return codes ^ ((first != first) & (first == first)).astype(codes.dtype)


@_with_zero.def_vmap
def _with_zero_of_batch(axis_size: int, batched: list, x: Array, codes: Array) -> tuple:
    if batched[1]:
        return codes, True
    return _with_zero(x[0] if batched[0] else x, codes), False


def make_frozen(
    model: nn.Module,
    sites: Mapping[str, FrozenSite],
    act_site: str,
    signature: Signature | None,
    arrays: Arrays,
) -> FrozenModel:
    """Returns the frozen model of these parts, its arrays copies of its own on the device.

    What the arrays came from may be donated to a train step, or written to, and not this model.
    """
    on_device = {
        kind: {name: jnp.array(x) for name, x in named.items()} for kind, named in arrays.items()
    }
    return FrozenModel(model, FrozenDict(sites), act_site, signature, on_device)
