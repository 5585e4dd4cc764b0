"""A function of a tree of parameters whose contractions see quantized operands."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax.core import FrozenDict
from jax.typing import ArrayLike

from compand_jax.calibration.fit import check_arguments
from compand_jax.layers.batch_observation import MakeObserver, observe_batches
from compand_jax.layers.batches import require_concrete
from compand_jax.layers.config import QuantConfig, require_config
from compand_jax.layers.contractions.program import (
    Program,
    is_array,
    nested_by_name,
    require_inputs,
    trace,
)
from compand_jax.layers.initial_parameters import initial_observer, initial_parameters
from compand_jax.layers.layer_quantizer import LayerQuantizer
from compand_jax.layers.observation import Observer
from compand_jax.layers.parameters import fit_parameters, observed_sites
from compand_jax.layers.quantized import Quantized, compand_of
from compand_jax.layers.sites import Site, require_sites
from compand_jax.layers.summary import site_weight


def quantize_function(
    function: Callable, config: QuantConfig, *, sites: Mapping[str, Site] | None = None
) -> "QuantizedFunction":
    """Returns a function of parameters with its contractions quantized; it is itself unchanged.

    A contraction is a `jax.lax.dot_general` or a `jax.lax.conv_general_dilated`, and so whatever
    comes down to one: `@`, `jnp.dot`, `jnp.einsum`. One with a parameter is a site, named by the
    parameter's path in the tree, such as "layers/0/w"; the attribute `value` of a box of Flax is
    left out. They are found in the program that the function is traced to, inside jit, scan, while,
    cond and remat, too. On its way to a contraction a parameter may be transposed, reshaped, cut,
    indexed, or converted to another dtype; it is quantized as it is stored. Elsewhere, as where a
    tied embedding is looked up, it stays in full precision, and so does a weight that is computed
    from parameters (W * mask, A @ B). A parameter in several contractions is one site: a mu and a
    scale for it, and for its activations.

    A function with a derivative rule of its own (`jax.custom_jvp`, `jax.custom_vjp`) keeps it, but
    where a site is inside: that is differentiated through. What runs inside `jax.shard_map` or a
    kernel of Pallas is not seen; `QuantizedFunction.summary` names the weights that are left.

    Args:
      function: Called as function(params, *args, **kwargs), params being any tree of arrays: nested
        dictionaries, dataclasses, the modules of Equinox. It is pure, as for `jax.jit`.
      config: What to quantize and how, with activations at the contractions' input. With
        contractions="all", products of two activations are sites, too.
      sites: A calibrated function's `sites`, to go with a checkpoint of its variables (stored by
        `sites_to_json`); None for a function to be calibrated.

    Returns:
      A `QuantizedFunction`, with `init`, `calibrate` and `apply`.

    Raises:
      TypeError: `function` cannot be called, `config` is no QuantConfig, or `sites` no sites.
      ValueError: `act_site` is "output", a rule matches none of `sites`, or they were calibrated
        with another config.

    >>> import jax.numpy as jnp
    >>> def mlp(params, x):
    ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
    >>> params = {"w1": jnp.eye(4), "w2": jnp.ones((4, 2))}
    >>> qmlp = quantize_function(mlp, QuantConfig(weight_bits=4, act_bits=4))
    >>> qmlp, variables = qmlp.calibrate({"params": params}, [jnp.ones((8, 4))])
    >>> sorted(qmlp.sites), qmlp.apply(variables, jnp.ones((8, 4))).shape
    (['w1', 'w2'], (8, 2))
    """
    if not callable(function):
        raise TypeError(
            f"`function` must be called with params, got {type(function).__name__}: give a "
            "function such as model.apply"
        )
    require_config(config)
    require_inputs(config)
    if sites is not None:
        require_sites(sites)
        sites = FrozenDict(sites)
    return QuantizedFunction(function, config, sites)


@dataclasses.dataclass(frozen=True)
class QuantizedFunction(Quantized):
    """A function whose contractions see quantized weights and activations. Frozen and hashable.

    Args:
      function: The function of params and further arguments, unchanged.
      config: What to quantize and how.
      sites: What calibration found, by site; None before it, with activations signed.
    """

    function: Callable
    config: QuantConfig
    sites: Mapping[str, Site] | None = None

    def init(self, params: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Returns {"params": params, "compand": ...}, with a first mu and scale of each site.

        mu is the config's `mu_init`. A scale is the largest magnitude: of the weight, or of the
        activation on the given arguments. Under `jit`, activations inside scan, while, cond and
        remat cannot be seen: there the scale is 1.

        Args:
          params: The tree of parameters, returned as it is.
          *args: Further arguments of the function.
          **kwargs: Likewise.

        Returns:
          The variables. Leaves of "compand" are theta = log(1 + mu) and rho = log(scale), float32.

        Raises:
          ValueError: the function contracts no parameter, or a rule matches no site.
        """
        program = self._trace(params, args, kwargs)
        observer = initial_observer(self.config)
        program.observed(observer)
        jax.effects_barrier()
        compand = initial_parameters(self.config, observer, nested_by_name(params))
        return {"params": params, "compand": compand}

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Returns what the function returns, computed with quantized operands.

        The function is traced anew in each call: call it within your own `jax.jit`.

        Args:
          variables: {"params": ..., "compand": ...}, as `init` and `calibrate` return them.
          *args: Further arguments of the function.
          **kwargs: Likewise.

        Gradient: straight-through, as `fake_quantize`, in "params" and "compand".

        Raises:
          ValueError: "compand" is missing, or was made with another config or other arguments.
        """
        compand, params = compand_of(variables), variables["params"]
        self._warn_uncalibrated()
        program = self._trace(params, args, kwargs)
        stored = functools.partial(site_weight, nested_by_name(params))
        return program.quantized(LayerQuantizer(self.config, self.site, compand, stored))

    def calibrate(
        self,
        variables: Mapping[str, Any],
        batches: Any,
        *,
        calibration: str = "mse",
        percentile: ArrayLike = 99.9,
        mu: ArrayLike | None = None,
        **kwargs: Any,
    ) -> tuple["QuantizedFunction", dict[str, Any]]:
        """Returns this function calibrated, and its variables with mu and scale found from data.

        It does what `QuantizedModel.calibrate` does, and finds the same numbers: see there.

        Args:
          variables: {"params": ...}. A "compand" in it is replaced.
          batches: Iterable or sequence of batches. A batch is the function's argument after params,
            or a tuple of its arguments; examples lie along the leading axis of the first one.
          calibration: "mse", "absmax", "percentile" or "output". The error at the output is known
            of weights that are stored as matrices, inputs first, and contracted once, outside of
            scan; for others "output" is "mse".
          percentile: Percent of the magnitudes, in (0, 100], for the calibration of that name.
          mu: A mu to give every tensor, 0 to 255; only the scales are found then.
          **kwargs: Further arguments of the function.

        Returns:
          This function with its `sites`, and the variables with "compand".

        Raises:
          TypeError: `batches` is an array, or this is called under `jax.jit`.
          ValueError: `variables` have no "params", the function contracts none, there are no
            batches, one is empty, or something is not finite; a rule matches no site, activations
            of one bit have a sign, or an argument is out of its range.
        """
        percentile, mu = check_arguments(calibration, percentile, mu)
        require_concrete("variables", variables)

        if "params" not in variables:
            raise ValueError(
                f"`variables` must hold the parameters as 'params', got {sorted(variables)}: give "
                '{"params": params}'
            )
        params = variables["params"]
        leaves, tree = jax.tree.flatten(params)  # such as functions among the arrays, in Equinox

        def run(make_observer: MakeObserver, arrays: list, args: tuple) -> Observer:
            observer, given = make_observer(), iter(arrays)
            own = [next(given) if is_array(leaf) else leaf for leaf in leaves]
            self._trace(jax.tree.unflatten(tree, own), args, kwargs).observed(observer)
            return observer

        seen = observe_batches(
            run,
            [leaf for leaf in leaves if is_array(leaf)],
            batches,
            functools.partial(self.function, params),
            kwargs,
            at_output=False,
            activations=self.config.quantizes_activations,
            moments=calibration == "output",
        )
        sites = observed_sites(self.config, seen)
        compand = fit_parameters(self.config, sites, seen, calibration, percentile, mu)
        calibrated = dataclasses.replace(self, sites=FrozenDict(sites))
        return calibrated, {"params": params, "compand": compand}

    def _trace(self, params: Any, args: tuple, kwargs: Mapping[str, Any]) -> Program:
        program = trace(
            self.function, params, args, kwargs, products=self.config.contractions == "all"
        )
        if not program.layers:
            raise ValueError(
                "`function` must contract a parameter, by dot_general or conv_general_dilated, "
                "found none: parameters are its first argument, a tree of arrays"
            )
        return program

    def _params(self, variables: Mapping[str, Any]) -> Mapping[str, Any]:
        return nested_by_name(variables["params"])
