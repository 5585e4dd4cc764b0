"""From the variables of a quantized model to a frozen one."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from compand_jax.frozen.check import initial_shapes, line, run_abstractly
from compand_jax.frozen.codes import act_tables, check_weight, pack_weight, require_layers
from compand_jax.frozen.expansion import Weights, scales_of
from compand_jax.frozen.folded_norms import NORM_LEAVES, Norm, foldable_norms
from compand_jax.frozen.model import FrozenModel, make_frozen
from compand_jax.frozen.observed_call import ObservedLinen
from compand_jax.frozen.origins import computed_weights, find_origins, needed_variables
from compand_jax.frozen.sample import Call, Signature, abstract_call, is_nnx, result_arrays
from compand_jax.frozen.tree import (
    KINDS,
    WEIGHT_TYPES,
    Arrays,
    FrozenSite,
    FrozenWeight,
    Path,
    flatten,
    join_path,
    nested,
    split_path,
)
from compand_jax.layers import parametrization as par
from compand_jax.layers.quantized import compand_of
from compand_jax.layers.summary import WEIGHT_NAMES
from compand_jax.linen.quantized_model import QuantizedModel

if TYPE_CHECKING:
    from flax import nnx

    from compand_jax.frozen.nnx.model import FrozenModule


@overload
def freeze(
    qmodel: QuantizedModel,
    variables: Mapping[str, Any],
    *sample: Any,
    fold_norms: bool = False,
    **kwargs: Any,
) -> FrozenModel: ...
@overload
def freeze(qmodel: "nnx.Module", *sample: Any, **kwargs: Any) -> "FrozenModule": ...
def freeze(qmodel: Any, *args: Any, fold_norms: bool = False, **kwargs: Any) -> Any:
    """Returns a quantized model for inference alone: packed codes and tables instead of kernels.

    A model of Linen is traced on a sample: `freeze(qmodel, variables, *sample)`. That finds the
    layers that compute their weights from their parameters (WeightNorm, a mask), and tells a file
    what to know the model by. A model of NNX holds its variables, and knows its layers: it needs
    no sample, `freeze(qmodel)`.

    Args:
      qmodel: The quantized model, of `quantize_model` or of `compand_jax.nnx.quantize`.
      *args: For Linen, the variables as its `apply` takes them, with "compand". Then the sample:
        arguments of the model, such as one batch of inputs. Only their shapes count;
        `jax.ShapeDtypeStruct` can take the place of arrays.
      fold_norms: Whether to fold every batch norm whose only input is a quantized layer's float32
        output. Its factor goes into the weight's scales, and an addition is left of it. The
        frozen model then runs in evaluation alone.
        Linen's alone.
      **kwargs: Further arguments of the sample, such as `train=False` or `method`.

    Returns:
      A `FrozenModel`, whose `apply(*args, **kwargs)` returns what the jitted `qmodel.apply`
      returns on the same backend, to within rounding: see there how far. With `fold_norms` the
      rounding is that of other scales. Either can flip an activation's code. For NNX it is a
      `FrozenModule`: its `apply` does what the jitted `qmodel` does, and its `model` is a model of
      the same class.

    Raises:
      TypeError: `qmodel` is no quantized model, `variables` are missing, its model does not take
        such a sample, or an activation that is quantized is float64.
      ValueError: "compand" is missing; the config has other contractions than "layers"; an NNX
        model is not quantized or not calibrated; a weight is
        not finite, in float64, or differs between the layers of a stack that compute it from their
        parameters; or there is no batch norm to fold.

    >>> import compand_jax as cj
    >>> qmodel = cj.quantize_model(nn.Dense(3), cj.QuantConfig(weight_bits=4, act_bits=None))
    >>> x = jnp.ones((2, 8))
    >>> frozen = freeze(qmodel, qmodel.init(jax.random.key(0), x), x)
    >>> frozen.arrays["codes"][""].nbytes  # 24 weights of 4 bits
    12
    """
    if is_nnx(qmodel):
        return _freeze_nnx(qmodel, args, fold_norms, kwargs)
    if not isinstance(qmodel, QuantizedModel):
        raise TypeError(
            "`qmodel` must be a QuantizedModel or a quantized NNX model, got "
            f"{type(qmodel).__name__}: make it with quantize_model or nnx.quantize"
        )
    if not args:
        raise TypeError(
            "`variables` must be given for a QuantizedModel, got none: freeze(qmodel, variables, x)"
        )
    return _freeze_linen(qmodel, args[0], args[1:], fold_norms, kwargs)


def _freeze_nnx(qmodel: Any, sample: tuple, fold_norms: bool, kwargs: dict[str, Any]) -> Any:
    from compand_jax.frozen.nnx.freeze import freeze_module  # flax.nnx takes its time to import

    if fold_norms:
        raise ValueError("`fold_norms` must be False for an NNX model, got True: leave it out")
    return freeze_module(qmodel, sample, kwargs)


def _freeze_linen(
    qmodel: QuantizedModel,
    variables: Mapping[str, Any],
    sample: tuple,
    fold_norms: bool,
    kwargs: dict[str, Any],
) -> FrozenModel:
    model, config = qmodel.model, qmodel.config
    require_layers(config)
    compand = compand_of(variables)
    tree = {name: tree for name, tree in variables.items() if name != "compand"}
    tree = nn.meta.unbox(tree)
    rest = dict(flatten(tree))

    def run(call: Call) -> None:
        def results(*given: Any) -> list:
            return result_arrays(call.run(model, *given))

        jax.eval_shape(results, tree, call.arrays(), jax.random.key(0))

    try:
        call = abstract_call(model, sample, kwargs).as_it_runs(run)
    except Exception as error:
        if sample or kwargs:
            raise
        raise TypeError(  # a model that takes any arguments, such as nn.Sequential, needs some
            f"`sample` must be arguments that the model runs with, got none ({line(error)}): "
            "freeze(qmodel, variables, x)"
        ) from error
    operands = list(par.quantized_operands(compand))
    sources = _sources(model, rest, call, [name for name, what in operands if what == "weight"])
    norms = _norms(qmodel, rest, call, operands) if fold_norms else {}
    weights = [sources[name].value if what == "weight" else None for name, what in operands]

    def read(compand: Mapping, weights: list) -> list:
        pairs = zip(operands, weights, strict=True)
        return [par.read_parameters(compand, *key, config, weight) for key, weight in pairs]

    # In one compiled function, as in the quantized model's: eagerly the last bit may differ.
    parameters = jax.jit(read)(compand, weights)
    sites: dict[str, FrozenSite] = {}
    arrays: Arrays = {kind: {} for kind in KINDS}
    for (name, operand), (mu, scale) in zip(operands, parameters, strict=True):
        found, spec = sites.get(name, FrozenSite()), qmodel.site(name).spec(operand)
        if operand == "act":
            for kind, x in act_tables(mu, scale, spec).items():
                arrays[kind][name] = x
            sites[name] = dataclasses.replace(found, act_bits=spec.bits, act_signed=spec.signed)
            continue
        source = sources[name]
        site = qmodel.site(name)
        for kind, x in pack_weight(source.value, mu, scale, site).items():
            arrays[kind][name] = x
        own = None if source.leaf is None else rest.pop(source.leaf)
        computed = own if source.computed else None
        weight = FrozenWeight(
            spec.bits,
            spec.grid,
            source.value.shape,
            source.value.dtype.name,
            scale.shape,
            None if source.leaf is None else join_path(source.leaf),
            None if computed is None else computed.shape,
            None if computed is None else computed.dtype.name,
            group_size=site.group_size,
            scale_dtype=site.scale_dtype if scale.ndim else "float32",
        )
        sites[name] = dataclasses.replace(found, weight=weight)
    _fold(sites, arrays, rest, norms)
    arrays["variables"] = {join_path(path): value for path, value in rest.items()}
    try:
        initial = initial_shapes(model, call)
    except Exception:  # a model that makes nothing of the sample: it goes on with what there is
        initial = None
    if jax.config.jax_enable_x64:  # activations of float64 are refused before anything is lost
        run_abstractly(model, Weights(sites, arrays), config.act_site, call)
    return make_frozen(model, sites, config.act_site, Signature(call, initial), arrays)


class _Source(NamedTuple):
    """Where a site's weight is from.

    Attributes:
      value: The weight.
      leaf: The variable that the file does not need beside the codes, if there is one.
      computed: Whether the weight is computed: it does not come from the place of `leaf`.
    """

    value: Array
    leaf: Path | None
    computed: bool


def _sources(
    model: nn.Module, variables: dict[Path, Any], call: Call, names: list[str]
) -> dict[str, _Source]:
    """Returns where the weights of these sites are from, every one of them checked.

    Raises:
      ValueError: a site without a parameter of its own did not run, a weight depends on the
        inputs, is another one from call to call, or is not to be quantized.
    """
    observed = ObservedLinen(model, call)
    origins = find_origins(observed, variables)
    origins.require_the_same(names)
    leaves: dict[str, Path | None] = {}
    for name in names:  # what did not run is taken to be its module's parameter
        own = origins.leaves.get(name) if name in origins.leaves else _own(variables, name)
        free = own is not None and own not in origins.used and own not in leaves.values()
        leaves[name] = own if free else None
        if own is None and name not in origins.leaves:
            raise ValueError(
                f"site {name!r} has no kernel of its own, and does not run: freeze it with a "
                "sample that runs it"
            )
    computed = {name for name, leaf in leaves.items() if leaf is None}
    values, needed = {}, set(variables)
    if computed:
        values = computed_weights(observed, variables, computed)
        needed = needed_variables(observed, variables)
    found = {}
    for name, leaf in leaves.items():
        value = jnp.asarray(variables[leaf]) if leaf is not None else values[name]
        check_weight(name, value)
        if leaf is None:
            own = _own(variables, name)
            if own is not None and (
                own in needed
                or own in leaves.values()
                or jnp.asarray(variables[own]).dtype.name not in WEIGHT_TYPES
            ):
                own = None
            found[name] = _Source(value, own, True)
        else:
            found[name] = _Source(value, leaf, False)
    return found


def _own(
    variables: Mapping[Path, Any], name: str, leaves: tuple[str, ...] = WEIGHT_NAMES
) -> Path | None:
    """Returns a site's parameter of one of these names; a module's name may have slashes."""
    return next(
        (
            path
            for path in variables
            if path[0] == "params" and path[-1] in leaves and "/".join(path[1:-1]) == name
        ),
        None,
    )


def _norms(
    qmodel: QuantizedModel,
    variables: dict[Path, Any],
    call: Call,
    operands: list[tuple[str, str]],
) -> dict[str, Norm]:
    """Returns the batch norms to fold, by the site whose weight they are folded into."""
    norms = {
        name: norm
        for name, norm in foldable_norms(qmodel.model, nested(variables.items()), call).items()
        if (name, "weight") in operands
        and (qmodel.config.act_site == "input" or (name, "act") not in operands)
    }
    if not norms:
        raise ValueError(
            "`fold_norms` must find a batch norm that sees a quantized layer's unquantized output "
            "alone, got none: give freeze the evaluation's arguments, such as x, train=False, or "
            "leave it out"
        )
    return norms


def _fold(
    sites: dict[str, FrozenSite], arrays: Arrays, rest: dict, norms: Mapping[str, Norm]
) -> None:
    """Moves batch norms' variables into the scales and biases of the layers before, and shifts."""
    for name, norm in norms.items():
        weight = sites[name].weight
        assert weight is not None
        scale, bias, mean, var = (
            np.asarray(rest.pop((collection, *split_path(norm.name), leaf), default), np.float64)
            for (collection, leaf), default in zip(NORM_LEAVES, (1, 0, None, None), strict=True)
        )
        factor = scale / np.sqrt(var + norm.epsilon)
        if not np.all(np.isfinite(np.stack(np.broadcast_arrays(factor, bias, mean)))):
            raise ValueError(
                f"`variables` must be finite, batch norm {norm.name!r} is not: give those from "
                "before training diverged"
            )
        shape = [1] * (len(weight.shape) if weight.group_size is None else 3)
        shape[norm.axis] = factor.size
        own = np.asarray(scales_of(arrays, name, 1), np.float64)
        arrays["scale_units"].pop(name, None)
        arrays["scales"][name] = (own * factor.reshape(shape)).astype(np.float32)
        arrays["shifts"][name] = (bias - factor * mean).astype(np.float32)
        path = _own(rest, name, ("bias",))
        if path is not None:
            rest[path] = (np.asarray(rest[path], np.float64) * factor).astype(np.float32)
        shape = np.shape(arrays["scales"][name])
        weight = dataclasses.replace(
            weight, scale_shape=shape, norm=norm.name, scale_dtype="float32"
        )
        sites[name] = dataclasses.replace(sites[name], weight=weight)
