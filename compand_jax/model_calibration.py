"""Running a model over batches, for what calibration needs to know of it."""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from compand_jax import parametrization as par
from compand_jax.calibration import (
    Histogram,
    Sample,
    fit_group,
    histogram,
    merge_histograms,
    sample_from_histogram,
    sample_from_tensor,
)
from compand_jax.config import QuantConfig
from compand_jax.interception import Observer, intercept_layers
from compand_jax.sites import Site


@dataclasses.dataclass
class Observations:
    """What was seen of a model: the observers, weights as used, histograms of activations."""

    observers: list[Observer] = dataclasses.field(default_factory=list)
    weights: dict[str, list[np.ndarray]] = dataclasses.field(default_factory=dict)
    activations: dict[str, Histogram] = dataclasses.field(default_factory=dict)

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
) -> Observations:
    """Returns what is seen of the full-precision model over the batches, in one pass.

    Raises:
      ValueError: there are no batches, a layer ran on none of them, or a weight is not finite.
    """
    seen = Observations()

    def run(variables: Mapping, args: tuple) -> dict:
        observer = Observer(activation=histogram, weight=lambda w: w, at_output=at_output)
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


def fit_parameters(
    config: QuantConfig, sites: Mapping[str, Site], seen: Observations, calibration: str
) -> dict[str, Any]:
    """Returns the collection "compand": every mu and scale, fitted to what was observed.

    Operands that share a mu are fitted together; the three mu scopes differ in nothing else.
    """
    groups: dict[Any, list[tuple[str, str]]] = {}
    for name, site in sites.items():
        for operand in site.operands():
            path = par.mu_path(name, operand, config)
            groups.setdefault(path or (name, operand), []).append((name, operand))
    compand: dict = {}
    for members in groups.values():
        path = par.mu_path(*members[0], config)
        mu, scales, _ = fit_group(
            [_sample(sites, seen, name, operand) for name, operand in members],
            [sites[name].spec(operand) for name, operand in members],
            calibration=calibration,
            uniform=path is None,
        )
        if path is not None:
            par.set_leaf(compand, path, par.theta_from_mu(mu))
        for (name, operand), scale in zip(members, scales, strict=True):
            if operand == "weight":
                scale = scale.reshape(sites[name].scale_shape(seen.weights[name][0].shape))
            else:
                scale = scale.reshape(())
            par.set_leaf(compand, par.scale_path(name, operand), par.rho_from_scale(scale))
    return compand


def _sample(sites: Mapping[str, Site], seen: Observations, name: str, operand: str) -> Sample:
    if operand == "act":
        return sample_from_histogram(seen.activations[name], sites[name].act_signed)
    samples = [
        sample_from_tensor(jnp.asarray(weight), sites[name].scale_axes)
        for weight in seen.weights[name]
    ]
    return Sample(
        jnp.concatenate([sample.magnitudes for sample in samples], 1),
        jnp.concatenate([sample.counts for sample in samples], 1),
        jnp.max(jnp.stack([sample.absmax for sample in samples]), 0),
    )


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
