"""Levels that are parameters, each.

Sources: Zhang, Yang, Ye, Hua, "LQ-Nets: learned quantization for highly accurate and compact deep
neural networks", ECCV 2018, and Wang, Dong, Wang, Zhu, Chen, "Learnable lookup table for neural
network quantization", CVPR 2022, whose levels are learned with the network. Here none is tied to
another but by their order; calibrated, they are those of Lloyd, "Least squares quantization in
PCM", IEEE Transactions on Information Theory 28, 1982.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from compand_jax.core.families.base import Gaps, nearest_thresholds

if TYPE_CHECKING:
    from compand_jax.core.spec import Spec


class Free(Gaps):
    """Levels by the gaps between them, which are positive, so that levels stay in order.

    On "midtread" the gaps are those of 0, l_1, ..., l_M = 1. On "midrise" they are those of 0, l_0,
    ..., l_(H-1), 1: the first is half of what it is between -l_0 and l_0, the last lies between the
    top level and the clip. Thresholds are halfway between levels.
    """

    parameter = "gaps"
    required = "the gaps of quantizer 'free', positive and finite"
    is_shared = False

    def shape(self, spec: "Spec") -> tuple[int, ...]:
        """Returns (M,) or (H + 1,)."""
        return (spec.steps + spec.midrise,)

    def start(self, spec: "Spec") -> np.ndarray:
        """Returns the gaps of uniform levels."""
        gaps = super().start(spec)
        if spec.midrise:
            gaps[[0, -1]] = 0.5
        return gaps / gaps.mean()

    def table(self, p: Array, spec: "Spec") -> tuple[Array, Array]:
        """Returns the sums of gaps, as shares of all, and the points halfway between."""
        sums = jax.lax.optimization_barrier(jnp.cumsum(p, -1))
        levels = sums / sums[..., -1:]
        if spec.midrise:
            levels = levels[..., :-1]  # the last one is the clip
        else:
            levels = jnp.concatenate([jnp.zeros_like(levels[..., :1]), levels], -1)
        return levels, nearest_thresholds(levels)
