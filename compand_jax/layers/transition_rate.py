"""Transition-rate scheduling: not the size of a weight's step is scheduled, but how many cross.

A quantized weight changes only when the weight behind it crosses a threshold. How many do so in a
step depends on the learning rate, and on how many lie near a threshold. So the share of those that
cross is given a schedule R, and the learning rate U follows from it:

    k_t = share of the weights whose code is another than a step before
    K_t = m K_{t-1} + (1 - m) k_t
    U_t = max(0, U_{t-1} + eta (R_t - K_t))
    w  <- w - U_t g                                   g the inner optimizer's direction

Source: Lee, Jeon, Kim, Ham, "Scheduling weight transitions for quantization-aware training", ICCV
2025, arXiv 2404.19248, equations 5 and 10 to 12; of SGD it makes SGDT, of Adam AdamT. There the
weights' scales are not trained, so that a code changes with its weight alone; here they may be, and
what they change is counted too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array


class TransitionRateState(NamedTuple):
    """What the transformation keeps.

    Attributes:
      count: Steps done, int32.
      codes: The codes at the last step.
      rate: K, the running share of codes that change in a step.
      learning_rate: U.
    """

    count: Array
    codes: Any
    rate: Array
    learning_rate: Array


def scale_by_transition_rate(
    target: optax.ScalarOrSchedule,
    codes: Callable[[Any], Any],
    *,
    learning_rate: float,
    momentum: float = 0.99,
    gain: float | None = None,
) -> optax.GradientTransformation:
    """Returns what takes a learning rate's place for quantized weights: -U_t times the direction.

    U is raised as long as fewer codes change in a step than the target says, and lowered when more
    do. It is one for all weights. It comes last, after momentum or Adam's scaling:

        optax.chain(optax.trace(0.9), scale_by_transition_rate(schedule, codes, learning_rate=0.1))

    Args:
      target: R, the share of the quantized weights whose code is to change in a step, from 0 to 1;
        a number, or a schedule of the step.
      codes: A function of all parameters that the optimizer moves, which returns a tree of integer
        arrays: the codes of the quantized weights, each at the path of its weight, and nothing
        else. `weight_codes` of a quantized model is one. Other leaves' updates pass as they are.
      learning_rate: U before the first step.
      momentum: m, in [0, 1).
      gain: eta; None is the learning rate.

    Returns:
      An optax transformation, whose `update` needs the parameters.

    Raises:
      ValueError: `momentum` or `learning_rate` is out of range; or, in `init` and `update`, there
        are no codes or no parameters.

    >>> import compand_jax as cj
    >>> codes = lambda params: {"w": cj.quantize(params["w"], 0.0, 1.0, bits=3)}
    >>> tx = scale_by_transition_rate(0.01, codes, learning_rate=0.1)
    >>> params = {"w": jnp.ones(8), "b": jnp.ones(2)}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> round(float(updates["w"][0]), 4), float(updates["b"][0])
    (-0.101, 1.0)
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"`momentum` must be in [0, 1), got {momentum!r}: 0.99 is a usual value")
    if not learning_rate > 0:
        raise ValueError(
            f"`learning_rate` must be positive, got {learning_rate!r}: give the one that training "
            "would start with"
        )
    eta = learning_rate if gain is None else gain

    def init(params: Any) -> TransitionRateState:
        found = codes(params)
        if not jax.tree.leaves(found):
            raise ValueError(
                "`codes` must return the codes of some weights, got none: quantize weights, or "
                "leave the transition rate out"
            )
        zero = jnp.zeros((), jnp.float32)
        return TransitionRateState(jnp.zeros((), jnp.int32), found, zero, zero + learning_rate)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, TransitionRateState]:
        if params is None:
            raise ValueError("`params` must be given to `update`: the codes are theirs")
        found = codes(params)
        rate = momentum * state.rate + (1 - momentum) * _changed(state.codes, found)
        wanted = target(state.count) if callable(target) else target
        own = jnp.maximum(state.learning_rate + eta * (wanted - rate), 0).astype(jnp.float32)
        paths = {path for path, _ in jax.tree_util.tree_leaves_with_path(found)}
        scaled = jax.tree_util.tree_map_with_path(
            lambda path, leaf: (-own * leaf).astype(leaf.dtype) if path in paths else leaf, updates
        )
        return scaled, TransitionRateState(state.count + 1, found, rate, own)

    return optax.GradientTransformation(init, update)


def _changed(before: Any, after: Any) -> Array:
    """Returns the share of codes that differ."""
    pairs = list(zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    changed = [jnp.sum(a != b, dtype=jnp.float32) for a, b in pairs]
    return sum(changed[1:], changed[0]) / sum(a.size for a, _ in pairs)
