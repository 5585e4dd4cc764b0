"""The proof that no layer of a model was missed.

`jax.jit` keeps the trace of a function from call to call. Where a user jits a layer by himself, a
trace from before would run without the interceptor, and the layer in full precision, silently. So
what a call runs is found once more, abstractly and by traces of its own, and compared.
"""

import functools
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.core import ShapedArray

from compand_jax.layers.observation import Observer
from compand_jax.linen.interception import intercept_layers
from compand_jax.linen.traces import no_trace_from_before


def layers_run(
    model: nn.Module, variables: Any, args: tuple, mutable: Any, kwargs: dict[str, Any]
) -> set[str]:
    """Returns the sites of the layers that `model.apply` runs with these arguments.

    It is found by an abstract evaluation, so that nothing is computed, and remembered. Every
    function that the model jits is traced afresh for it, whatever was cached.

    Raises:
      ValueError: a layer runs in a function whose trace `jax.jit` keeps from call to call.
    """
    leaves, structure = jax.tree.flatten((variables, args, kwargs))
    # Of the type that jax gives an array: int64 is int32 by default, and it may be sharded.
    signature = tuple(
        jax.typeof(x) if isinstance(x, (jax.Array, np.ndarray, np.generic)) else x for x in leaves
    )
    mutable = tuple(mutable) if isinstance(mutable, list) else mutable
    try:
        return _layers_run(model, structure, signature, mutable)
    except TypeError:  # a leaf, or a field of the model, that cannot be hashed
        return _layers_run.__wrapped__(model, structure, signature, mutable)


@functools.lru_cache(maxsize=1024)
def _layers_run(model: nn.Module, structure: Any, signature: tuple, mutable: Any) -> set[str]:
    arrays = [leaf for leaf in signature if isinstance(leaf, ShapedArray)]

    def call(arrays: list, observer: Observer) -> None:
        values = iter(arrays)
        leaves = [next(values) if isinstance(leaf, ShapedArray) else leaf for leaf in signature]
        variables, args, kwargs = jax.tree.unflatten(structure, leaves)
        with intercept_layers(model, observer) as intercepted:
            # What it returns is not looked at, and need not be arrays.
            intercepted.apply(variables, *args, mutable=mutable, **kwargs)

    observers = Observer(), Observer()
    with no_trace_from_before():
        for observer in observers:
            jax.eval_shape(functools.partial(call, observer=observer), arrays)
    # What is not traced again would be quantized by what is left of an earlier call, and leak.
    require_reached(observers[0].layers, observers[1].layers)
    return set(observers[0].layers)


def require_reached(run: Iterable[str], reached: Iterable[str]) -> None:
    """Raises ValueError, naming them, where layers that run were not reached."""
    if missed := set(run) - set(reached):
        raise ValueError(
            f"site {', '.join(map(repr, sorted(missed)))} runs but was not quantized: a trace of "
            "it that outlives the call was used; call it without its own jit"
        )
