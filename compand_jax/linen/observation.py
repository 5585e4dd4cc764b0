"""Running a model under an observer, whatever traces its layers run in."""

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax

from compand_jax.layers.observation import Observer
from compand_jax.linen.interception import intercept_layers
from compand_jax.linen.traces import no_trace_from_before


def observe_layers(
    model: nn.Module, make_observer: Callable[[], Observer], call: Callable[[nn.Module], Any]
) -> tuple[Observer, Any]:
    """Returns an observer of a model, and what a call of the model returns that it has seen.

    Args:
      model: The Linen module.
      make_observer: Called for an observer, in the trace that it is for.
      call: Calls `init` or `apply` of the model that it is given.

    Flax traces the body of `nn.scan` once more than it runs it: it has to find that what the body
    broadcasts, such as parameters, does not depend on what is scanned, and it keeps no more of that
    trace. A callback there is an effect and, for flax 0.12.12, a use of the values that it is
    given, so that it raises "broadcasted variable has a data dependency on the scan body". Older
    ones let it go, and ran it where it was given parameters alone, which was once too often.
    So the model is traced first without a callback, every value being marked by its name, which
    is no effect. The names that are left in the program are those of the traces that are run, on
    every version, and they alone call back.
    """

    def scout() -> None:
        with intercept_layers(model, make_observer()) as intercepted:
            call(intercepted)

    with no_trace_from_before():
        program = jax.make_jaxpr(scout)()
    observer = make_observer()
    observer.run_names = frozenset(_names(program.jaxpr))
    with intercept_layers(model, observer) as intercepted:
        return observer, call(intercepted)


def _names(program: Any) -> Iterator[str]:
    """Yields the names that `checkpoint_name` gave to values of a program, or of one inside it."""
    for equation in program.eqns:
        if equation.primitive.name == "name":
            yield equation.params["name"]
        for part in jax.tree.leaves(equation.params):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                yield from _names(inner)
