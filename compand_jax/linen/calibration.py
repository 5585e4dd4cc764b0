"""Running a model over batches, for what calibration needs to know of it."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from compand_jax.calibration.error_feedback import round_with_feedback
from compand_jax.calibration.samples import (
    histogram,
)
from compand_jax.layers.batches import (
    all_finite,
    check_call,
    each_batch,
    labels_explained,
    require_concrete,
)
from compand_jax.layers.observation import Layer, Observations, Observer
from compand_jax.layers.sites import Site
from compand_jax.linen.batch_statistics import CHANGEABLE, whole_batches
from compand_jax.linen.observation import observe_layers

# A float32 matrix of second moments of so many inputs takes 256 MB.
_MOST_INPUTS = 8192


def observe(
    model: nn.Module,
    variables: Mapping[str, Any],
    batches: Any,
    model_kwargs: Mapping[str, Any],
    *,
    at_output: bool,
    activations: bool,
    moments: bool,
) -> Observations:
    """Returns what is seen of the full-precision model over the batches, in one pass.

    Args:
      model: the Linen module.
      variables: its collections.
      batches: as `QuantizedModel.calibrate`.
      model_kwargs: further arguments of the model's `apply`.
      at_output: whether a layer's activation is its output.
      activations: whether histograms of the activations are taken.
      moments: whether the second moments of the layers' inputs are taken.

    Raises:
      TypeError: `batches` are none, or this is called under `jax.jit`.
      ValueError: there are no batches, one is empty, or a weight, a batch or an activation that is
        looked at is not finite.
    """
    require_concrete("variables", variables)
    seen = Observations()

    def run(variables: Mapping, args: tuple) -> tuple[dict, Array]:
        make_observer = functools.partial(
            Observer,
            activation=histogram if activations else None,
            weight=lambda w: w,
            moments=_moments if moments else None,
            at_output=at_output,
        )
        with nn.intercept_methods(whole_batches):
            observer, _ = observe_layers(
                model,
                make_observer,
                # Statistics, caches and averages may change, of which nothing is kept.
                lambda model: model.apply(variables, *args, mutable=CHANGEABLE, **model_kwargs),
            )
        seen.observers.append(observer)
        return observer.traced, all_finite(args)

    jitted = jax.jit(run)
    method = model_kwargs.get("method") or "__call__"
    method = getattr(model, method) if isinstance(method, str) else functools.partial(method, model)
    for i, args in enumerate(each_batch(batches)):
        check_call(method, args, model_kwargs)
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


def _moments(layer: Layer, activation: jax.Array, weight: jax.Array) -> jax.Array | None:
    unrolling = layer.unrolling
    if unrolling is None or unrolling.inputs(weight.shape) > _MOST_INPUTS:
        return None
    return unrolling.moments(activation, weight.shape)


def feed_errors_back(
    params: Mapping[str, Any],
    quantizers: Mapping[str, Mapping[str, jax.Array]],
    sites: Mapping[str, Site],
    seen: Observations,
) -> Mapping[str, Any]:
    """Returns `params` with kernels on levels, rounded by `round_with_feedback`.

    Left as they are: kernels whose layer is not a matrix product with known inputs, and those
    that are not used as they are stored (under WeightNorm, or a mask).
    """

    def rounded(path: tuple, leaf: Any) -> Any:
        name, _, kind = jax.tree_util.keystr(path, simple=True, separator="/").rpartition("/")
        found = quantizers.get(name, {})
        if kind != "kernel" or "weight_scale" not in found:
            return leaf
        return _fed_back(leaf, found, sites[name], seen, name)

    return jax.tree_util.tree_map_with_path(rounded, params, is_leaf=_is_box)


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.meta.AxisMetadata)


def _fed_back(
    stored: Any, found: Mapping[str, jax.Array], site: Site, seen: Observations, name: str
) -> Any:
    """Returns a kernel's levels, in its box and on its devices; or itself, if it has to be left."""
    unrolling, kernel, own = seen.unrolled(name), seen.weights[name][0], nn.meta.unbox(stored)
    if unrolling is None or not np.array_equal(kernel, own):
        return stored
    rows = unrolling.rows(jnp.asarray(kernel, jnp.float32))
    scales = jnp.broadcast_to(found["weight_scale"].ravel(), rows[..., 0].size)
    round_group = functools.partial(round_with_feedback, spec=site.spec("weight"))
    rounded = jax.vmap(round_group, in_axes=(0, 0, None, 0))(
        rows,
        jnp.asarray(seen.moments[name]),
        found["weight_mu"],
        scales.reshape(rows.shape[:2]),
    )
    rounded = unrolling.weight(rounded, kernel.shape).astype(kernel.dtype)
    # What is where it would be anyhow stays free to be moved.
    if isinstance(own, jax.Array) and own.sharding != rounded.sharding:
        rounded = jax.device_put(rounded, own.sharding)
    return nn.meta.replace_boxed(stored, rounded)
