"""Observing a full-precision model over batches, whatever framework it is of."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array, Bool

from compand_jax.calibration.samples import histogram
from compand_jax.layers.batches import all_finite, check_call, each_batch, labels_explained
from compand_jax.layers.observation import Layer, Observations, Observer

# A float32 matrix of second moments of so many inputs takes 256 MB.
_MOST_INPUTS = 8192

MakeObserver = Callable[..., Observer]
Run = Callable[[MakeObserver, Any, tuple], Observer]


def observe_batches(
    run: Run,
    variables: Any,
    batches: Any,
    method: Callable,
    keywords: Mapping[str, Any],
    *,
    at_output: bool,
    activations: bool,
    moments: bool,
    owner: str = "variables",
) -> Observations:
    """Returns what is seen of the full-precision model over the batches, in one pass.

    Args:
      run: called under `jax.jit` with what makes an observer, the variables and a batch's
        arguments, runs the model with the observer that it makes, and returns this.
      variables: the model's.
      batches: as `QuantizedModel.calibrate`.
      method: what a batch's arguments are those of.
      keywords: further arguments of it.
      at_output: whether a layer's activation is its output.
      activations: whether histograms of the activations are taken.
      moments: whether the second moments of the layers' inputs are taken.
      owner: the name of the argument that weights come from, for errors.

    Raises:
      TypeError: `batches` are none, or this is called under `jax.jit`.
      ValueError: there are no batches, one is empty, or a weight, a batch or an activation that is
        looked at is not finite.
    """
    make_observer = functools.partial(
        Observer,
        activation=histogram if activations else None,
        weight=lambda w: w,
        moments=_moments if moments else None,
        at_output=at_output,
    )
    seen = Observations(owner)

    def observe_batch(variables: Any, args: tuple) -> tuple[dict, Bool[Array, ""]]:
        observer = run(make_observer, variables, args)
        seen.observers.append(observer)
        return observer.traced, all_finite(args)

    jitted = jax.jit(observe_batch)
    for i, args in enumerate(each_batch(batches)):
        check_call(method, args, keywords)
        with labels_explained():
            traced, finite = jitted(variables, args)
        jax.effects_barrier()
        if not finite:
            raise ValueError(
                f"`batches` must be finite, got NaN or infinity in batch {i}, counting from 0: "
                "leave it out"
            )
        seen.add(traced, i)
    return seen


def _moments(layer: Layer, activation: jax.Array, shape: tuple[int, ...]) -> jax.Array | None:
    unrolling = layer.unrolling
    if unrolling is None or unrolling.inputs(shape) > _MOST_INPUTS:
        return None
    return unrolling.moments(activation, shape)
