"""An NNX model whose methods quantize the contractions that no layer of Flax has.

The copy that is quantized gets a class of its own, made of the model's, in which each method runs
as a program (`layers/contractions`): what it does to state is done after it. What quantizes these
contractions lies in one attribute of the model, beside what is in its layers.
"""

import functools
import inspect
import operator
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict
from jaxtyping import Array

from compand_jax.layers import parametrization as par
from compand_jax.layers.config import QuantConfig
from compand_jax.layers.contractions.program import Program, nested_by_name, trace
from compand_jax.layers.layer_quantizer import LayerQuantizer
from compand_jax.layers.observation import Observer
from compand_jax.layers.sites import Site
from compand_jax.layers.summary import site_weight
from compand_jax.nnx.variables import Mu, Scale

ATTRIBUTE = "compand_contractions"
"""The attribute of a model that its `Contractions` take."""

# What asks a traced value for its number.
_UNTRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


class Contractions(nnx.Module):
    """What quantizes the contractions of a model beside its layers.

    Attributes:
      config: What to quantize and how, in the whole model.
      sites: What is static about them, by site. None before calibration, which finds them.
      visitor: What sees their operands in full precision, in the copy that is observed.
      quantizers: theta and rho, as `Mu` and `Scale`, nested as Linen's collection "compand".
    """

    def __init__(self, config: QuantConfig) -> None:
        self.config = config
        self.sites: Mapping[str, Site] = FrozenDict()
        self.visitor: Observer | None = None
        self.quantizers = nnx.data({})


# Functions beside the class: Flax tabulates whatever methods a module has.
def contractions_of(model: nnx.Module) -> Contractions | None:
    """Returns what quantizes a model's own contractions; None where they are no sites."""
    return vars(model).get(ATTRIBUTE)


def hook(model: nnx.Module, config: QuantConfig) -> Contractions:
    """Makes the methods of a model quantize its own contractions, once their sites are given."""
    own = Contractions(config)
    setattr(model, ATTRIBUTE, nnx.data(own))
    _set_class(model, _quantizing(type(model)))
    return own


def unhook(model: nnx.Module) -> None:
    """Makes a model of its own class again, without what quantizes its own contractions."""
    if contractions_of(model) is None:
        return
    delattr(model, ATTRIBUTE)
    # Flax 0.11 knows an attribute that was data as data ever after.
    nodes: Any = model._pytree__nodes
    if ATTRIBUTE in nodes:
        object.__setattr__(model, "_pytree__nodes", nodes - {ATTRIBUTE})
    _set_class(model, _plain(type(model)))


def set_sites(
    own: Contractions,
    sites: Mapping[str, Site],
    compand: Mapping[str, Any],
    shared: Mapping[tuple[str, ...], Mu],
) -> None:
    """Gives contractions their sites, with theta and rho; others stay as they are.

    Args:
      own: The model's.
      sites: By name.
      compand: theta and rho, nested as Linen's collection.
      shared: The variables of each mu that layers share, by path.
    """
    variables = _copied(own.quantizers)
    for name, site in sites.items():
        for operand in site.operands():
            places = (
                (par.parameter_path(name, operand, own.config), Mu),
                (par.scale_path(name, operand), Scale),
            )
            for path, kind in places:
                if path is None:  # of a uniform quantizer
                    continue
                value = jnp.asarray(par.get_leaf(compand, path))
                variable = shared[path] if path in shared else par.get_leaf(variables, path)
                if variable is None or variable[...].shape != value.shape:
                    variable = kind(value)
                variable[...] = value
                par.set_leaf(variables, path, variable)
    own.quantizers = nnx.data(variables)
    own.sites = FrozenDict({**own.sites, **sites})


def compand_of(own: Contractions) -> dict[str, Any]:
    """Returns theta and rho of contractions, as Linen's collection "compand"."""
    return jax.tree.map(
        lambda variable: variable[...],
        own.quantizers,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )


def own_parameters(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Returns the parameters of a model that a contraction can have, by name."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    named = {"/".join(map(str, path)): leaf for path, leaf in flat}
    return {name: x for name, x in named.items() if jnp.issubdtype(x[...].dtype, jnp.inexact)}


def own_quantizers(model: nnx.Module) -> Iterator[tuple[str, str, dict[str, Array]]]:
    """Yields site and operand of a model's own contractions, with what `quantizers` has of them."""
    if (own := contractions_of(model)) is None:
        return
    compand, params = compand_of(own), own_parameters(model)
    for name, site in own.sites.items():
        for operand in site.operands():
            weight = params[name][...] if operand == "weight" else None
            found = par.read_parameters(compand, name, operand, own.config, weight)
            assert found is not None
            mu, scale = found
            key = par.entry_name(operand, site.quantizer)
            yield name, operand, {f"{operand}_scale": scale} | ({key: mu} if key else {})


def _copied(tree: Any) -> Any:
    """Returns nested dictionaries, of the same leaves."""
    return {k: _copied(x) for k, x in tree.items()} if isinstance(tree, Mapping) else tree


def _set_class(model: nnx.Module, kind: type) -> None:
    object.__setattr__(model, "__class__", kind)


@functools.lru_cache(maxsize=1024)
def _quantizing(kind: type) -> type:
    """Returns a class of models as one whose methods quantize: once, as a graphdef has it."""
    methods: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if base in nnx.Module.__mro__:
            continue
        for name, method in vars(base).items():
            if name == "__call__" or (not hasattr(nnx.Module, name) and not name.startswith("__")):
                methods[name] = method
    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    named |= {"__doc__": kind.__doc__, "_compand_plain": kind}
    reached = {name: _reached(name, x) for name, x in methods.items() if _is_method(x)}
    return types.new_class(kind.__name__, (kind,), {}, lambda own: own.update(named, **reached))


def _plain(kind: Any) -> type:
    return kind._compand_plain


def _is_method(x: Any) -> bool:
    """Whether an attribute of a class is a function of its instances, as is one of `nnx.jit`."""
    if isinstance(x, staticmethod | classmethod | property | type):
        return False
    return inspect.isfunction(x) or (callable(x) and hasattr(x, "__get__"))


def _reached(name: str, method: Callable) -> Callable:
    @functools.wraps(method)
    def call(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        return _run(self, name, method, args, kwargs)

    return call


def _run(model: nnx.Module, name: str, method: Callable, args: tuple, kwargs: dict) -> Any:
    """Returns what a method returns, of quantized operands, and changes state as it does."""
    own = contractions_of(model)
    assert own is not None
    call = _Call(model, method, args, kwargs)
    try:
        program = call.traced(products=own.config.contractions == "all")
    except _UNTRACEABLE:
        if name == "__call__":
            raise
        warnings.warn(
            f"method {name!r} of the model needs the values of arrays, so that its own "
            "contractions are not quantized; those in the methods that it calls are",
            stacklevel=3,
        )
        return method(model, *args, **kwargs)
    if not program.layers:  # then it may do what a program cannot
        return method(model, *args, **kwargs)
    if own.visitor is not None:
        return call.finished(program.observed(own.visitor))
    if missing := sorted(program.layers.keys() - own.sites.keys()):
        raise ValueError(
            f"`model` must be calibrated with its method {name!r} before it is run, contractions "
            f"have no mu and scale: {', '.join(missing)}; use nnx.calibrate, whose batches show "
            "them, or give quantize the `sites` of a calibrated model"
        )
    stored = functools.partial(site_weight, nested_by_name(program.weights))
    quantizer = LayerQuantizer(own.config, own.sites.__getitem__, compand_of(own), stored)
    return call.finished(program.quantized(quantizer))


class _Call:
    """A call of a model's method as a function of its parameters and of other state.

    The arguments are split with the model, so that what is Flax's among them (`nnx.Rngs`, a cache)
    is changed in place, too.
    """

    def __init__(self, model: nnx.Module, method: Callable, args: tuple, kwargs: dict) -> None:
        self._bundle, self._method = (model, args, kwargs), method
        self._graphdef, state = nnx.split(self._bundle)
        flat = nnx.to_flat_state(state)
        is_own = lambda path, leaf: path[0] == 0 and isinstance(leaf, nnx.Param)  # noqa: E731
        own = [(path, leaf) for path, leaf in flat if is_own(path, leaf)]
        self._paths = {"/".join(map(str, path[1:])): path for path, _ in own}
        self._params = {name: leaf[...] for name, (_, leaf) in zip(self._paths, own, strict=True)}
        self._state = state
        self._graphdef_after: Any = None

    def traced(self, *, products: bool) -> Program:
        """Returns the call as a program, whose result `finished` takes."""
        return trace(self._call, self._params, (self._state,), {}, products=products)

    def finished(self, result: tuple[Any, Any]) -> Any:
        """Returns the call's outputs, the state being changed as the call changes it.

        Raises:
          ValueError: the call changes what is no state.
        """
        outputs, changed = result
        try:
            if changed:
                nnx.update(self._bundle, changed)
            after = self._graphdef_after
            is_state = after is None or nnx.graphdef(self._bundle) == after
        except ValueError:  # a variable in the place of what is none
            is_state = False
        if not is_state:
            raise ValueError(
                "`model` must change its state alone when it is run, nnx.Variable, where its own "
                "contractions are quantized; it changes an attribute or removes a variable: make "
                "a variable of it"
            )
        return outputs

    def _call(self, params: dict[str, Array], state: Any) -> tuple[Any, Any]:
        bundle = nnx.merge(self._graphdef, self._with_params(params, state))
        model, args, kwargs = bundle
        before = _leaves(bundle)
        # It runs as it was: `nnx.bridge.ToNNX` hands all that it has to Linen.
        kind, own = type(model), vars(model).pop(ATTRIBUTE)
        _set_class(model, _plain(kind))
        outputs = self._method(model, *args, **kwargs)
        _set_class(model, kind)
        vars(model)[ATTRIBUTE] = own
        after = _leaves(bundle)
        graphdef = nnx.graphdef(bundle)
        self._graphdef_after = None if graphdef == self._graphdef else graphdef
        changed = [
            (path, leaf)
            for path, (leaf, values) in after.items()
            if path not in before or _differ(values, before[path][1])
        ]
        return outputs, nnx.from_flat_state(changed) if changed else {}

    def _with_params(self, params: dict[str, Array], state: Any) -> Any:
        flat = dict(nnx.to_flat_state(state))
        for name, path in self._paths.items():
            flat[path] = flat[path].replace(params[name])
        return nnx.from_flat_state(flat)


def _differ(values: list, before: list) -> bool:
    # One that `nnx.capture` reads has more values after a call.
    return len(values) != len(before) or any(map(operator.is_not, values, before))


def _leaves(bundle: Any) -> dict[tuple, tuple[nnx.Variable, list]]:
    """Returns the variables, each with its values."""
    _, state = nnx.split(bundle)
    flat = nnx.to_flat_state(state)
    return {
        path: (leaf, jax.tree.leaves(leaf)) for path, leaf in flat if isinstance(leaf, nnx.Variable)
    }
