"""Running a model over batches, for what calibration needs to know of it."""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from compand_jax import parametrization as par
from compand_jax.calibration import Group, fit_groups
from compand_jax.config import QuantConfig
from compand_jax.error_feedback import round_with_feedback
from compand_jax.interception import Layer, Observer, intercept_layers
from compand_jax.samples import (
    Histogram,
    Sample,
    histogram,
    merge_histograms,
    sample_from_histogram,
    sample_from_moments,
    sample_from_weights,
)
from compand_jax.sites import Site
from compand_jax.unrolling import Unrolling

# A float32 matrix of second moments of so many inputs takes 256 MB.
_MOST_INPUTS = 8192


@dataclasses.dataclass
class Observations:
    """What was seen of a model.

    Attributes:
      observers: what saw it, one for each trace.
      weights: by site, as they are used: one, or those of a stack of layers.
      activations: by site, their histogram.
      moments: by site, the second moments of a layer's inputs, [groups, n, n], where asked for.
    """

    observers: list[Observer] = dataclasses.field(default_factory=list)
    weights: dict[str, list[np.ndarray]] = dataclasses.field(default_factory=dict)
    activations: dict[str, Histogram] = dataclasses.field(default_factory=dict)
    moments: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def unrolled(self, site: str) -> Unrolling | None:
        """Returns how a site is a product with inputs whose moments are known, or None."""
        if site not in self.moments or len(self.weights[site]) != 1:
            return None  # the moments of a stack's layers cannot be told apart
        if not np.all(np.isfinite(self.moments[site])) or not np.any(self.moments[site]):
            return None  # then no change of the weight is better than another
        return self.observers[0].layers[site].unrolling

    def add(self, traced: dict[str, dict[str, list]]) -> None:
        """Takes over one batch: what the observed function returned, and what it called back."""
        for observer in self.observers:
            for what, sites in observer.called_back.items():
                for site, values in sites.items():
                    traced[what].setdefault(site, []).extend(values)
                    values.clear()
        for site, values in traced["activation"].items():
            for value in values:
                value = Histogram(*(np.asarray(leaf, np.float64) for leaf in value))
                seen = self.activations.get(site)
                self.activations[site] = value if seen is None else merge_histograms(seen, value)
        for site, values in traced["moments"].items():
            parts = [np.asarray(value) for value in values]
            seen = self.moments.get(site)
            self.moments[site] = sum(parts[1:], parts[0]) + (0 if seen is None else seen)
        for site, values in traced["weight"].items():
            if not self.weights.get(site):  # the same in every batch
                self.weights[site] = [np.asarray(value) for value in values]


def observe(
    model: nn.Module,
    variables: Mapping[str, Any],
    batches: Iterable,
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
      ValueError: there are no batches, a layer ran on none of them, or a weight is not finite.
    """
    seen = Observations()

    def run(variables: Mapping, args: tuple) -> dict:
        observer = Observer(
            activation=histogram if activations else None,
            weight=lambda w: w,
            moments=_moments if moments else None,
            at_output=at_output,
        )
        seen.observers.append(observer)
        with intercept_layers(model, observer) as intercepted:
            intercepted.apply(variables, *args, **model_kwargs)
        return observer.traced

    jitted = jax.jit(run)
    for batch in batches:
        traced = jitted(variables, as_arguments(batch))
        jax.effects_barrier()
        seen.add(traced)
    if not seen.observers:
        raise ValueError("`batches` must hold at least one batch, got none")
    for site, weights in seen.weights.items():
        if not weights:
            raise ValueError(
                f"`batches` must reach every layer, site {site!r} is in a branch that none took"
            )
        if not all(np.all(np.isfinite(weight)) for weight in weights):
            raise ValueError(f"`variables` must be finite, the weight of site {site!r} is not")
    return seen


def as_arguments(batch: Any) -> tuple:
    """Returns a batch as the model's positional arguments."""
    return tuple(batch) if isinstance(batch, tuple) else (batch,)


def _moments(layer: Layer, activation: jax.Array, weight: jax.Array) -> jax.Array | None:
    unrolling = layer.unrolling
    if unrolling is None or unrolling.inputs(weight.shape) > _MOST_INPUTS:
        return None
    return unrolling.moments(activation, weight.shape)


def fit_parameters(
    config: QuantConfig,
    sites: Mapping[str, Site],
    seen: Observations,
    calibration: str,
    percentile: float | int,
    mu: float | int | None = None,
) -> dict[str, Any]:
    """Returns the collection "compand": every mu and scale, fitted to what was observed.

    Operands that share a mu are fitted together; the three mu scopes differ in nothing else. Where
    `mu` is given, it is every mu, and the scales alone are fitted.
    """
    members: dict[Any, list[tuple[str, str]]] = {}
    for name, site in sites.items():
        for operand in site.operands():
            path = par.mu_path(name, operand, config)
            members.setdefault(path or (name, operand), []).append((name, operand))
    groups = [
        Group(
            [_sample(sites[name], seen, name, operand, calibration) for name, operand in group],
            [sites[name].spec(operand) for name, operand in group],
            mu if par.mu_path(*group[0], config) else 0.0,
        )
        for group in members.values()
    ]
    fits = fit_groups(groups, calibration=calibration, percentile=percentile)
    compand: dict = {}
    for group, fit in zip(members.values(), fits, strict=True):
        if (path := par.mu_path(*group[0], config)) is not None:
            par.set_leaf(compand, path, par.theta_from_mu(fit.mu))
        for (name, operand), scales in zip(group, fit.scales, strict=True):
            scale = jnp.asarray(scales, jnp.float32)
            shape = sites[name].scale_shape(seen.weights[name][0].shape)
            scale = scale.reshape(shape if operand == "weight" else ())
            par.set_leaf(compand, par.scale_path(name, operand), par.rho_from_scale(scale))
    return compand


def _sample(site: Site, seen: Observations, name: str, operand: str, calibration: str) -> Sample:
    if operand == "act":
        return sample_from_histogram(seen.activations[name], site.act_signed)
    unrolling = seen.unrolled(name)
    if calibration != "output" or unrolling is None:
        return sample_from_weights(seen.weights[name], site.scale_axes)
    rows = unrolling.rows(jnp.asarray(seen.weights[name][0]))
    return sample_from_moments(rows, seen.moments[name], per_row=bool(site.scale_axes))


def feed_errors_back(
    params: Mapping[str, Any],
    quantizers: Mapping[str, Mapping[str, jax.Array]],
    sites: Mapping[str, Site],
    seen: Observations,
) -> dict[str, Any]:
    """Returns `params` with kernels on levels, rounded by `round_with_feedback`.

    Left as they are: kernels whose layer is not a matrix product with known inputs, and those
    that are not used as they are stored (under WeightNorm, or a mask).
    """
    flat = dict(flatten_dict(params))
    for name, found in quantizers.items():
        path = (*filter(None, name.split("/")), "kernel")
        unrolling = seen.unrolled(name)
        if "weight_scale" not in found or unrolling is None or path not in flat:
            continue
        kernel = seen.weights[name][0]
        if not np.array_equal(kernel, nn.meta.unbox(flat[path])):
            continue
        rows = unrolling.rows(jnp.asarray(kernel, jnp.float32))
        scales = jnp.broadcast_to(found["weight_scale"].ravel(), rows[..., 0].size)
        round_group = functools.partial(round_with_feedback, spec=sites[name].spec("weight"))
        rounded = jax.vmap(round_group, in_axes=(0, 0, None, 0))(
            rows,
            jnp.asarray(seen.moments[name]),
            found["weight_mu"],
            scales.reshape(rows.shape[:2]),
        )
        rounded = unrolling.weight(rounded, kernel.shape).astype(kernel.dtype)
        flat[path] = nn.meta.replace_boxed(flat[path], rounded)
    return unflatten_dict(flat)


def estimate_batch_stats(
    apply: Callable, variables: Mapping[str, Any], batches: Iterable, model_kwargs: Mapping
) -> Any:
    """Returns `batch_stats` with, for the batch norms, the mean over the batches of what they see.

    All else runs as in evaluation.
    """

    @jax.jit
    def step(variables: Mapping, args: tuple) -> Any:
        with nn.intercept_methods(_batch_norms_of_this_batch()):
            _, updates = apply(variables, *args, mutable=["batch_stats"], **model_kwargs)
        return updates["batch_stats"]

    total, count = None, 0
    for batch in batches:
        seen = step(variables, as_arguments(batch))
        total = seen if total is None else jax.tree.map(jnp.add, total, seen)
        count += 1
    if count == 0:
        raise ValueError(
            "`batches` must hold at least one batch each time they are gone through, got none the "
            "second time: give a list, or an iterator"
        )
    return jax.tree.map(lambda sum_: sum_ / count, total)


def _batch_norms_of_this_batch() -> Callable:
    """Returns an interceptor with which batch norms forget all statistics but this batch's.

    They move theirs by s <- m s + (1 - m) b, here with m = (k - 1)/k in the k-th call of a batch
    norm, so that s is the mean over its calls.
    """
    calls: collections.Counter = collections.Counter()
    running: list = []  # for each method that is being called, the batch norm that it is of

    def interceptor(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        if not running:
            calls.clear()  # the model is run anew
        # A lifted batch norm may come by twice, outside and inside of its transformation.
        is_batch_norm = isinstance(module, nn.BatchNorm) and context.method_name == "__call__"
        outermost = is_batch_norm and module.path not in running
        running.append(module.path if outermost else None)
        try:
            if not outermost:
                return next_fun(*args, **kwargs)
            calls[module.path] += 1
            momentum = 1 - 1 / calls[module.path]
            with _fields_set(module, use_running_average=None, momentum=momentum):
                return next_fun(*args[:1], **{**kwargs, "use_running_average": False})
        finally:
            running.pop()

    return interceptor


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
