"""A recorded run of post-training quantization: its table, sensitivities, and bits in a budget.

All that was measured is in `results.json`, which is written anew after each row. A run that was
stopped goes on there, and all three parts may share a directory.
"""

import dataclasses
import functools
import math
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compand_jax.calibration.fit import CALIBRATIONS
from compand_jax.data.calibration_images import choose_calibration_images
from compand_jax.data.images import DATASETS
from compand_jax.data.packages import needed_for
from compand_jax.experiments.errors import UserError, require, user_errors
from compand_jax.experiments.ptq.bit_allocation import (
    SiteLosses,
    allocate_bits,
    at_bits,
    mixed_bits,
)
from compand_jax.experiments.ptq.checkpoint import Checkpoint, digest, load_checkpoint
from compand_jax.experiments.ptq.families import BITS as FAMILY_BITS
from compand_jax.experiments.ptq.network import (
    TrainedNetwork,
    evaluate_full_precision,
    observe_network,
    require_finite,
    weight_counts,
)
from compand_jax.experiments.ptq.record import (
    open_record,
    read_record,
    results_by_setting,
    tables_of,
    write_record,
)
from compand_jax.experiments.ptq.settings import evaluate_setting
from compand_jax.experiments.ptq.tables import base_setting
from compand_jax.experiments.records import provenance, write_json
from compand_jax.models import MODELS

with needed_for("post-training quantization", "tqdm"):
    from tqdm import tqdm

BITS = tuple(range(2, 9))


@dataclass(frozen=True)
class PostTrainingConfig:
    """Quantizes a trained network without training, in many ways, and tests each."""

    checkpoint: Path
    """The trained network: an .npz file of a PyTorch state dict (see import_state_dict), or a run
    directory of compand train, whose full-precision stage it is."""
    model: str | None = None
    """Network of a state dict: alexnet, vgg19, resnet20, ...; left out, resnet20. A run directory
    has its own, as it has data set and normalization."""
    dataset: str | None = None
    """Data set of a state dict: cifar10 or cifar100; left out, cifar10."""
    mean: tuple[float, ...] | None = None
    """Means of a state dict's normalization, per channel, of pixels from 0 to 1; left out, those of
    the public networks of its kind."""
    std: tuple[float, ...] | None = None
    """Standard deviations of a state dict's normalization, likewise."""
    bits: tuple[int, ...] | None = None
    """Bits per weight, and per activation where these are quantized, each from 2 to 8; left out, 2
    to 8 in the table and 4 for --sensitivity."""
    sensitivity: bool = False
    """Instead of the table, quantize one site at a time."""
    budget: float | None = None
    """Instead of the table, choose bits from 2 to 8 for each site, of at most this average over the
    weights, and compare them with so many for every site."""
    families: bool = False
    """Instead of the table, every family of levels, of weights alone; --bits left out, 2, 3, 4."""
    calibration: str = "mse"
    """Calibration that the tables start from: mse, absmax, percentile or output."""
    error_feedback: bool = False
    """Whether weights are rounded with error feedback where the tables do not say."""
    batch_stats: bool = True
    """Whether batch-norm statistics are re-estimated where the tables do not say."""
    images: int = 2048
    """Training images that are used for calibration, augmented as in training."""
    test_images: int | None = None
    """Test images, the first so many; left out, all."""
    seed: int = 0
    """Seed of the choice of calibration images and of their augmentation, from 0 to 2**32 - 1."""
    workers: int = min(os.cpu_count() or 1, 4)
    """Rows at a time, in threads."""
    data_dir: Path = Path("data")
    """Directory of the prepared data sets."""
    out: Path | None = None
    """Directory of the record; left out, runs/ptq-MODEL-DATASET. The same command started again
    goes on where it was stopped."""

    def __post_init__(self):
        for name in ("images", "test_images", "workers"):
            value = getattr(self, name)
            require(self, name, value is None or value >= 1, "an integer of at least 1")
        # Of a larger one jax.random.key takes the last 32 bits alone.
        require(self, "seed", 0 <= self.seed < 2**32, "an integer from 0 to 2**32 - 1")
        choices = {"calibration": CALIBRATIONS, "model": tuple(MODELS), "dataset": DATASETS}
        for name, values in choices.items():
            value = getattr(self, name)
            ok = value in values or (value is None and name != "calibration")
            require(self, name, ok, "one of " + ", ".join(values))
        if self.bits == () and not self.checkpoint.exists():
            raise UserError(  # as of `--bits 3` alone
                f"`checkpoint` must be an .npz file or a run directory, got {self.checkpoint}, "
                "which does not exist: give it before --bits"
            )
        ok = self.bits is None or (self.bits != () and set(self.bits) <= set(BITS))
        require(self, "bits", ok, f"one or more of {', '.join(map(str, BITS))}")
        ok = self.budget is None or (math.isfinite(self.budget) and 2 <= self.budget <= 8)
        require(self, "budget", ok, "from 2 to 8 bits per weight")
        ok = not (self.sensitivity and self.budget is not None)
        require(self, "budget", ok, "left out with `sensitivity`: one part at a time")
        ok = not (self.families and (self.sensitivity or self.budget is not None))
        require(self, "families", ok, "left out with `sensitivity` and `budget`")


def run(config: PostTrainingConfig, *, progress: bool = True) -> tuple[str, Path]:
    """Runs what is not finished of a part; returns what its record says, and its directory.

    Args:
      config: what to run.
      progress: whether to show progress bars.

    Raises:
      UserError: the checkpoint or the data is missing, damaged or of another network, or holds
        NaN; there are no calibration images; or `out` holds another run or cannot be written.
        Nothing is measured or overwritten then.
    """
    if config.out is not None:
        read_record(config.out)  # what is wrong with it is not to be found out after loading
    checkpoint = load_checkpoint(
        config.checkpoint,
        data_dir=config.data_dir,
        model=config.model,
        dataset=config.dataset,
        mean=config.mean,
        std=config.std,
    )
    require_finite(checkpoint.variables)
    part = _Run(config, checkpoint, progress)
    if config.sensitivity:
        part.measure_sites(config.bits or (4,))
    elif config.budget is not None:
        part.allocate(config.budget)
    else:
        part.fill_tables(config.bits or (FAMILY_BITS if config.families else BITS))
    return write_record(part.directory, part.record), part.directory


class _Run:
    """A record, and what adds to it."""

    def __init__(self, config: PostTrainingConfig, checkpoint: Checkpoint, progress: bool) -> None:
        self._config, self._checkpoint, self._progress = config, checkpoint, progress
        data = checkpoint.data
        self._data = dataclasses.replace(
            data,
            test_images=data.test_images[: config.test_images],
            test_labels=data.test_labels[: config.test_images],
        )
        with user_errors(ValueError):
            self._calibration = choose_calibration_images(
                data, config.images, pad=checkpoint.pad, flip=checkpoint.flip, seed=config.seed
            )
        self._base = base_setting(config.calibration, config.error_feedback, config.batch_stats)
        name = f"{checkpoint.name}-{data.name}"
        kind = "families" if config.families else "ptq"
        self.directory = config.out or Path("runs") / f"{kind}-{name}"
        self.record = open_record(self.directory, self._identity())

    def _identity(self) -> dict[str, Any]:
        """Returns all that the results depend on."""
        config, checkpoint = self._config, self._checkpoint
        return {
            "checkpoint": config.checkpoint.name,
            "weights_sha256": digest(checkpoint.variables),
            "model": checkpoint.name,
            "dataset": checkpoint.data.name,
            "mean": list(checkpoint.data.mean),
            "std": list(checkpoint.data.std),
            "pad": checkpoint.pad,
            "flip": checkpoint.flip,
            "images": config.images,
            "test_images": len(self._data.test_labels),
            "seed": config.seed,
            "calibration": config.calibration,
            "error_feedback": config.error_feedback,
            "batch_stats": config.batch_stats,
            # Records of the other parts are without.
            **({"families": True} if config.families else {}),
        }

    @functools.cached_property
    def network(self) -> TrainedNetwork:
        """The network, observed."""
        checkpoint = self._checkpoint
        return observe_network(
            checkpoint.model, checkpoint.variables, self._data, self._calibration
        )

    def fill_tables(self, bits: tuple[int, ...]) -> None:
        """Runs the settings of all tables."""
        wanted = [
            setting
            for one in tables_of(self._base, bits, families=self._config.families)
            for setting in one.settings()
        ]
        done = results_by_setting(self.record["rows"])
        missing = [setting for setting in dict.fromkeys(wanted) if setting not in done]
        if "full_precision" not in self.record:
            self.record["full_precision"] = evaluate_full_precision(self.network)
        self._map("rows", missing, lambda one: evaluate_setting(self.network, one))

    def measure_sites(self, bits: tuple[int, ...]) -> None:
        """Quantizes one site at a time."""
        self._measure_divergences(bits)
        self._sites("sensitivity", bits, SiteLosses.accuracy)

    def allocate(self, budget: float) -> None:
        """Chooses bits for each site, and compares them with as many for all sites."""
        if any(found["budget"] == budget for found in self.record["budgets"]):
            return
        self._measure_divergences(BITS)
        rows = self.record["divergences"]
        losses: dict[str, dict[int, float]] = {}
        for row in rows:
            losses.setdefault(row["site"], {})[row["weight_bits"]] = row["divergence"]
        counts = self.record["sites"]
        chosen, fixed_bits = allocate_bits(losses, counts, budget), int(budget)
        fixed = at_bits(self._base, fixed_bits)
        found: dict[str, Any] = {
            "budget": budget,
            "sites": [{"site": site, "weights": counts[site], "weight_bits": chosen[site]}
                      for site in chosen],
            "mixed_divergence": sum(losses[site][chosen[site]] for site in chosen),
            "fixed_divergence": sum(losses[site][fixed_bits] for site in chosen),
        }  # fmt: skip
        for name, one in {"mixed": mixed_bits(fixed, chosen), "fixed": fixed}.items():
            found[name] = evaluate_setting(self.network, one)
        self.record["budgets"].append(found)

    def _measure_divergences(self, bits: Iterable[int]) -> None:
        def measure(losses: SiteLosses, quantized: dict, site: str) -> dict:
            return {"divergence": losses.divergence(quantized, site)}

        self._sites("divergences", bits, measure)

    def _sites(self, part: str, bits: Iterable[int], measure: Callable) -> None:
        """Adds a row for each site and bits that there is none of."""
        done = {(row["site"], row["weight_bits"]) for row in self.record[part]}
        if "sites" not in self.record:
            self.record["sites"] = weight_counts(self.network)
        counts = self.record["sites"]
        missing = [(site, count) for count in bits for site in counts if (site, count) not in done]
        if not missing:
            return
        losses = SiteLosses(self.network, batch_stats=self._base.batch_stats)
        settings = {count: at_bits(self._base, count) for _, count in missing}
        quantized = {count: losses.quantized(setting) for count, setting in settings.items()}

        def row(item: tuple[str, int]) -> dict:
            site, count = item
            fields = {"site": site, "weights": counts[site], "weight_bits": count}
            fields["grid"] = settings[count].quant.grid
            return fields | measure(losses, quantized[count], site)

        self._map(part, missing, row)

    def _map(self, part: str, items: list, function: Callable[[Any], dict]) -> None:
        """Adds what a function gives of each item to a part of the record, as it comes."""
        if not items:
            return
        _ = self.network  # observed once, before there are threads
        self.record |= provenance() | {"workers": self._config.workers}
        began, before = time.perf_counter(), self.record["seconds"].get(part, 0.0)
        lock = threading.Lock()

        def add(item: Any) -> None:
            row = function(item)
            with lock:
                self.record[part].append(row)
                self.record["seconds"][part] = round(before + time.perf_counter() - began, 1)
                write_json(self.directory / "results.json", self.record)

        with ThreadPoolExecutor(self._config.workers) as pool:
            futures = [pool.submit(add, item) for item in items]
            try:
                for future in tqdm(
                    as_completed(futures), part, len(items), disable=not self._progress
                ):
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
