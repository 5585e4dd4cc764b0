"""What a model was last called with, in shapes: for what can only be seen by running it again.

Where a layer computes its weight from its parameters (WeightNorm), the weight is found by running
the model, and so by an input of the right shape. No value is kept.
"""

import collections
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

_MAX_MODELS = 64


class Call(NamedTuple):
    """Arguments of a model's method: arrays as `jax.ShapeDtypeStruct`, all else as it was."""

    args: tuple
    kwargs: dict[str, Any]

    def zeros(self) -> "Call":
        """Returns these arguments with arrays of zeros."""
        return jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x,
            self,
        )


# By the model, or by its identity where it cannot be hashed: it is kept for that to be its own.
_calls: collections.OrderedDict[Any, tuple[nn.Module, dict[str, Call]]] = collections.OrderedDict()


def remember_call(model: nn.Module, method: str, args: tuple, kwargs: dict[str, Any]) -> None:
    """Keeps the shapes of a call; not where a lifted model calls its method by another name."""
    if not hasattr(type(model), method):
        return
    key = _key(model)
    _, calls = _calls.setdefault(key, (model, {}))
    _calls.move_to_end(key)
    if len(_calls) > _MAX_MODELS:
        _calls.popitem(last=False)
    calls[method] = abstract_call(args, kwargs)


def remembered_calls(model: nn.Module) -> dict[str, Call]:
    """Returns the last call of each of the model's methods that was called, by its name."""
    _, calls = _calls.get(_key(model), (model, {}))
    return calls


def _key(model: nn.Module) -> Any:
    try:
        hash(model)
    except TypeError:
        return id(model)
    return model


def abstract_call(args: tuple, kwargs: dict[str, Any]) -> Call:
    """Returns the shapes of a call's arguments."""

    def abstract(x: Any) -> Any:
        is_array = isinstance(x, jax.Array | np.ndarray | np.generic)
        return jax.ShapeDtypeStruct(x.shape, x.dtype) if is_array else x

    return Call(*jax.tree.map(abstract, (args, kwargs)))
