"""Mu-law companding quantization of Flax networks to 2 to 8 bits, with learned mu."""

import importlib
from typing import TYPE_CHECKING, Any

from compand_jax.calibration.fit import fit as fit
from compand_jax.core.codebooks import codebook as codebook
from compand_jax.core.companding import mu_law_compress as mu_law_compress
from compand_jax.core.companding import mu_law_expand as mu_law_expand
from compand_jax.core.families.base import Compander as Compander
from compand_jax.core.families.base import Family as Family
from compand_jax.core.families.registry import register_quantizer as register_quantizer
from compand_jax.core.quantizers import dequantize as dequantize
from compand_jax.core.quantizers import fake_quantize as fake_quantize
from compand_jax.core.quantizers import quantize as quantize
from compand_jax.frozen.freeze import freeze as freeze
from compand_jax.frozen.model import FrozenModel as FrozenModel
from compand_jax.frozen.model import load_frozen as load_frozen
from compand_jax.layers.config import QuantConfig as QuantConfig
from compand_jax.layers.config import Rule as Rule
from compand_jax.layers.contractions.quantized_function import (
    QuantizedFunction as QuantizedFunction,
)
from compand_jax.layers.contractions.quantized_function import (
    quantize_function as quantize_function,
)
from compand_jax.layers.parametrization import mu_from_theta as mu_from_theta
from compand_jax.layers.parametrization import rho_from_scale as rho_from_scale
from compand_jax.layers.parametrization import scale_from_rho as scale_from_rho
from compand_jax.layers.parametrization import theta_from_mu as theta_from_mu
from compand_jax.layers.partition import partition_optimizer as partition_optimizer
from compand_jax.layers.sites import Site as Site
from compand_jax.layers.stored_sites import sites_from_json as sites_from_json
from compand_jax.layers.stored_sites import sites_to_json as sites_to_json
from compand_jax.layers.transition_rate import (
    scale_by_transition_rate as scale_by_transition_rate,
)
from compand_jax.linen.codes import weight_codes as weight_codes
from compand_jax.linen.quantized_model import QuantizedModel as QuantizedModel
from compand_jax.linen.quantized_model import quantize_model as quantize_model
from compand_jax.models.torch_weights import import_state_dict as import_state_dict
from compand_jax.models.torch_weights import load_npz_state_dict as load_npz_state_dict
from compand_jax.models.torch_weights import (
    load_safetensors_state_dict as load_safetensors_state_dict,
)

if TYPE_CHECKING:
    from compand_jax import nnx as nnx
    from compand_jax.frozen.nnx.model import FrozenModule as FrozenModule

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # flax.nnx takes about as long to import as flax.linen, and is for those who use it.
    if name == "nnx":
        return importlib.import_module("compand_jax.nnx")
    if name == "FrozenModule":
        return importlib.import_module("compand_jax.frozen.nnx.model").FrozenModule
    raise AttributeError(f"module 'compand_jax' has no attribute {name!r}")
