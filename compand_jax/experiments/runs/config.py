"""What a run is: `RunConfig`, its methods, and how it is written to and read from JSON."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compand_jax.calibration.fit import CALIBRATIONS, MU_MAX
from compand_jax.data.images import DATASETS
from compand_jax.experiments.errors import UserError, require
from compand_jax.layers.config import MU_SCOPES, QuantConfig, Rule
from compand_jax.models import BLOCK_ORDERS, MODELS

FULL_PRECISION = "full_precision"
"""The name of the stage that all methods fine-tune."""


@dataclass(frozen=True)
class Method:
    """How a fine-tuning is quantized.

    Attributes:
      quantizer: as in `QuantConfig`; None is the control, which goes on in full precision.
      mu_scope: as in `QuantConfig`; None where there is no mu.
    """

    quantizer: str | None
    mu_scope: str | None = None

    @property
    def name(self) -> str:
        """What its stage, and that one's directory, is called."""
        if self.quantizer is None:
            return "full_precision_continued"
        return self.quantizer if self.mu_scope is None else f"{self.quantizer}-{self.mu_scope}"


CONTROL = Method(None)
METHODS = (CONTROL, Method("uniform"), *(Method("mu_law", scope) for scope in MU_SCOPES))
METHODS_BY_NAME = {method.name: method for method in METHODS}
DTYPES = ("float32", "bfloat16", "float16")
QUANTIZER_OPTIMIZERS = ("adam", "sgd")
DIRECTORY_FIELDS = ("data_dir", "run_dir", "record_dir", "parent_dir")
PATH_FIELDS = (*DIRECTORY_FIELDS, "state_dict")
# What changes no result but for rounding, so that a run may go on with another value.
FREE_FIELDS = ("methods", "steps_per_call", "checkpoint_every", "distributed", "tensorboard",
               *DIRECTORY_FIELDS)  # fmt: skip
# What only matters once a fine-tuning has begun.
FINETUNE_FIELDS = (
    "finetune_epochs",
    "finetune_learning_rate",
    "mu_learning_rate",
    "scale_learning_rate",
    "calibration",
    "calibration_batches",
    "calibration_mu",
    "quant",
    "first_last_bits",
    "quantizer_optimizer",
    "transition_rate",
    "preceding_bits",
    "distillation_weight",
    "distillation_temperature",
    "batch_stats_batches",
)


@dataclass(frozen=True)
class RunConfig:
    """Trains a network in full precision, then fine-tunes it quantized, each method alike."""

    dataset: str = "digits"
    """Data set: digits (embedded), cifar10 or cifar100 (see compand prepare_data)."""
    model: str = "cnn"
    """Network: cnn, alexnet, alexnet-bn, vgg11, vgg13, vgg16, vgg19, vgg-small, resnet20,
    resnet32, resnet44 or resnet56."""
    block_order: str = "conv_norm_act"
    """Order within a block: conv_norm_act or norm_act_conv."""
    dtype: str = "float32"
    """Type of the computation: float32, bfloat16 or float16; parameters are float32."""
    seed: int = 0
    """Seed of parameters, shuffling and augmentation, from 0."""
    epochs: int = 20
    """Full-precision training, in epochs; 0 takes what state-dict or parent-dir gives."""
    state_dict: Path | None = None
    """File (.npz) of a PyTorch network's arrays that full precision starts from; None starts from
    random parameters."""
    mean: tuple[float, ...] | None = None
    """Mean of the pixels in [0, 1], per channel, that images are normalized with; None is that of
    the data set."""
    std: tuple[float, ...] | None = None
    """Standard deviation likewise."""
    parent_dir: Path | None = None
    """Run directory whose full precision the fine-tuning starts from; None trains it in this run's
    own."""
    finetune_epochs: int = 8
    """Fine-tuning of each method, in epochs."""
    methods: tuple[Method, ...] = METHODS
    """What is fine-tuned from the full-precision network, each with the same budget:
    full_precision_continued (the control), uniform, mu_law-single, mu_law-separate,
    mu_law-per_layer. They set quant.quantizer and quant.mu-scope."""
    batch_size: int = 64
    """Images a step, all devices together."""
    learning_rate: float = 0.1
    """Peak of the full-precision training's schedule (warm-up, then cosine to 0), of SGD with
    Nesterov momentum 0.9."""
    finetune_learning_rate: float = 0.02
    """Peak of the fine-tuning's schedule, of the weights; the schedule is the same."""
    mu_learning_rate: float = 3e-3
    """Peak of the fine-tuning's schedule, of log(1 + mu), by Adam."""
    scale_learning_rate: float = 1e-3
    """Peak of the fine-tuning's schedule, of log(scale), by Adam."""
    weight_decay: float = 5e-4
    """L2 penalty's gradient, per unit of weight; on kernels only."""
    warmup_epochs: float = 1.0
    """Length of the linear warm-up, in epochs; at most half of a stage, whatever this says."""
    pad: int = 0
    """Augmentation: zeros around an image before it is cropped at random, in pixels."""
    flip: bool = False
    """Augmentation: whether images are mirrored at random."""
    calibration: str = "mse"
    """How mu and scale are found before they are learned: mse, absmax, percentile or
    output (see `QuantizedModel.calibrate`)."""
    calibration_batches: int = 4
    """Training batches that are used for calibration."""
    calibration_mu: float | None = None
    """mu that calibration sets everywhere, 0 to 255, and fits the scales at; None fits mu too. With
    mu-learning-rate 0 it stays there."""
    quant: QuantConfig = field(default_factory=QuantConfig)
    """Quantization."""
    first_last_bits: int | None = None
    """Bits of weight and input of the first and the last layer, 1 to 8, on the grid midtread; None
    for those of all others. Most of the low-bit literature, such as LSQ (Esser et al., ICLR 2020),
    has 8."""
    quantizer_optimizer: str = "adam"
    """What moves mu and scale: adam, in their trainable forms; or sgd, of mu and scale themselves,
    with Nesterov momentum 0.9, as LSQ does with quant.scale-gradient lsq. Adam's steps are the same
    whatever factor the gradients have."""
    transition_rate: float | None = None
    """Peak share of the quantized weights that change their level in a step, 0 to 1: with the
    schedule of the learning rates, it takes the place of that of these weights, which follows from
    it (SGDT: Lee et al., ICCV 2025, arXiv 2404.19248). None for learning rates."""
    preceding_bits: tuple[int, ...] = ()
    """Bits of weights and activations that a quantized fine-tuning goes through first, each from
    where the one before ended, each for finetune-epochs (APoT: Li et al., ICLR 2020); the control
    has as many epochs in all. Such as 4 3 before 2."""
    distillation_weight: float = 0.0
    """Share of the fine-tuning's loss that is the cross-entropy to what the full-precision network
    says at distillation-temperature, 0 to 1 (Hinton et al., 2015, arXiv 1503.02531; for low bits
    Mishra and Marr, "Apprentice", ICLR 2018). The control has it too."""
    distillation_temperature: float = 4.0
    """Temperature T of both softmaxes, above 0; the loss is multiplied by T^2."""
    batch_stats_batches: int = 0
    """Training batches that batch norms' statistics are estimated from anew at the end of the
    fine-tuning, of the control's too (Nagel et al., "Overcoming oscillations in
    quantization-aware training", ICML 2022); 0 leaves them as trained."""
    steps_per_call: int = 2
    """Most training steps in one compiled call; metrics are logged once a call. On a CPU the
    compilation time grows with it."""
    checkpoint_every: int = 1
    """Distance of checkpoints, in epochs."""
    distributed: bool = False
    """Whether this is one of several processes that train together, on one machine or many; see
    docs/many_machines.md."""
    tensorboard: bool = False
    """Whether each stage's metrics, and histograms of its weights, are written for TensorBoard too,
    into a directory of that name; needs the extra `tensorboard`."""
    data_dir: Path = Path("data")
    """Directory of the prepared data sets."""
    run_dir: Path = Path("runs/digits")
    """Directory of this run: configuration, metrics, checkpoints, results. The same command started
    again goes on where it was stopped."""
    record_dir: Path | None = None
    """Directory that the small records (configuration, metrics, results, plot) are copied to at
    the end; None for no copy."""

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            require(self, name, getattr(self, name) in choices, "one of " + ", ".join(choices))
        for name, low in _INTEGERS.items():
            value = getattr(self, name)
            ok = isinstance(value, int) and not isinstance(value, bool) and value >= low
            require(self, name, ok, f"an integer of at least {low}")
        for name in _RATES:
            value = getattr(self, name)
            ok = isinstance(value, int | float) and math.isfinite(value) and value >= 0
            require(self, name, ok, "a finite number of at least 0")
        started = self.state_dict is not None or self.parent_dir is not None
        require(self, "epochs", self.epochs > 0 or started,
                 "an integer of at least 1, or 0 with `state_dict` or `parent_dir`")  # fmt: skip
        bits = [self.first_last_bits] if self.first_last_bits is not None else []
        ok = all(type(each) is int and 1 <= each <= 8 for each in bits)
        require(self, "first_last_bits", ok, "None or an integer from 1 to 8")
        ok = all(type(each) is int and 2 <= each <= 8 for each in self.preceding_bits)
        require(self, "preceding_bits", ok, "integers from 2 to 8")
        rate = self.transition_rate
        ok = rate is None or (isinstance(rate, int | float) and 0 < rate <= 1)
        require(self, "transition_rate", ok, "None or a number above 0, at most 1")
        require(self, "finetune_learning_rate", rate is None or self.finetune_learning_rate > 0,
                 "above 0 with `transition_rate`, which starts from it")  # fmt: skip
        require(self, "distillation_weight", 0 <= self.distillation_weight <= 1, "from 0 to 1")
        require(self, "distillation_temperature", 0 < self.distillation_temperature < math.inf,
                 "a finite number above 0")  # fmt: skip
        mu = self.calibration_mu
        ok = mu is None or (isinstance(mu, int | float) and 0 <= mu <= MU_MAX)
        require(self, "calibration_mu", ok, f"None or a number from 0 to {MU_MAX:g}")
        ok = (self.mean is None) == (self.std is None)
        require(self, "std", ok, "given where `mean` is, and only there")
        ok = set(self.methods) <= set(METHODS) and len(set(self.methods)) == len(self.methods)
        require(self, "methods", ok, "different ones of " + ", ".join(METHODS_BY_NAME))


_CHOICES = {
    "dataset": DATASETS,
    "model": tuple(MODELS),
    "block_order": BLOCK_ORDERS,
    "dtype": DTYPES,
    "calibration": CALIBRATIONS,
    "quantizer_optimizer": QUANTIZER_OPTIMIZERS,
}
_INTEGERS = dict.fromkeys(("seed", "epochs", "pad", "batch_stats_batches"), 0) | dict.fromkeys(
    ("finetune_epochs", "batch_size", "calibration_batches", "steps_per_call", "checkpoint_every"),
    1,
)
_RATES = (
    "learning_rate",
    "finetune_learning_rate",
    "mu_learning_rate",
    "scale_learning_rate",
    "weight_decay",
    "warmup_epochs",
)


def to_json(config: RunConfig) -> dict:
    """Returns the configuration as JSON can hold it."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config) | {"methods": [m.name for m in config.methods]})


def from_json(stored: dict) -> RunConfig:
    """Returns the configuration that `to_json` wrote; what is absent has its default.

    Raises:
      UserError: if a value is none that its field may have.
    """
    fields = dict(stored)
    for name in PATH_FIELDS:
        if fields.get(name) is not None:
            fields[name] = Path(fields[name])
    for name in ("mean", "std", "preceding_bits"):
        if fields.get(name) is not None:
            fields[name] = tuple(fields[name])
    names = fields.get("methods", METHODS_BY_NAME)
    if unknown := [name for name in names if name not in METHODS_BY_NAME]:
        raise UserError(
            f"`methods` must be of {', '.join(METHODS_BY_NAME)}, got {unknown}: choose of these"
        )
    fields["methods"] = tuple(METHODS_BY_NAME[name] for name in names)
    quant = dict(fields.get("quant", {}))
    quant["rules"] = tuple(Rule(**rule) for rule in quant.get("rules", ()))
    fields["quant"] = QuantConfig(**quant)
    return RunConfig(**fields)


def unknown_fields(stored: dict) -> list[str]:
    """Returns the names in a stored configuration that are no field of `RunConfig`, sorted."""
    known = {field.name for field in dataclasses.fields(RunConfig)}
    quant = stored.get("quant", {}).keys() - {f.name for f in dataclasses.fields(QuantConfig)}
    return sorted([*(stored.keys() - known), *(f"quant.{name}" for name in quant)])


def differences(stored: dict, config: RunConfig, *, finetune: bool = True) -> list[str]:
    """Returns "name is x there, y here" of every field that can change a result.

    Args:
      stored: the other configuration, as `to_json` wrote it; what is absent has its default.
      config: this configuration.
      finetune: whether the fields of the fine-tuning count.
    """
    here, defaults = to_json(config), to_json(RunConfig())
    there = {name: stored.get(name, default) for name, default in defaults.items()}
    rules = [dataclasses.asdict(Rule(**rule)) for rule in there["quant"].get("rules", ())]
    there["quant"] = defaults["quant"] | there["quant"] | {"rules": rules}
    rows = []
    for name in here.keys() - set(FREE_FIELDS) - set(() if finetune else FINETUNE_FIELDS):
        pairs = {name: (there[name], here[name])}
        if name == "quant":
            own = here["quant"]
            pairs = {f"quant.{key}": (x, own.get(key)) for key, x in there["quant"].items()}
        rows += [f"{key} is {x!r} there, {y!r} here" for key, (x, y) in pairs.items() if x != y]
    return sorted(rows)
