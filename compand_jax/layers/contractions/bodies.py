"""Equations of a jaxpr that have jaxprs in them, and which of their operands these pass on."""

from collections.abc import Sequence
from typing import Any, TypeVar

from compand_jax.layers.contractions.views import View

T = TypeVar("T")

# Their body takes the operands as they are, and returns the results.
CALLS = frozenset(
    (
        "jit", "pjit", "closed_call", "core_call",
        "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr",
    )
)  # fmt: skip
REMATS = frozenset(("checkpoint", "remat", "remat2"))


def bodies_of(
    equation: Any, views: Sequence[View | None]
) -> list[tuple[Any, Sequence[View | None]]]:
    """Returns the bodies of an equation that are interpreted, each with its arguments' views."""
    name, params = equation.primitive.name, equation.params
    if name in CALLS | REMATS:
        return [(params["call_jaxpr"] if "call_jaxpr" in params else params["jaxpr"], views)]
    if name == "scan":
        consts, carry, _ = scan_parts(equation)
        layers = [None if view is None else view.layer() for view in views[consts + carry :]]
        carried = passed_on(equation, views)[:carry]
        return [(params["jaxpr"], [*views[:consts], *carried, *layers])]
    if name == "while":
        first = params["cond_nconsts"]
        second = first + params["body_nconsts"]
        carried = passed_on(equation, views)
        return [
            (params["cond_jaxpr"], [*views[:first], *carried]),
            (params["body_jaxpr"], [*views[first:second], *carried]),
        ]
    if name == "cond":
        return [(branch, views[1:]) for branch in params["branches"]]
    return []


def scan_parts(equation: Any) -> tuple[int, int, int]:
    """Returns how many of a scan's operands are constants, are carried and are scanned over."""
    params = equation.params
    if "num_consts" in params:
        consts, carry = params["num_consts"], params["num_carry"]
    else:  # from jax 0.11 on
        consts, carry, _ = map(len, params["ft_in"].unpack())
    return consts, carry, len(equation.invars) - consts - carry


def passed_on(equation: Any, given: Sequence[T | None]) -> list[T | None]:
    """Returns what is known of the results of scan, while, cond and remat: they are operands.

    The transformations of NNX return all state that they are given, such as parameters, and its
    loops carry it. What each body returns as it was is the operand still.

    Args:
      equation: one of these.
      given: what is known of each operand.
    """
    name, params = equation.primitive.name, equation.params
    count = len(equation.outvars)
    if name == "cond":
        places = [_places(branch) for branch in params["branches"]]
        same = [own[0] if len(set(own)) == 1 else None for own in zip(*places, strict=True)]
        return [None if i is None else given[1 + i] for i in same]
    if name == "while":
        consts, own = params["body_nconsts"], given[params["cond_nconsts"] :]
        carried = [i == consts + j for j, i in enumerate(_places(params["body_jaxpr"]))]
        return [own[consts + j] if carried[j] else None for j in range(count)]
    places = _places(params["jaxpr"])
    if name == "scan":
        consts, carry, _ = scan_parts(equation)
        for j, i in enumerate(places):
            # A stack comes out as it is where each of its layers does.
            kept = i is not None and (i == consts + j if j < carry else i >= consts + carry)
            places[j] = i if kept else None
    return [None if i is None else given[i] for i in places]


def _places(jaxpr: Any) -> list[int | None]:
    """Returns, for each result of a jaxpr, which of the arguments it is, or None."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    places = {id(v): i for i, v in enumerate(jaxpr.invars)}
    return [places.get(id(v)) for v in jaxpr.outvars]
