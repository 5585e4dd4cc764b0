"""Mu-law companding quantization of Flax Linen networks to 2 to 8 bits, with learned mu."""

from compand_jax.companding import mu_law_compress as mu_law_compress
from compand_jax.companding import mu_law_expand as mu_law_expand
from compand_jax.quantizers import codebook as codebook
from compand_jax.quantizers import dequantize as dequantize
from compand_jax.quantizers import fake_quantize as fake_quantize
from compand_jax.quantizers import quantize as quantize
