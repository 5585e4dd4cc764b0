"""A plan of a traced program: which of its contractions are sites, found without running it.

The program is a jaxpr. Views of the parameters are followed through it, and into the bodies of
scan, while, cond, remat, jit and functions with derivatives of their own. What is not on the way
of a parameter to a contraction has no step in the plan, and runs as it is.
"""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Literal

from compand_jax.layers.contractions.bodies import CALLS, bodies_of, passed_on
from compand_jax.layers.contractions.views import View, moved
from compand_jax.layers.groups import last_run
from compand_jax.layers.observation import Layer
from compand_jax.layers.unrolling import Unrolling

BY_ITS_LAYER = "compand_jax: quantized by its layer"
"""The name, as `jax.ad_checkpoint.checkpoint_name` gives it, of a weight that is quantized."""


@dataclasses.dataclass(frozen=True)
class Moved:
    """An equation with results that are views of a parameter.

    `marked`: of one that its layer has quantized already.
    """

    views: tuple[View | None, ...]
    marked: bool = False


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A contraction whose operands are to be quantized.

    Attributes:
      weights: of each operand, the site whose weight it is, or None.
      activations: of each operand, the site whose activation it is, or None.
    """

    weights: tuple[str | None, str | None]
    activations: tuple[str | None, str | None]


@dataclasses.dataclass(frozen=True)
class Nested:
    """An equation with a site in a body of it, or one that passes a parameter on."""

    plans: tuple["Plan", ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to do at each equation of a jaxpr.

    Attributes:
      steps: for each equation, None where it runs as it is.
      views: of the jaxpr's arguments.
      results: views that it returns.
      weights: the sites whose weights are contracted in it.
      has_site: whether anything is.
    """

    steps: tuple[Moved | Contraction | Nested | None, ...]
    views: tuple[View | None, ...]
    results: tuple[View | None, ...]
    weights: frozenset[str]
    has_site: bool


@dataclasses.dataclass
class Use:
    """How a parameter is contracted, in all of its contractions.

    Attributes:
      ndim: how many axes it has.
      kept: the axes that the results have as outputs.
      summed: the axes that are summed over.
      batch: the axes that the other operand has, too.
      times: how many contractions there are.
      unrolling: how its one contraction is a matrix product, or None.
    """

    ndim: int
    kept: set[int] = dataclasses.field(default_factory=set)
    summed: set[int] = dataclasses.field(default_factory=set)
    batch: set[int] = dataclasses.field(default_factory=set)
    times: int = 0
    unrolling: Unrolling | None = None

    def layer(self, site: str) -> Layer:
        """Returns what visitors are told: its channels are outputs wherever it is contracted."""
        channels = sorted(self.kept - self.summed - self.batch)
        return Layer(
            site,
            tuple(axis - self.ndim for axis in channels),
            self.unrolling if self.times == 1 else None,
            min(self.kept & self.summed, default=None),
            last_run(axis - self.ndim for axis in self.summed - self.kept - self.batch),
        )


class Planner:
    """Plans programs, and remembers how the parameters in them are used.

    Args:
      products: whether contractions of two activations are sites, too.
      root: the outermost scope, where it is in no name.
    """

    def __init__(self, products: bool, root: str) -> None:
        self._products, self._root = products, f"{root}/" if root else ""
        self._counts: collections.Counter[str] = collections.Counter()
        self.uses: dict[str, Use] = {}
        self.product_sites: list[str] = []

    def layers(self) -> dict[str, Layer]:
        """Returns what visitors are told of each site."""
        weights = {site: use.layer(site) for site, use in self.uses.items()}
        return weights | {site: Layer(site, ()) for site in self.product_sites}

    def plan(self, jaxpr: Any, views: Sequence[View | None], scope: str = "") -> Plan:
        """Returns the plan of a jaxpr.

        Args:
          jaxpr: open or closed.
          views: of its arguments, None where they are no view of a parameter.
          scope: the names of the scopes that it is in, for products.
        """
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        known = {v: view for v, view in zip(jaxpr.invars, views, strict=True) if view is not None}
        steps, weights, has_site = [], set[str](), False
        for equation in jaxpr.eqns:
            own = [None if isinstance(v, Literal) else known.get(v) for v in equation.invars]
            step = self._step(equation, own, scope)
            steps.append(step)
            if isinstance(step, Contraction):
                has_site = True
                weights |= {site for site in step.weights if site is not None}
            results: Sequence[View | None] = ()
            if isinstance(step, Moved):
                results = step.views
            if isinstance(step, Nested):
                has_site |= any(plan.has_site for plan in step.plans)
                weights = weights.union(*(plan.weights for plan in step.plans))
                is_call = equation.primitive.name in CALLS
                results = step.plans[0].results if is_call else passed_on(equation, own)
            known |= {v: view for v, view in zip(equation.outvars, results) if view is not None}  # noqa: B905
        found = [None if isinstance(v, Literal) else known.get(v) for v in jaxpr.outvars]
        return Plan(tuple(steps), tuple(views), tuple(found), frozenset(weights), has_site)

    def _step(
        self, equation: Any, views: Sequence[View | None], scope: str
    ) -> Moved | Contraction | Nested | None:
        name = equation.primitive.name
        if name in ("dot_general", "conv_general_dilated"):
            return self._contraction(equation, views, scope)
        if name == "name" and equation.params["name"] == BY_ITS_LAYER:
            return Moved((View(None, (frozenset(),) * equation.invars[0].aval.ndim),), marked=True)
        bodies = bodies_of(equation, views)
        if bodies:
            inner = f"{scope}/{equation.source_info.name_stack}"
            plans = tuple(self.plan(body, own, inner) for body, own in bodies)
            is_call = name in CALLS
            if any(plan.has_site for plan in plans) or (
                not is_call and any(passed_on(equation, views))
            ):
                return Nested(plans)
            # A rule of derivatives is kept, for the quantized view as for the plain one.
            is_view = is_call and any(plans[0].results)
            return Moved(plans[0].results) if is_view else None
        first = views[0] if views else None
        if first is None or not jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.inexact):
            return None
        results = moved(equation, first)
        return None if results is None else Moved(results)

    def _contraction(
        self, equation: Any, views: Sequence[View | None], scope: str
    ) -> Contraction | None:
        summed, batch = _axes(equation)
        if not summed[0] or any(view is not None and view.path is None for view in views):
            return None
        paths = [None if view is None else view.path for view in views]
        inexact = [jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in equation.invars]
        if None not in paths:
            repeated = [_is_repeated(*own) for own in zip(views, equation.invars, strict=True)]
            if repeated[0] == repeated[1]:  # a weight that is computed from two parameters
                return None
            paths[repeated.index(True)] = None  # such as a token that all examples begin with
        if paths == [None, None]:
            return self._product(f"{scope}/{equation.source_info.name_stack}", all(inexact))
        for site, view, *along in zip(paths, views, summed, batch, strict=True):
            if site is not None and view is not None:
                self._note(site, view, *along)
        left, right = paths
        if right is not None and views[1] is not None:
            self._note_product(right, views[1], equation, summed, batch)
        acts = (right if inexact[0] else None, left if inexact[1] else None)
        return Contraction((left, right), acts)

    def _note(self, site: str, view: View, summed: Sequence[int], batch: Sequence[int]) -> None:
        use = self.uses[site]
        use.times += 1
        for axis, along in enumerate(view.axes):
            kind = use.summed if axis in summed else use.batch if axis in batch else use.kept
            kind |= along

    def _note_product(
        self, site: str, view: View, equation: Any, summed: Sequence[Any], batch: Sequence[Any]
    ) -> None:
        """Notes where the parameter itself is a matrix, its inputs in front."""
        inputs, weight_inputs = map(tuple, summed)
        is_product = equation.primitive.name == "dot_general" and view.whole and not batch[1]
        own_axes = len(view.axes) == self.uses[site].ndim
        if is_product and own_axes and weight_inputs == tuple(range(len(weight_inputs))):
            self.uses[site].unrolling = Unrolling(contracted=inputs)

    def _product(self, scope: str, inexact: bool) -> Contraction | None:
        if not self._products or not inexact:
            return None
        scope = scope_name(scope).removeprefix(self._root)
        name = f"{scope}product_{self._counts[scope]}"
        self._counts[scope] += 1
        sites = f"{name}:left", f"{name}:right"
        self.product_sites += sites
        return Contraction((None, None), sites)


def plan_program(
    jaxpr: Any,
    views: Sequence[View | None],
    ndims: Mapping[str, int],
    *,
    products: bool,
    root: str = "",
) -> tuple[Plan, Planner]:
    """Returns the plan of a whole program, and the planner that knows its sites.

    Args:
      jaxpr: the program's.
      views: of its arguments.
      ndims: how many axes each parameter has, by path.
      products: whether contractions of two activations are sites, too.
      root: the outermost scope, where it is in no name.
    """
    planner = Planner(products, root)
    planner.uses = {path: Use(ndim) for path, ndim in ndims.items()}
    plan = planner.plan(jaxpr, views)
    planner.uses = {site: use for site, use in planner.uses.items() if site in plan.weights}
    return plan, planner


def scope_name(scope: str) -> str:
    """Returns the names of the scopes that a product is in, each followed by a slash.

    They are those of `jax.named_scope`, as Flax gives them to modules. Left out is what is no
    name: an einsum's equation, a transformation, a module's method.

    >>> scope_name("/Model/block.encode/block/vmap(bd,cd->bc)")
    'Model/block/'
    """
    names: list[str] = []
    for part in scope.split("/"):
        part = re.sub(r"\..*", "", part)
        if re.fullmatch(r"[A-Za-z_]\w*", part) and part not in names[-1:]:
            names.append(part)
    return "".join(f"{name}/" for name in names)


def _is_repeated(view: View | None, v: Any) -> bool:
    """Returns whether a view has a parameter more than once."""
    sizes = zip(view.axes if view else (), v.aval.shape, strict=True)
    return any(not along and size > 1 for along, size in sizes)


def _axes(equation: Any) -> tuple[tuple[Sequence[int], ...], tuple[Sequence[int], ...]]:
    """Returns the axes of both operands that are summed over, and those that they share."""
    numbers = equation.params["dimension_numbers"]
    if equation.primitive.name == "dot_general":
        return numbers
    # The first is the output's features, and for the input the batch: all others are summed over.
    return (numbers.lhs_spec[1:], numbers.rhs_spec[1:]), ((), ())
