"""A run's quantized network as one file, in any of three formats, and the file run again.

    safetensors    packed codes and tables, for `load_frozen`
    stablehlo      uint8 images [batch, h, w, c] to logits, for `jax.export.deserialize`
    onnx           the same, for onnxruntime

The last two normalize the images themselves, and take batches of any size.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.core
import jax.export
import numpy as np
from tqdm import tqdm

from compand_jax.data.images import DATASETS, ImageData, normalize
from compand_jax.experiments.errors import UserError, user_errors
from compand_jax.experiments.runs.config import RunConfig
from compand_jax.experiments.runs.stages import finished
from compand_jax.frozen.freeze import freeze
from compand_jax.frozen.model import FrozenModel, load_frozen, read_info
from compand_jax.models import create_model
from compand_jax.models.cpu_conv import plain_convolutions

PLATFORMS = ("cpu", "cuda", "tpu")
_BATCH_SIZE = 250

Predictor = Callable[[np.ndarray], Any]
"""From uint8 images [batch, h, w, c] to logits [batch, classes]."""

# Shapes of the images, and how many classes there are: by these a file finds its data set.
_SHAPES = {(8, 8, 1, 10): DATASETS[0], (32, 32, 3, 10): DATASETS[1], (32, 32, 3, 100): DATASETS[2]}


def freeze_stage(
    config: RunConfig, data: ImageData, name: str, *, fold_norms: bool = False
) -> FrozenModel:
    """Returns the frozen model of a finished stage.

    Args:
      config: the run's.
      data: the run's data set.
      name: of the stage.
      fold_norms: whether to fold batch norms into the layers before them.

    Raises:
      UserError: if there is no sound checkpoint of its last step, or it is one of another model;
        or if the stage is not quantized, or has no batch norm that can be folded.
    """
    stage, state = finished(config, data, name)
    if stage.quantized is None:
        raise UserError(
            f"`run_dir` must be of a quantized stage, got {name}, which is in full precision: "
            "give another stage's directory"
        )
    sample = jax.ShapeDtypeStruct((1, *data.test_images.shape[1:]), np.float32)
    with user_errors(ValueError):  # there is no batch norm to fold
        return freeze(stage.quantized, state.variables, sample, train=False, fold_norms=fold_norms)


def export(
    frozen: FrozenModel, config: RunConfig, data: ImageData, path: Path, kind: str, compress: bool
) -> None:
    """Writes a frozen model of a run to a file.

    Args:
      frozen: as `freeze_stage` returns it.
      config: the run's.
      data: the run's data set.
      path: of the file.
      kind: safetensors, stablehlo or onnx.
      compress: whether to compress codes where that takes fewer bytes; of safetensors.

    Raises:
      UserError: the file cannot be written, or the format cannot hold the model.
    """
    if kind == "safetensors":
        model = {
            "name": config.model,
            "num_classes": data.num_classes,
            "block_order": config.block_order,
            "dtype": config.dtype,
        }
        info = {"model": model, "dataset": data.name, "mean": data.mean, "std": data.std}
        with user_errors(OSError):
            frozen.save(path, compress=compress, info=info)
        return
    shape = data.test_images.shape[1:]
    if kind == "stablehlo":
        written = to_stablehlo(
            lambda x: frozen.apply(normalize(x, data.mean, data.std), train=False), shape, np.uint8
        )
    else:
        written = to_onnx(
            lambda x: frozen.apply_dense(normalize(x, data.mean, data.std), train=False),
            shape,
            np.uint8,
        )
    with user_errors(OSError):
        path.write_bytes(written)


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
      UserError: jax2onnx is not installed, does not know this jax, or cannot convert the function.
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
        raise UserError(
            "`format` onnx needs jax2onnx: pip install 'compand-jax[onnx]', then "
            "pip install --no-deps jax2onnx"
        ) from error
    except AttributeError as error:  # it uses what is private to jax
        raise UserError(
            f"`format` onnx needs a jax that jax2onnx knows, got {jax.__version__} ({error}): use "
            "stablehlo, or an older jax"
        ) from error
    except NotImplementedError as error:
        raise UserError(f"`format` onnx cannot hold this model ({error}): use stablehlo") from error
    finally:
        logging.disable(level)
    return model.SerializeToString()


def load_predictor(path: Path) -> tuple[Predictor, str]:
    """Returns the function of an exported file, and the name of the data set that it is for.

    Args:
      path: of a file that ends in .safetensors, .stablehlo or .onnx.

    Raises:
      UserError: the file cannot be read, is damaged, or of no known format or data set.
    """
    if path.suffix not in _LOADERS:
        raise UserError(
            f"`path` must end in one of {', '.join(_LOADERS)}, got {path}: give a file that "
            "compand export wrote"
        )
    with user_errors(OSError, ValueError):  # of the file
        return _LOADERS[path.suffix](path)


def predictor(frozen: FrozenModel, mean: tuple[float, ...], std: tuple[float, ...]) -> Predictor:
    """Returns the function of a frozen network, which normalizes the images itself."""
    predict = jax.jit(lambda frozen, x: frozen.apply(normalize(x, mean, std), train=False))
    return functools.partial(predict, frozen)


def logits(predict: Predictor, images: np.ndarray) -> np.ndarray:
    """Returns what a function gives for images [n, h, w, c]: [n, classes], showing a progress bar.

    Args:
      predict: it is called on batches of one size, the last one filled up.
      images: uint8.
    """
    found = []
    for start in tqdm(range(0, len(images), _BATCH_SIZE), "images", unit="batch", leave=False):
        rows = np.arange(start, start + _BATCH_SIZE)
        batch = np.asarray(predict(images[np.minimum(rows, len(images) - 1)]))
        found.append(batch[rows < len(images)])
    return np.concatenate(found)


def compare(one: np.ndarray, other: np.ndarray) -> str:
    """Returns in words how far two functions' logits, and classes, of the same images are apart."""
    same = int((one.argmax(-1) == other.argmax(-1)).sum())
    largest = np.abs(one - other).max()
    return f"{same} of {len(one)} test images in the same class, logits at most {largest:.2g} apart"


def _load_frozen(path: Path) -> tuple[Predictor, str]:
    info = read_info(path)
    try:
        model, name = create_model(**info["model"]), str(info["dataset"])
        mean, std = (tuple(map(float, info[key])) for key in ("mean", "std"))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"`path` must be a file that compand export wrote, got {path} without "
            f"{error}: use load_frozen with your own model"
        ) from error
    return predictor(load_frozen(path, model), mean, std), name


def _load_stablehlo(path: Path) -> tuple[Predictor, str]:
    data = path.read_bytes()
    try:
        exported = jax.export.deserialize(bytearray(data))
        (images,), (logits,) = exported.in_avals, exported.out_avals
    except Exception as error:  # whatever flatbuffers and MLIR raise
        raise UserError(
            f"`path` must be a StableHLO file that compand export wrote, got {path}, which "
            f"cannot be read ({error})"
        ) from error
    return jax.jit(exported.call), _data_set(path, images.shape, logits.shape)


def _load_onnx(path: Path) -> tuple[Predictor, str]:
    try:
        import onnxruntime  # pyright: ignore[reportMissingImports]  # of an extra
    except ImportError as error:
        raise UserError(
            f"`path` {path} needs onnxruntime: pip install 'compand-jax[onnx]'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    data = path.read_bytes()
    try:
        session = onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"])
        (images,), (logits,) = session.get_inputs(), session.get_outputs()
    except Exception as error:  # its errors have no common base
        raise UserError(
            f"`path` must be an ONNX file that compand export wrote, got {path}, which "
            f"cannot be read ({error})"
        ) from error

    def predict(x: np.ndarray) -> Any:
        return session.run(None, {images.name: x})[0]

    return predict, _data_set(path, images.shape, logits.shape)


_LOADERS = {".safetensors": _load_frozen, ".stablehlo": _load_stablehlo, ".onnx": _load_onnx}


def _data_set(path: Path, images: Any, logits: Any) -> str:
    key = (*images[1:], *logits[1:])
    if key not in _SHAPES:
        raise UserError(
            f"`path` must be for a known data set, got {path} for images {list(images[1:])} and "
            f"{list(logits[1:])} classes: run it with its own library"
        )
    return _SHAPES[key]


def _argument(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*jax.export.symbolic_shape("batch"), *shape), dtype)
