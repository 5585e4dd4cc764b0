"""Sites, and the mu and scale of each, from what was observed of a model."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from compand_jax.calibration.error_feedback import round_with_feedback
from compand_jax.calibration.fit import Group, fit_groups
from compand_jax.calibration.samples import (
    Sample,
    sample_from_histogram,
    sample_from_moments,
    sample_from_weights,
)
from compand_jax.core.codebooks import SMALLEST_SCALE
from compand_jax.layers import parametrization as par
from compand_jax.layers.config import QuantConfig
from compand_jax.layers.groups import group_moments, grouped
from compand_jax.layers.observation import Observations
from compand_jax.layers.sites import Site, check_signs, sites_from_observers
from compand_jax.layers.standardization import DEVIATIONS, moments


def observed_sites(config: QuantConfig, seen: Observations) -> dict[str, Site]:
    """Returns the sites, their activations signed as they were seen unless that is configured.

    Raises:
      ValueError: there are none, a rule matches none, activations of one bit have a sign, or a
        layer that is quantized ran on no batch.
    """
    sites = sites_from_observers(config, seen.observers)
    if config.act_signed is None:
        for name, data in seen.activations.items():
            signed = bool(data.minimum < -SMALLEST_SCALE)
            if sites[name].act_bits != 1:  # of zeros alone nothing is known
                signed |= bool(data.maximum <= SMALLEST_SCALE)
            sites[name] = dataclasses.replace(sites[name], act_signed=signed)
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
            path = par.parameter_path(name, operand, config)
            members.setdefault(path or (name, operand), []).append((name, operand))
    groups = [
        Group(
            [_sample(sites[name], seen, name, operand, calibration) for name, operand in group],
            [sites[name].spec(operand) for name, operand in group],
            _held(par.parameter_path(*group[0], config), mu),
        )
        for group in members.values()
    ]
    fits = fit_groups(groups, calibration=calibration, percentile=percentile)
    compand: dict = {}
    for tensors, group, fit in zip(members.values(), groups, fits, strict=True):
        known = [np.asarray(sample.absmax) > 0 for sample in group.samples]
        if (path := par.parameter_path(*tensors[0], config)) is not None:
            nothing = group.mu is None and not any(map(np.any, known))
            spec = sites[tensors[0][0]].spec(tensors[0][1])
            theta = par.first_theta(config, spec) if nothing else spec.family.to_trainable(fit.mu)
            par.set_leaf(compand, path, theta)
        for (name, operand), scales, seen_any in zip(tensors, fit.scales, known, strict=True):
            rho, shape = par.rho_from_scale(scales), ()
            if operand == "weight":
                weight = seen.weights[name][0].shape
                of_zeros = first_rho(sites[name], weight, seen.layer(name).channel_axes)
                rho, shape = jnp.where(seen_any, rho, of_zeros), sites[name].scale_shape(weight)
            par.set_leaf(compand, par.scale_path(name, operand), rho.reshape(shape))
    return compand


def _held(path: tuple[str, ...] | None, mu: float | None) -> float | None:
    """Returns the mu that is held: as given, 0 without parameters, None where it is searched."""
    if path is None:
        return 0.0
    return mu if path[-1].rpartition("_")[2] == "mu" else None


def first_rho(site: Site, shape: tuple[int, ...], channel_axes: tuple[int, ...]) -> float:
    """Returns the rho of a weight of zeros.

    Args:
      site: What is static about it.
      shape: Of the weight.
      channel_axes: The weight's output axes, from the end.
    """
    if site.weight_standardization:  # its scale follows it by itself
        return math.log(DEVIATIONS)
    return par.following_rho(shape, channel_axes)


def _standardized(weights: list[np.ndarray]) -> list[np.ndarray]:
    """Returns the weights, a stack's together, less their mean, in standard deviations."""
    mean, deviation = map(np.asarray, moments(jnp.asarray(np.stack(weights))))
    return [(weight.astype(mean.dtype) - mean) / (deviation or 1) for weight in weights]


def _sample(site: Site, seen: Observations, name: str, operand: str, calibration: str) -> Sample:
    if operand == "act":
        return sample_from_histogram(seen.activations[name], site.act_signed)
    weights, unrolling = seen.weights[name], seen.unrolled(name)
    if site.weight_standardization:
        weights = _standardized(weights)
    scale_shape = site.scale_shape(weights[0].shape)
    if site.group_size is not None and (calibration != "output" or unrolling is None):
        weights = [grouped(weight, scale_shape, site.group_size) for weight in weights]
    if calibration != "output" or unrolling is None:
        return sample_from_weights(weights, site.scale_axes)
    rows, moments = unrolling.rows(jnp.asarray(weights[0])), jnp.asarray(seen.moments[name])
    if site.group_size is not None:
        rows, moments = group_moments(rows, moments, site.group_size)
    return sample_from_moments(rows, moments, per_row=bool(site.scale_axes))


def fed_back(
    kernel: Array, found: Mapping[str, Array], site: Site, seen: Observations, name: str
) -> Array | None:
    """Returns a kernel's levels, rounded by `round_with_feedback`, on its devices.

    None where its layer is not a matrix product with known inputs, and where the weight is
    standardized: the levels of what is rounded would be others than it was rounded to.

    Args:
      kernel: as it is stored, and as it was seen.
      found: its "weight_scale", and "weight_mu" or what another family has.
      site: what is static.
      seen: what was observed, with moments.
      name: the site's name.
    """
    unrolling = seen.unrolled(name)
    if unrolling is None or site.weight_standardization:
        return None
    # As seen it is on no devices: explicit shardings may not allow the reshape.
    rows = unrolling.rows(jnp.asarray(seen.weights[name][0], jnp.float32))
    scales = found["weight_scale"]
    if site.group_size is None:
        scales = jnp.broadcast_to(scales.ravel(), rows[..., 0].size).reshape(rows.shape[:2])
    else:  # each weight has its group's, wherever among the inputs it is rounded
        shape = (*scales.shape[:-2], site.group_size, scales.shape[-1])
        scales = unrolling.rows(jnp.broadcast_to(scales, shape).reshape(kernel.shape))
    round_group = functools.partial(round_with_feedback, spec=site.spec("weight"))
    mu = par.entry(found, "weight", site.spec("weight"))
    mu = jnp.zeros((), jnp.float32) if mu is None else mu
    rounded = jax.vmap(round_group, in_axes=(0, 0, None, 0))(
        rows, jnp.asarray(seen.moments[name]), mu, scales
    )
    rounded = unrolling.weight(rounded, kernel.shape).astype(kernel.dtype)
    # What is free to be moved stays free: beside a mesh that is set, one device alone is an error.
    if isinstance(kernel, jax.Array) and kernel.committed:
        return jax.device_put(rounded, kernel.sharding)
    return rounded
