"""The collection "compand" before calibration: mu as configured, scales the largest magnitudes."""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from compand_jax.core.codebooks import SMALLEST_SCALE
from compand_jax.layers import parametrization as par
from compand_jax.layers.config import QuantConfig
from compand_jax.layers.groups import grouped
from compand_jax.layers.observation import Observer
from compand_jax.layers.parameters import first_rho
from compand_jax.layers.sites import first_spec, sites_from_observers
from compand_jax.layers.summary import site_weight


def initial_observer(config: QuantConfig) -> Observer:
    """Returns what sees, of a model's `init`, all that `initial_parameters` needs."""
    return Observer(activation=_absmax, weight=lambda x: x, at_output=config.act_site == "output")


def initial_parameters(
    config: QuantConfig, observer: Observer, params: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns every mu and scale, of what was seen of a model's `init`.

    Where a weight was not seen, its scale is taken from `params`; an activation's is then 1.

    Raises:
      ValueError: no layer was seen, or a rule matches none.
    """
    compand: dict = {}
    for name, site in sites_from_observers(config, [observer]).items():
        for operand in site.operands():
            if operand == "act":
                absmax = observer.values("activation", name) or [jnp.ones(())]
            elif site.weight_standardization:
                absmax = [jnp.zeros(())]  # its scale is that of any weight
            else:
                own, shape = site_weight(params, name), observer.weight_shapes[name]
                weights = observer.values("weight", name) or [_unstacked(own, shape)]
                of_layer = site.scale_shape(shape)
                absmax = [
                    _absmax(grouped(jnp.asarray(w), of_layer, site.group_size), site.scale_axes)
                    for w in weights
                ]
            scale = functools.reduce(jnp.maximum, absmax)
            of_zeros = 0.0
            if operand == "weight":
                axes = observer.layers[name].channel_axes
                of_zeros = first_rho(site, observer.weight_shapes[name], axes)
            rho = jnp.where(scale > SMALLEST_SCALE, par.rho_from_scale(scale), of_zeros)
            par.set_leaf(compand, par.scale_path(name, operand), rho)
            if (path := par.parameter_path(name, operand, config)) is not None:
                par.set_leaf(compand, path, par.first_theta(config, first_spec(site, operand)))
    return compand


def _unstacked(own: Array | None, shape: tuple[int, ...]) -> Array:
    """Returns a weight's maximum over the axes that vmap or scan stacked in front of its shape.

    What lies in `params` in another form is taken as one number, and 1 where there is nothing.
    """
    if own is None:
        return jnp.ones(shape)
    magnitude, extra = jnp.abs(own), own.ndim - len(shape)
    if own.shape[max(extra, 0) :] == shape:
        return jnp.max(magnitude, tuple(range(extra)))
    return jnp.full(shape, jnp.max(magnitude, initial=0.0))


def _absmax(x: Array, kept_axes: tuple[int, ...] = ()) -> Array:
    axes = tuple(i for i in range(x.ndim) if i - x.ndim not in kept_axes)
    return jnp.max(jnp.abs(x), axes, initial=0.0, keepdims=bool(kept_axes)).astype(jnp.float32)
