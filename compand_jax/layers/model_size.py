"""How many bytes a network takes, quantized or not."""

from collections.abc import Mapping
from typing import Any

import jax

from compand_jax.layers.groups import bytes_of_scales
from compand_jax.layers.parametrization import get_leaf, scale_path
from compand_jax.layers.sites import Site
from compand_jax.layers.summary import site_weight


def model_bytes(variables: Mapping[str, Any], sites: Mapping[str, Site] | None = None) -> int:
    """Returns the bytes of a network's variables, the quantized weights packed at their bits.

    Counted are: each quantized weight's codes, its number of elements times its bits, rounded up
    to bytes; every other parameter, the batch norms' statistics, and every mu and scale, as they
    are (float32, 4 bytes each; several scales as they are stored). Levels follow from mu and scale,
    and are not counted.

    Args:
      variables: the model's collections.
      sites: a quantized model's; None for a model in full precision.

    >>> import jax.numpy as jnp
    >>> params = {"Dense_0": {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)}}
    >>> model_bytes({"params": params}), model_bytes({"params": params}, {"Dense_0": Site(4, 4)})
    (48, 17)
    """
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    for name, site in (sites or {}).items():
        weight = site_weight(variables["params"], name)
        if site.weight_bits is not None and weight is not None:
            total += -(-weight.size * site.weight_bits // 8) - weight.nbytes
            rho = get_leaf(variables.get("compand", {}), scale_path(name, "weight"))
            if rho is not None and site.scale_axes:
                total += bytes_of_scales(rho.size, site.scale_dtype) - rho.nbytes
    return total
