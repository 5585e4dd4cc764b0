"""A run's quantized network as one file, in any of three formats, and the file run again.

    safetensors    packed codes and tables, for `load_frozen`
    stablehlo      uint8 images [batch, h, w, c] to logits, for `jax.export.deserialize`
    onnx           the same, for onnxruntime

The last two normalize the images themselves.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from compand_jax.data.images import DATASETS, ImageData, normalize
from compand_jax.experiments.runs.config import RunConfig
from compand_jax.experiments.runs.directory import finished_stages
from compand_jax.experiments.runs.export import to_onnx, to_stablehlo
from compand_jax.experiments.runs.stages import finished, make_stage
from compand_jax.frozen.freeze import freeze
from compand_jax.frozen.model import FrozenModel, load_frozen, read_info
from compand_jax.models import create_model

FORMATS = ("safetensors", "stablehlo", "onnx")

Predictor = Callable[[np.ndarray], Any]
"""From uint8 images [batch, h, w, c] to logits [batch, classes]."""

# Shapes of the images, and how many classes there are: by these a file finds its data set.
_SHAPES = {(8, 8, 1, 10): DATASETS[0], (32, 32, 3, 10): DATASETS[1], (32, 32, 3, 100): DATASETS[2]}


def quantized_stages(config: RunConfig, data: ImageData) -> list[str]:
    """Returns the names of a run's finished stages whose networks are quantized."""
    names = finished_stages(config.run_dir)
    return [name for name in names if make_stage(config, data, name).quantized is not None]


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
      FileNotFoundError: if there is no sound checkpoint of its last step.
      ValueError: if the checkpoint is one of another model, the stage is not quantized, or it has
        no batch norm that can be folded.
    """
    stage, state = finished(config, data, name)
    if stage.quantized is None:
        raise ValueError(
            f"`run_dir` must be of a quantized stage, got {name}, which is in full precision: "
            "give another stage's directory"
        )
    sample = jax.ShapeDtypeStruct((1, *data.test_images.shape[1:]), np.float32)
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
      kind: one of `FORMATS`.
      compress: whether to compress codes where that takes fewer bytes; of safetensors.

    Raises:
      OSError: the file cannot be written.
      ValueError: the format cannot hold the model.
    """
    if kind == "safetensors":
        model = {
            "name": config.model,
            "num_classes": data.num_classes,
            "block_order": config.block_order,
            "dtype": config.dtype,
        }
        info = {"model": model, "dataset": data.name, "mean": data.mean, "std": data.std}
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
    path.write_bytes(written)


def load_predictor(path: Path) -> tuple[Predictor, str]:
    """Returns the function of an exported file, and the name of the data set that it is for.

    Args:
      path: of a file whose suffix is one of `FORMATS`.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is damaged, or of no known format or data set.
    """
    kind = path.suffix.removeprefix(".")
    if kind == "safetensors":
        info = read_info(path)
        try:
            model, name = create_model(**info["model"]), str(info["dataset"])
            mean, std = (tuple(map(float, info[key])) for key in ("mean", "std"))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"`path` must be a file that scripts/export.py wrote, got {path} without "
                f"{error}: use load_frozen with your own model"
            ) from error
        return predictor(load_frozen(path, model), mean, std), name
    if kind == "stablehlo":
        return _load_stablehlo(path)
    if kind == "onnx":
        return _load_onnx(path)
    raise ValueError(
        f"`path` must end in one of {', '.join('.' + kind for kind in FORMATS)}, got {path}: "
        "give a file that scripts/export.py wrote"
    )


def predictor(frozen: FrozenModel, mean: tuple[float, ...], std: tuple[float, ...]) -> Predictor:
    """Returns the function of a frozen network, which normalizes the images itself."""
    predict = jax.jit(lambda frozen, x: frozen.apply(normalize(x, mean, std), train=False))
    return functools.partial(predict, frozen)


def compare(one: Predictor, other: Predictor, images: np.ndarray, batch_size: int = 250) -> str:
    """Returns in words how far two functions are apart on images: their logits and classes."""
    largest, same = 0.0, 0
    for start in tqdm(range(0, len(images), batch_size), "images", unit="batch", leave=False):
        batch = images[start : start + batch_size]
        a, b = np.asarray(one(batch)), np.asarray(other(batch))
        largest = max(largest, float(np.abs(a - b).max()))
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
    return (
        f"{same} of {len(images)} test images in the same class, logits at most {largest:.2g} apart"
    )


def count_correct(predict: Predictor, data: ImageData, batch_size: int = 250) -> int:
    """Returns how many test images a function classifies correctly, showing a progress bar."""
    correct, n = 0, len(data.test_labels)
    for start in tqdm(range(0, n, batch_size), desc="test images", unit="batch", leave=False):
        rows = np.arange(start, start + batch_size)
        kept = np.minimum(rows, n - 1)  # the last batch is filled up
        found = np.asarray(predict(data.test_images[kept])).argmax(-1) == data.test_labels[kept]
        correct += int(found[rows < n].sum())
    return correct


def _load_stablehlo(path: Path) -> tuple[Predictor, str]:
    data = path.read_bytes()
    try:
        exported = jax.export.deserialize(bytearray(data))
        (images,), (logits,) = exported.in_avals, exported.out_avals
    except Exception as error:  # whatever flatbuffers and MLIR raise
        raise ValueError(
            f"`path` must be a StableHLO file that scripts/export.py wrote, got {path}, which "
            f"cannot be read ({error})"
        ) from error
    return jax.jit(exported.call), _data_set(path, images.shape, logits.shape)


def _load_onnx(path: Path) -> tuple[Predictor, str]:
    try:
        import onnxruntime  # pyright: ignore[reportMissingImports]  # of an extra
    except ImportError as error:
        raise ValueError(
            f"`path` {path} needs onnxruntime: pip install 'compand-jax[onnx]'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    data = path.read_bytes()
    try:
        session = onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"])
        (images,), (logits,) = session.get_inputs(), session.get_outputs()
    except Exception as error:  # its errors have no common base
        raise ValueError(
            f"`path` must be an ONNX file that scripts/export.py wrote, got {path}, which "
            f"cannot be read ({error})"
        ) from error

    def predict(x: np.ndarray) -> Any:
        return session.run(None, {images.name: x})[0]

    return predict, _data_set(path, images.shape, logits.shape)


def _data_set(path: Path, images: Any, logits: Any) -> str:
    key = (*images[1:], *logits[1:])
    if key not in _SHAPES:
        raise ValueError(
            f"`path` must be for a known data set, got {path} for images {list(images[1:])} and "
            f"{list(logits[1:])} classes: run it with its own library"
        )
    return _SHAPES[key]
