"""A quantized model's levels in the place of its weights."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax.core import meta

from compand_jax.core.quantizers import fake_quantize
from compand_jax.layers import parametrization as par
from compand_jax.layers.groups import grouped
from compand_jax.layers.summary import WEIGHT_NAMES
from compand_jax.linen.quantized_model import QuantizedModel


def dequantized_params(qmodel: QuantizedModel, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns "params" with each quantized weight's levels in its place, for the model itself.

    With weights alone quantized, the model computes with them what the quantized one does. What is
    computed from parameters, and standardized weights, stay as they are.

    Args:
      qmodel: The quantized model.
      variables: As its `apply` takes them.

    Not differentiable.
    """
    params = _copied(meta.unbox(variables["params"]))
    for site, own in qmodel.quantizers(variables).items():
        path = par.site_path(site)
        paths = [(*path, name) for name in WEIGHT_NAMES]
        leaf = next((p for p in paths if par.get_leaf(params, p) is not None), None)
        known = "weight_scale" in own and not qmodel.site(site).weight_standardization
        if leaf is None or not known:
            continue
        weight, scale = par.get_leaf(params, leaf), own["weight_scale"]
        values = grouped(weight, scale.shape, qmodel.site(site).group_size)
        if scale.ndim:  # a stack's layers share their scales
            scale = scale.reshape((1,) * (values.ndim - scale.ndim) + scale.shape)
        spec = qmodel.site(site).spec("weight")
        levels = fake_quantize(values, par.entry(own, "weight", spec), scale, **spec.arguments)
        par.set_leaf(params, leaf, jnp.reshape(levels, weight.shape))
    return params


def _copied(tree: Any) -> Any:
    return {k: _copied(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree
