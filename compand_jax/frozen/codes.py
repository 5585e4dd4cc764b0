"""From a weight or activations with their mu and scale to packed codes and tables."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from compand_jax.core.codebooks import Spec, codebook
from compand_jax.core.quantizers import quantize
from compand_jax.frozen.packing import pack
from compand_jax.frozen.tree import WEIGHT_TYPES
from compand_jax.layers.config import QuantConfig
from compand_jax.layers.groups import grouped, packed_scales
from compand_jax.layers.layer_quantizer import given
from compand_jax.layers.sites import Site
from compand_jax.layers.standardization import moments


def require_layers(config: QuantConfig) -> None:
    """Raises ValueError where weights in other contractions than layers' are to be packed."""
    if config.contractions != "layers":
        raise ValueError(
            f"`qmodel` must have contractions='layers', got {config.contractions!r}: a frozen "
            "model hands levels to Flax's layers alone, so that weights in other contractions "
            "cannot be packed"
        )


def check_weight(name: str, weight: Array) -> None:
    """Raises ValueError where a site's weight cannot be frozen."""
    if weight.dtype.name not in WEIGHT_TYPES:
        raise ValueError(
            f"`variables` must hold weights of at most 32 bits, site {name!r} has one of "
            f"{weight.dtype}: a frozen model's levels are float32, which differ from those of such "
            "a weight; convert it to float32"
        )
    if not jnp.all(jnp.isfinite(weight)):
        raise ValueError(
            f"`variables` must be finite, the weight of site {name!r} is not: give those from "
            "before training diverged"
        )


def pack_weight(weight: Array, mu: Array, scale: Array, site: Site) -> dict[str, Array]:
    """Returns a weight's "codes", its "levels", and its "scales" where it has several.

    With the scales comes their "scale_units", where they are multiples of it.

    Args:
      weight: As the layer multiplies it, or a stack of such.
      mu: A scalar, or another family's parameters.
      scale: A scalar, or of the weight's rank, without a stack's axes.
      site: What is static about it. Where it is standardized, levels lie around its mean.
    """
    spec = site.spec("weight")
    mean = _mean(weight) if site.weight_standardization else None
    if mean is not None:
        weight = weight.astype(mean.dtype) - mean
    weight = grouped(weight, scale.shape, site.group_size)
    stacked = weight.ndim - scale.ndim if scale.ndim else 0  # scan and vmap stack in front
    own = scale.reshape((1,) * stacked + scale.shape)
    codes = quantize(weight, given(mu, spec), own, **spec.arguments)
    # Several scales have one table, of scale 1: a level of theirs is the same product.
    table_scale = jnp.ones((), scale.dtype) if scale.ndim else scale
    levels, _ = codebook(given(mu, spec), table_scale, **spec.arguments)
    if mean is not None:
        levels = levels + mean
    indices = (codes.astype(jnp.int32) + spec.steps).astype(jnp.uint8)  # in the ascending table
    packed = {"codes": pack(indices, spec.bits), "levels": levels}
    if not scale.ndim:
        return packed
    stored, unit = packed_scales(scale, site.scale_dtype, tuple(range(-scale.ndim, 0)))
    return packed | {"scales": stored} | ({} if unit is None else {"scale_units": unit.reshape(())})


@jax.jit
def _mean(weight: Array) -> Array:
    return moments(weight)[0]


def act_tables(mu: Array, scale: Array, spec: Spec) -> dict[str, Array]:
    """Returns the "act_levels" and "act_thresholds" of activations."""
    levels, thresholds = codebook(given(mu, spec), scale, **spec.arguments)
    return {"act_levels": levels, "act_thresholds": thresholds}
