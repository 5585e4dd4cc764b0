"""What lifts accuracy at low bits whatever the quantizer: which of it a run has on.

Each is off by default, and on for every method alike; the control has those that say nothing of
quantization. Their fields, and where they are from, are in `RunConfig` and `QuantConfig`.
"""

import dataclasses

from compand_jax.experiments.runs.config import CONTROL, Method, RunConfig
from compand_jax.layers.config import QuantConfig, Rule
from compand_jax.models import FIRST_AND_LAST

OF_ANY_NETWORK = ("bn", "distill")
"""Levers that the control has too."""
OF_QUANTIZED_NETWORKS = (
    "first_last_bits",
    "quantizer_optimizer",
    "transition_rate",
    "preceding_bits",
)
"""Fields of `RunConfig` that say nothing of the control."""


def levers(config: RunConfig, method: Method) -> tuple[str, ...]:
    """Returns the names of what is on in a method's fine-tuning, sorted.

    They are "bn" (statistics estimated anew), "distill", "ends8" (first and last layer at 8 bits,
    or another number), "lsq" (gradients as in LSQ), "progressive" (from more bits), "standardize"
    (weights) and "transitions" (scheduled).

    >>> levers(RunConfig(first_last_bits=8, distillation_weight=0.5), Method("uniform"))
    ('distill', 'ends8')
    """
    is_on = {
        "bn": config.batch_stats_batches > 0,
        "distill": config.distillation_weight > 0,
        f"ends{config.first_last_bits}": config.first_last_bits is not None,
        "lsq": "lsq" in (config.quant.mu_gradient, config.quant.scale_gradient)
        or config.quantizer_optimizer == "sgd",
        "progressive": bool(config.preceding_bits),
        "standardize": config.quant.weight_standardization,
        "transitions": config.transition_rate is not None,
    }
    names = OF_ANY_NETWORK if method == CONTROL else is_on
    return tuple(sorted(name for name in names if is_on[name]))


def quant_of(config: RunConfig, method: Method) -> QuantConfig:
    """Returns how a method of a run quantizes."""
    rules = config.quant.rules
    if (bits := config.first_last_bits) is not None:
        ends = [Rule(name, bits, bits, grid="midtread") for name in FIRST_AND_LAST]
        rules = (*ends, *rules)
    return dataclasses.replace(
        config.quant,
        quantizer=method.quantizer,
        mu_scope=method.mu_scope or config.quant.mu_scope,
        rules=rules,
    )


def preceding(config: RunConfig) -> RunConfig | None:
    """Returns the run of the bits that come before a fine-tuning's own, or None.

    It is in a directory within the run's, and starts where the run would start without it.
    """
    if not config.preceding_bits:
        return None
    *before, bits = config.preceding_bits
    quant = dataclasses.replace(config.quant, weight_bits=bits, act_bits=bits)
    return dataclasses.replace(
        config,
        quant=quant,
        preceding_bits=tuple(before),
        parent_dir=config.parent_dir or config.run_dir,
        run_dir=config.run_dir / f"w{bits}a{bits}",
    )
