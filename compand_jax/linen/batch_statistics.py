"""Batch norms' statistics, estimated anew from batches.

Each batch norm ends with the mean of what it saw, b, over batches and calls, an example weighing
as much as another:

    s <- s + n/(N + n) (b - s)        N <- N + n

n being the batch's examples and N those that the batch norm has counted. N is a variable beside its
statistics: only there does it follow them through scan, vmap and remat, where a body may be traced
once or often, however many times it runs.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.core.scope import DenyList
from flax.traverse_util import flatten_dict, unflatten_dict

from compand_jax.layers.batches import count_examples, each_batch

# What a model may change while it runs, and calibration throws away.
CHANGEABLE = DenyList(("params",))

_COUNT = "examples_counted"
# Other than a subclass's or a lifted class's, which call it in the end.
_BATCH_NORM = nn.BatchNorm.__call__.__wrapped__
# The devices of a mapped axis see a part of a batch each; here is the whole of it.
_ALONE = {"axis_name": None, "axis_index_groups": None}


def estimate_batch_stats(
    variables: Mapping[str, Any], batches: Any, update: Callable[[Mapping, tuple], Any]
) -> dict[str, Any]:
    """Returns `batch_stats` with, for the batch norms, the mean over the examples of what they see.

    Args:
      variables: the model's collections.
      batches: as `QuantizedModel.calibrate`.
      update: `update_batch_stats`, jitted, of a model.

    Raises:
      ValueError: there are no batches, or a statistic is not finite.
    """
    flat: dict[tuple, Any] = dict(flatten_dict(variables["batch_stats"]))
    # In the shape of the mean, and so divided among a stack's layers as it is.
    means = {path[:-1]: leaf for path, leaf in flat.items() if path[-1] == "mean"}
    counts = {(*module, _COUNT): jnp.zeros_like(mean) for module, mean in means.items()}
    given, stats = flat, {**flat, **counts}
    for args in each_batch(batches):
        updated = update({**variables, "batch_stats": unflatten_dict(stats)}, args)
        # What else is kept there, such as spectral norms' vectors, stays as it was.
        norms = {path: leaf for path, leaf in flatten_dict(updated).items() if path[:-1] in means}
        stats |= norms
    flat = {path: stats[path] for path in given}
    bad = ["/".join(path) for path, leaf in flat.items() if not np.all(np.isfinite(leaf))]
    if bad:
        raise ValueError(
            f"`batches` must give finite statistics, got NaN or infinity in {', '.join(bad)}: "
            "leave out what is not finite"
        )
    return unflatten_dict(flat)


def update_batch_stats(
    apply: Callable, variables: Mapping[str, Any], args: tuple, model_kwargs: Mapping
) -> Any:
    """Returns `batch_stats` and counts after one batch more; all else runs as it is called."""
    with nn.intercept_methods(_count(count_examples(args))):
        _, updates = apply(variables, *args, mutable=CHANGEABLE, **model_kwargs)
    return updates["batch_stats"]


def _count(examples: int) -> Callable:
    """Returns an interceptor with which batch norms average what they see, and normalize by it."""

    def interceptor(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        if context.orig_method.func is not _BATCH_NORM:
            return next_fun(*args, **kwargs)
        module = context.module
        counted = module.get_variable("batch_stats", _COUNT)
        module.put_variable("batch_stats", _COUNT, counted + examples)
        # Theirs is s <- m s + (1 - m) b.
        momentum = counted / (counted + examples)
        with _fields_set(module, use_running_average=None, momentum=momentum, **_ALONE):
            return next_fun(*args[:1], **{**kwargs, "use_running_average": False})

    return interceptor


def whole_batches(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    """Intercepts batch norms: their statistics are those of the batch, without a mapped axis."""
    if context.orig_method.func is not _BATCH_NORM:
        return next_fun(*args, **kwargs)
    with _fields_set(context.module, **_ALONE):
        return next_fun(*args, **kwargs)


@contextlib.contextmanager
def _fields_set(module: nn.Module, **fields: Any) -> Iterator[None]:
    stored = {name: getattr(module, name) for name in fields}
    for name, value in fields.items():
        object.__setattr__(module, name, value)
    try:
        yield
    finally:
        for name, value in stored.items():
            object.__setattr__(module, name, value)
