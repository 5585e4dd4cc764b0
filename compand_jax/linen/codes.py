"""The integer codes of a quantized model's weights, by their places in its variables."""

from collections.abc import Mapping
from typing import Any

from compand_jax.core.quantizers import quantize
from compand_jax.layers import parametrization as par
from compand_jax.layers.groups import grouped
from compand_jax.layers.standardization import moments
from compand_jax.layers.summary import WEIGHT_NAMES
from compand_jax.linen.quantized_model import QuantizedModel


def weight_codes(qmodel: QuantizedModel, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the codes of the quantized weights, each at the path of its weight.

    Args:
      qmodel: The quantized model.
      variables: As its `apply` takes them; "params" and "compand" do.

    Returns:
      {"params": {...}}, of int8 arrays; no entry where a weight is in full precision, or is
      computed from parameters.

    Not differentiable: codes are integers.
    """
    found: dict[str, Any] = {}
    for site, own in qmodel.quantizers(variables).items():
        module = ("params", *par.site_path(site))
        paths = [module, *((*module, name) for name in WEIGHT_NAMES)]  # or a parameter by itself
        leaves = {path: par.get_leaf(variables, path) for path in paths}
        leaves = {path: leaf for path, leaf in leaves.items() if not isinstance(leaf, Mapping)}
        path = next((path for path, leaf in leaves.items() if leaf is not None), None)
        if path is None or "weight_scale" not in own:
            continue
        weight, scale = par.get_leaf(variables, path), own["weight_scale"]
        spec = qmodel.site(site).spec("weight")
        if qmodel.site(site).weight_standardization:
            weight = weight - moments(weight)[0].astype(weight.dtype)
        shape, size = weight.shape, qmodel.site(site).group_size
        weight = grouped(weight, scale.shape, size)
        if scale.ndim:  # a stack's layers share their channels' scales
            scale = scale.reshape((1,) * (weight.ndim - scale.ndim) + scale.shape)
        codes = quantize(weight, par.entry(own, "weight", spec), scale, **spec.arguments)
        par.set_leaf(found, path, codes.reshape(shape))
    return found
