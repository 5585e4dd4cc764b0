"""A stage's optimizer and its schedules, from a run's configuration."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from compand_jax.experiments.runs.config import Method, RunConfig
from compand_jax.layers.partition import partition_optimizer
from compand_jax.layers.transition_rate import scale_by_transition_rate
from compand_jax.linen.codes import weight_codes
from compand_jax.linen.quantized_model import QuantizedModel

_MOMENTUM = 0.9
# Of the running share of transitions, and how much faster than with arXiv 2404.19248's eta the rate
# follows it: their trainings have 80,000 steps, fine-tunings here a thousand.
_RATE_MOMENTUM, _RATE_GAIN = 0.9, 5.0
# No scale in use is below exp(-20), whose square has an inverse in float32.
_SMALLEST = -20.0


def make_schedules(
    config: RunConfig, method: Method | None, steps: int, per_epoch: int
) -> dict[str, optax.Schedule]:
    """Returns the schedules of a stage, functions of the step, by the names of their peaks.

    Args:
      config: the run's.
      method: the stage's; None in full precision.
      steps: of the stage.
      per_epoch: steps of an epoch.
    """
    peaks = {"learning_rate": config.learning_rate}
    if method is not None:
        peaks["learning_rate"] = config.finetune_learning_rate
    if method is not None and method.quantizer is not None:
        peaks["mu_learning_rate"] = config.mu_learning_rate
        peaks["scale_learning_rate"] = config.scale_learning_rate
        if config.transition_rate is not None:
            peaks["transition_rate"] = config.transition_rate
    warmup = round(config.warmup_epochs * per_epoch)
    return {name: _schedule(peak, steps, warmup) for name, peak in peaks.items()}


def _schedule(peak: float, steps: int, warmup: int) -> optax.Schedule:
    if steps == 0:
        return optax.constant_schedule(0.0)
    warmup = min(warmup, steps // 2)
    if warmup == 0:
        return optax.cosine_decay_schedule(peak, steps)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps)


def make_optimizer(
    config: RunConfig, schedules: Mapping[str, optax.Schedule], model: Any
) -> optax.GradientTransformation:
    """Returns the optimizer of a stage, as `RunConfig` describes it.

    Args:
      config: the run's.
      schedules: of the stage.
      model: a Linen module or a `QuantizedModel`.
    """
    decay = optax.add_decayed_weights(config.weight_decay, mask=_is_kernel)
    weights = optax.chain(
        decay, optax.sgd(schedules["learning_rate"], momentum=_MOMENTUM, nesterov=True)
    )
    if not isinstance(model, QuantizedModel):
        return weights
    mu, scale = (
        _of_quantizers(config, schedules[f"{name}_learning_rate"]) for name in ("mu", "scale")
    )
    if "transition_rate" not in schedules:
        return partition_optimizer(weights=weights, mu=mu, scale=scale)

    def codes(variables: Mapping[str, Any]) -> dict[str, Any]:
        return weight_codes(model, variables)

    def others(variables: Mapping[str, Any]) -> Any:
        """Returns which leaves are the network's, but no quantized weight."""
        found = jax.tree_util.tree_leaves_with_path(jax.eval_shape(codes, variables))
        paths = {path for path, _ in found}
        return jax.tree_util.tree_map_with_path(
            lambda path, _: path[0].key == "params" and path not in paths, variables
        )

    weights = optax.chain(decay, optax.trace(_MOMENTUM, nesterov=True))
    return optax.chain(
        partition_optimizer(weights=weights, mu=mu, scale=scale),
        optax.masked(optax.scale_by_learning_rate(schedules["learning_rate"]), others),
        scale_by_transition_rate(
            schedules["transition_rate"],
            codes,
            learning_rate=config.finetune_learning_rate,
            momentum=_RATE_MOMENTUM,
            gain=_RATE_GAIN * config.finetune_learning_rate,
        ),
    )


def _of_quantizers(config: RunConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns the optimizer of theta or of rho."""
    if config.quantizer_optimizer == "adam":
        return optax.adam(schedule)
    return optax.chain(_of_exponentials(), optax.sgd(schedule, momentum=_MOMENTUM, nesterov=True))


def _of_exponentials() -> optax.GradientTransformation:
    """Makes a step of p the one that gradient descent takes of exp(p), to first order.

    With E = exp(p), be it 1 + mu or a scale, dE = -r dL/dE and dL/dE = (dL/dp)/E, so that
    dp = dE/E = -r (dL/dp)/E^2.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple:
        def divided(gradient: jax.Array, p: jax.Array) -> jax.Array:
            return gradient * jnp.exp(-2 * jnp.maximum(p, _SMALLEST)).astype(gradient.dtype)

        return jax.tree.map(divided, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _is_kernel(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
