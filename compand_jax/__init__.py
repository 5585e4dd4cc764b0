"""Mu-law companding quantization of Flax Linen networks to 2 to 8 bits, with learned mu."""

from compand_jax.codebooks import codebook as codebook
from compand_jax.companding import mu_law_compress as mu_law_compress
from compand_jax.companding import mu_law_expand as mu_law_expand
from compand_jax.config import QuantConfig as QuantConfig
from compand_jax.config import Rule as Rule
from compand_jax.frozen_model import FrozenModel as FrozenModel
from compand_jax.frozen_model import load_frozen as load_frozen
from compand_jax.partition import partition_optimizer as partition_optimizer
from compand_jax.quantized_model import QuantizedModel as QuantizedModel
from compand_jax.quantized_model import quantize_model as quantize_model
from compand_jax.quantizers import dequantize as dequantize
from compand_jax.quantizers import fake_quantize as fake_quantize
from compand_jax.quantizers import quantize as quantize
from compand_jax.sites import Site as Site
from compand_jax.state_dicts import import_state_dict as import_state_dict
from compand_jax.state_dicts import load_npz_state_dict as load_npz_state_dict
