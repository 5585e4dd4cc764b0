"""A Linen model with its weights and activations quantized, as a value without state."""

import dataclasses
import functools
import math
import numbers
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from flax.core.scope import in_filter
from jaxtyping import Array

from compand_jax import parametrization as par
from compand_jax.calibration import CALIBRATIONS
from compand_jax.calls import abstract_call, remembered_calls
from compand_jax.config import QuantConfig, require_choice
from compand_jax.freezing import freeze
from compand_jax.frozen_model import FrozenModel
from compand_jax.interception import (
    Layer,
    Observer,
    intercept_layers,
    layers_run,
    require_reached,
)
from compand_jax.model_calibration import (
    Observations,
    estimate_batch_stats,
    feed_errors_back,
    fit_parameters,
    observe,
)
from compand_jax.quantizers import fake_quantize
from compand_jax.sites import (
    Site,
    check_rules,
    check_signs,
    site_from_config,
    sites_from_observers,
)
from compand_jax.summary import site_weight, summarize


def quantize_model(
    model: nn.Module, config: QuantConfig, *, sites: Mapping[str, Site] | None = None
) -> "QuantizedModel":
    """Returns a Linen model with its layers quantized; the model itself is not changed.

    Args:
      model: Any Linen module.
      config: What to quantize and how.
      sites: A calibrated model's `sites`, to go with a checkpoint of its variables; None for a
        model to be calibrated.

    Returns:
      A `QuantizedModel`, to be used as a Linen module is: `init`, `apply`.

    Raises:
      TypeError: `model` is no Linen module, or `config` no QuantConfig.
      ValueError: a rule matches none of `sites`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a flax.linen Module, got {type(model).__name__}")
    if not isinstance(config, QuantConfig):
        raise TypeError(f"`config` must be a QuantConfig, got {type(config).__name__}")
    if sites is not None:
        check_rules(config, sites)
        sites = FrozenDict(sites)
    return QuantizedModel(model, config, sites)


@dataclasses.dataclass(frozen=True)
class QuantizedModel:
    """A Linen model whose layers see quantized weights and activations. Frozen and hashable.

    Args:
      model: The Linen module, unchanged.
      config: What to quantize and how.
      sites: What calibration found, by site; None before it, with activations signed.
    """

    model: nn.Module
    config: QuantConfig
    sites: Mapping[str, Site] | None = None

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Returns the model's own variables, and "compand": mu_init and largest magnitudes.

        Args and Returns are those of the Linen module's `init`. The activations' scales are the
        largest magnitudes on the given input. Under `jit`, values inside scan, vmap and remat
        cannot be seen: a weight's scale is then taken from `params`, an activation's is 1.

        Raises:
          ValueError: no layer is found, or a rule matches none.
        """
        observer = Observer(
            activation=_absmax, weight=lambda x: x, at_output=self.config.act_site == "output"
        )
        with intercept_layers(self.model, observer) as model:
            variables = model.init(rngs, *args, **kwargs)
        jax.effects_barrier()
        compand: dict = {}
        for name, site in sites_from_observers(self.config, [observer]).items():
            for operand in site.operands():
                if operand == "act":
                    absmax = observer.values("activation", name) or [jnp.ones(())]
                else:
                    shape = observer.weight_shapes[name]
                    own = site_weight(dict(variables).get("params", {}), name)
                    weights = observer.values("weight", name) or [_unstacked(own, shape)]
                    absmax = [_absmax(jnp.asarray(w), site.scale_axes) for w in weights]
                scale = functools.reduce(jnp.maximum, absmax)
                scale = jnp.where(scale > 0, scale, 1)
                par.set_leaf(compand, par.scale_path(name, operand), par.rho_from_scale(scale))
                if (path := par.mu_path(name, operand, self.config)) is not None:
                    par.set_leaf(compand, path, par.theta_from_mu(self.config.mu_init))
        return {**variables, "compand": compand}

    def apply(
        self, variables: Mapping[str, Any], *args: Any, mutable: Any = False, **kwargs: Any
    ) -> Any:
        """Returns the quantized model's output, and the mutated collections where asked for.

        Args:
          variables: The model's collections and "compand", as `init` returns them.
          *args: As the Linen module's `apply`.
          mutable: As the Linen module's `apply`; "compand" comes back as it was.
          **kwargs: As the Linen module's `apply` (`rngs`, `method`, ...).

        Gradient: straight-through, as `fake_quantize`, in "params" and "compand".

        Raises:
          ValueError: "compand" is missing or of another config; or a layer that the model runs
            was not reached, and so not quantized.
        """
        compand = _compand(variables)
        if self.sites is None:
            try:
                _warn_uncalibrated(self)
            except TypeError:  # a field of the model cannot be hashed
                _warn_uncalibrated(repr(self))
        rest = {name: value for name, value in variables.items() if name != "compand"}
        runs = layers_run(self.model, rest, args, mutable, kwargs)
        visitor = _Quantizer(self, compand)
        with intercept_layers(self.model, visitor) as model:
            outputs = model.apply(rest, *args, mutable=mutable, **kwargs)
        require_reached(runs, visitor.visited)
        if mutable is not False and in_filter(mutable, "compand"):
            outputs = (outputs[0], {**outputs[1], "compand": compand})
        return outputs

    def calibrate(
        self,
        variables: Mapping[str, Any],
        batches: Iterable,
        *,
        calibration: str = "mse",
        percentile: float | int = 99.9,
        mu: float | int | None = None,
        error_feedback: bool = False,
        batch_stats: bool = False,
        **model_kwargs: Any,
    ) -> tuple["QuantizedModel", dict[str, Any]]:
        """Returns this model with its activations' signs found, and mu and scale from data.

        The full-precision model runs once over the batches; what is kept of an activation is a
        histogram, whatever the number of batches. mu minimizes the squared error, relative to the
        power and summed over what shares it, at the scales that the calibration gives:

          "mse": of the least squared error.
          "absmax": the largest magnitude.
          "percentile": the magnitude that `percentile` percent do not exceed.
          "output": a weight's of the least squared error of its layer's output (of Dense,
            DenseGeneral and Conv with at most 8192 inputs to an output, outside of scan and vmap),
            anything else's as "mse".

        Args:
          variables: The model's collections; an existing "compand" is replaced.
          batches: Iterable of batches, a batch being the model's argument or a tuple of them.
          calibration: "mse", "absmax", "percentile" or "output".
          percentile: Of the magnitudes, in (0, 100].
          mu: Every mu, 0 to 255, at which the scales are found; None finds mu too. Uniform
            quantizers have none, and keep mu = 0.
          error_feedback: Whether weights are rounded one input at a time, those that are still to
            be rounded making up for the error at the layer's output; of the same layers as
            "output". The kernels in "params" are then levels of their quantizers.
          batch_stats: Whether to estimate the batch norms' statistics, where there are any, anew
            afterwards, under quantization, as the mean over the batches. The batches are then
            gone through twice, and kept in memory if they are an iterator.
          **model_kwargs: Further arguments of the model's `apply`, such as `train=False`.

        Raises:
          ValueError: there are no batches, a weight is not finite, a rule matches no site,
            activations of one bit have a sign, or an argument is out of its range.

        Source: the layer output's error after Nagel et al., "Up or down? Adaptive rounding for
        post-training quantization", ICML 2020; error feedback after GPTQ (`error_feedback`).
        """
        _check_calibration(calibration, percentile, mu)
        rest = {name: value for name, value in variables.items() if name != "compand"}
        if batch_stats and isinstance(batches, Iterator):
            batches = list(batches)
        seen = observe(
            self.model,
            rest,
            batches,
            model_kwargs,
            at_output=self.config.act_site == "output",
            activations=self.config.quantizes_activations,
            moments=error_feedback or calibration == "output",
        )
        qmodel, result = self.calibrate_from(
            seen,
            variables,
            calibration=calibration,
            percentile=percentile,
            mu=mu,
            error_feedback=error_feedback,
        )
        if batch_stats and "batch_stats" in rest:
            result["batch_stats"] = estimate_batch_stats(
                qmodel.apply, result, batches, model_kwargs
            )
        return qmodel, result

    def calibrate_from(
        self,
        seen: Observations,
        variables: Mapping[str, Any],
        *,
        calibration: str = "mse",
        percentile: float | int = 99.9,
        mu: float | int | None = None,
        error_feedback: bool = False,
    ) -> tuple["QuantizedModel", dict[str, Any]]:
        """Returns what `calibrate` does, of what `observe` saw: once, for any number of configs.

        Args:
          seen: The full-precision model's observations, at the config's `act_site`; with moments
            for calibration "output" and for error feedback.
          variables: The collections that it was observed with.
          calibration: As `calibrate`.
          percentile: As `calibrate`.
          mu: As `calibrate`.
          error_feedback: As `calibrate`.

        Raises:
          ValueError: a rule matches no site, activations of one bit have a sign, or an argument
            is out of its range.
        """
        _check_calibration(calibration, percentile, mu)
        rest = {name: value for name, value in variables.items() if name != "compand"}
        sites = sites_from_observers(self.config, seen.observers)
        if self.config.act_signed is None:
            for name, data in seen.activations.items():
                sites[name] = dataclasses.replace(sites[name], act_signed=bool(data.minimum < 0))
        check_signs(sites)
        qmodel = dataclasses.replace(self, sites=FrozenDict(sites))
        compand = fit_parameters(self.config, sites, seen, calibration, percentile, mu)
        result = {**rest, "compand": compand}
        if error_feedback and "params" in rest:
            quantizers = qmodel.quantizers(result)
            result["params"] = feed_errors_back(rest["params"], quantizers, sites, seen)
        return qmodel, result

    def freeze(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> FrozenModel:
        """Returns the model for inference alone: packed codes and tables instead of kernels.

        A layer that computes its weight from its parameters (WeightNorm) is frozen with what it
        computes. To find it, the model is run on zeros: of the arguments' shapes or, without
        any, of those that the model was last called with.

        Args:
          variables: As `apply`'s.
          *args: Arguments of the model, of which only shapes count.
          **kwargs: Further ones, such as `train=False`.

        Returns:
          A `FrozenModel`, whose `apply(*args, **kwargs)` returns what this model's jitted `apply`
          returns on the same backend, to the last bit.

        Raises:
          ValueError: "compand" is missing, or a weight is not finite, in float64, or differs
            between the layers of a stack that compute it from their parameters.
        """
        _compand(variables)
        given = {kwargs.pop("method", "__call__"): abstract_call(args, kwargs)} if args else {}
        calls = given or remembered_calls(self.model)
        return freeze(self.model, self.config, variables, self.site, calls)

    def quantizers(self, variables: Mapping[str, Any]) -> dict[str, dict[str, Array]]:
        """Returns {site: {"weight_mu", "weight_scale", "act_mu", "act_scale"}}.

        mu is without unit, 0 where the quantizer is uniform; a scale is in the units of what it
        clips. Operands in full precision are absent.
        """
        compand = _compand(variables)
        found: dict[str, dict[str, Array]] = {}
        for site, operand in par.quantized_operands(compand):
            parameters = par.read_parameters(compand, site, operand, self.config)
            assert parameters is not None
            mu, scale = parameters
            found.setdefault(site, {}).update({f"{operand}_mu": mu, f"{operand}_scale": scale})
        return found

    def summary(self, variables: Mapping[str, Any]) -> str:
        """Returns a table of the sites, and the names of the weights that are not quantized.

        A row per site: bits, mu, scale, signal to quantization noise of the weights in dB, bytes
        of the weights before and after, and whether the activations have a sign.
        """
        quantizers = self.quantizers(variables)
        return summarize(
            variables["params"], quantizers, {name: self.site(name) for name in quantizers}
        )

    def site(self, name: str) -> Site:
        """Returns what is static about a site: as calibrated, or else as configured."""
        if self.sites is not None and name in self.sites:
            return self.sites[name]
        return site_from_config(self.config, name)


def _check_calibration(calibration: str, percentile: float | int, mu: float | int | None) -> None:
    require_choice("calibration", calibration, CALIBRATIONS)
    if not 0 < percentile <= 100:
        raise ValueError(f"`percentile` must be in (0, 100], got {percentile!r}")
    if mu is not None and not (isinstance(mu, numbers.Real) and 0 <= mu <= par.MU_MAX):
        raise ValueError(f"`mu` must be None or from 0 to 255, got {mu!r}")


def _compand(variables: Mapping[str, Any]) -> Mapping[str, Any]:
    if "compand" not in variables:
        raise ValueError(
            f"`variables` must hold the collection 'compand', got {sorted(variables)}: "
            "make it with this model's init or calibrate"
        )
    return variables["compand"]


@functools.lru_cache(maxsize=1024)
def _warn_uncalibrated(qmodel: QuantizedModel | str) -> None:
    warnings.warn(
        "the quantized model is not calibrated: mu and scale are what init set, and activations "
        "are taken to be signed; call calibrate, or pass `sites` to quantize_model",
        stacklevel=3,
    )


class _Quantizer:
    """The visitor that quantizes what every layer multiplies."""

    def __init__(self, qmodel: QuantizedModel, compand: Mapping) -> None:
        self._qmodel, self._compand = qmodel, compand
        self.visited: set[str] = set()

    def operands(
        self, layer: Layer, activation: Array | None, weight: Array
    ) -> tuple[Array | None, Array]:
        self.visited.add(layer.site)
        if activation is not None and self._qmodel.config.act_site == "input":
            activation = self._quantize(layer.site, "act", activation)
        return activation, self._quantize(layer.site, "weight", weight)

    def output(self, layer: Layer, output: Array) -> Array:
        if self._qmodel.config.act_site == "input":
            return output
        return self._quantize(layer.site, "act", output)

    def _quantize(self, name: str, operand: str, x: Array) -> Array:
        site, config = self._qmodel.site(name), self._qmodel.config
        if operand not in site.operands():
            return x
        parameters = par.read_parameters(self._compand, name, operand, config)
        if parameters is None:
            if operand == "act" and config.act_site == "output":  # the last layer's
                return x
            raise ValueError(
                f"`variables` must hold compand/{'/'.join(par.scale_path(name, operand))}: they "
                f"were made without running site {name!r}; init or calibrate with this method"
            )
        mu, scale = parameters
        spec = site.spec(operand)
        if config.scale_gradient == "lsq":
            factor = 1 / math.sqrt(x.size * spec.steps)
            scale = jnp.asarray(_scale_gradient(scale, factor))
        return fake_quantize(x, mu, scale, bits=spec.bits, signed=spec.signed, grid=spec.grid)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scale_gradient(x: Array, factor: float) -> Array:
    """Returns x, to the last bit; its gradient is multiplied by the factor."""
    return x


def _scale_gradient_fwd(x: Array, factor: float) -> tuple[Array, None]:
    return x, None


def _scale_gradient_bwd(factor: float, _: None, cotangent: Array) -> tuple[Array]:
    return (cotangent * factor,)


_scale_gradient.defvjp(_scale_gradient_fwd, _scale_gradient_bwd)


def _unstacked(own: Array | None, shape: tuple[int, ...]) -> Array:
    """Returns a weight's maximum over the axes that vmap or scan stacked in front of its shape.

    What lies in `params` in another form is taken as one number, and 1 where there is nothing.
    """
    if own is None:
        return jnp.ones(shape)
    magnitude, extra = jnp.abs(own), own.ndim - len(shape)
    if own.shape[max(extra, 0) :] == shape:
        return jnp.max(magnitude, tuple(range(extra)))
    return jnp.full(shape, jnp.max(magnitude, initial=0.0))


def _absmax(x: Array, kept_axes: tuple[int, ...] = ()) -> Array:
    axes = tuple(i for i in range(x.ndim) if i - x.ndim not in kept_axes)
    return jnp.max(jnp.abs(x), axes, initial=0.0, keepdims=bool(kept_axes)).astype(jnp.float32)
