"""A function of arrays as a file that other programs run: StableHLO or ONNX, of any batch size."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.export

from compand_jax.models.cpu_conv import plain_convolutions

PLATFORMS = ("cpu", "cuda", "tpu")


def to_stablehlo(
    function: Callable[[jax.Array], jax.Array],
    shape: Sequence[int],
    dtype: Any,
    *,
    platforms: Sequence[str] = PLATFORMS,
) -> bytes:
    """Returns a function of a batch as bytes for `jax.export.deserialize(...).call(x)`.

    Args:
      function: Of an array [batch, *shape]; what it closes over is stored in the bytes.
      shape: Of its argument, without the batch.
      dtype: Of its argument.
      platforms: Where it is to run.
    """
    exported = jax.export.export(jax.jit(function), platforms=platforms)(_argument(shape, dtype))
    return bytes(exported.serialize())


def to_onnx(function: Callable[[jax.Array], jax.Array], shape: Sequence[int], dtype: Any) -> bytes:
    """Returns a function of a batch as an ONNX model, by jax2onnx (Apache-2.0).

    Args:
      function: Of an array [batch, *shape]; what it closes over is stored in the bytes.
      shape: Of its argument, without the batch.
      dtype: Of its argument.

    Raises:
      ValueError: jax2onnx is not installed, or cannot convert the function.
    """
    argument = _argument(shape, dtype)
    # Traced here: jax2onnx replaces Linen's layers while it traces, and with them what is
    # quantized in them.
    with plain_convolutions():
        traced = jax.make_jaxpr(function)(argument)
    # On import it logs a traceback for each of its examples that has other requirements.
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        import jax2onnx  # pyright: ignore[reportMissingImports]  # of an extra

        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            model = jax2onnx.to_onnx(
                lambda x: jax.core.eval_jaxpr(traced.jaxpr, traced.consts, x)[0], [argument]
            )
    except ImportError as error:
        raise ValueError(
            "`format` onnx needs jax2onnx: pip install 'compand-jax[onnx]', then "
            "pip install --no-deps jax2onnx"
        ) from error
    except NotImplementedError as error:
        raise ValueError(
            f"`format` onnx cannot hold this model ({error}): use stablehlo"
        ) from error
    finally:
        logging.disable(level)
    return model.SerializeToString()


def _argument(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*jax.export.symbolic_shape("batch"), *shape), dtype)
