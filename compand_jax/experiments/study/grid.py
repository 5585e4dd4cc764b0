"""What a study compares: its cells, each a fine-tuning of a full-precision parent, by preset.

A cell is a network, a data set, bits, a method, a mu scope, an arrangement and a seed. Its parent
is one for all cells of a network, data set and arrangement; the seed is that of the fine-tuning.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from compand_jax.experiments.errors import UserError
from compand_jax.experiments.runs.config import CONTROL, METHODS, Method, RunConfig
from compand_jax.experiments.runs.levers import OF_QUANTIZED_NETWORKS, levers
from compand_jax.experiments.runs.presets import preset
from compand_jax.layers.config import QuantConfig, Rule
from compand_jax.models import BLOCK_ORDERS
from compand_jax.models.torch_weights import NORMALIZATIONS

FIRST_ORDER, SECOND_ORDER = BLOCK_ORDERS
UNIFORM, PER_LAYER = Method("uniform"), Method("mu_law", "per_layer")
LEARNED, FIXED_CALIBRATED, FIXED_255 = "learned", "fixed_calibrated", "fixed_255"
# The fields of a run that make each.
_MU_FIELDS: dict[str, dict[str, Any]] = {
    LEARNED: {},
    FIXED_CALIBRATED: {"mu_learning_rate": 0.0},
    FIXED_255: {"mu_learning_rate": 0.0, "calibration_mu": 255.0},
}
_FIRST_AND_LAST = "conv1|dense"
_ENDS = Rule(_FIRST_AND_LAST, weight_bits=8, act_bits=8, grid="midtread")


@dataclass(frozen=True)
class Cell:
    """One fine-tuning of a study.

    Attributes:
      parent: the run that trains the full-precision network.
      config: the fine-tuning, by its one method; its directories are the study's to set.
    """

    parent: RunConfig
    config: RunConfig

    @property
    def method(self) -> Method:
        """The one of `METHODS` that the cell's only stage is of."""
        return self.config.methods[0]

    @property
    def bits(self) -> int | None:
        """Bits of weights and of activations; None in full precision."""
        return None if self.method == CONTROL else self.config.quant.weight_bits

    @property
    def mu(self) -> str | None:
        """How mu is found: `LEARNED`, `FIXED_CALIBRATED` or `FIXED_255`; None where there is none.

        A mu that is not learned stays where calibration put it.
        """
        if self.method.mu_scope is None:
            return None
        if self.config.mu_learning_rate > 0:
            return LEARNED
        return FIXED_CALIBRATED if self.config.calibration_mu is None else FIXED_255

    @property
    def levers(self) -> tuple[str, ...]:
        """What else is on, as `levers` names it."""
        return levers(self.config, self.method)

    @property
    def parent_name(self) -> str:
        """The parent's directory."""
        imported = "" if self.parent.state_dict is None else "-imported"
        return f"{network(self.parent)}-{self.parent.block_order}{imported}"

    @property
    def name(self) -> str:
        """The cell's directory."""
        if self.method == CONTROL:
            what = f"control-lr{self.config.finetune_learning_rate:g}"
        else:
            what = f"w{self.bits}a{self.bits}-{self.method.name}"
        fixed = "" if self.mu in (None, LEARNED) else f"-{self.mu}"
        on = "".join(f"-{name}" for name in ["+".join(self.levers)] if name)
        return f"{self.parent_name}-{what}{fixed}{on}-seed{self.config.seed}"


def network(config: RunConfig) -> str:
    """Returns the network and the data set that it is for, as in the names of presets."""
    return f"{config.model}-{config.dataset}"


def grid(
    parent: RunConfig,
    *,
    bits: Sequence[int],
    methods: Sequence[Method] = METHODS,
    seeds: Sequence[int] = (0,),
    mu: str = LEARNED,
    ends: Rule | None = None,
    quant: Mapping[str, Any] = MappingProxyType({}),
    **finetuning: Any,
) -> list[Cell]:
    """Returns the cells of every seed, the control (if it is among the methods) first.

    Args:
      parent: the full-precision run.
      bits: of weights and activations. Weights of two bits are on the grid midrise: on midtread
        they have three levels, which mu does not move.
      methods: of `METHODS`.
      seeds: of the fine-tuning.
      mu: how the mu-law's mu is found.
      ends: a rule for the first and the last layer.
      quant: further fields of the quantization.
      **finetuning: fields of the fine-tuning.
    """
    found = []
    for seed in seeds:
        fields = {**finetuning, "seed": seed, "state_dict": None, "parent_dir": Path()}
        if CONTROL in methods:
            own = {name: fields[name] for name in fields if name not in OF_QUANTIZED_NETWORKS}
            config = dataclasses.replace(parent, **own, methods=(CONTROL,))
            found.append(Cell(parent, config))
        fields |= _MU_FIELDS[mu]
        for count in bits:
            config_of_bits = QuantConfig(
                weight_bits=count,
                act_bits=count,
                grid="midrise" if count == 2 else "midtread",
                rules=() if ends is None else (ends,),
                **quant,
            )
            for method in methods:
                if method != CONTROL:
                    config = dataclasses.replace(
                        parent, **fields, methods=(method,), quant=config_of_bits
                    )
                    found.append(Cell(parent, config))
    return found


def _orders(parent: RunConfig) -> list[RunConfig]:
    return [dataclasses.replace(parent, block_order=order) for order in BLOCK_ORDERS]


def _smoke(checkpoint: Path | None) -> list[Cell]:
    parent = dataclasses.replace(preset("digits"), epochs=5, finetune_epochs=2)
    return grid(parent, bits=(2,), methods=(CONTROL, UNIFORM, PER_LAYER))


def _laptop(checkpoint: Path | None) -> list[Cell]:
    first, second = _orders(_alexnet("cifar10", epochs=20, finetune_epochs=3))
    some = (CONTROL, UNIFORM, PER_LAYER)
    return [
        *grid(first, bits=(4, 3, 2)),
        *grid(second, bits=(4,)),
        *grid(first, bits=(4, 2), methods=(PER_LAYER,), mu=FIXED_CALIBRATED),
        *grid(first, bits=(4, 2), methods=(PER_LAYER,), mu=FIXED_255),
        *grid(first, bits=(4, 3, 2), methods=some, seeds=(1, 2)),
    ]


def _paper(checkpoint: Path | None) -> list[Cell]:
    found = []
    for dataset in ("cifar10", "cifar100"):
        vgg = dataclasses.replace(
            preset(f"vgg19-{dataset}"),
            epochs=20,
            learning_rate=0.05,
            warmup_epochs=1.0,
            finetune_epochs=2,
        )
        alexnet = _alexnet(dataset, epochs=60, finetune_epochs=10)
        parents = [*_orders(alexnet), *_orders(vgg)]
        for seed in range(3):
            for parent in parents:
                found += grid(parent, bits=(4, 2, 3, 8), seeds=(seed,))
    return found


def _alexnet(dataset: str, **epochs: int) -> RunConfig:
    return dataclasses.replace(
        preset(f"alexnet-{dataset}"), model="alexnet-bn", learning_rate=0.05, **epochs
    )


def _levers(checkpoint: Path | None) -> list[Cell]:
    return lever_cells(_alexnet("cifar10", epochs=20, finetune_epochs=3))


def lever_cells(parent: RunConfig) -> list[Cell]:
    """Returns the cells that try each lever alone, and some together, at 2 and then at 3 bits.

    Uniform and mu-law levels have each, the control those that are not about quantization. All
    have as many epochs.

    Args:
      parent: the full-precision run, with three epochs of fine-tuning.
    """
    found: dict[str, Cell] = {}
    for bits, before in ((2, (4, 3)), (3, (5, 4))):
        for fields in _lever_fields(parent, before):
            methods = (UNIFORM, PER_LAYER)
            if "preceding_bits" not in fields:
                methods = (CONTROL, *methods)
            for cell in grid(parent, bits=(bits,), methods=methods, **fields):
                found.setdefault(cell.name, cell)  # they have most controls in common
    return list(found.values())


def _lever_fields(parent: RunConfig, before: tuple[int, ...]) -> list[dict[str, Any]]:
    """Returns what differs from a plain fine-tuning, the most promising first."""
    rate = parent.finetune_learning_rate
    standardize = {"quant": {"weight_standardization": True}}
    ends, distill = {"first_last_bits": 8}, {"distillation_weight": 0.5}
    statistics = {"batch_stats_batches": 50}
    lsq = {
        "quant": {"scale_gradient": "lsq", "mu_gradient": "lsq"},
        "quantizer_optimizer": "sgd",
        "mu_learning_rate": rate,
        "scale_learning_rate": rate,
    }
    progressive = {
        "preceding_bits": before,
        "finetune_epochs": parent.finetune_epochs // (1 + len(before)),
    }
    return [
        {},
        standardize,
        ends,
        {"transition_rate": 2e-3},
        lsq,
        distill,
        standardize | ends | distill | statistics,
        progressive,
        statistics,
    ]


def _literature(checkpoint: Path | None) -> list[Cell]:
    some = (CONTROL, UNIFORM, PER_LAYER)
    resnet = dataclasses.replace(preset("resnet20-cifar10"), epochs=200, finetune_epochs=4)
    if checkpoint is not None:
        mean, std = NORMALIZATIONS["resnet"]
        resnet = dataclasses.replace(resnet, epochs=0, state_dict=checkpoint, mean=mean, std=std)
    vgg = dataclasses.replace(
        preset("vgg19-cifar10"), model="vgg-small", epochs=100, finetune_epochs=20,
        learning_rate=0.05,
    )  # fmt: skip
    found = []
    # The fewer the bits, the farther the weights have to go; each rate has a control of its own.
    for count, rate in ((4, 0.01), (3, 0.02), (2, 0.04)):
        found += grid(
            resnet,
            bits=(count,),
            methods=some,
            ends=_ENDS,
            finetune_learning_rate=rate,
            warmup_epochs=0.2,
            scale_learning_rate=2e-3,
        )
    return [*found, *grid(vgg, bits=(4, 3, 2), methods=some, ends=_ENDS)]


def _vgg19_short(checkpoint: Path | None) -> list[Cell]:
    parent = dataclasses.replace(
        preset("vgg19-cifar10"), epochs=6, finetune_epochs=1, learning_rate=0.05, warmup_epochs=1.0
    )
    return grid(parent, bits=(4,), methods=(CONTROL, UNIFORM, PER_LAYER), warmup_epochs=0.1)


_PRESETS: dict[str, Callable[[Path | None], list[Cell]]] = {
    "paper": _paper,
    "literature": _literature,
    "laptop": _laptop,
    "levers": _levers,
    "smoke": _smoke,
    "vgg19-short": _vgg19_short,
}
STUDIES = MappingProxyType(
    {
        "paper": "AlexNet and VGG19 on CIFAR-10 and CIFAR-100, at 8, 4, 3 and 2 bits",
        "literature": "ResNet-20 and VGG-Small on CIFAR-10, first and last layer at 8 bits",
        "laptop": "AlexNet on CIFAR-10, at 4, 3 and 2 bits",
        "levers": "AlexNet on CIFAR-10 at 2 and 3 bits, with what else lifts accuracy on and off",
        "smoke": "the digits, in two minutes",
        "vgg19-short": "VGG19 on CIFAR-10, too short a training to judge it by",
    }
)
"""What each study compares, by the name of its preset."""


def study_cells(
    name: str, *, checkpoint: Path | None = None, networks: Sequence[str] = ()
) -> list[Cell]:
    """Returns the cells of a preset, in the order that they are run.

    Args:
      name: of `STUDIES`.
      checkpoint: PyTorch's ResNet-20 as an .npz file, for the one preset that can start from it.
      networks: only cells of these; none are all.

    Raises:
      UserError: if there is no such preset or network in it, or it has no use for a checkpoint.

    >>> [cell.name for cell in study_cells("smoke")][0]
    'cnn-digits-conv_norm_act-control-lr0.02-seed0'
    """
    if name not in STUDIES:
        raise UserError(f"`preset` must be one of {', '.join(STUDIES)}, got {name!r}: choose one")
    if checkpoint is not None and name != "literature":
        raise UserError(
            f"`checkpoint` must go with the preset literature, got {name}: leave it out"
        )
    found = _PRESETS[name](checkpoint)
    known = sorted({cell.config.model for cell in found})
    if unknown := sorted(set(networks) - set(known)):
        raise UserError(
            f"`networks` must be of {', '.join(known)}, got {', '.join(unknown)}: correct it"
        )
    return [cell for cell in found if not networks or cell.config.model in networks]
