"""A trained network from what a checkpoint holds: a public state dict, or a run of ours."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from compand_jax.data.images import ImageData, load_data
from compand_jax.experiments.errors import UserError, user_errors
from compand_jax.experiments.runs.config import FULL_PRECISION
from compand_jax.experiments.runs.directory import read_config
from compand_jax.experiments.runs.run import load_run_data
from compand_jax.experiments.runs.stages import finished
from compand_jax.models import create_model
from compand_jax.models.torch_weights import (
    NORMALIZATIONS,
    import_state_dict,
    load_npz_state_dict,
)

# What they were trained on, and its classes; images are [32, 32, 3].
_CLASSES = MappingProxyType({"cifar10": 10, "cifar100": 100})
_CHANNELS = 3
# All of them pad by 4 pixels and mirror.
_PAD, _FLIP = 4, True


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """A trained network, its data, and how its training images were augmented.

    Attributes:
      name: of the model, as in `create_model`.
      model: the Linen module.
      variables: its collections.
      data: its data set, with the normalization that it was trained with.
      pad: zeros around a training image before it was cropped at random, in pixels.
      flip: whether training images were mirrored at random.
    """

    name: str
    model: nn.Module
    variables: dict[str, Any]
    data: ImageData
    pad: int
    flip: bool


def load_checkpoint(
    path: Path,
    *,
    data_dir: Path,
    model: str | None = None,
    dataset: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Checkpoint:
    """Returns the network of an .npz state dict, or of a run directory of compand train.

    Args:
      path: of either.
      data_dir: directory of the prepared data sets.
      model: of a state dict, as in `create_model`; None is resnet20.
      dataset: of a state dict, as in `load_data`; None is cifar10.
      mean: of a state dict, per channel of pixels in [0, 1]; None is that of the public networks.
      std: likewise.

    Raises:
      UserError: there is nothing at the path, it is damaged, or of another network; the data set is
        not prepared; or a field is given for a run directory,
        which has its own.
    """
    if not path.exists():
        raise UserError(
            f"`checkpoint` must be an .npz file or a run directory, got {path}, which does not "
            "exist: correct the path"
        )
    if path.is_dir():
        given = {"model": model, "dataset": dataset, "mean": mean, "std": std}
        return _from_run(path, data_dir, given)
    model, dataset = model or "resnet20", dataset or "cifar10"
    if dataset not in _CLASSES:
        raise UserError(
            f"`dataset` must be {' or '.join(_CLASSES)} for a state dict, got {dataset!r}: choose "
            "one that it was trained on"
        )
    try:
        arrays = load_npz_state_dict(path)
    except ValueError as error:
        raise UserError(str(error).replace("`path`", "`checkpoint`")) from error
    with user_errors(OSError, ValueError, TypeError):  # TypeError: of a model that none is for
        module = create_model(model, _CLASSES[dataset])
        variables = import_state_dict(arrays, module)
        normalization = _normalization(model, mean, std)
        data = dataclasses.replace(load_data(dataset, data_dir), **normalization)
    return Checkpoint(model, module, variables, data, _PAD, _FLIP)


def _from_run(path: Path, data_dir: Path, given: Mapping[str, Any]) -> Checkpoint:
    config = read_config(path)
    for name, value in given.items():
        if value is not None:
            raise UserError(
                f"`{name}` must be left out for a run directory, which has its own, got {value!r} "
                f"with {path}: leave it out"
            )
    data = load_run_data(config, data_dir)
    stage, state = finished(config, data, FULL_PRECISION)
    return Checkpoint(config.model, stage.model, state.variables, data, config.pad, config.flip)


def _normalization(
    model: str, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> dict[str, tuple[float, ...]]:
    """Returns `mean` and `std`, those of the public networks where they are not given."""
    public = next(own for name, own in NORMALIZATIONS.items() if model.startswith(name))
    values = {"mean": mean or public[0], "std": std or public[1]}
    for name, given in values.items():
        positive = name != "std" or min(given, default=0) > 0
        if len(given) != _CHANNELS or not np.all(np.isfinite(given)) or not positive:
            raise UserError(
                f"`{name}` must be {_CHANNELS} finite{' positive' if name == 'std' else ''} "
                f"numbers, one for each channel, got {given}: give those of the training"
            )
    return values


def digest(variables: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a network's variables, in hexadecimal digits."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        array = np.ascontiguousarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()
