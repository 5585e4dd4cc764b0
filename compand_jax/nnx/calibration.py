"""Calibrating a quantized NNX model, in place: mu and scale from batches of data."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array

from compand_jax.calibration.fit import check_arguments
from compand_jax.layers import parametrization as par
from compand_jax.layers.batch_observation import MakeObserver, observe_batches
from compand_jax.layers.batches import require_concrete
from compand_jax.layers.config import QuantConfig
from compand_jax.layers.observation import Observations, Observer
from compand_jax.layers.parameters import fed_back, fit_parameters, observed_sites
from compand_jax.layers.sites import check_rules
from compand_jax.layers.visitor import Unchanged
from compand_jax.nnx.batch_statistics import estimate_batch_stats, whole_batches
from compand_jax.nnx.contractions import (
    contractions_of,
    own_parameters,
    own_quantizers,
    set_sites,
    unhook,
)
from compand_jax.nnx.layer_kinds import weight_of
from compand_jax.nnx.promotion import Promotion, parameters_of, theta_name, variables_of
from compand_jax.nnx.quantized_model import hooked_layers, sites, stack_shape
from compand_jax.nnx.variables import Mu, Quantizer

_UNCHANGED = Unchanged()  # one, so that a graphdef with it equals another


def calibrate(
    model: nnx.Module,
    batches: Any,
    *,
    calibration: str = "mse",
    percentile: ArrayLike = 99.9,
    mu: ArrayLike | None = None,
    error_feedback: bool = False,
    batch_stats: bool = False,
    method: str = "__call__",
    **model_kwargs: Any,
) -> None:
    """Sets mu and scale of a quantized NNX model, found from data, and whether activations sign.

    It does what `QuantizedModel.calibrate` does, and finds the same numbers: see there for the
    arguments. A copy of the model in full precision runs over the batches once, in the mode (as
    `model.eval()`) that the model is in. A stack that `nnx.vmap` made is calibrated as one site:
    its layers start with the same mu and scale. A layer that does not run keeps what it has.

    Args:
      model: A model that `quantize` returned.
      batches: Iterable or sequence of batches. A batch is the model's argument, or a tuple of its
        arguments; examples lie along the leading axis of the first one.
      calibration: "mse", "absmax", "percentile" or "output".
      percentile: Percent of the magnitudes, in (0, 100], for the calibration of that name.
      mu: A mu to give every tensor, 0 to 255; only the scales are found then. None finds mu too.
      error_feedback: Whether to round weights one input at a time, and to let those that follow
        make up for the error at the layer's output. The kernels of Linear, LinearGeneral and Conv
        outside of stacks are then the rounded ones.
      batch_stats: Whether to estimate the batch norms' statistics anew, under quantization.
      method: The name of the model's method that a batch is given to.
      **model_kwargs: Further arguments of it, such as `deterministic=True`.

    Raises:
      TypeError: `batches` are none, or this is called under `jax.jit`.
      ValueError: `model` is not quantized; there are no batches, one is empty, or something is not
        finite; activations of one bit have a sign; or an argument is out of its range.

    >>> from compand_jax.nnx import quantize, quantizers
    >>> qmodel = quantize(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), QuantConfig())
    >>> calibrate(qmodel, [jnp.ones((2, 4))], calibration="absmax")
    >>> round(float(quantizers(qmodel)[""]["act_scale"]), 3)
    1.0
    """
    percentile, mu = check_arguments(calibration, percentile, mu)
    layers, own = hooked_layers(model), contractions_of(model)
    config = layers[0][1].config if own is None else own.config
    if batch_stats and isinstance(batches, Iterator):
        batches = list(batches)
    seen = observe(
        model,
        batches,
        method,
        model_kwargs,
        activations=config.quantizes_activations,
        moments=error_feedback or calibration == "output",
    )
    if own is not None:
        check_rules(config, {*sites(model), *_names(seen)})
    config = _of_what_ran(config, seen)
    found = observed_sites(config, seen)
    compand = fit_parameters(config, found, seen, calibration, percentile, mu)
    for layer, promotion in layers:
        name = promotion.layer.site
        if name not in found:  # it did not run, and says so when it does
            continue
        promotion.site, promotion.is_calibrated = found[name], True
        for operand in ("weight", "act"):
            _set(promotion, operand, compand, config, stack_shape(layer))
        if error_feedback:
            _feed_back(layer, promotion, seen)
    if own is not None:
        named = {promotion.layer.site for _, promotion in layers}
        of_contractions = {name: site for name, site in found.items() if name not in named}
        set_sites(own, of_contractions, compand, _shared(layers, config))
        if error_feedback:
            _feed_back_own(model, seen)
    if batch_stats:
        estimate_batch_stats(model, batches, _call(method, model_kwargs))


def observe(
    model: nnx.Module,
    batches: Any,
    method: str,
    model_kwargs: Mapping[str, Any],
    *,
    activations: bool,
    moments: bool,
) -> Observations:
    """Returns what is seen of a quantized model over the batches, run in full precision.

    Arguments and errors are those of `calibrate` and `observe_batches`. The model stays as it is.
    """
    graphdef, state = nnx.split(model)
    require_concrete("model", state)
    call = _call(method, model_kwargs)

    def run(make_observer: MakeObserver, state: Any, args: tuple) -> Observer:
        observer = make_observer(calls_back=True)
        copy = nnx.merge(graphdef, state)
        layers, own = hooked_layers(copy), contractions_of(copy)
        unhook(copy)
        whole_batches(copy)
        for _, promotion in layers:
            promotion.visitor = observer
        if layers:
            call(copy, args)
        if own is not None:  # once more: what a layer does twice is compiled once
            copy = nnx.merge(graphdef, state)
            whole_batches(copy)
            for _, promotion in hooked_layers(copy):
                promotion.visitor = _UNCHANGED
            own = contractions_of(copy)
            assert own is not None
            own.visitor = observer
            call(copy, args)
        return observer

    seen = observe_batches(
        run,
        state,
        batches,
        getattr(model, method),
        model_kwargs,
        at_output=False,
        activations=activations,
        moments=moments,
        owner="model",
    )
    if not any(observer.layers for observer in seen.observers):
        raise ValueError(
            f"`batches` must run a quantized layer of the model's `{method}`, they ran none: name "
            "the `method` that does"
        )
    return seen


def _of_what_ran(config: QuantConfig, seen: Observations) -> QuantConfig:
    """Returns a config for the sites that ran: of its rules, those that match one of them."""
    names = _names(seen)
    rules = [rule for rule in config.rules if any(re.fullmatch(rule.pattern, n) for n in names)]
    return dataclasses.replace(config, rules=tuple(rules))


def _names(seen: Observations) -> set[str]:
    return {name for observer in seen.observers for name in observer.layers}


def _shared(layers: list[tuple[Any, Promotion]], config: QuantConfig) -> dict[tuple, Any]:
    """Returns the variables of each mu that layers share, by path."""
    found = {}
    for _, promotion in layers:
        for operand in promotion.site.operands():
            path = par.parameter_path(promotion.layer.site, operand, config)
            if path is not None and path[0] == par.SHARED:
                found[path], _ = variables_of(promotion, operand)
    return found


def _call(method: str, model_kwargs: Mapping[str, Any]) -> Callable[[Any, tuple], Any]:
    def call(model: Any, args: tuple) -> Any:
        # What a call changes of them, such as the counts of an nnx.Rngs, is not theirs to keep.
        own = {
            name: nnx.clone(value) if isinstance(value, nnx.Pytree | nnx.Variable) else value
            for name, value in model_kwargs.items()
        }
        return getattr(model, method)(*args, **own)

    return call


def _set(
    promotion: Promotion, operand: str, compand: Mapping, config: QuantConfig, stack: tuple
) -> None:
    """Gives a site's operand its theta and rho; none where it is in full precision."""
    name = promotion.layer.site
    rho = par.get_leaf(compand, par.scale_path(name, operand))
    if rho is None:
        setattr(promotion, theta_name(promotion, operand), nnx.data(None))
        setattr(promotion, f"{operand}_scale", nnx.data(None))
        return
    theta_variable, rho_variable = variables_of(promotion, operand)
    assert rho_variable is not None
    _write(rho_variable, jnp.broadcast_to(rho, stack + rho.shape))
    if theta_variable is not None:
        path = par.parameter_path(name, operand, config)
        assert path is not None
        theta = par.get_leaf(compand, path)
        own = () if path[0] == par.SHARED else stack
        theta = jnp.broadcast_to(theta, (*own, *theta.shape))
        if theta.shape == theta_variable[...].shape:
            _write(theta_variable, theta)
        else:  # as many free levels as the sign asks for that was found
            setattr(promotion, theta_name(promotion, operand), Mu(theta))


def _write(variable: Quantizer, value: Array) -> None:
    variable[...] = value


def _feed_back(layer: Any, promotion: Promotion, seen: Observations) -> None:
    """Rounds a layer's kernel with error feedback, where it is a product with known inputs."""
    name, kernel = promotion.layer.site, weight_of(layer)
    parameters = parameters_of(promotion, "weight", kernel[...])
    # Under WeightNorm, or a mask, it is not used as it is stored.
    if parameters is None or not np.array_equal(seen.weights[name][0], kernel[...]):
        return
    spec = promotion.site.spec("weight")
    found = {"weight_scale": parameters[1], f"weight_{spec.family.parameter}": parameters[0]}
    rounded = fed_back(kernel[...], found, promotion.site, seen, name)
    if rounded is not None:
        kernel[...] = rounded


def _feed_back_own(model: nnx.Module, seen: Observations) -> None:
    """Rounds with error feedback what the model itself multiplies as it is stored."""
    params = own_parameters(model)
    for name, operand, found in own_quantizers(model):
        if operand != "weight" or name not in seen.weights:
            continue
        variable, site = params[name], sites(model)[name]
        rounded = fed_back(variable[...], found, site, seen, name)
        if rounded is not None:
            variable[...] = rounded
