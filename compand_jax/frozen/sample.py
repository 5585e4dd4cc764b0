"""The call that a model is frozen for: shapes of arrays, and all else as it is."""

import inspect
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

_APPLY_OPTIONS = ("method", "rngs", "mutable", "capture_intermediates")
"""What Linen's `apply` takes for itself, and not for the model's method."""


class Call(NamedTuple):
    """Arguments of a model's method: arrays as `jax.ShapeDtypeStruct`, all else as it was."""

    method: Any
    args: tuple
    kwargs: dict[str, Any]

    def run(self, model: nn.Module, variables: Any) -> Any:
        """Returns the outputs of the method, and all collections, on arrays of zeros."""
        args, kwargs = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x,
            (self.args, self.kwargs),
        )
        return model.apply(
            variables, *args, rngs=jax.random.key(0), mutable=True, method=self.method, **kwargs
        )


def abstract_call(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Call:
    """Returns the shapes of a call's arguments.

    Raises:
      TypeError: the model's method does not take such arguments.
    """

    def abstract(x: Any) -> Any:
        is_array = isinstance(x, jax.Array | np.ndarray | np.generic)
        return jax.ShapeDtypeStruct(x.shape, x.dtype) if is_array else x

    method = kwargs.get("method") or "__call__"
    function = getattr(type(model), method) if isinstance(method, str) else method
    options = {k: v for k, v in kwargs.items() if k not in _APPLY_OPTIONS}
    try:
        inspect.signature(function).bind(model, *args, **options)
    except TypeError as error:
        raise TypeError(
            f"`sample` must be the arguments of the model's {method}, got {len(args)} and "
            f"{sorted(options)} ({error}): give freeze an input, freeze(qmodel, variables, x)"
        ) from None
    return Call(method, *jax.tree.map(abstract, (args, options)))
