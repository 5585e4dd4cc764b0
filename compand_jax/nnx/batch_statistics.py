"""Batch norms' statistics, estimated anew from batches.

Each batch norm ends with the mean of what it saw, an example weighing as much as another, as
`compand_jax.linen.batch_statistics` has it. How many it has counted is a variable of its own, so
that it follows the statistics through scan, vmap and remat.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from compand_jax.layers.batches import count_examples, each_batch

# Of each batch norm: its mean, its variance, and the examples that it has counted.
Statistics = list[tuple[Array, Array, Array]]


class _Count(nnx.BatchStat):
    """How many examples a batch norm has counted, in the shape of its mean."""


class _Averaging(nnx.BatchNorm):
    """A batch norm that averages what it sees, and normalizes by what it sees.

    Attributes:
      counted: The examples counted so far.
      examples: Those of the batch.
    """

    counted: _Count
    examples: int

    def __call__(self, x: Array, use_running_average: bool | None = None, **kwargs: Any) -> Array:
        """Returns what training's batch norm does."""
        total = self.counted[...] + self.examples
        momentum = self.momentum
        # Theirs is s <- m s + (1 - m) b.
        object.__setattr__(self, "momentum", self.counted[...] / total)
        try:
            return super().__call__(x, use_running_average=False, **kwargs)
        finally:
            object.__setattr__(self, "momentum", momentum)
            self.counted[...] = total


@functools.lru_cache(maxsize=1024)
def _averaging(kind: type[nnx.BatchNorm]) -> type[nnx.BatchNorm]:
    """Returns a class of batch norms as one that averages; a subclass calls it in the end."""
    if kind is nnx.BatchNorm:
        return _Averaging
    return types.new_class(kind.__name__, (kind, _Averaging))


def estimate_batch_stats(
    model: nnx.Module, batches: Any, call: Callable[[Any, tuple], Any]
) -> None:
    """Sets the batch norms' statistics to the mean over the examples of what they see.

    Raises:
      ValueError: there are no batches, or a statistic is not finite.
    """
    norms = _batch_norms(model)
    if not norms:
        return
    graphdef, state = nnx.split(model)

    @jax.jit
    def update(state: Any, statistics: Statistics, args: tuple) -> Statistics:
        copy = nnx.merge(graphdef, state)
        whole_batches(copy)
        copies = _batch_norms(copy)
        for norm, (mean, var, counted) in zip(copies, statistics, strict=True):
            norm.mean[...], norm.var[...] = mean, var
            norm.counted, norm.examples = _Count(counted), count_examples(args)
            object.__setattr__(norm, "__class__", _averaging(type(norm)))
        call(copy, args)
        return [(norm.mean[...], norm.var[...], norm.counted[...]) for norm in copies]

    statistics = [(norm.mean[...], norm.var[...], jnp.zeros_like(norm.mean[...])) for norm in norms]
    for args in each_batch(batches):
        statistics = update(state, statistics, args)
    for norm, (mean, var, _) in zip(norms, statistics, strict=True):
        if not np.all(np.isfinite([mean, var])):
            raise ValueError(
                "`batches` must give finite statistics, a batch norm's are NaN or infinity: leave "
                "out what is not finite"
            )
        norm.mean[...], norm.var[...] = mean, var


def whole_batches(model: nnx.Module) -> None:
    """Makes batch norms take the statistics of the batch, without a mapped axis."""
    for norm in _batch_norms(model):
        norm.axis_name = norm.axis_index_groups = None


def _batch_norms(model: nnx.Module) -> list[Any]:
    return [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.BatchNorm)]
