"""A quantized NNX model for inference alone: one of its class, with packed codes for kernels."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flax import nnx
from flax.errors import TraceContextError
from jaxtyping import Array

from compand_jax.frozen.calls import Ways, call_arguments, call_compiled, call_results
from compand_jax.frozen.description import from_file, to_file
from compand_jax.frozen.file import read_sealed, write_sealed
from compand_jax.frozen.identity import Fixed
from compand_jax.frozen.nnx.layers import TABLES, expanded_layers, expanded_weight
from compand_jax.frozen.nnx.state import arrays_of
from compand_jax.frozen.sample import Signature
from compand_jax.frozen.summary import summarize_frozen
from compand_jax.frozen.tree import Arrays, FrozenSite


class FrozenModule(nnx.Module):
    """A quantized NNX model as packed codes and tables, made by `compand_jax.freeze`.

    Attributes:
      model: A model of the class that was frozen, used as ever: called, given to `nnx.jit`, put
        into `eval()`. Its quantized layers have `compand_jax.nnx.Codes` and `Table` variables in
        the place of their kernels, mu and scales, and expand them when they run.
      signature: The sample that it was frozen for.
      ways: How its calls run.
    """

    def __init__(self, model: nnx.Module, signature: Signature) -> None:
        self.model = model
        self.signature = Fixed(signature)
        self.ways = Ways()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the model returns, not compiled, as a call of any module."""
        return self.model(*args, **kwargs)

    def apply(
        self, *args: Any, method: str | Callable[..., Any] = "__call__", **kwargs: Any
    ) -> Any:
        """Returns what the quantized model's `nnx.jit`ted method returns, to within rounding.

        It is compiled, once for each shape of the arrays among the arguments. Python floats are
        traced as well, as `nnx.jit` does it. All other arguments are static: each new value
        compiles again. So does a float's where the model needs its value (as a rate of dropout). A
        model that returns objects that are no pytrees is not compiled. What the method changes
        of the model's state, such as a decoder's cache, is changed in place. In a transformation of
        jax that has the model from outside, such as `jax.grad(lambda x: frozen.apply(x).sum())`, it
        is not compiled by itself, and cannot change it.

        The codes are those of `quantize`, and a layer by itself gives the same bits. In a network,
        XLA rounds what lies between the layers by what it is compiled with, which differs here: by
        no more than 4 times float32's precision of the largest output. An activation that is so
        close to a threshold can take the level beyond it.

        Args:
          *args: As the model's method.
          method: The name of the method, or a function of the model and the arguments.
          **kwargs: As the model's method.

        Raises:
          ValueError: a weight is used by more than its layer, and the model was not frozen with a
            sample that shows it (an AttributeError where an attribute of the weight is asked for);
            or a stack's codes are not split as its parameters are.
        """
        compiled = functools.partial(_run, self)
        plain = functools.partial(_call, self)
        if _is_from_outside(self.model):
            return plain(method, *args, **kwargs)
        return call_compiled(compiled, plain, self.ways, (method, *args), kwargs, _is_node)

    def weight(self, site: str) -> Array:
        """Returns a site's weight as the levels of its codes, of its own shape and dtype.

        Args:
          site: Its name, such as "blocks/0/conv".

        Raises:
          ValueError: the site's weight is in full precision.
        """
        for _, own in expanded_layers(self.model):
            if own.layer.site == site and own.site.weight is not None:
                expand: Callable = expanded_weight
                for _ in own.stack:
                    expand = nnx.vmap(expand)
                return expand(own)
        raise ValueError(
            f"`site` must have a quantized weight, got {site!r} without one: its weight is "
            "among the variables"
        )

    @property
    def sites(self) -> dict[str, FrozenSite]:
        """What is static, by site."""
        return {own.layer.site: own.site for _, own in expanded_layers(self.model)}

    @property
    def arrays(self) -> Arrays:
        """Codes, tables, and what stays in full precision, as a file has them."""
        return arrays_of(self.model)

    def summary(self) -> str:
        """Returns a table of sizes as text, as `FrozenModel.summary`."""
        return summarize_frozen(self.sites, self.arrays)

    def save(
        self, path: str | Path, *, compress: bool = False, info: Mapping[str, Any] | None = None
    ) -> None:
        """Writes the model to a safetensors file, and reads it back as `load_frozen` does.

        The file has the format of `FrozenModel.save`. It holds all state but that of random
        streams (`nnx.RngState`): a model that draws numbers does so with its own.

        Args:
          path: Of the file. Whatever happens, it is complete or as it was before.
          compress: Whether to store codes by zlib where that takes fewer bytes.
          info: What else to write into the file, as JSON, such as how to make the model.

        Raises:
          OSError: the file cannot be written.
          ValueError: variables are of a type that the file does not hold, or `info` is no JSON.
        """
        description, arrays = to_file(
            self.sites, "input", self.signature.value, self.arrays, compress
        )
        write_sealed(
            path,
            description | {"info": dict(info or {})},
            arrays,
            lambda written: from_file(written, *read_sealed(written)),
        )


@functools.partial(nnx.jit, static_argnums=(2, 3))
def _run(frozen: FrozenModule, traced: list, structure: Any, static: tuple) -> Any:
    args, kwargs = call_arguments(traced, structure, static)
    return call_results(_call(frozen, *args, **kwargs))


def _call(frozen: FrozenModule, method: Any, *args: Any, **kwargs: Any) -> Any:
    function = getattr(type(frozen.model), method) if isinstance(method, str) else method
    return function(frozen.model, *args, **kwargs)


def _is_from_outside(model: nnx.Module) -> bool:
    """Whether a transformation of jax runs that a frozen model is no argument of.

    `nnx.jit` would set its state there, which is an error that leaves it without attributes.
    """
    variables = (getattr(own, kind) for _, own in expanded_layers(model) for kind in TABLES)
    first = next((variable for variable in variables if variable is not None), None)
    if first is None:
        return False
    try:
        first[...] = first[...]
    except TraceContextError:
        return True
    return False


def _is_node(x: Any) -> bool:
    """Whether an argument is Flax's own, such as `nnx.Rngs`, to be changed in place."""
    return isinstance(x, nnx.Pytree | nnx.Variable)
