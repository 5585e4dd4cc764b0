"""What a stage shows in TensorBoard beside its log: its weights, and how many are on each level."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Array

from compand_jax.core.codebooks import codebook
from compand_jax.core.quantizers import quantize
from compand_jax.experiments.runs.stages import Stage
from compand_jax.layers import parametrization as par
from compand_jax.layers.groups import grouped
from compand_jax.layers.sites import Site
from compand_jax.layers.standardization import moments
from compand_jax.layers.summary import site_weight
from compand_jax.linen.quantized_model import QuantizedModel
from compand_jax.training.events import Buckets, Events
from compand_jax.training.steps import TrainState

_BUCKETS = 64


def make_events(stage: Stage, step: int) -> Events:
    """Returns what writes a stage's event file, into its directory.

    Args:
      stage: calibrated, where it is quantized.
      step: that it starts at.

    Raises:
      ImportError: tensorboardX is not installed.
    """
    return Events(stage.directory / "tensorboard", step, weight_histograms(stage.quantized))


def weight_histograms(
    model: QuantizedModel | None,
) -> Callable[[TrainState], dict[str, Buckets]]:
    """Returns the function of a state that gives the histograms of a model's weights.

    "weights/SITE" is that of a weight, in full precision. "levels/SITE" is that of its codes: a
    bucket for each level, from threshold to threshold, in units of the scale. Without a quantizer,
    "weights/PATH" of each parameter of two axes and more.
    """

    @jax.jit
    def describe(state: TrainState) -> dict[str, Buckets]:
        params = meta.unbox(state.variables["params"])
        if model is None:
            leaves = jax.tree_util.tree_leaves_with_path(params)
            weights = {
                jax.tree_util.keystr(path, simple=True, separator="/"): leaf
                for path, leaf in leaves
                if leaf.ndim > 1
            }
            return {f"weights/{name}": _values(weight) for name, weight in weights.items()}
        found: dict[str, Buckets] = {}
        for name, own in model.quantizers(state.variables).items():
            weight = site_weight(params, name)
            if weight is not None and "weight_scale" in own:
                found[f"weights/{name}"] = _values(weight)
                found[f"levels/{name}"] = _levels(weight, own, model.site(name))
        return found

    return describe


def _values(weight: Array) -> Buckets:
    counts, edges = jnp.histogram(weight.astype(jnp.float32).ravel(), _BUCKETS)
    return Buckets(edges[1:], counts, (edges[1:] + edges[:-1]) / 2, edges[0])


def _levels(weight: Array, found: Mapping[str, Any], site: Site) -> Buckets:
    spec = site.spec("weight")
    mu = par.entry(found, "weight", spec)
    if site.weight_standardization:
        weight = weight - moments(weight)[0].astype(weight.dtype)
    scale = found["weight_scale"]
    weight = grouped(weight, scale.shape, site.group_size)
    levels, thresholds = codebook(mu, jnp.ones(()), **spec.arguments)
    codes = quantize(weight, mu, scale, **spec.arguments).astype(jnp.int32)
    counts = jnp.bincount((codes - spec.code_range[0]).ravel(), length=len(levels))
    return Buckets(jnp.append(thresholds, levels[-1]), counts, levels, levels[0])
