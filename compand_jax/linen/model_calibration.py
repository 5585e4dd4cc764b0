"""Running a model over batches, for what calibration needs to know of it."""

import dataclasses
import functools
import math
import numbers
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array

from compand_jax.calibration.error_feedback import round_with_feedback
from compand_jax.calibration.fit import CALIBRATIONS, Group, fit_groups
from compand_jax.calibration.samples import (
    Histogram,
    Sample,
    histogram,
    merge_histograms,
    sample_from_histogram,
    sample_from_moments,
    sample_from_weights,
)
from compand_jax.layers import parametrization as par
from compand_jax.layers.batches import (
    all_finite,
    check_call,
    each_batch,
    labels_explained,
    require_concrete,
)
from compand_jax.layers.config import QuantConfig, require_choice
from compand_jax.layers.observation import Layer, Observer
from compand_jax.layers.sites import Site, check_signs, sites_from_observers
from compand_jax.layers.unrolling import Unrolling
from compand_jax.linen.batch_statistics import CHANGEABLE, whole_batches
from compand_jax.linen.observation import observe_layers

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

    def add(self, traced: dict[str, dict[str, list]], batch: int) -> None:
        """Takes over a batch, by number: what the observed function returned and called back.

        Raises:
          ValueError: a weight or an activation is not finite.
        """
        for observer in self.observers:
            for what, sites in observer.called_back.items():
                for site, values in sites.items():
                    traced[what].setdefault(site, []).extend(values)
                    values.clear()
        for site, values in traced["weight"].items():
            if not self.weights.get(site):  # the same in every batch
                self.weights[site] = [np.asarray(value) for value in values]
                if not all(np.all(np.isfinite(weight)) for weight in self.weights[site]):
                    raise ValueError(
                        f"`variables` must be finite, the weight of site {site!r} is not"
                    )
        for site, values in traced["activation"].items():
            for value in values:
                value = Histogram(*(np.asarray(leaf, np.float64) for leaf in value))
                if not np.isfinite([value.maximum, value.minimum]).all():
                    raise ValueError(
                        f"`batches` must give finite activations, got NaN or infinity at site "
                        f"{site!r} in batch {batch}, counting from 0: leave it out"
                    )
                seen = self.activations.get(site)
                self.activations[site] = value if seen is None else merge_histograms(seen, value)
        for site, values in traced["moments"].items():
            if not values:  # a branch that this batch did not take
                continue
            parts = [np.asarray(value) for value in values]
            seen = self.moments.get(site)
            self.moments[site] = sum(parts[1:], parts[0]) + (0 if seen is None else seen)


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


def check_arguments(
    calibration: str, percentile: ArrayLike, mu: ArrayLike | None
) -> tuple[float, float | None]:
    """Returns percentile and mu as numbers; raises ValueError where an argument is out of range."""
    require_choice("calibration", calibration, CALIBRATIONS)
    percentile_number, mu_number = _number(percentile), _number(mu)
    if not 0 < percentile_number <= 100:
        raise ValueError(f"`percentile` must be in (0, 100], got {percentile!r}")
    if mu is not None and not 0 <= mu_number <= par.MU_MAX:
        raise ValueError(f"`mu` must be None or from 0 to 255, got {mu!r}")
    return percentile_number, None if mu is None else mu_number


def _number(value: Any) -> float:
    """Returns a real number, of Python, NumPy or JAX, as a float; NaN if it is something else."""
    is_array = isinstance(value, np.ndarray | jax.Array) and not isinstance(value, Tracer)
    if is_array and value.shape == ():
        value = value.item()
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return float(value) if is_real else math.nan


def observed_sites(config: QuantConfig, seen: Observations) -> dict[str, Site]:
    """Returns the sites, their activations signed as they were seen unless that is configured.

    Raises:
      ValueError: there are none, a rule matches none, activations of one bit have a sign, or a
        layer that is quantized ran on no batch.
    """
    sites = sites_from_observers(config, seen.observers)
    if config.act_signed is None:
        for name, data in seen.activations.items():
            sites[name] = dataclasses.replace(sites[name], act_signed=bool(data.minimum < 0))
    check_signs(sites)
    for name, site in sites.items():
        missed = {"weight": not seen.weights.get(name), "act": name not in seen.activations}
        if any(missed[operand] for operand in site.operands()):
            raise ValueError(
                f"`batches` must reach every layer that is quantized, site {name!r} is in a branch "
                "that none took: add one that does, or leave the site in full precision by a rule"
            )
    return sites


def fit_parameters(
    config: QuantConfig,
    sites: Mapping[str, Site],
    seen: Observations,
    calibration: str,
    percentile: float,
    mu: float | None = None,
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
            shape = ()
            if operand == "weight":
                shape = sites[name].scale_shape(seen.weights[name][0].shape)
            scale = scale.reshape(shape)
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
