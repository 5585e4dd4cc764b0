"""The call that a model is frozen for: shapes of arrays, and all else as it is."""

import inspect
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core.scope import DenyList

from compand_jax.frozen.file import is_shape

_APPLY_OPTIONS = ("rngs", "mutable", "capture_intermediates")
"""What Linen's `apply` takes for itself beside `method`, and not for the model's method."""

INPUT_TYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
               "bfloat16", "float16", "float32", "float64", "complex64", "complex128")  # fmt: skip
"""Types of a sample's arrays that a file can name."""

_MAX_DEPTH = 32


NOT_PARAMS = DenyList("params")


class Call(NamedTuple):
    """Arguments of a model's method: arrays as `jax.ShapeDtypeStruct`, all else as it was.

    It may change every collection but the parameters; no collection where Linen allows that alone
    (`nn.map_variables(..., init=True)` asks for all or none): that is `mutable=False`.
    """

    method: Any
    args: tuple
    kwargs: dict[str, Any]
    mutable: Any = NOT_PARAMS

    def arrays(self) -> list[jax.ShapeDtypeStruct]:
        """Returns the arrays among the arguments."""
        return [x for x in jax.tree.leaves((self.args, self.kwargs)) if _is_abstract(x)]

    def zeros(self) -> list[jax.Array]:
        """Returns arrays of zeros in their place."""
        return [jnp.zeros(x.shape, x.dtype) for x in self.arrays()]

    def with_arrays(self, arrays: list) -> tuple[tuple, dict[str, Any]]:
        """Returns the arguments with these arrays in place of the abstract ones."""
        values = iter(arrays)
        return jax.tree.map(
            lambda x: next(values) if _is_abstract(x) else x, (self.args, self.kwargs)
        )

    def run(self, model: nn.Module, variables: Any, arrays: list, key: jax.Array) -> Any:
        """Returns the method's outputs, and the collections that it may change."""
        args, options = self.options(arrays, key)
        found = model.apply(variables, *args, **options)
        return found if self.mutable else (found, {})

    def options(self, arrays: list, key: jax.Array) -> tuple[tuple, dict[str, Any]]:
        """Returns positional arguments and all others for `apply`."""
        args, kwargs = self.with_arrays(arrays)
        return args, {"rngs": key, "mutable": self.mutable, "method": self.method} | kwargs

    def as_it_runs(self, run: Callable[["Call"], Any]) -> "Call":
        """Returns this call, or the one that changes nothing where it alone runs."""
        try:
            run(self)
            return self
        except Exception as error:
            constant = self._replace(mutable=False)
            try:
                run(constant)
            except Exception:
                raise error from None
            return constant


class Signature(NamedTuple):
    """What a frozen model is known by.

    Attributes:
      call: The sample that it was frozen for; None in a file that cannot hold it.
      initial: Shapes of the variables that the model's `init` makes of the sample, by path; None
        where it makes none of it.
    """

    call: Call | None
    initial: Mapping[str, tuple[int, ...]] | None


def _is_abstract(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


def is_array(x: Any) -> bool:
    """Returns whether an argument is an array or a NumPy number; text and objects are neither."""
    if isinstance(x, jax.Array):
        return True
    return isinstance(x, np.ndarray | np.generic) and x.dtype.kind not in "USOMm"


def is_nnx(model: Any) -> bool:
    """Returns whether a model is one of NNX; whoever has one has imported `flax.nnx`."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(model, nnx.Module)


def result_arrays(results: Any) -> list[jax.Array]:
    """Returns the arrays among a model's results, for a trace to return."""
    return [x for x in jax.tree.leaves(results) if isinstance(x, jax.Array)]


def abstract_call(
    model: Any,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    own_options: tuple[str, ...] = _APPLY_OPTIONS,
) -> Call:
    """Returns the shapes of a call's arguments, and the types that jax gives them.

    Args:
      model: The module.
      args: Arguments of its method.
      kwargs: Arguments by name, and the `method`.
      own_options: Names of those that the method does not take.

    Raises:
      TypeError: the model's method does not take such arguments.
    """

    def abstract(x: Any) -> Any:
        if not is_array(x) and not _is_abstract(x):
            return x
        dtype = x.dtype
        if not jnp.issubdtype(dtype, jax.dtypes.extended):
            dtype = jax.dtypes.canonicalize_dtype(dtype)  # int64 is int32 to jax by default
        return jax.ShapeDtypeStruct(x.shape, dtype)

    method = kwargs.get("method") or "__call__"
    options = {name: x for name, x in kwargs.items() if name not in ("method", *own_options)}
    name = getattr(method, "__name__", None)
    if not isinstance(method, str) and name and getattr(type(model), name, None) is method:
        method = name  # a file can hold a name
    try:
        function = getattr(type(model), method) if isinstance(method, str) else method
        inspect.signature(function).bind(model, *args, **options)
    except (TypeError, AttributeError) as error:
        raise TypeError(
            f"`sample` must be the arguments of the model's {method}, got {len(args)} and "
            f"{sorted(options)} ({error}): give freeze an input, such as x, train=False"
        ) from None
    return Call(method, *jax.tree.map(abstract, (args, options)))


def call_to_json(call: Call) -> dict[str, Any] | None:
    """Returns a call as JSON can hold it; None where it cannot (a named tuple, an object)."""
    try:
        return {"method": _encode(call.method), "args": _encode(call.args),
                "kwargs": _encode(call.kwargs)}  # fmt: skip
    except TypeError:
        return None


def _encode(x: Any) -> list:
    if _is_abstract(x) and x.dtype.name in INPUT_TYPES:
        return ["array", list(x.shape), x.dtype.name]
    if x is None or type(x) in (bool, int, str) or (type(x) is float and math.isfinite(x)):
        return ["value", x]
    if isinstance(x, tuple | list) and type(x) in (tuple, list):
        return [type(x).__name__, [_encode(item) for item in x]]
    if isinstance(x, Mapping) and all(isinstance(name, str) for name in x):
        return ["dict", {name: _encode(item) for name, item in x.items()}]
    raise TypeError(f"no JSON for {type(x).__name__}")


def call_from_json(fields: Any) -> Call:
    """Returns the call that `call_to_json` wrote; ValueError where it is none."""
    if not isinstance(fields, dict) or fields.keys() != {"method", "args", "kwargs"}:
        raise ValueError("not the fields method, args, kwargs")
    method, args, kwargs = (_decode(fields[name]) for name in ("method", "args", "kwargs"))
    public = isinstance(method, str) and (method == "__call__" or not method.startswith("_"))
    if not public or type(args) is not tuple or type(kwargs) is not dict:
        raise ValueError("arguments of no method")
    return Call(method, args, kwargs)


def _decode(row: Any, depth: int = 0) -> Any:
    match row:
        case ["array", [*shape], str(dtype)] if dtype in INPUT_TYPES and is_shape(shape):
            own = jax.dtypes.canonicalize_dtype(jnp.dtype(dtype))
            return jax.ShapeDtypeStruct(tuple(shape), own)
        case ["value", None | bool() | int() | float() | str() as value]:
            return value
        case ["tuple" | "list" as kind, [*items]] if depth < _MAX_DEPTH:
            found = [_decode(item, depth + 1) for item in items]
            return tuple(found) if kind == "tuple" else found
        case ["dict", dict() as items] if depth < _MAX_DEPTH:
            return {name: _decode(item, depth + 1) for name, item in items.items()}
    raise ValueError("an argument that is none")
