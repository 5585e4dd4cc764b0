"""The recipes by name."""

from pathlib import Path
from types import MappingProxyType
from typing import Any

from compand_jax.experiments.errors import UserError
from compand_jax.experiments.runs.config import RunConfig


def _cifar(name: str, model: str, dataset: str, **fields: Any) -> RunConfig:
    defaults = {
        "model": model,
        "dataset": dataset,
        "batch_size": 128,
        "pad": 4,
        "flip": True,
        "steps_per_call": 5,
        "run_dir": Path("runs") / name,
    }
    return RunConfig(**(defaults | fields))


_LONG = {
    "learning_rate": 0.1,
    "epochs": 160,
    "finetune_epochs": 20,
    "finetune_learning_rate": 0.01,
    "warmup_epochs": 5.0,
}
_RECIPES: dict[str, dict[str, Any]] = {
    "alexnet": {
        "learning_rate": 0.03,
        "epochs": 15,
        "finetune_epochs": 5,
        "finetune_learning_rate": 0.01,
    },
    "vgg19": _LONG,
    "resnet20": _LONG | {"weight_decay": 1e-4},
}

PRESETS = MappingProxyType(
    {"digits": RunConfig()}
    | {
        f"{model}-{dataset}": _cifar(f"{model}-{dataset}", model, dataset, **recipe)
        for dataset in ("cifar10", "cifar100")
        for model, recipe in _RECIPES.items()
    }
)
"""The recipes by name; "digits" is the default."""


def preset(name: str) -> RunConfig:
    """Returns the preset of that name; UserError if there is none.

    >>> preset("alexnet-cifar10").batch_size
    128
    """
    if name not in PRESETS:
        raise UserError(f"`preset` must be one of {', '.join(PRESETS)}, got {name!r}: choose one")
    return PRESETS[name]
