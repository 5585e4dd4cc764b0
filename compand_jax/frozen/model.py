"""A quantized model for inference alone: packed codes and tables of levels, no kernels."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jaxtyping import Array

from compand_jax.frozen.calls import Ways, call_arguments, call_compiled, call_results
from compand_jax.frozen.check import check_model
from compand_jax.frozen.description import from_file, to_file
from compand_jax.frozen.expansion import Weights, run_expanded
from compand_jax.frozen.file import read_sealed, write_sealed, wrong_file
from compand_jax.frozen.identity import Fixed
from compand_jax.frozen.sample import Call, Signature, abstract_call, is_nnx
from compand_jax.frozen.summary import summarize_frozen
from compand_jax.frozen.tree import Arrays, FrozenSite, flatten, join_path, split_path

if TYPE_CHECKING:
    from flax import nnx

    from compand_jax.frozen.nnx.model import FrozenModule


@dataclasses.dataclass(frozen=True, eq=False)
class FrozenModel:
    """A quantized model as packed codes and tables, made by `compand_jax.freeze`.

    It is a value without state, and a pytree: given to a jitted function as an argument, its
    packed bytes are arguments of the compiled function. They are expanded layer by layer.

    Args:
      model: The Linen module.
      sites: What is static, by site.
      act_site: Which activations are quantized, "input" or "output".
      signature: The sample that it was frozen for, and what the model makes of it.
      arrays: Codes, tables, and what stays in full precision; see `tree.Arrays`.
    """

    model: nn.Module
    sites: Mapping[str, FrozenSite]
    act_site: str
    signature: Signature
    arrays: Arrays

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the quantized model's jitted `apply` returns, to within rounding.

        It is compiled, once for each shape of the arrays among the arguments. Python floats are
        traced as well, as `jax.jit` does it. All other arguments are static: each new value
        compiles again. So does a float's where the model needs its value (as a rate of dropout). A
        model that returns objects that are no pytrees is not compiled.

        The codes are those of `quantize`, and a layer by itself gives the same bits. In a network,
        XLA rounds what lies between the layers by what it is compiled with, which differs here: by
        no more than 4 times float32's precision of the largest output. An activation that is so
        close to a threshold can take the level beyond it.

        Args:
          *args: As the Linen module's `apply`, without the variables.
          **kwargs: As the Linen module's `apply` (`method`, `rngs`, `train=False`, ...).

        Returns:
          The model's output; with `mutable`, a pair of it and of the collections that changed.

        Raises:
          ValueError: a layer computes its weight from its parameters, and did not run so when the
            model was frozen; or a layer that the model runs was not reached.
        """
        compiled = functools.partial(_run, self)
        return call_compiled(compiled, self._run, self._static.ways, args, kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        return run_expanded(self.model, self._weights, self.act_site, args, kwargs)

    def with_state(self, state: Mapping[str, Any]) -> "FrozenModel":
        """Returns this model with these collections in place of its own, such as a cache.

        So a model that keeps state is run on: a decoder, step by step, without compiling again,

            y, state = frozen.with_state(state).apply(token, mutable=["cache"])

        Args:
          state: Collections by name, as `apply` returns them with `mutable`. They are not copied.

        Raises:
          ValueError: a collection holds quantized weights, as "params" does.
        """
        quantized = {"params", *(path[0] for _, path, _ in self._weights.leaves())}
        if wrong := quantized.intersection(state):
            raise ValueError(
                "`state` must be of collections without quantized weights, got "
                f"{', '.join(map(repr, sorted(wrong)))}: freeze the model with those"
            )
        own = self.arrays["variables"].items()
        kept = {name: x for name, x in own if split_path(name)[0] not in state}
        given = {join_path(path): x for path, x in flatten(nn.meta.unbox(state))}
        return _unflatten(self._static, [{**self.arrays, "variables": kept | given}])

    def apply_dense(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what `apply` returns, not compiled, from weights expanded before the model runs.

        It is for converters, which do not know the types and calls that `apply` uses.
        """
        return run_expanded(self.model, self._weights, self.act_site, args, kwargs, dense=True)

    def variables(self, *, dense: bool = False) -> dict[str, Any]:
        """Returns the model's variables, with something else in the place of quantized kernels.

        Args:
          dense: Whether that is the kernel's levels, as an array of its shape and dtype. If not,
            it is the kernel's codes, in a form that only `apply` can use.
        """
        return self._weights.variables(dense=dense)

    def weight(self, site: str) -> Array:
        """Returns a site's weight as the levels of its codes, of its own shape and dtype.

        Args:
          site: Its name, such as "block1/conv2".

        Raises:
          ValueError: the site's weight is in full precision.
        """
        return self._weights.weight(site)

    def shifts(self) -> dict[str, Array]:
        """Returns by batch norm, of those that are folded, what is added in its place."""
        return self._weights.shifts()

    def summary(self) -> str:
        """Returns a table of sizes as text: a row per weight, one for full precision, and a sum.

        A row has the bytes of the packed codes and of their tables, the entropy of the codes in
        bits, the bytes that an ideal coder would need, the bytes in float32, and the ratio of
        those to all bytes here. A file has a header besides.
        """
        return summarize_frozen(self.sites, self.arrays)

    def save(
        self, path: str | Path, *, compress: bool = False, info: Mapping[str, Any] | None = None
    ) -> None:
        """Writes the model to a safetensors file, and reads it back as `load_frozen` does.

        Args:
          path: Of the file. Whatever happens, it is complete or as it was before.
          compress: Whether to store codes by zlib where that takes fewer bytes.
          info: What else to write into the file, as JSON, such as how to make the model.

        Raises:
          OSError: the file cannot be written.
          ValueError: variables are of a type that the file does not hold, or `info` is no JSON.
        """
        description, arrays = to_file(
            self.sites, self.act_site, self.signature, self.arrays, compress
        )
        write_sealed(
            path,
            description | {"info": dict(info or {})},
            arrays,
            lambda written: _load(written, self.model, self.signature.call),
        )

    @property
    def _weights(self) -> Weights:
        return Weights(self.sites, self.arrays)

    @functools.cached_property
    def _static(self) -> "_Static":
        return _Static((self.model, self.sites, self.act_site, self.signature))


class _Static(Fixed):
    """All of a frozen model but its arrays, and how its calls are found to run, by their shapes."""

    def __init__(self, value: tuple) -> None:
        super().__init__(value)
        self.ways = Ways()


def _flatten(frozen: FrozenModel) -> tuple[tuple, _Static]:
    return ((jax.tree_util.GetAttrKey("arrays"), frozen.arrays),), frozen._static


def _unflatten(static: _Static, children: Iterable[Any]) -> FrozenModel:
    frozen = FrozenModel(*static.value, *children)
    vars(frozen)["_static"] = static
    return frozen


jax.tree_util.register_pytree_with_keys(FrozenModel, _flatten, _unflatten)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _run(frozen: FrozenModel, traced: list, structure: Any, static: tuple) -> Any:
    args, kwargs = call_arguments(traced, structure, static)
    return call_results(frozen._run(*args, **kwargs))


def make_frozen(
    model: nn.Module,
    sites: Mapping[str, FrozenSite],
    act_site: str,
    signature: Signature,
    arrays: Arrays,
) -> FrozenModel:
    """Returns the frozen model of these parts, its arrays copies of its own on the device.

    What the arrays came from may be donated to a train step, or written to, and not this model.
    """
    on_device = {
        kind: {name: jax.tree.map(jnp.array, x) for name, x in named.items()}
        for kind, named in arrays.items()
    }
    return FrozenModel(model, FrozenDict(sites), act_site, signature, on_device)


@overload
def load_frozen(path: str | Path, model: nn.Module, *sample: Any, **kwargs: Any) -> FrozenModel: ...
@overload
def load_frozen(
    path: str | Path, model: "nnx.Module", *sample: Any, **kwargs: Any
) -> "FrozenModule": ...
def load_frozen(path: str | Path, model: Any, *sample: Any, **kwargs: Any) -> Any:
    """Returns the frozen model of a file that `save` wrote.

    Args:
      path: Of the file. It is not trusted: all of it is checked, and no code is read from it.
      model: The module that was frozen, in full precision; one of NNX with any weights, or with
        shapes alone, as `nnx.eval_shape` makes it. It is not changed.
      *sample: What `freeze` was given, only for a file that cannot hold it (named tuples,
        objects). An error says so where it is missing.
      **kwargs: Likewise.

    Returns:
      A `FrozenModel`, for NNX a `FrozenModule`, equal to the one that was saved.

    Raises:
      OSError: the file cannot be read.
      ValueError: the file is damaged, of another version or of another model; or it needs a sample.
    """
    if is_nnx(model):
        from compand_jax.frozen.nnx.load import load_module  # flax.nnx takes its time to import

        return load_module(path, model, sample, kwargs)
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise ValueError(
            f"`model` must be the Flax module that was frozen, got {got}: make it as for "
            "quantize_model or nnx.quantize"
        )
    try:
        given = abstract_call(model, sample, kwargs) if sample or kwargs else None
    except TypeError as error:
        raise ValueError(str(error)) from error
    return _load(path, model, given)


def _load(path: str | Path, model: nn.Module, given: Call | None) -> FrozenModel:
    """Returns a file's model; the call is the given one where the file has none."""
    description, stored = read_sealed(path)
    sites, act_site, signature, arrays = from_file(path, description, stored)
    if any(x.ndim > 1 for kind in ("levels", "act_levels") for x in arrays[kind].values()):
        raise ValueError(
            f"`model` must be of NNX for {path}, in which each layer of a stack has a table of its "
            "own, got one of Linen: give load_frozen the NNX model that was frozen"
        )
    if signature.call is None and given is None:
        raise ValueError(
            f"`sample` must be what the model was frozen with, {path} does not hold it: give it "
            "to load_frozen, load_frozen(path, model, *sample), or, where a model of NNX was "
            "frozen, that one"
        )
    signature = signature._replace(call=signature.call or given)
    frozen = make_frozen(model, sites, act_site, signature, arrays)
    check_model(path, model, frozen._weights, act_site, signature)
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
