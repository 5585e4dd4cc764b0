"""Training of a Linen module or a `QuantizedModel` over epochs.

The data set lies on the devices as uint8. A chunk of steps, with its shuffling and augmentation,
is one compiled call; what it measures is summed on the device and fetched once.
"""

import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from compand_jax.data.augmentation import augment
from compand_jax.data.images import ImageData, normalize
from compand_jax.data.packages import needed_for
from compand_jax.training.checkpoints import Checkpoints
from compand_jax.training.distributed import data_mesh, everywhere, is_main, replicate, split
from compand_jax.training.events import Events
from compand_jax.training.metrics_log import append_log, truncate_log
from compand_jax.training.steps import Teacher, TrainState, train_step

with needed_for("training", "tqdm"):
    from tqdm import tqdm


@dataclass(frozen=True)
class FitConfig:
    """What `fit` does, apart from model, data and optimizer.

    Attributes:
      epochs: passes over the training split.
      batch_size: images a step, all devices together; a last incomplete batch is left out.
      pad: zeros around an image before it is cropped at random, in pixels.
      flip: whether images are mirrored at random.
      steps_per_call: most steps in one compiled call.
      checkpoint_every: epochs between checkpoints; the last epoch always has one.
    """

    epochs: int
    batch_size: int
    pad: int = 0
    flip: bool = False
    steps_per_call: int = 10
    checkpoint_every: int = 1

    def steps_per_epoch(self, images: int) -> int:
        """Returns the steps that `images` images make; ValueError if not even one batch."""
        if self.batch_size > images:
            raise ValueError(
                f"`batch_size` must be at most the {images} images of the training split, got "
                f"{self.batch_size}: choose a smaller one"
            )
        return images // self.batch_size

    def steps_a_call(self, images: int) -> int:
        """Returns the largest divisor of an epoch's steps that is at most `steps_per_call`."""
        steps = self.steps_per_epoch(images)
        return max(d for d in range(1, min(self.steps_per_call, steps) + 1) if steps % d == 0)


def make_chunk(
    data: ImageData,
    config: FitConfig,
    *,
    model: Any,
    tx: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Returns the compiled call `chunk(state, train_images, train_labels, teacher=None)`.

    Its state is donated.

    It returns the state some steps later and, over these steps, `loss` (sum of the means),
    `correct` (sum), `bad_step` (first step whose loss is not finite, or -1), `finite` (whether
    all parameters and statistics are).
    """
    n = len(data.train_labels)
    per_epoch, length = config.steps_per_epoch(n), config.steps_a_call(n)
    # XLA's CPU backend runs a convolution's gradient in a loop's body up to 100 times slower than
    # outside of one; elsewhere a loop is as fast, and quicker to compile.
    unroll = length if jax.default_backend() == "cpu" else 1
    make_batch = _batch_maker(data, config, mesh)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=everywhere(mesh))
    def chunk(state, images, labels, teacher=None):
        # A chunk never crosses the end of an epoch, so one permutation does.
        epoch_key = jax.random.fold_in(jax.random.fold_in(state.key, 0), state.step // per_epoch)
        order = jax.random.permutation(epoch_key, n)

        def body(carry, _):
            state, sums = carry
            batch = make_batch(state, images, labels, order)
            after, measured = train_step(state, *batch, model=model, tx=tx, teacher=teacher)
            return (after, _add(sums, measured, state.step)), None

        sums = {"loss": jnp.float32(0), "correct": jnp.int32(0), "bad_step": jnp.int32(-1)}
        if length == 1:  # which scan would make a loop, whatever `unroll` is
            (state, sums), _ = body((state, sums), None)
        else:
            (state, sums), _ = jax.lax.scan(body, (state, sums), length=length, unroll=unroll)
        finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.variables)]
        return state, {**sums, "finite": jnp.stack(finite).all()}

    return chunk


def _batch_maker(data: ImageData, config: FitConfig, mesh: jax.sharding.Mesh) -> Callable:
    per_epoch = config.steps_per_epoch(len(data.train_labels))
    sharding = split(mesh)

    def make_batch(state, images, labels, order):
        start = (state.step % per_epoch) * config.batch_size
        rows = jax.lax.dynamic_slice_in_dim(order, start, config.batch_size)
        rows = jax.lax.with_sharding_constraint(rows, sharding)
        key = jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step)
        batch = augment(key, images[rows], pad=config.pad, flip=config.flip)
        batch = normalize(batch, data.mean, data.std)
        return jax.lax.with_sharding_constraint(batch, sharding), labels[rows]

    return make_batch


def _add(sums: dict, measured: dict, step: Array) -> dict:
    first = (sums["bad_step"] < 0) & ~jnp.isfinite(measured["loss"])
    return {
        "loss": sums["loss"] + measured["loss"],
        "correct": sums["correct"] + measured["correct"],
        "bad_step": jnp.where(first, step, sums["bad_step"]),
    }


def fit(
    state: TrainState,
    data: ImageData,
    config: FitConfig,
    *,
    model: Any,
    tx: optax.GradientTransformation,
    checkpoints: Checkpoints | None = None,
    metadata: dict | None = None,
    log: str | Path | None = None,
    describe: Callable[[TrainState], dict] | None = None,
    progress: str | None = None,
    devices: Sequence[Any] | None = None,
    teacher: Teacher | None = None,
    at_end: Callable[[TrainState], TrainState] | None = None,
    events: Events | None = None,
) -> TrainState:
    """Returns the state after `config.epochs` epochs, counted from step 0.

    A state restored from a checkpoint goes on where it was saved, to the same end.

    Args:
      state: where to start; it stays usable.
      data: images and labels.
      config: epochs, batches, augmentation.
      model: a Linen module or a `QuantizedModel`.
      tx: the state's optimizer.
      checkpoints: where to save; None keeps none.
      metadata: stored with every checkpoint.
      log: path of a JSONL file; a row a compiled call: `step`, `epoch`, mean `loss` (nats) and
        `accuracy` (percent) on the training batches, `seconds`, and what `describe` gives. Rows
        after the state's step are dropped.
      describe: a jitted function of the state, whose arrays are added to the row.
      progress: label of the progress bar; None shows none.
      devices: data-parallel over these; by default all of all processes. Logs, checkpoints and
        the progress bar are those of the main process.
      teacher: mixes its answers into the loss, see `Teacher`; None trains on the labels alone.
      at_end: called with the state after the last step, before it is saved; what it returns is
        the result.
      events: for TensorBoard, given each row of the log, and the state at the end of each epoch.

    Raises:
      ValueError: if a batch is larger than the split or does not divide over the devices.
      FloatingPointError: if loss or parameters stop being finite; the checkpoints stay.
      OSError: if the disk cannot be written.
    """
    mesh = data_mesh(devices)
    check_devices(config.batch_size, mesh.size)
    n = len(data.train_labels)
    per_epoch, length = config.steps_per_epoch(n), config.steps_a_call(n)
    step, total = int(state.step), config.epochs * per_epoch
    state = replicate(state, mesh)  # a copy, because it is donated
    images, labels, teacher = replicate((data.train_images, data.train_labels, teacher), mesh)
    if not is_main():
        log = progress = None
    if log is not None:
        truncate_log(log, step)
    chunk = make_chunk(data, config, model=model, tx=tx, mesh=mesh)
    # Not more than a line a minute where each update is one, in a log.
    interval = 0.1 if sys.stderr.isatty() else 60
    with tqdm(
        total=total, initial=step, desc=progress, disable=progress is None, mininterval=interval
    ) as bar:
        while step < total:
            began = time.perf_counter()
            state, sums = chunk(state, images, labels, teacher)
            sums, described = jax.device_get((sums, describe(state) if describe else {}))
            step += length
            _check_finite(sums, step, checkpoints)
            row = {"step": step, "epoch": round(step / per_epoch, 4)}
            row |= _measured(sums, config, length)
            row["seconds"] = round(time.perf_counter() - began, 4)
            whole = row | jax.tree.map(lambda x: np.asarray(x).tolist(), described)
            if log is not None:
                append_log(log, whole)
            if events is not None:
                events.row(whole)
                if step % per_epoch == 0:
                    events.epoch(step, state)
            bar.update(length)
            shown = {"loss": f"{row['loss']:.3f}", "accuracy": f"{row['accuracy']:.1f}%"}
            bar.set_postfix(shown, refresh=False)
            if step == total and at_end is not None:
                state = at_end(state)
            due = step % (config.checkpoint_every * per_epoch) == 0 or step == total
            if checkpoints is not None and due:
                checkpoints.save(step, state, metadata)
    return state


def _measured(sums: dict, config: FitConfig, length: int) -> dict[str, float]:
    return {
        "loss": float(sums["loss"]) / length,
        "accuracy": 100 * int(sums["correct"]) / (length * config.batch_size),
    }


def check_devices(batch_size: int, devices: int) -> None:
    """Raises ValueError if a batch does not divide over that many devices."""
    if batch_size % devices:
        raise ValueError(
            f"`batch_size` must be a multiple of the {devices} devices, got {batch_size}: "
            "choose another"
        )


def _check_finite(sums: dict, step: int, checkpoints: Checkpoints | None) -> None:
    bad = int(sums["bad_step"])
    if bad < 0 and bool(sums["finite"]):
        return
    what = f"loss at step {bad}" if bad >= 0 else f"parameters after step {step - 1}"
    kept = checkpoints.steps() if checkpoints is not None else []
    kept_text = f"the checkpoint of step {kept[-1]} is kept" if kept else "there is no checkpoint"
    raise FloatingPointError(
        f"`learning_rate` must keep the training finite, got a NaN or infinite {what} "
        f"({kept_text}): lower it"
    )
