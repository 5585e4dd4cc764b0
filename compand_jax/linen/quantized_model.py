"""A Linen model with its weights and activations quantized, as a value without state."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import FrozenDict
from flax.core.scope import in_filter
from jax.typing import ArrayLike

from compand_jax.calibration.fit import check_arguments
from compand_jax.layers.config import QuantConfig, require_config
from compand_jax.layers.contractions.program import require_inputs
from compand_jax.layers.initial_parameters import initial_observer, initial_parameters
from compand_jax.layers.layer_quantizer import LayerQuantizer
from compand_jax.layers.observation import Observations
from compand_jax.layers.parameters import fit_parameters, observed_sites
from compand_jax.layers.quantized import Quantized, compand_of
from compand_jax.layers.sites import Site, require_sites
from compand_jax.layers.summary import site_weight
from compand_jax.layers.visitor import Unchanged
from compand_jax.linen.batch_statistics import CHANGEABLE, estimate_batch_stats, update_batch_stats
from compand_jax.linen.calibration import feed_errors_back, observe
from compand_jax.linen.contractions import trace_model
from compand_jax.linen.interception import intercept_layers, refuse_nnx
from compand_jax.linen.observation import observe_layers
from compand_jax.linen.reach import layers_run, require_reached


def quantize_model(
    model: nn.Module, config: QuantConfig, *, sites: Mapping[str, Site] | None = None
) -> "QuantizedModel":
    """Returns a Linen model with its layers quantized; the model itself is not changed.

    Args:
      model: Any Linen module.
      config: What to quantize and how.
      sites: A calibrated model's `sites`, to go with a checkpoint of its variables (stored by
        `sites_to_json`); None for a model to be calibrated.

    Returns:
      A `QuantizedModel`, to be used as a Linen module is: `init`, `apply`.

    Raises:
      TypeError: `model` is no Linen module, `config` no QuantConfig, or `sites` no sites.
      ValueError: a rule matches none of `sites`, or they were calibrated with another config.
    """
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(
            f"`model` must be a flax.linen Module, got {got}: give an instance of one; a model of "
            "NNX is quantized by compand_jax.nnx.quantize"
        )
    refuse_nnx(model)
    require_config(config)
    if config.contractions != "layers":
        require_inputs(config)
    if sites is not None:
        require_sites(sites)
        sites = FrozenDict(sites)
    return QuantizedModel(model, config, sites)


@dataclasses.dataclass(frozen=True)
class QuantizedModel(Quantized):
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
        """Returns the model's own variables, and with them "compand", a first mu and scale each.

        mu is the config's `mu_init`. A scale is the largest magnitude: of the weight, or of the
        activation on the given input. Zeros are treated as in `calibrate`. Under `jit`, values
        inside scan, vmap and remat cannot be seen: there a weight's scale comes from `params`, and
        an activation's is 1.

        Args:
          rngs: As the Linen module's `init`.
          *args: As the Linen module's `init`.
          **kwargs: As the Linen module's `init`.

        Returns:
          {"params": ..., "compand": ..., ...}: what the Linen module's `init` returns, and
          "compand". Its leaves are theta = log(1 + mu) and rho = log(scale), float32.

        Raises:
          ValueError: the model has no layer to quantize, or a rule matches none.
        """
        observer, variables = observe_layers(
            self.model,
            functools.partial(initial_observer, self.config),
            lambda model: model.init(rngs, *args, **kwargs),
        )
        if self.config.contractions != "layers":
            call = variables, args, CHANGEABLE, {**kwargs, "rngs": rngs}, self.config.contractions
            trace_model(self.model, Unchanged(), *call).observed(observer)
        jax.effects_barrier()
        params = dict(variables).get("params", {})
        compand = initial_parameters(self.config, observer, params)
        return {**variables, "compand": compand}

    def apply(
        self, variables: Mapping[str, Any], *args: Any, mutable: Any = False, **kwargs: Any
    ) -> Any:
        """Returns what the Linen module's `apply` returns, computed with quantized operands.

        Args:
          variables: The model's collections and "compand", as `init` and `calibrate` return them.
          *args: As the Linen module's `apply`.
          mutable: As the Linen module's `apply`. "compand" can be named too, and comes back as it
            was.
          **kwargs: As the Linen module's `apply` (`rngs`, `method`, ...).

        Returns:
          The output; with `mutable`, a pair of it and of the collections that changed.

        Gradient: straight-through, as `fake_quantize`, in "params" and "compand".

        Raises:
          ValueError: "compand" is missing, or was made with another config; or the model runs a
            layer that could not be reached, and so would not be quantized.
        """
        compand = compand_of(variables)
        self._warn_uncalibrated()
        rest = {name: value for name, value in variables.items() if name != "compand"}
        runs = layers_run(self.model, rest, args, mutable, kwargs)
        stored = functools.partial(site_weight, rest.get("params", {}))
        visitor = LayerQuantizer(self.config, self.site, compand, stored)
        if self.config.contractions == "layers":
            with intercept_layers(self.model, visitor) as model:
                outputs = model.apply(rest, *args, mutable=mutable, **kwargs)
        else:
            call = rest, args, mutable, kwargs, self.config.contractions
            outputs = trace_model(self.model, visitor, *call).quantized(visitor)
        require_reached(runs, visitor.visited)
        if mutable is not False and in_filter(mutable, "compand"):
            outputs = (outputs[0], {**outputs[1], "compand": compand})
        return outputs

    def calibrate(
        self,
        variables: Mapping[str, Any],
        batches: Any,
        *,
        calibration: str = "mse",
        percentile: ArrayLike = 99.9,
        mu: ArrayLike | None = None,
        error_feedback: bool = False,
        batch_stats: bool = False,
        **model_kwargs: Any,
    ) -> tuple["QuantizedModel", dict[str, Any]]:
        """Returns this model calibrated, and its variables with mu and scale found from data.

        The full-precision model runs over the batches once. Of each activation a histogram is
        kept, so that memory does not grow with the number of batches. It tells whether the
        activation has a sign. A mu is the one of the least squared error, relative to the tensor's
        power and summed over the tensors that share it. The scale at each mu is, by `calibration`:

          "mse": the one of the least squared error.
          "absmax": the largest magnitude.
          "percentile": the magnitude that `percentile` percent of the values do not exceed.
          "output": as "mse", but of a weight the squared error is that of its layer's output. This
            is for Dense, DenseGeneral and Conv with at most 8192 inputs to an output, outside of
            scan and vmap, that saw an input other than zero. All else is as with "mse".

        What does not exceed 2^-110 counts as zero. The scale of a weight that is all zero, or of a
        channel of one, follows it in training: it is the largest magnitude, and 2^-110 at least,
        until that reaches 3/sqrt(n), n being the inputs of an output; from then on it is learned
        as any other. Activations that are all zero get the scale 1 and, above one bit, a sign,
        since nothing is known of them. Where all tensors of a mu are zero, it is `mu_init`.

        Args:
          variables: The model's collections. A "compand" among them is replaced.
          batches: Iterable or sequence of batches. A batch is the model's argument, or a tuple of
            its arguments; examples lie along the leading axis of the first one. Batches may
            differ in size.
          calibration: "mse", "absmax", "percentile" or "output".
          percentile: Percent of the magnitudes, in (0, 100], for the calibration of that name.
          mu: A mu to give every tensor, 0 to 255; only the scales are found then. None finds mu
            too. Uniform quantizers keep mu = 0.
          error_feedback: Whether to round weights one input at a time, and to let those that
            follow make up for the error at the layer's output. "params" then holds the rounded
            kernels. It is for the layers that "output" is for, if they use their kernel as it is
            stored; others (with WeightNorm, with a mask) keep their kernels.
          batch_stats: Whether to estimate the batch norms' statistics anew, under quantization.
            They are the mean over the batches, weighed by their examples. The model then runs over
            the batches twice; an iterator's batches are kept in memory for it.
          **model_kwargs: Further arguments of the model's `apply`, such as `train=False`. All
            collections but "params" may change while the model runs, whatever `mutable` says, and
            are returned as they were; every batch starts from them.

        Returns:
          This model with its `sites`, and the variables with "compand".

        Raises:
          TypeError: `batches` is an array, or this is called under `jax.jit`.
          ValueError: there are no batches, one of them is empty, a batch, an activation or a
            weight is not finite, a rule matches no site, activations of one bit have a sign, or
            an argument is out of its range.

        Source: the layer output's error after Nagel et al., "Up or down? Adaptive rounding for
        post-training quantization", ICML 2020; error feedback after GPTQ (`error_feedback`).
        """
        check_arguments(calibration, percentile, mu)
        rest = {name: value for name, value in variables.items() if name != "compand"}
        model_kwargs.pop("mutable", None)
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
            contractions=self.config.contractions,
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

            def update(variables: Mapping, args: tuple) -> Any:
                return update_batch_stats(qmodel.apply, variables, args, model_kwargs)

            result["batch_stats"] = estimate_batch_stats(result, batches, jax.jit(update))
        return qmodel, result

    def calibrate_from(
        self,
        seen: Observations,
        variables: Mapping[str, Any],
        *,
        calibration: str = "mse",
        percentile: ArrayLike = 99.9,
        mu: ArrayLike | None = None,
        error_feedback: bool = False,
    ) -> tuple["QuantizedModel", dict[str, Any]]:
        """Returns what `calibrate` returns, from observations made before.

        So one run over the batches serves any number of configs.

        Args:
          seen: What `compand_jax.linen.calibration.observe` returned for the full-precision
            model, at the config's `act_site`; with moments for calibration "output" and for error
            feedback.
          variables: The collections that the model was observed with.
          calibration: As `calibrate`.
          percentile: As `calibrate`.
          mu: As `calibrate`.
          error_feedback: As `calibrate`.

        Returns:
          As `calibrate`.

        Raises:
          ValueError: a rule matches no site, activations of one bit have a sign, or an argument
            is out of its range.
        """
        percentile, mu = check_arguments(calibration, percentile, mu)
        rest = {name: value for name, value in variables.items() if name != "compand"}
        sites = observed_sites(self.config, seen)
        qmodel = dataclasses.replace(self, sites=FrozenDict(sites))
        compand = fit_parameters(self.config, sites, seen, calibration, percentile, mu)
        result = {**rest, "compand": compand}
        if error_feedback and "params" in rest:
            quantizers = qmodel.quantizers(result)
            result["params"] = feed_errors_back(rest["params"], quantizers, sites, seen)
        return qmodel, result
