"""Running a model over batches, for what calibration needs to know of it."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from compand_jax.layers.batch_observation import MakeObserver, observe_batches
from compand_jax.layers.batches import require_concrete
from compand_jax.layers.observation import Observations, Observer
from compand_jax.layers.parameters import fed_back
from compand_jax.layers.sites import Site
from compand_jax.layers.visitor import Unchanged
from compand_jax.linen.batch_statistics import CHANGEABLE, whole_batches
from compand_jax.linen.contractions import trace_model
from compand_jax.linen.observation import observe_layers


def observe(
    model: nn.Module,
    variables: Mapping[str, Any],
    batches: Any,
    model_kwargs: Mapping[str, Any],
    *,
    at_output: bool,
    activations: bool,
    moments: bool,
    contractions: str = "layers",
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
      contractions: which are looked at beside the layers, as in `QuantConfig`.

    Raises:
      TypeError: `batches` are none, or this is called under `jax.jit`.
      ValueError: there are no batches, one is empty, or a weight, a batch or an activation that is
        looked at is not finite.
    """
    require_concrete("variables", variables)

    def run(make_observer: MakeObserver, variables: Mapping, args: tuple) -> Observer:
        with nn.intercept_methods(whole_batches):
            observer, _ = observe_layers(
                model,
                make_observer,
                # Statistics, caches and averages may change, of which nothing is kept.
                lambda model: model.apply(variables, *args, mutable=CHANGEABLE, **model_kwargs),
            )
        if contractions != "layers":
            # Once more: what a layer does twice is compiled once.
            with nn.intercept_methods(whole_batches):
                trace_model(
                    model, Unchanged(), variables, args, CHANGEABLE, model_kwargs, contractions
                ).observed(observer)
        return observer

    method = model_kwargs.get("method") or "__call__"
    method = getattr(model, method) if isinstance(method, str) else functools.partial(method, model)
    return observe_batches(
        run,
        variables,
        batches,
        method,
        model_kwargs,
        at_output=at_output,
        activations=activations,
        moments=moments,
    )


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
        whole = jax.tree_util.keystr(path, simple=True, separator="/")
        name, _, kind = whole.rpartition("/")
        if whole in quantizers:  # the module multiplies it by itself
            name, kind = whole, "kernel"
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
    """Returns a kernel's levels, in its box; or itself, if it has to be left."""
    kernel, own = seen.weights[name][0], nn.meta.unbox(stored)
    if not np.array_equal(kernel, own):
        return stored
    rounded = fed_back(own, found, site, seen, name)
    return stored if rounded is None else nn.meta.replace_boxed(stored, rounded)
