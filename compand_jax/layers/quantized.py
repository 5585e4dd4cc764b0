"""What quantized models have in common, whatever framework they are of."""

import functools
import warnings
from collections.abc import Mapping
from typing import Any

from jaxtyping import Array

from compand_jax.layers import parametrization as par
from compand_jax.layers.config import QuantConfig
from compand_jax.layers.sites import Site, check_sites, site_from_config
from compand_jax.layers.summary import site_weight, summarize


class Quantized:
    """A model, or a function, whose sites see quantized operands.

    Attributes:
      config: What to quantize and how.
      sites: What calibration found, by site; None before it, with activations signed.
    """

    config: QuantConfig
    sites: Mapping[str, Site] | None

    def __post_init__(self) -> None:
        if self.sites is not None:
            check_sites(self.config, self.sites)

    def quantizers(self, variables: Mapping[str, Any]) -> dict[str, dict[str, Array]]:
        """Returns mu and scale of every site: {site: {"weight_mu": ..., "act_scale": ..., ...}}.

        Args:
          variables: As `apply` takes them.

        Returns:
          By site, "weight_mu", "weight_scale", "act_mu" and "act_scale", float32. mu has no unit,
          and is 0 for a uniform quantizer. In its place another family has its own parameters, such
          as "weight_exponent", or nothing. A scale is in the units of what it clips. A weight or an
          activation in full precision has no entry. A scale that follows its weight is that of the
          weight in "params", and 2^-110 where the weight is zero.

        Raises:
          ValueError: "compand" is missing, or was made with another config.
        """
        compand = compand_of(variables)
        found: dict[str, dict[str, Array]] = {}
        for site, operand in par.quantized_operands(compand):
            weight = site_weight(self._params(variables), site) if operand == "weight" else None
            parameters = par.read_parameters(compand, site, operand, self.config, weight)
            assert parameters is not None
            mu, own = parameters[0], found.setdefault(site, {})
            if (name := par.entry_name(operand, self.config.at(site).quantizer)) is not None:
                own[name] = mu
            own[f"{operand}_scale"] = parameters[1]
        return found

    def summary(self, variables: Mapping[str, Any]) -> str:
        """Returns a table of the sites as text, and the names of the weights not quantized.

        A site's row has the bits, mu and scale of its weight and of its activation, the weight's
        ratio of signal to quantization noise in dB, its bytes packed and in float32, whether the
        activation has a sign, and the bits per weight with its scales and mu. Named below are the
        parameters of two axes and more that are no site's weight, also those that a site's layer
        multiplies by itself.

        Args:
          variables: As `apply` takes them.
        """
        quantizers = self.quantizers(variables)
        return summarize(
            self._params(variables), quantizers, {name: self.site(name) for name in quantizers}
        )

    def site(self, name: str) -> Site:
        """Returns the `Site` of that name: as calibrated, or before calibration as configured."""
        if self.sites is not None and name in self.sites:
            return self.sites[name]
        return site_from_config(self.config, name)

    def _params(self, variables: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the parameters as nested dictionaries."""
        return variables.get("params", {})

    def _warn_uncalibrated(self) -> None:
        if self.sites is not None:
            return
        try:
            _warn_uncalibrated(self)
        except TypeError:  # a field of it cannot be hashed
            _warn_uncalibrated(repr(self))


def compand_of(variables: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the collection "compand"; ValueError where it is missing."""
    if "compand" not in variables:
        raise ValueError(
            f"`variables` must hold the collection 'compand', got {sorted(variables)}: "
            "make it with its init or calibrate"
        )
    return variables["compand"]


@functools.lru_cache(maxsize=1024)
def _warn_uncalibrated(qmodel: Quantized | str) -> None:
    warnings.warn(
        "the quantized model is not calibrated: mu and scale are what init set, and activations "
        "are taken to be signed; call calibrate, or pass `sites` to quantize_model",
        stacklevel=4,
    )
