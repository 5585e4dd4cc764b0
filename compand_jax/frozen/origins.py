"""Where the layers' weights come from: parameters as they are stored, or computed from them.

It is read from the trace of a call, never from values: a kernel times a mask of ones is computed,
whatever it equals today. In the trace every weight is marked by a name on its way into its layer,
and what is marked is followed back to a variable, through whatever passes it on unchanged: `jit`,
`remat`, branches, and `scan` and `vmap`, which pass on parts of it.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from flax.core.tracers import current_trace
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import Array

from compand_jax.frozen.sample import Call, result_arrays
from compand_jax.frozen.tree import Path
from compand_jax.layers.observation import Layer, Observer
from compand_jax.layers.visitor import Visitor
from compand_jax.linen.traces import no_trace_from_before

# What gives out an array as it took it.
_PASSES_ON = ("copy", "copy_p", "name", "optimization_barrier", "pvary", "sharding_constraint")


class Origins(NamedTuple):
    """What the trace of a call tells about its layers' weights.

    Attributes:
      leaves: By site that runs, the variable that the layer multiplies as it is; None where it
        multiplies something else, or not the same in all its calls.
      used: Variables that are used otherwise as well.
      varying: Sites whose weight depends on the call's inputs or random numbers.
    """

    leaves: dict[str, Path | None]
    used: set[Path]
    varying: set[str]

    def require_the_same(self, sites: Iterable[str]) -> None:
        """Raises ValueError where the weight of one of these sites is another from call to call."""
        if varying := self.varying.intersection(sites):
            raise ValueError(
                f"site {', '.join(map(repr, sorted(varying)))} computes its weight from the "
                "model's inputs or random numbers: leave it in full precision, "
                "Rule(..., weight_bits=None)"
            )


@runtime_checkable
class ObservedCall(Protocol):
    """A call of a model, of Linen or of NNX, whose layers are visited."""

    @property
    def call(self) -> Call:
        """The arguments."""
        ...

    @property
    def random(self) -> Any:
        """What the model's random numbers come from: arrays."""
        ...

    def run(
        self, visitor: Visitor, variables: dict[Path, Any], arrays: list, random: Any
    ) -> tuple[Any, Any]:
        """Returns the outputs, with a visitor at every layer, and the state after the call."""
        ...

    def observe(
        self,
        make_observer: Callable[[bool], Observer],
        variables: dict[Path, Any],
        arrays: list,
        random: Any,
    ) -> Observer:
        """Returns an observer of the call, made by whether every inner trace runs."""
        ...


class _Input:
    """Stands for an input of the call where a variable's path could be."""


class _Visitor:
    """Shows every weight, with its site, to a function, and passes on what that returns."""

    def __init__(self, change: Any) -> None:
        self._change = change

    def operands(
        self, layer: Layer, activation: Array | None, weight: Array
    ) -> tuple[Array | None, Array]:
        return activation, self._change(layer.site, weight)

    def output(self, layer: Layer, output: Array) -> Array:
        return output


def find_origins(observed: ObservedCall, variables: dict[Path, Any]) -> Origins:
    """Returns where a model's weights come from, in this call of it.

    Args:
      observed: The call.
      variables: The model's variables by path, without mu and scale.
    """
    visitor = _Visitor(lambda site, weight: checkpoint_name(weight, f"weight {site}"))
    program, sources, _ = _trace(observed, variables, visitor)
    found: dict[str, set] = {}
    used: set[Path] = set()
    paths = [source if isinstance(source, tuple) else None for source in sources]
    _follow(program, dict(zip(program.invars, paths, strict=True)), found, used)
    leaves = {site: next(iter(paths)) if len(paths) == 1 else None for site, paths in found.items()}
    varying: set[str] = set()
    _spread(program, [isinstance(source, _Input) for source in sources], varying)
    return Origins(leaves, used, varying)


def needed_variables(observed: ObservedCall, variables: dict[Path, Any]) -> set[Path]:
    """Returns the variables that a call's results depend on once every layer's weight is given."""
    visitor = _Visitor(lambda _, weight: jnp.zeros(weight.shape, weight.dtype))
    program, sources, opaque = _trace(observed, variables, visitor)
    if opaque:  # a result in which arrays cannot be seen
        return set(variables)
    _, used = dce_jaxpr(program, [True] * len(program.outvars))
    pairs = zip(sources, used, strict=True)
    return {path for path, needed in pairs if needed and isinstance(path, tuple)}


def _trace(
    observed: ObservedCall, variables: dict[Path, Any], visitor: _Visitor
) -> tuple[jex.Jaxpr, list, bool]:
    """Returns a call's program, what each of its inputs is, and whether a result is an object."""
    opaque = False

    def run(variables: dict[Path, Any], arrays: list, random: Any) -> list:
        nonlocal opaque
        outputs, state = observed.run(visitor, variables, arrays, random)
        leaves = jax.tree.leaves(outputs)
        opaque = any(not isinstance(x, jax.Array | bool | int | float | str) for x in leaves)
        # A collection that may change comes back whether it did or not.
        given = {id(leaf) for leaf in jax.tree.leaves(variables)}
        changed = [x for x in jax.tree.leaves(state) if id(x) not in given]
        return result_arrays((outputs, changed))

    arguments = variables, observed.call.arrays(), observed.random
    with no_trace_from_before():
        program = jax.make_jaxpr(run)(*arguments)
    sources: list[Path | _Input | None] = [
        (path[1].key if len(path) == 2 else None) if path[0].idx == 0 else _Input()
        for path, _ in jax.tree_util.tree_leaves_with_path(arguments)
    ]
    return program.jaxpr, sources, opaque


def _follow(
    program: jex.Jaxpr, origins: dict[Any, Path | None], found: dict[str, set], used: set[Path]
) -> list[Path | None]:
    """Returns the variables that a program gives out as they are.

    Args:
      program: The program.
      origins: What its inputs are; its own values are added.
      found: By site, the origins of the weights that are met; added to.
      used: The variables that are met elsewhere; added to.
    """

    def origin(value: Any) -> Path | None:
        return origins.get(value) if isinstance(value, jex.Var) else None

    for eqn in program.eqns:
        inputs = [origin(value) for value in eqn.invars]
        name = eqn.params["name"] if eqn.primitive.name == "name" else ""
        outputs: list[Path | None] = [None] * len(eqn.outvars)
        if name.startswith("weight "):
            found.setdefault(name.removeprefix("weight "), set()).add(inputs[0])
        elif eqn.primitive.name in _PASSES_ON:
            outputs = inputs
        elif parts := list(_parts(eqn, inputs, None)):
            for part, given in parts:
                given_out = _follow(part, dict(zip(part.invars, given, strict=True)), found, used)
                if len(parts) == 1 and _same_shapes(part.outvars, eqn.outvars):
                    outputs = given_out
                else:
                    used.update(path for path in given_out if path)
        else:
            used.update(path for path in inputs if path)
        origins.update(zip(eqn.outvars, outputs, strict=True))
    return [origin(value) for value in program.outvars]


def _spread(program: jex.Jaxpr, varying: list[bool], found: set[str]) -> list[bool]:
    """Returns which results of a program depend on inputs that vary; adds such weights' sites."""
    values = dict(zip(program.invars, varying, strict=True))

    def varies(value: Any) -> bool:
        return isinstance(value, jex.Var) and values.get(value, False)

    for eqn in program.eqns:
        inputs = [varies(value) for value in eqn.invars]
        name = eqn.params["name"] if eqn.primitive.name == "name" else ""
        if name.startswith("weight ") and any(inputs):
            found.add(name.removeprefix("weight "))
        outputs = [any(inputs)] * len(eqn.outvars)
        parts = list(_parts(eqn, inputs, any(inputs)))
        for part, given in parts:
            given_out = _spread(part, given, found)
            if len(parts) == 1 and _same_shapes(part.outvars, eqn.outvars):
                outputs = given_out
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [varies(value) for value in program.outvars]


def _same_shapes(inner: list, outer: list) -> bool:
    return [v.aval.shape for v in inner] == [v.aval.shape for v in outer]


def _parts(eqn: Any, inputs: list, unknown: Any) -> Iterator[tuple[jex.Jaxpr, list]]:
    """Yields the programs inside an equation, and what is known of each of their inputs.

    Args:
      eqn: The equation.
      inputs: What is known of its inputs.
      unknown: What is taken to be known of an input that may be another one each time.
    """
    for part in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_program):
        if not _is_program(part):
            continue
        part = getattr(part, "jaxpr", part)
        given = inputs
        if eqn.primitive.name == "while":
            before, own = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
            carried = [unknown] * (len(inputs) - before - own)
            is_condition = part is eqn.params["cond_jaxpr"].jaxpr
            given = (inputs[:before] if is_condition else inputs[before : before + own]) + carried
        elif eqn.primitive.name == "cond":
            given = inputs[1:]
        elif eqn.primitive.name == "scan":
            # In front of what is scanned, and so has an axis less inside, is what is carried: as
            # many as there are results with no axis less inside. It may be another one each time.
            pairs = zip(part.outvars, eqn.outvars, strict=True)
            carried = sum(v.aval.ndim == outer.aval.ndim for v, outer in pairs)
            pairs = zip(part.invars, eqn.invars, strict=True)
            end = sum(v.aval.ndim == outer.aval.ndim for v, outer in pairs)
            given = inputs[: end - carried] + [unknown] * carried + inputs[end:]
        if len(given) != len(part.invars):
            given = [unknown] * len(part.invars)
        yield part, given


def _is_program(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def computed_weights(
    observed: ObservedCall, variables: dict[Path, Any], sites: set[str]
) -> dict[str, Array]:
    """Returns what these layers multiply with, to the last bit as in the jitted model.

    Raises:
      ValueError: there are several weights of one site.
    """
    called_back: dict[str, list] = {}

    def run(variables: dict[Path, Any], arrays: list, random: Any) -> dict[str, list]:
        make_observer = functools.partial(_EveryWeight, sites)
        observer = observed.observe(make_observer, variables, arrays, random)
        called_back.update(observer.called_back["weight"])
        assert isinstance(observer, _EveryWeight)
        return observer.every

    seen = jax.device_get(jax.jit(run)(variables, observed.call.zeros(), observed.random))
    jax.effects_barrier()
    computed = {}
    for site in sorted(sites):
        first, *others = [*seen.get(site, []), *called_back.get(site, [])]
        if any(x.shape != first.shape or not (x == first).all() for x in others):
            raise ValueError(
                f"site {site!r} computes several weights from its parameters, in a stack of "
                "layers or from call to call: freeze a model that has the layers one by one"
            )
        computed[site] = jnp.asarray(first)
    return computed


class _EveryWeight(Observer):
    """Keeps the weights of some sites, of every call: in `every`, or called back."""

    def __init__(self, sites: set[str], calls_back: bool) -> None:
        super().__init__(weight=lambda weight: weight, calls_back=calls_back)
        self._sites, self._here = sites, current_trace()
        self.every: dict[str, list] = {}

    def operands(
        self, layer: Layer, activation: Array | None, weight: Array
    ) -> tuple[Array | None, Array]:
        if layer.site in self._sites and current_trace() == self._here:
            self.every.setdefault(layer.site, []).append(weight)
        elif layer.site in self._sites:
            self._compute("weight", layer.site, weight)
        return activation, weight
