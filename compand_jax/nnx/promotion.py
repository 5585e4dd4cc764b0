"""What takes the place of a layer's `promote_dtype`: it quantizes what the layer multiplies."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from compand_jax.core.families.registry import family_of
from compand_jax.layers import parametrization as par
from compand_jax.layers.config import QuantConfig
from compand_jax.layers.contractions.program import marked
from compand_jax.layers.groups import grouped, stored_scales
from compand_jax.layers.layer_quantizer import quantize_operand, quantize_standardized
from compand_jax.layers.observation import Layer
from compand_jax.layers.sites import Site, require_real
from compand_jax.layers.standardization import in_weights_units, moments
from compand_jax.layers.visitor import Visitor, visited_operands
from compand_jax.nnx.variables import Mu, Scale

HOOK = "promote_dtype"
"""The attribute of a layer that a `Promotion` takes."""


class Promotion(nnx.Module):
    """A layer's `promote_dtype` that quantizes the operands first.

    Attributes:
      promote: The layer's own.
      layer: What is known of the layer.
      site: What is static about its quantizers.
      config: What to quantize and how, in the whole model.
      is_calibrated: Whether `site` is what calibration found.
      visitor: What sees the operands in full precision, in place of quantizing them. In the copy
        of a model that is observed, it is part of the graphdef, so that `nnx.jit` keeps its traces
        apart from any other.
      weight_mu: theta of the weight, None in full precision and for a uniform quantizer. Another
        family has its theta in an attribute of its parameter's name, such as `weight_exponent`.
      weight_scale: rho of the weight, None in full precision.
      act_mu: theta of the activation, likewise.
      act_scale: rho of the activation, likewise.
    """

    def __init__(
        self,
        promote: Callable,
        layer: Layer,
        site: Site,
        config: QuantConfig,
        is_calibrated: bool,
    ) -> None:
        self.promote = promote
        self.layer = layer
        self.site = site
        self.config = config
        self.is_calibrated = is_calibrated
        self.visitor: Visitor | None = None
        self.weight_mu: Mu | None = nnx.data(None)
        self.weight_scale: Scale | None = nnx.data(None)
        self.act_mu: Mu | None = nnx.data(None)
        self.act_scale: Scale | None = nnx.data(None)

    def __call__(self, operands: tuple, /, **kwargs: Any) -> Any:
        """Returns what the layer's own `promote_dtype` makes of the quantized operands."""
        visitor = _Quantizing(self) if self.visitor is None else self.visitor
        used = visited_operands(visitor, self.layer, operands)
        if self.config.contractions != "layers":
            used = marked(used)
        return self.promote(used, **kwargs)


# Functions beside the class: Flax tabulates whatever methods a module has.
def variables_of(promotion: Promotion, operand: str) -> tuple[Mu | None, Scale | None]:
    """Returns theta and rho of "weight" or "act", as the variables that hold them."""
    return getattr(promotion, theta_name(promotion, operand), None), getattr(
        promotion, f"{operand}_scale"
    )


def theta_name(promotion: Promotion, operand: str) -> str:
    """Returns the attribute that holds theta of "weight" or "act", by the parameter's name."""
    return f"{operand}_{family_of(promotion.site.quantizer).parameter or 'mu'}"


def parameters_of(
    promotion: Promotion, operand: str, weight: Array | None = None
) -> tuple[Array, Array] | None:
    """Returns mu and scale of "weight", which is given, or "act"; None in full precision.

    Of a standardized weight that is not given, the scale is in standard deviations.
    """
    theta, rho = variables_of(promotion, operand)
    if rho is None:
        return None
    family = family_of(promotion.site.quantizer)
    mu = jnp.zeros((), jnp.float32) if theta is None else family.from_trainable(theta[...])
    if weight is None:
        return mu, par.scale_from_rho(rho[...])
    values: Array = grouped(weight, rho[...].shape, promotion.site.group_size)
    # One scale for each layer of a stack lies along its axes, in front.
    if promotion.site.weight_standardization:
        deviation = lambda x: moments(x)[1]  # noqa: E731
        for _ in rho[...].shape:
            deviation = jax.vmap(deviation)
        return mu, in_weights_units(par.scale_from_rho(rho[...]), deviation(values))
    shape = rho[...].shape + (1,) * (values.ndim - rho[...].ndim)
    scale = par.weight_scale(rho[...].reshape(shape), values).reshape(rho[...].shape)
    return mu, stored_scales(scale, promotion.config.scale_dtype, promotion.site.scale_axes)


class _Quantizing:
    """A visitor that quantizes what a layer multiplies, by its `Promotion`."""

    def __init__(self, promotion: Promotion) -> None:
        self._own = promotion

    def operands(
        self, layer: Layer, activation: Array | None, weight: Array
    ) -> tuple[Array | None, Array]:
        """Returns the quantized operands; the activation is None where integers are looked up."""
        if activation is not None:
            self._check_act()
            activation = self._quantize("act", activation)
        return activation, self._quantize("weight", weight)

    def output(self, layer: Layer, output: Array) -> Array:
        """Returns the output: a layer of NNX is not seen there."""
        return output

    def _check_act(self) -> None:
        name = self._own.layer.site
        if self._own.site.act_bits is None and self._own.config.at(name).act_bits is not None:
            raise ValueError(
                f"site {name!r} must see activations while it is calibrated, it looked integers "
                "up alone: calibrate again, with the method that runs it so"
            )

    def _quantize(self, operand: str, x: Array) -> Array:
        name = self._own.layer.site
        if operand not in self._own.site.operands():
            return x
        require_real(name, operand, x.dtype)
        standardized = operand == "weight" and self._own.site.weight_standardization
        weight = x if operand == "weight" and not standardized else None
        parameters = parameters_of(self._own, operand, weight)
        assert parameters is not None
        if operand == "act" and not self._own.is_calibrated:
            warnings.warn(
                f"site {name!r} is not calibrated: its activations are taken to be signed and its "
                "scale is what quantize set; call calibrate, or pass `sites` to quantize",
                stacklevel=2,
            )
        mu, scale = parameters
        shape = self._own.site.scale_shape(x.shape) if operand == "weight" else ()
        spec = self._own.site.spec(operand)
        own = spec.family.shape(spec)
        if mu.shape != own or scale.shape != shape:
            raise ValueError(
                f"site {name!r} must see the {theta_name(self._own, operand)} and {operand}_scale "
                f"of one layer, of shapes {own} and {shape}, got {mu.shape} and {scale.shape}: "
                "what runs a stack of layers splits these variables as it does nnx.Param, such as "
                "nnx.StateAxes({(nnx.Param, compand_jax.nnx.Quantizer): 0, ...: None})"
            )
        _, rho = variables_of(self._own, operand)
        assert rho is not None
        if standardized:
            return quantize_standardized(x, x, mu, scale, rho[...], spec, self._own.config)
        size = self._own.site.group_size if operand == "weight" else None
        values = grouped(x, shape, size)
        found = quantize_operand(operand, values, mu, scale, rho[...], spec, self._own.config)
        return found.reshape(x.shape)
