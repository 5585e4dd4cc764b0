"""What quantizes the operands of every layer, as `intercept_layers` shows them."""

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array

from compand_jax.core._mesh import varying_axes
from compand_jax.core.quantizers import fake_quantize
from compand_jax.core.spec import Spec
from compand_jax.layers import parametrization as par
from compand_jax.layers.config import QuantConfig
from compand_jax.layers.groups import group_scale_shape, grouped, has_groups, require_divides
from compand_jax.layers.observation import Layer
from compand_jax.layers.sites import Site, require_real
from compand_jax.layers.standardization import in_weights_units, moments


class LayerQuantizer:
    """A visitor that quantizes what every layer multiplies, or its output.

    Args:
      config: what to quantize and how.
      site: called with a site's name, what is static about it.
      compand: mu and scales.
      stored: called with a site's name, its weight as it is stored, a stack of layers whole; None
        where there is none.

    `visited` has the sites that came by.
    """

    def __init__(
        self,
        config: QuantConfig,
        site: Callable[[str], Site],
        compand: Mapping,
        stored: Callable[[str], Array | None],
    ) -> None:
        self._config, self._site, self._compand = config, site, compand
        self._stored = stored
        self.visited: set[str] = set()

    def operands(
        self, layer: Layer, activation: Array | None, weight: Array
    ) -> tuple[Array | None, Array]:
        """Returns the quantized weight and, unless it is done at the output, activation."""
        if activation is not None and self._config.act_site == "input":
            activation = self.activation(layer, activation)
        return activation, self.weight(layer, weight)

    def activation(self, layer: Layer, activation: Array) -> Array:
        """Returns a layer's quantized input."""
        self.visited.add(layer.site)
        self._check_act(layer.site)
        return self._quantize(layer.site, "act", activation)

    def weight(self, layer: Layer, weight: Array) -> Array:
        """Returns a layer's quantized weight."""
        self.visited.add(layer.site)
        self._check_granularity(layer, weight.shape)
        return self._quantize(layer.site, "weight", weight)

    def output(self, layer: Layer, output: Array) -> Array:
        """Returns the output, quantized where activations are quantized there."""
        if self._config.act_site == "input":
            return output
        return self._quantize(layer.site, "act", output)

    def _check_act(self, name: str) -> None:
        if self._config.at(name).act_bits is not None and self._site(name).act_bits is None:
            raise ValueError(
                f"`sites` must be of the same config, site {name!r} was calibrated without "
                f"act_bits, the config has {self._config.at(name).act_bits}: calibrate again, with "
                "this method"
            )

    def _check_granularity(self, layer: Layer, shape: tuple[int, ...]) -> None:
        rho = par.get_leaf(self._compand, par.scale_path(layer.site, "weight"))
        granularity = self._config.at(layer.site).weight_granularity
        if rho is None or not (layer.channel_axes or has_groups(granularity)):
            return
        if has_groups(granularity):
            require_divides(layer.site, int(granularity), shape, layer.input_axes)
            own = group_scale_shape(shape, int(granularity), layer.input_axes[-1])
            fits = jnp.shape(rho) == own
        else:
            fits = bool(jnp.ndim(rho)) == (granularity == "channel")
        if not fits:
            raise ValueError(
                f"`variables` must hold compand/{'/'.join(par.scale_path(layer.site, 'weight'))} "
                f"for weight_granularity={granularity!r}, got one of shape {jnp.shape(rho)}: they "
                "were made by another config, make them with this model's init or calibrate"
            )

    def _quantize(self, name: str, operand: str, x: Array) -> Array:
        site, config = self._site(name), self._config
        if operand not in site.operands():
            return x
        require_real(name, operand, x.dtype)
        standardized = operand == "weight" and site.weight_standardization
        weight = self._whole(name, x) if operand == "weight" and not standardized else None
        parameters = par.read_parameters(self._compand, name, operand, config, weight)
        if parameters is None:
            if operand == "act" and config.act_site == "output":  # the last layer's
                return x
            raise ValueError(
                f"`variables` must hold compand/{'/'.join(par.scale_path(name, operand))}: they "
                f"were made without running site {name!r}; init or calibrate with this method"
            )
        (mu, scale), spec = parameters, site.spec(operand)
        rho = par.get_leaf(self._compand, par.scale_path(name, operand))
        if standardized:
            whole = self._whole(name, x)
            return quantize_standardized(x, whole, mu, scale, rho, spec, config)
        size = config.at(name).weight_granularity if operand == "weight" else None
        values = grouped(x, scale.shape, size)
        found = quantize_operand(operand, values, mu, scale, rho, spec, config)
        return found.reshape(x.shape)

    def _whole(self, name: str, weight: Array) -> Array:
        """Returns all layers' weights where one layer of a stack runs: they share their scale."""
        stored = self._stored(name)
        if stored is None:
            return weight
        whole, own = jnp.shape(stored), weight.shape
        # A stack's layer may keep the stack's axes, of length 1.
        cut = next((i for i, n in enumerate(own) if n != 1), len(own))
        is_layer = len(whole) == len(own) and whole != own and whole[cut:] == own[cut:]
        return stored if len(whole) > len(own) or is_layer else weight


def given(mu: Array, spec: Spec) -> Array | None:
    """Returns what the public functions take for mu: None where a family has no parameters."""
    return None if spec.family.parameter is None else mu


def quantize_operand(
    operand: str, x: Array, mu: Array, scale: Array, rho: Array, spec: Spec, config: QuantConfig
) -> Array:
    """Returns what a layer multiplies in place of x, with mu's and the scale's gradients as set."""
    mu, scale = _with_gradients(operand, x, mu, scale, rho, spec, config)
    return fake_quantize(x, given(mu, spec), scale, **spec.arguments)


def quantize_standardized(
    x: Array, whole: Array, mu: Array, scale: Array, rho: Array, spec: Spec, config: QuantConfig
) -> Array:
    """Returns m + Q(x - m), the clip being s times the scale: `standardization`'s Q_s.

    Args:
      x: The weight, floating.
      whole: What m and s are of: x, or the stack of layers that it is one of.
      mu: Scalar, or the parameters of another family.
      scale: Scalar, in standard deviations.
      rho: What the scale is made of.
      spec: The quantizer.
      config: As `quantize_operand`'s.

    Gradient: straight-through, and the chain rule's through m and s.
    """
    mu, scale = _with_gradients("weight", x, mu, scale, rho, spec, config)
    mean, deviation = moments(whole)
    quantized = fake_quantize(
        x.astype(mean.dtype) - mean,
        given(mu, spec),
        in_weights_units(scale, deviation),
        **spec.arguments,
    )
    return (mean + quantized).astype(x.dtype)


def _with_gradients(
    operand: str, x: Array, mu: Array, scale: Array, rho: Array, spec: Spec, config: QuantConfig
) -> tuple[Array, Array]:
    """Returns mu and the scale, whose gradients are multiplied by 1/sqrt(n M) where configured."""
    if "lsq" not in (config.mu_gradient, config.scale_gradient):
        return mu, scale
    # A weight that is only cast to differ is whole, and its rho is cast with it.
    axes = varying_axes(x) - (varying_axes(rho) if operand == "weight" else set())
    values = x.size * math.prod(map(jax.lax.axis_size, axes))
    factor = 1 / math.sqrt(values * spec.steps)
    if config.mu_gradient == "lsq":
        mu = jnp.asarray(_scale_gradient(mu, factor))
    if config.scale_gradient == "lsq":
        scale = jnp.asarray(_scale_gradient(scale, factor))
    return mu, scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scale_gradient(x: Array, factor: float) -> Array:
    """Returns x, to the last bit; its gradient is multiplied by the factor."""
    return x


def _scale_gradient_fwd(x: Array, factor: float) -> tuple[Array, None]:
    return x, None


def _scale_gradient_bwd(factor: float, _: None, cotangent: Array) -> tuple[Array]:
    return (cotangent * factor,)


_scale_gradient.defvjp(_scale_gradient_fwd, _scale_gradient_bwd)
