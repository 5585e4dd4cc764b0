"""Running a planned program, its contractions with other operands.

What has no site runs as it is: functions with derivative rules of their own keep these. What has
one is built again from JAX's public functions: scan, while, cond and remat stay what they are, jit
is inlined, and so are custom derivatives, which a quantized operand would make wrong.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jaxtyping import Array

from compand_jax.layers.contractions.bodies import CALLS, REMATS, passed_on, scan_parts
from compand_jax.layers.contractions.plan import Contraction, Moved, Nested, Plan
from compand_jax.layers.observation import Layer

Memo = dict["Quantized", Any]


class Quantized:
    """A view of a quantized weight, which is made where it is needed.

    That is within remat, so that it is made again there and not kept, and in a loop's body for the
    layer of a stack that runs. What is made in one trace must not be used in another: each has a
    memo of its own.
    """

    def __init__(self, make: Callable[[Memo], Any]) -> None:
        self._make = make

    def value(self, memo: Memo) -> Any:
        """Returns the view, made in the current trace or known in its memo."""
        if self not in memo:
            memo[self] = self._make(memo)
        return memo[self]


Views = Sequence[Quantized | None]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What the operands of a program's contractions are replaced by.

    Args:
      layers: what is told of each site.
      ndims: how many axes each parameter has.
      weight: called with a site's layer and its weight, which has all of the parameter's axes, of
        length 1 in front for one layer of a stack. None leaves weights as they are.
      activation: called with a site's layer and its activation.
    """

    layers: Mapping[str, Layer]
    ndims: Mapping[str, int]
    weight: Callable[[Layer, Array], Array] | None
    activation: Callable[[Layer, Array], Array]

    def program(self, plan: Plan, closed: Any, args: Sequence[Any]) -> list[Any]:
        """Returns the results of a whole program."""
        quantized = [self._whole(plan, i, x) for i, x in enumerate(args)]
        return self._run(plan, closed, args, quantized, {})[0]

    def _whole(self, plan: Plan, i: int, x: Array) -> Quantized | None:
        """Returns a parameter, or a stack's layer of it, as it is to be quantized; None if not."""
        view = plan.views[i]
        if view is None or not view.whole or view.path not in plan.weights or self.weight is None:
            return None
        site, weight = view.path, self.weight
        axes = tuple(range(self.ndims[site] - x.ndim))

        def make(memo: Memo) -> Array:
            layer = weight(self.layers[site], jnp.expand_dims(x, axes))
            return jnp.squeeze(layer, axes)

        return Quantized(make)

    def _run(
        self, plan: Plan, closed: Any, args: Sequence[Any], quantized: Views, memo: Memo
    ) -> tuple[list[Any], list[Quantized | None]]:
        """Returns a jaxpr's results, and those of them that are views of quantized weights."""
        jaxpr = getattr(closed, "jaxpr", closed)
        values = dict(zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=True))
        values |= dict(zip(jaxpr.invars, args, strict=True))
        views = {v: x for v, x in zip(jaxpr.invars, quantized, strict=True) if x is not None}

        def read(v: Any) -> Any:
            return v.val if isinstance(v, core.Literal) else values[v]

        def view(v: Any) -> Quantized | None:
            return None if isinstance(v, core.Literal) else views.get(v)

        for equation, step in zip(jaxpr.eqns, plan.steps, strict=True):
            given = [read(v) for v in equation.invars]
            own = [view(v) for v in equation.invars]
            results, found = self._equation(equation, step, given, own, memo, jaxpr)
            values.update(zip(equation.outvars, results, strict=True))
            views.update((v, x) for v, x in zip(equation.outvars, found) if x is not None)  # noqa: B905
        return [read(v) for v in jaxpr.outvars], [view(v) for v in jaxpr.outvars]

    def _equation(
        self, equation: Any, step: Any, given: list, views: Views, memo: Memo, jaxpr: Any
    ) -> tuple[Sequence[Any], Views]:
        if isinstance(step, Nested):
            return self._nested(equation, step.plans, given, views, memo)
        if isinstance(step, Contraction):
            return [self._contraction(equation, step, given, views, memo)], ()
        if isinstance(step, Moved) and step.marked:
            return given, ()
        run = _as_it_is(equation, jaxpr)
        results = run(given)
        if not isinstance(step, Moved) or not any(views):
            return results, ()

        def again(memo: Memo) -> list[Any]:
            pairs = zip(given, views, strict=True)
            return run([x if view is None else view.value(memo) for x, view in pairs])

        moved = Quantized(again)
        return results, [view and _part(moved, i) for i, view in enumerate(step.views)]

    def _contraction(
        self, equation: Any, step: Contraction, given: list, views: Views, memo: Memo
    ) -> Any:
        operands = list(given)
        for i in range(2):
            weight, activation, quantized = step.weights[i], step.activations[i], views[i]
            if weight is not None and quantized is not None:
                operands[i] = quantized.value(memo)
            elif weight is None and activation is not None:
                operands[i] = self.activation(self.layers[activation], given[i])
        return equation.primitive.bind(*operands, **equation.params)

    def _nested(
        self, equation: Any, plans: tuple[Plan, ...], given: list, views: Views, memo: Memo
    ) -> tuple[Sequence[Any], Views]:
        name, params = equation.primitive.name, equation.params
        if name in CALLS:
            body = params["call_jaxpr"] if "call_jaxpr" in params else params["jaxpr"]
            return self._run(plans[0], body, given, views, memo)
        return self._again(equation, plans, given, views, memo), passed_on(equation, views)

    def _again(
        self, equation: Any, plans: tuple[Plan, ...], given: list, views: Views, memo: Memo
    ) -> Sequence[Any]:
        """Returns the results of remat, cond, scan or while, built again."""
        name, params = equation.primitive.name, equation.params
        if name in REMATS:
            body = self._body(plans[0], params["jaxpr"], views)
            remat = jax.checkpoint(body, prevent_cse=params["prevent_cse"], policy=params["policy"])
            return remat(*given)
        if name == "cond":
            bodies = [
                self._body(plan, branch, views[1:])
                for plan, branch in zip(plans, params["branches"], strict=True)
            ]
            return lax.switch(given[0], bodies, *given[1:])
        if name == "scan":
            return self._scan(equation, plans[0], given, views, memo)
        return self._while(equation, plans, given, views, memo)

    def _body(self, plan: Plan, closed: Any, views: Views) -> Callable[..., list[Any]]:
        return lambda *args: self._run(plan, closed, args, views, {})[0]

    def _while(
        self, equation: Any, plans: tuple[Plan, ...], given: list, views: Views, memo: Memo
    ) -> Sequence[Any]:
        params = equation.params
        first = params["cond_nconsts"]
        second = first + params["body_nconsts"]
        before = self._made_before(plans[0], [*views[:first], *views[second:]], memo)
        condition = self._body(plans[0], params["cond_jaxpr"], before)
        before = self._made_before(plans[1], views[first:], memo)
        body = self._body(plans[1], params["body_jaxpr"], before)
        return lax.while_loop(
            lambda carry: condition(*given[:first], *carry)[0],
            lambda carry: tuple(body(*given[first:second], *carry)),
            tuple(given[second:]),
        )

    def _scan(
        self, equation: Any, plan: Plan, given: list, views: Views, memo: Memo
    ) -> Sequence[Any]:
        params = equation.params
        consts, carry, _ = scan_parts(equation)
        xs = consts + carry
        before = self._made_before(plan, views[:xs], memo)
        # A stack that was moved on the way is quantized as a whole, and scanned over beside it.
        beside = {
            i: quantized.value(memo)
            for i, (quantized, view) in enumerate(zip(views[xs:], plan.views[xs:], strict=True))
            if quantized and view and view.path in plan.weights and not view.whole
        }

        def body(carried: list, scanned: tuple[list, dict]) -> tuple[list, list]:
            layers, moved = scanned
            args = [*given[:consts], *carried, *layers]
            own = [self._whole(plan, i, x) for i, x in enumerate(layers, xs)]
            for i, layer in moved.items():
                own[i] = _known(layer)
            results, _ = self._run(plan, params["jaxpr"], args, [*before, *own], {})
            return results[:carry], results[carry:]

        options = {"_split_transpose"} & params.keys()
        carried, stacked = lax.scan(
            body,
            given[consts:xs],
            (given[xs:], beside),
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
            **{name: params[name] for name in options},
        )
        return [*carried, *stacked]

    def _made_before(self, plan: Plan, views: Views, memo: Memo) -> Views:
        """Returns a loop's constants, and what it carries as it is, made once before it.

        That is where its body contracts them.
        """
        return [
            _known(quantized.value(memo))
            if quantized and view and view.path in plan.weights
            else None
            for quantized, view in zip(views, plan.views, strict=False)
        ]


def _known(value: Any) -> Quantized:
    return Quantized(lambda memo: value)


def _part(quantized: Quantized, i: int) -> Quantized:
    return Quantized(lambda memo: quantized.value(memo)[i])


def _as_it_is(equation: Any, jaxpr: Any) -> Callable[[Sequence[Any]], list[Any]]:
    """Returns an equation as a function of all of its operands."""
    named = {v: i for i, v in enumerate(equation.invars) if not isinstance(v, core.Literal)}
    alone = jaxpr.replace(
        constvars=[],
        invars=list(named),
        outvars=list(equation.outvars),
        eqns=[equation],
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    run = core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))  # pyright: ignore[reportPrivateImportUsage]
    return lambda given: run(*(given[i] for i in named.values()))
