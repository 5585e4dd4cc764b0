"""Batches as calibration is given them: what they must be, and how many examples are in one."""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool

_LABELS = (
    "a batch is the model's positional arguments; without labels it is [x for x, *_ in batches]"
)


def each_batch(batches: Any) -> Iterator[tuple]:
    """Yields each batch, of an iterable or a sequence, as the model's positional arguments.

    Raises:
      TypeError: `batches` is one array, or something else that is not made of batches.
      ValueError: there are none, or one of them has no examples.
    """
    if (shape := getattr(batches, "shape", None)) is not None:
        raise TypeError(
            f"`batches` must be several, got an array of shape {tuple(shape)}: give a list of "
            "batches, [batch] if there is one"
        )
    is_sequence = hasattr(batches, "__getitem__") and hasattr(batches, "__len__")
    if isinstance(batches, Mapping | str) or not (isinstance(batches, Iterable) or is_sequence):
        raise TypeError(
            f"`batches` must be several, got {type(batches).__name__}: give a list of batches"
        )
    if not isinstance(batches, Iterable):  # a data set, which may raise another than IndexError
        batches = map(batches.__getitem__, range(len(batches)))
    i = -1
    for i, batch in enumerate(batches):
        args = tuple(batch) if isinstance(batch, tuple) else (batch,)
        require_concrete("batches", args)
        if count_examples(args) == 0:
            raise ValueError(
                f"`batches` must have an example each, got none in batch {i}, counting from 0: "
                "leave it out"
            )
        yield args
    if i < 0:
        raise ValueError(
            "`batches` must hold at least one batch, got none: give a list, or an iterator that "
            "is not used up"
        )


def check_call(method: Callable, args: tuple, keywords: Mapping[str, Any]) -> None:
    """Raises TypeError where a batch holds more than a model's method takes, such as labels."""
    parameters = inspect.signature(method).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(args) > len(named):
        raise TypeError(
            f"`batches` must hold the {len(named)} positional arguments of the model, got "
            f"{len(args)}: {_LABELS}"
        )
    for parameter, value in zip(named, args, strict=False):
        is_flag = isinstance(parameter.default, bool) or parameter.annotation in (bool, "bool")
        if parameter.name in keywords or (is_flag and np.ndim(value) > 0):
            raise TypeError(
                f"`batches` must not hold the model's `{parameter.name}`, got an array of shape "
                f"{np.shape(value)} in its place: {_LABELS}"
            )


@contextlib.contextmanager
def labels_explained() -> Iterator[None]:
    """Adds to an error of the model what a batch is."""
    try:
        yield
    except Exception as error:  # whatever the model raises is passed on
        error.add_note(f"In calibration, {_LABELS}.")
        raise


def count_examples(args: tuple) -> int:
    """Returns the length of the leading axis of the model's first argument; 1 without axes.

    >>> count_examples((np.zeros((5, 4)), np.zeros(3)))
    5
    """
    first, *_ = jax.tree.leaves(args) or [0]
    return np.shape(first)[0] if np.ndim(first) else 1


def all_finite(args: tuple) -> Bool[Array, ""]:
    """Returns whether no floating-point array in a batch holds NaN or infinity."""
    arrays = [x for x in map(jnp.asarray, jax.tree.leaves(args))
              if jnp.issubdtype(x.dtype, jnp.floating)]  # fmt: skip
    return jnp.all(jnp.asarray([jnp.all(jnp.isfinite(x)) for x in arrays] or [True]))


def require_concrete(name: str, tree: Any) -> None:
    """Raises TypeError where a tree holds tracers, as inside of `jax.jit`."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree)):
        raise TypeError(
            f"`{name}` must be arrays with values, got tracers: calibration is no function to "
            "transform, call it outside of jax.jit, jax.grad and jax.vmap"
        )
