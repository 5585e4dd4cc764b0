"""Variables of the networks here from the state dicts of public PyTorch networks for CIFAR.

PyTorch is not needed: a state dict is a mapping from names to arrays, kept in an .npz or a
.safetensors file.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import unflatten_dict
from safetensors import SafetensorError

from compand_jax.models import VGG, AlexNet, ResNet
from compand_jax.models.alexnet import CONVS
from compand_jax.models.resnet import FEATURES
from compand_jax.models.vgg import BLOCKS

# Mean and std that the public networks were trained with, by the first letters of the model's name:
# those of https://github.com/akamaster/pytorch_resnet_cifar10 (trainer.py), and of
# https://github.com/bearpaw/pytorch-classification (cifar.py).
NORMALIZATIONS = MappingProxyType(
    {
        "resnet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "alexnet": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        "vgg": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    }
)
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_CLASSIFIER = re.compile(r"((?:classifier|linear|fc)(?:\.\d+)?)\.(?:weight|bias)")
# What turns a PyTorch kernel's axes into those of a Flax kernel: OIHW to HWIO, [out, in] to
# [in, out]; by rank.
_TO_FLAX = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}
_Network = AlexNet | VGG | ResNet
_Shape = tuple[int, ...]


def import_state_dict(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, dict[str, Any]]:
    """Returns the variables that make `model` compute what a PyTorch network computes, to rounding.

    Names are those of the public networks. `DataParallel`'s prefix `module.` may be there or not.

        AlexNet, VGG    features.N.{weight, bias, running_mean, running_var}; N counts relus and
                        pools too
        ResNet          conv1, bn1, layerS.B.convI, layerS.B.bnI; all shortcuts are of option A
        dense layer     classifier, linear or fc; classifier.N inside a Sequential

    A convolution before a batch norm may have a bias. It is folded into the norm's mean, since
    (y + bias) - mean = y - (mean - bias). `num_batches_tracked` is ignored. A state dict does not
    hold strides, paddings and epsilon: these must be those of the sources below.

    Args:
      state_dict: Arrays of a floating type by name, or what `np.asarray` takes for one. Kernels
        are [out, in, height, width] or [out, in]. It is not changed, and the result shares no
        memory with it. Values are taken as they are, NaN included.
      model: An `AlexNet`, `VGG` or `ResNet` of `compand_jax.models`, for images [32, 32, 3]. With
        batch norm it must be in block order "conv_norm_act", as the PyTorch networks are.

    Returns:
      {"params": ..., "batch_stats": ...} with the tree, shapes and types (float32) of
      `model.init`; no "batch_stats" if the model has no batch norm.

    Raises:
      TypeError: `model` is none of these networks, or `state_dict` is no mapping.
      ValueError: names are missing or not known, or shapes are wrong, and all of them are listed;
        or the model has batch norm in block order "norm_act_conv".

    >>> kernels = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3),
    ...            8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}
    >>> state_dict = {f"features.{n}.weight": np.zeros(kernels[n]) for n in kernels}
    >>> state_dict |= {f"features.{n}.bias": np.zeros(kernels[n][0]) for n in kernels}
    >>> state_dict |= {"classifier.weight": np.zeros((10, 256)), "classifier.bias": np.zeros(10)}
    >>> import_state_dict(state_dict, AlexNet())["params"]["conv1"]["kernel"].shape
    (11, 11, 3, 64)

    Source: https://github.com/bearpaw/pytorch-classification (models/cifar/alexnet.py, vgg.py),
    https://github.com/kuangliu/pytorch-cifar (models/vgg.py) and, for the numbering,
    https://github.com/pytorch/vision (torchvision/models/alexnet.py, vgg.py);
    https://github.com/akamaster/pytorch_resnet_cifar10 (resnet.py).
    """
    if not isinstance(model, _Network):
        raise TypeError(
            "`model` must be an AlexNet, VGG or ResNet of compand_jax.models, got "
            f"{type(model).__name__}: create one with create_model"
        )
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"`state_dict` must map names to arrays, got {type(state_dict).__name__}: give what "
            "load_npz_state_dict returns, or a PyTorch model's state_dict()"
        )
    shapes = _flax_shapes(model)
    arrays = _arrays(state_dict)
    modules = _modules(model, arrays)
    names = {path: f"{modules['/'.join(path[1:-1])]}.{_LEAVES[path[-1]]}" for path in shapes}
    folded = {
        names["batch_stats", *module.split("/"), "mean"]: f"{normalized}.bias"
        for normalized, module in _normalizations(modules)
    }
    required = {names[path]: _pytorch_shape(shape) for path, shape in shapes.items()}
    optional = {bias: required[mean] for mean, bias in folded.items()}
    _check(arrays, required, optional, model)
    for mean, bias in folded.items():
        if bias in arrays:
            arrays[mean] = arrays[mean].astype(np.float64) - arrays[bias].astype(np.float64)
    return unflatten_dict({path: _to_flax(arrays[name]) for path, name in names.items()})


def load_npz_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Returns the arrays of an .npz file by name, for `import_state_dict`.

    Where PyTorch is installed, this makes such a file:

        np.savez(path, **{name: tensor.cpu().numpy() for name, tensor in state_dict.items()})

    Args:
      path: Of the file. Nothing in it is unpickled.

    Returns:
      The arrays as they were saved, in the host's memory.

    Raises:
      FileNotFoundError: there is no such file.
      OSError: the file cannot be opened.
      ValueError: the file is damaged, or no .npz file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     np.savez(f"{directory}/w.npz", **{"linear.bias": np.zeros(10)})
    ...     {name: w.shape for name, w in load_npz_state_dict(f"{directory}/w.npz").items()}
    {'linear.bias': (10,)}
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"`path` must be that of an .npz file, got {path}, which does not exist: correct it"
        )
    with path.open("rb") as file:
        try:
            loaded = np.load(file, allow_pickle=False)
            arrays = dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else None
        except Exception as error:  # zipfile, zlib and numpy raise what they like on damaged files
            raise _not_npz(path) from error
    if arrays is None:
        raise _not_npz(path)
    return arrays


def load_safetensors_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a .safetensors file by name, as public PyTorch networks come.

    Args:
      path: Of the file.

    Returns:
      The arrays as they were saved, in the host's memory; bfloat16 is `jnp.bfloat16`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, or of another format.

    >>> import tempfile
    >>> from safetensors.numpy import save_file
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save_file({"linear.bias": np.zeros(10)}, f"{directory}/w.safetensors")
    ...     print({name: w.shape for name, w in
    ...            load_safetensors_state_dict(f"{directory}/w.safetensors").items()})
    {'linear.bias': (10,)}
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"`path` must be that of a .safetensors file, got {path}, which does not exist: "
            "correct it"
        )
    try:
        return safetensors.numpy.load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"`path` must be that of a whole .safetensors file, got {path}, which is damaged or of "
            "another format: copy it anew"
        ) from error


def _not_npz(path: Path) -> ValueError:
    return ValueError(
        f"`path` must be that of a whole .npz file of arrays, got {path}, which is damaged or of "
        "another format: copy it anew, or save the state dict's arrays with np.savez"
    )


def _flax_shapes(model: _Network) -> dict[tuple[str, ...], _Shape]:
    """Returns the shape of every variable, by its collection, modules and name."""
    images = jnp.zeros((1, 32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    shapes = {tuple(key.key for key in path): leaf.shape for path, leaf in leaves}
    if model.block_order != "conv_norm_act" and any(path[0] == "batch_stats" for path in shapes):
        raise ValueError(
            "`model` must have block_order='conv_norm_act', as the PyTorch networks have, got "
            f"{model.block_order!r}, which computes something else from the same arrays: import "
            "into a model of that order"
        )
    return shapes


def _arrays(state_dict: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns its arrays, uncopied, by names without `module.`, but those that are ignored."""
    arrays = {}
    for name, value in state_dict.items():
        if isinstance(value, Mapping):
            raise ValueError(
                f"`state_dict` must map names to arrays, got a mapping under {name!r}, as in a "
                f"checkpoint: give that one, state_dict[{name!r}]"
            )
        short = name.removeprefix("module.")
        if not short.endswith(".num_batches_tracked"):
            # Where there are both, the longer one stays, and is listed as extra.
            arrays[name if short in state_dict else short] = _array(name, value)
    return arrays


def _array(name: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except Exception as error:  # PyTorch's are RuntimeError and TypeError
        raise ValueError(
            f"`state_dict` must map names to arrays, got {type(value).__name__} under {name!r}, "
            "which NumPy cannot take: give tensor.detach().cpu().float().numpy()"
        ) from error


def _modules(model: _Network, names: Mapping[str, Any]) -> dict[str, str]:
    """Returns PyTorch's name of every module here, each convolution right before its norm."""
    if isinstance(model, ResNet):
        modules, dense = _resnet_modules(model.depth), "linear"
    elif isinstance(model, VGG):
        counts = BLOCKS[model.depth]
        pools = [i == count - 1 for count in counts for i in range(count)]
        modules, dense = _stack_modules(pools, norm=True), "classifier"
    else:
        pools = [spec.pool for spec in CONVS]
        modules, dense = _stack_modules(pools, norm=model.norm == "batch"), "classifier"
    found = [match[1] for match in map(_CLASSIFIER.fullmatch, names) if match]
    return {**modules, "dense": found[0] if found else dense}


def _stack_modules(pools: Sequence[bool], *, norm: bool) -> dict[str, str]:
    modules, n = {}, 0
    for i, pool in enumerate(pools, start=1):
        modules[f"conv{i}"] = f"features.{n}"
        if norm:
            modules[f"norm{i}"] = f"features.{n + 1}"
        n += 2 + norm + pool
    return modules


def _resnet_modules(depth: int) -> dict[str, str]:
    modules = {"conv1": "conv1", "norm": "bn1"}
    for s in range(1, len(FEATURES) + 1):
        for b in range((depth - 2) // 6):
            for i in (1, 2):
                modules[f"stage{s}_block{b + 1}/conv{i}"] = f"layer{s}.{b}.conv{i}"
                modules[f"stage{s}_block{b + 1}/norm{i}"] = f"layer{s}.{b}.bn{i}"
    return modules


def _normalizations(modules: Mapping[str, str]) -> list[tuple[str, str]]:
    """Returns PyTorch's name of each convolution that is normalized, and ours of its norm."""
    pairs = itertools.pairwise(modules.items())
    return [(conv, module) for (_, conv), (module, _) in pairs if "norm" in module]


def _pytorch_shape(shape: _Shape) -> _Shape:
    return tuple(shape[axis] for axis in np.argsort(_TO_FLAX[len(shape)]))


def _to_flax(array: np.ndarray) -> jax.Array:
    # float32 before the copy, which `jnp.array` makes where `jnp.asarray` may share the memory.
    return jnp.array(array.astype(np.float32).transpose(_TO_FLAX[array.ndim]))


def _check(
    arrays: Mapping[str, np.ndarray],
    required: Mapping[str, _Shape],
    optional: Mapping[str, _Shape],
    model: nn.Module,
) -> None:
    """Raises ValueError that lists every name that is missing or extra, or has a wrong shape."""
    shapes = {**required, **{name: optional[name] for name in optional if name in arrays}}
    wrong = [
        f"{name}: required {_description(shapes.get(name))}, got {_description(arrays.get(name))}"
        for name in sorted(shapes.keys() | arrays.keys(), key=_with_numbers)
        if name not in arrays
        or arrays[name].shape != shapes.get(name)
        or not jnp.issubdtype(arrays[name].dtype, jnp.floating)
    ]
    if wrong:
        fields = {name: getattr(model, name, None) for name in ("depth", "norm", "num_classes")}
        given = ", ".join(f"{name}={value!r}" for name, value in fields.items() if value)
        raise ValueError(
            f"`state_dict` must hold the arrays of {type(model).__name__}({given}), "
            f"{len(wrong)} of which differ: {'; '.join(wrong)}: give the model it was trained as"
        )


def _with_numbers(name: str) -> list[str | int]:
    """Returns what sorts layer2 before layer10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _description(array: np.ndarray | _Shape | None) -> str:
    if array is None:
        return "none"
    if isinstance(array, tuple):
        return str(list(array))
    of_type = "" if jnp.issubdtype(array.dtype, jnp.floating) else f"{array.dtype} "
    return f"{of_type}{list(array.shape)}"
