"""A call of a frozen model, compiled: arrays among its arguments are traced, all else is static."""

from collections.abc import Callable
from typing import Any

import jax

from compand_jax.frozen.identity import Fixed
from compand_jax.frozen.sample import is_array

_TRACED, _CONSTANT, _NOT_COMPILED = range(3)
"""How a call runs: its Python floats traced, its Python floats constants, or not compiled."""


class Ways:
    """How calls are found to run, by their shapes; equal to any other, whatever was found."""

    def __init__(self) -> None:
        self.found: dict[Any, int] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ways)

    def __hash__(self) -> int:
        return hash(Ways)


def call_compiled(
    compiled: Callable[[list, Any, tuple], Any],
    plain: Callable[..., Any],
    ways: Ways,
    args: tuple,
    kwargs: dict[str, Any],
    is_node: Callable[[Any], bool] = lambda x: False,
) -> Any:
    """Returns what a function returns, compiled, or not where it returns objects.

    Args:
      compiled: The function, jitted: of the traced arguments, the structure of all, and the static
        ones. It calls `call_arguments` with these, and returns `call_results`.
      plain: The function itself.
      ways: Those of the function.
      args: Its arguments.
      kwargs: Its arguments by name.
      is_node: Tells objects that are traced as a whole.
    """
    leaves, structure = jax.tree.flatten((args, kwargs), is_leaf=is_node)
    found = ways.found
    known = found.get(_call_key(leaves, structure), _TRACED) if found else _TRACED
    way = known
    while True:
        try:
            output = _call(compiled, plain, leaves, structure, way, is_node)
        except _ObjectError:
            way = _NOT_COMPILED
        except Exception:  # whatever a model raises that needs a float's value
            if way != _TRACED or float not in map(type, leaves):
                raise
            way = _CONSTANT
        else:
            if way != known:
                found[_call_key(leaves, structure)] = way
            return output


def _call(
    compiled: Callable, plain: Callable, leaves: list, structure: Any, way: int, is_node: Callable
) -> Any:
    if way == _NOT_COMPILED:
        args, kwargs = jax.tree.unflatten(structure, leaves)
        return plain(*args, **kwargs)
    traced = [is_array(x) or is_node(x) or (way == _TRACED and type(x) is float) for x in leaves]
    static = tuple(None if t else Fixed(x) for x, t in zip(leaves, traced, strict=True))
    arrays = [x for x, t in zip(leaves, traced, strict=True) if t]
    output = compiled(arrays, structure, static)
    return jax.tree.map(
        lambda x: x.value if isinstance(x, _Constant) else x, output, is_leaf=_is_constant
    )


def call_arguments(traced: list, structure: Any, static: tuple) -> tuple[tuple, dict[str, Any]]:
    """Returns a call's arguments, of what `call_compiled` made of them."""
    arrays = iter(traced)
    leaves = [next(arrays) if fixed is None else fixed.value for fixed in static]
    return jax.tree.unflatten(structure, leaves)


def call_results(output: Any) -> Any:
    """Returns what a jitted function may return in place of a model's output."""
    return jax.tree.map(_result, output)


@jax.tree_util.register_static
class _Constant:
    """What a model returns and is no array: text, a number."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _is_constant(x: Any) -> bool:
    return isinstance(x, _Constant)


class _ObjectError(Exception):
    """The model returns an object, which may hold arrays of the trace."""


def _result(x: Any) -> Any:
    if is_array(x):
        return x
    if isinstance(x, str | bytes | bool | int | float | complex | type):
        return _Constant(x)
    raise _ObjectError


def _call_key(leaves: list, structure: Any) -> tuple:
    """Returns what tells a call from one that may have to run in another way."""

    def key(x: Any) -> Any:
        if is_array(x):
            return x.shape, x.dtype
        return float if type(x) is float else Fixed(x)

    return structure, tuple(map(key, leaves))
