"""Running a model over batches, for what calibration needs to know of it."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
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
            self.weights.setdefault(site, values)


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
      ValueError: there are no batches, or a weight is not finite.
    """
    seen = Observations()

    def run(variables: Mapping, args: tuple, with_weights: bool) -> dict:
        observer = Observer(
            activation=histogram,
            weight=(lambda weight: weight) if with_weights else None,
            at_output=at_output,
        )
        seen.observers.append(observer)
        with intercept_layers(observer):
            model.apply(variables, *args, **model_kwargs)
        return observer.traced

    jitted = jax.jit(run, static_argnums=2)
    for index, batch in enumerate(batches):
        traced = jax.device_get(jitted(variables, as_arguments(batch), index == 0))
        jax.effects_barrier()
        seen.add(traced)
    if not seen.observers:
        raise ValueError("`batches` must hold at least one batch, got none")
    for site, weights in seen.weights.items():
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
    """Returns `batch_stats` as the mean over the batches of what the batch norms see.

    A batch norm moves its statistics by s <- m s + (1 - m) b. From s = 0 and from s = 1 that
    gives m and the batch's own b, whatever the momentum m; all else runs as in evaluation.
    """

    @jax.jit
    def step(variables: Mapping, args: tuple, start: Any) -> Any:
        with nn.intercept_methods(_train_batch_norms):
            _, updates = apply(
                {**variables, "batch_stats": start}, *args, mutable=["batch_stats"], **model_kwargs
            )
        return updates["batch_stats"]

    zeros = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    total, count, one_minus_momentum = zeros, 0, None
    for batch in batches:
        args = as_arguments(batch)
        moved = step(variables, args, zeros)
        if one_minus_momentum is None:
            from_ones = step(variables, args, jax.tree.map(jnp.ones_like, zeros))
            one_minus_momentum = jax.tree.map(lambda a, b: 1 - (b - a), moved, from_ones)
        total, count = jax.tree.map(jnp.add, total, moved), count + 1
    return jax.tree.map(lambda a, keep: a / (keep * count), total, one_minus_momentum)


def _train_batch_norms(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    module = context.module
    if not isinstance(module, nn.BatchNorm) or context.method_name != "__call__":
        return next_fun(*args, **kwargs)
    stored = module.use_running_average
    object.__setattr__(module, "use_running_average", None)
    try:
        return next_fun(args[0], **{**kwargs, "use_running_average": False})
    finally:
        object.__setattr__(module, "use_running_average", stored)
