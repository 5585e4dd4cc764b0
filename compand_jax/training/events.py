"""A training's metrics as TensorBoard reads them: an event file, by tensorboardX."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from compand_jax.data.packages import needed_for
from compand_jax.training.distributed import is_main
from compand_jax.training.steps import TrainState


class Buckets(NamedTuple):
    """A histogram.

    Attributes:
      limits: upper ends of the buckets, rising.
      counts: how many values lie in each, as many.
      centres: one value for each bucket, that stands for those in it.
      lowest: the lower end of the first bucket.
    """

    limits: ArrayLike
    counts: ArrayLike
    centres: ArrayLike
    lowest: ArrayLike


def require_tensorboard() -> Any:
    """Returns the module tensorboardX; ImportError, naming the extra, where it is missing."""
    with needed_for("`tensorboard`", "compand-jax[tensorboard]"):
        import tensorboardX
    return tensorboardX


class Events:
    """Writes what `fit` logs, and once an epoch histograms of the state.

    Args:
      directory: of the event files.
      step: that the training starts at; what was written of later ones is void.
      histograms: a jitted function of the state that returns `Buckets` by tag.

    Raises:
      ImportError: tensorboardX is not installed.
    """

    def __init__(
        self, directory: Path, step: int, histograms: Callable[[TrainState], dict[str, Buckets]]
    ) -> None:
        self._histograms, self._writer = histograms, None
        if is_main():
            purge = {"purge_step": step + 1} if step else {}
            self._writer = require_tensorboard().SummaryWriter(str(directory), **purge)

    def row(self, row: Mapping[str, Any]) -> None:
        """Writes a row of the log: its numbers, and of an array the least, mean and largest."""
        if self._writer is None:
            return
        for tag, value in _numbers(row):
            self._writer.add_scalar(tag, value, row["step"])

    def epoch(self, step: int, state: TrainState) -> None:
        """Writes the histograms of a state. Every process calls it."""
        found = jax.device_get(self._histograms(state))
        if self._writer is None:
            return
        for tag, (limits, counts, centres, lowest) in found.items():
            self._writer.add_histogram_raw(
                tag,
                min=float(lowest),
                max=float(limits[-1]),
                num=int(np.sum(counts)),
                sum=float(np.sum(counts * centres)),
                sum_squares=float(np.sum(counts * np.square(centres))),
                bucket_limits=limits.tolist(),
                bucket_counts=counts.tolist(),
                global_step=step,
            )
        self._writer.flush()

    def close(self) -> None:
        """Writes what is left."""
        if self._writer is not None:
            self._writer.close()


def _numbers(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yields the numbers of a nested row, each with its path."""
    for name, value in row.items():
        tag = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{tag}/")
        elif np.size(value) == 1:
            if tag != "step":
                yield tag, float(np.ravel(value)[0])
        elif np.size(value):
            for kind in ("min", "mean", "max"):
                yield f"{tag}/{kind}", float(getattr(np, kind)(value))
