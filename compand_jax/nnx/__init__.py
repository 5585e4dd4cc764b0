"""NNX models, quantized by their layers' own hook: `compand_jax.nnx`."""

from compand_jax.nnx.calibration import calibrate as calibrate
from compand_jax.nnx.partition import partition_optimizer as partition_optimizer
from compand_jax.nnx.quantized_model import dequantize as dequantize
from compand_jax.nnx.quantized_model import quantize as quantize
from compand_jax.nnx.quantized_model import quantizers as quantizers
from compand_jax.nnx.quantized_model import sites as sites
from compand_jax.nnx.quantized_model import summary as summary
from compand_jax.nnx.variables import Codes as Codes
from compand_jax.nnx.variables import Mu as Mu
from compand_jax.nnx.variables import Quantizer as Quantizer
from compand_jax.nnx.variables import Scale as Scale
from compand_jax.nnx.variables import Table as Table
