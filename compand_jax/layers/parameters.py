"""Sites, and the mu and scale of each, from what was observed of a model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from compand_jax.calibration.fit import Group, fit_groups
from compand_jax.calibration.samples import (
    Sample,
    sample_from_histogram,
    sample_from_moments,
    sample_from_weights,
)
from compand_jax.layers import parametrization as par
from compand_jax.layers.config import QuantConfig
from compand_jax.layers.observation import Observations
from compand_jax.layers.sites import Site, check_signs, sites_from_observers


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
