"""What a frozen network takes: bytes on the device and time to evaluate, next to full precision."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from compand_jax.experiments.benchmark.measure import (
    FULL,
    Case,
    make_problem,
    ratios,
    time_in_turns,
)
from compand_jax.frozen.freeze import freeze
from compand_jax.frozen.model import FrozenModel
from compand_jax.layers.config import QuantConfig

FROZEN: Mapping[str, QuantConfig | None] = {
    FULL: None,
    "frozen mu-law W4": QuantConfig(weight_bits=4, act_bits=None, mu_scope="per_layer"),
    "frozen mu-law W4A4": QuantConfig(weight_bits=4, act_bits=4, mu_scope="per_layer"),
}


def compare_frozen(
    network: str,
    batch: int,
    repetitions: int,
    advance: Callable[[], Any] = lambda: None,
) -> list[dict]:
    """Returns a row for each of `FROZEN`: bytes on the device, and the time of an evaluation.

    Args:
      network: of the zoo.
      batch: images an evaluation.
      repetitions: of every evaluation, in turns.
      advance: called after every evaluation and every compilation, for a progress bar.
    """
    cases, stored = {}, {}
    for name, config in FROZEN.items():
        cases[name], stored[name] = _compiled(network, batch, name, config)
        advance()
    calls = {name: case.run for name, case in cases.items()}
    seconds = time_in_turns(calls, repetitions, advance)
    return [
        {
            "network": network,
            "batch": batch,
            "method": name,
            "seconds": float(np.median(seconds[name])),
            "images_per_second": batch / float(np.median(seconds[name])),
            **ratios(seconds[name], seconds[FULL]),
            "stored_bytes": stored[name],
            "temp_bytes": case.temp_bytes,
            "peak_bytes": stored[name] + case.temp_bytes,
        }
        for name, case in cases.items()
    ]


def _compiled(
    network: str, batch: int, name: str, config: QuantConfig | None
) -> tuple[Case, int]:
    """Returns an evaluation, compiled, and the bytes of the network's variables on the device."""
    problem = make_problem(network, batch, FULL if config is None else name, config)
    if config is None:
        held, run = problem.state.variables, problem.model.apply
    else:
        held = freeze(problem.model, problem.state.variables, problem.images)
        run = FrozenModel.apply
    compiled = jax.jit(run).lower(held, problem.images).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    call = functools.partial(compiled, held, problem.images)
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(held))
    return Case(call, 0.0, analysis.temp_size_in_bytes), stored
