"""Training of a Linen module or a `QuantizedModel`: one step, one evaluation, and whole runs.

The data set lies on the devices as uint8. A chunk of steps, with its shuffling and augmentation,
is one compiled call; what it measures is summed on the device and fetched once.
"""

import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped
from tqdm import tqdm

from compand_jax.checkpoints import Checkpoints
from compand_jax.data import ImageData, augment, normalize

TRAINABLE = ("params", "compand")
"""The collections that are trained, where a model has them."""

Model = Any
"""A Linen module, or anything with its `apply`."""


class TrainState(struct.PyTreeNode):
    """All that a training goes on from.

    Attributes:
      step: steps done, int32.
      params: the collections that are trained: `params`, and `compand` of a quantized model.
      model_state: the other collections, such as `batch_stats`.
      opt_state: the optimizer's.
      key: the PRNG key that every epoch's and step's randomness derives from; it never changes.
    """

    step: Any
    params: Any
    model_state: Any
    opt_state: Any
    key: Any

    @property
    def variables(self) -> dict:
        """The variables to apply the model with."""
        return {**self.params, **self.model_state}


def create_state(
    variables: dict, tx: optax.GradientTransformation, key: Shaped[Array, "..."]
) -> TrainState:
    """Returns the state at step 0.

    Args:
      variables: the model's, as `init` returns them.
      tx: acts on `{"params": ..., "compand": ...}`, without `compand` in full precision.
      key: a PRNG key.
    """
    params = {name: tree for name, tree in variables.items() if name in TRAINABLE}
    model_state = {name: tree for name, tree in variables.items() if name not in TRAINABLE}
    return TrainState(jnp.int32(0), params, model_state, tx.init(params), key)


def train_step(
    state: TrainState,
    images: Float[Array, "batch h w c"],
    labels: Int[Array, " batch"],
    *,
    model: Model,
    tx: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, Array]]:
    """Returns the state after one step on the mean cross-entropy, and what the step measured.

    Args:
      state: the state before.
      images: normalized.
      labels: in [0, number of classes).
      model: applied with `train=True`; its collections but `TRAINABLE` are mutable.
      tx: the state's optimizer.

    Returns:
      The state, and `loss` (float32, nats, mean of the batch) and `correct` (int32, of the batch),
      both of the parameters before the step.
    """

    def loss_fn(params):
        logits, model_state = model.apply(
            {**params, **state.model_state},
            images,
            train=True,
            mutable=list(state.model_state),
            rngs={"dropout": jax.random.fold_in(state.key, state.step)},
        )
        logits = logits.astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), (model_state, (logits.argmax(-1) == labels).sum(dtype=jnp.int32))

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (model_state, correct)), grads = grad_fn(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        model_state=model_state,
        opt_state=opt_state,
    )
    return state, {"loss": loss, "correct": correct}


def eval_step(
    variables: dict,
    images: Float[Array, "batch h w c"],
    labels: Int[Array, " batch"],
    mask: Shaped[Array, " batch"],
    *,
    model: Model,
) -> Int[Array, ""]:
    """Returns how many of the images that the mask selects are classified correctly.

    Args:
      variables: the model's.
      images: normalized.
      labels: in [0, number of classes).
      mask: bool; False for what pads a batch.
      model: applied with `train=False`.
    """
    logits = model.apply(variables, images, train=False)
    return ((logits.argmax(-1) == labels) & mask).sum(dtype=jnp.int32)


def evaluate(
    model: Model,
    variables: dict,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
) -> int:
    """Returns how many images are classified correctly, exact to the last one.

    Args:
      model: applied with `train=False`.
      variables: the model's.
      images: uint8 [n, h, w, c], n >= 1.
      labels: int32 [n].
      mean: per channel, as in `ImageData`.
      std: per channel, as in `ImageData`.
      batch_size: images at a time; the last batch is padded.

    Raises:
      ValueError: if there are no images.
    """
    n = len(images)
    if n == 0:
        raise ValueError(
            "`images` must hold at least one image, got an empty split: choose another"
        )

    @jax.jit
    def count(variables, images, labels, mask):
        images = normalize(images, tuple(mean), tuple(std))
        return eval_step(variables, images, labels, mask, model=model)

    counts = []
    for start in range(0, n, batch_size):
        rows = np.arange(start, start + batch_size)
        kept = np.minimum(rows, n - 1)
        counts.append(count(variables, images[kept], labels[kept], rows < n))
    return int(sum(np.asarray(counted) for counted in counts))


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


def data_mesh(devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Returns a mesh with the axis "data" over the devices, by default all of them."""
    devices = jax.devices() if devices is None else list(devices)
    return jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)


def make_chunk(
    data: ImageData,
    config: FitConfig,
    *,
    model: Model,
    tx: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> Callable[[TrainState, Array, Array], tuple[TrainState, dict[str, Array]]]:
    """Returns the compiled call `chunk(state, train_images, train_labels)`, whose state is donated.

    It returns the state some steps later and, over these steps, `loss` (sum of the means),
    `correct` (sum), `bad_step` (first step whose loss is not finite, or -1), `finite` (whether
    all parameters are).
    """
    n = len(data.train_labels)
    per_epoch, length = config.steps_per_epoch(n), config.steps_a_call(n)
    # XLA's CPU backend runs a convolution's gradient in a loop's body up to 100 times slower than
    # outside of one; elsewhere a loop is as fast, and quicker to compile.
    unroll = length if jax.default_backend() == "cpu" else 1
    batch_sharding = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def one_step(state, images, labels, order):
        start = (state.step % per_epoch) * config.batch_size
        rows = jax.lax.dynamic_slice_in_dim(order, start, config.batch_size)
        rows = jax.lax.with_sharding_constraint(rows, batch_sharding)
        key = jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step)
        batch = augment(key, images[rows], pad=config.pad, flip=config.flip)
        batch = normalize(batch, data.mean, data.std)
        batch = jax.lax.with_sharding_constraint(batch, batch_sharding)
        return train_step(state, batch, labels[rows], model=model, tx=tx)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=everywhere)
    def chunk(state, images, labels):
        # A chunk never crosses the end of an epoch, so one permutation does.
        epoch_key = jax.random.fold_in(jax.random.fold_in(state.key, 0), state.step // per_epoch)
        order = jax.random.permutation(epoch_key, n)

        def body(carry, _):
            state, sums = carry
            after, measured = one_step(state, images, labels, order)
            first = (sums["bad_step"] < 0) & ~jnp.isfinite(measured["loss"])
            sums = {
                "loss": sums["loss"] + measured["loss"],
                "correct": sums["correct"] + measured["correct"],
                "bad_step": jnp.where(first, state.step, sums["bad_step"]),
            }
            return (after, sums), None

        sums = {"loss": jnp.float32(0), "correct": jnp.int32(0), "bad_step": jnp.int32(-1)}
        (state, sums), _ = jax.lax.scan(body, (state, sums), length=length, unroll=unroll)
        finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)]
        return state, {**sums, "finite": jnp.stack(finite).all()}

    return chunk


def fit(
    state: TrainState,
    data: ImageData,
    config: FitConfig,
    *,
    model: Model,
    tx: optax.GradientTransformation,
    checkpoints: Checkpoints | None = None,
    metadata: dict | None = None,
    log: str | Path | None = None,
    describe: Callable[[TrainState], dict] | None = None,
    progress: str | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> TrainState:
    """Returns the state after `config.epochs` epochs, going on from the newest sound checkpoint.

    Args:
      state: where to start if there is no checkpoint; it stays usable.
      data: images and labels.
      config: epochs, batches, augmentation.
      model: a Linen module or a `QuantizedModel`.
      tx: the state's optimizer.
      checkpoints: where to save and to go on from; None keeps none.
      metadata: stored with every checkpoint.
      log: path of a JSONL file; a row a compiled call: `step`, `epoch`, mean `loss` (nats) and
        `accuracy` (percent) on the training batches, `seconds`, and what `describe` gives. When going
        on, rows after the checkpoint are dropped.
      describe: a jitted function of the state, whose arrays are added to the row.
      progress: label of the progress bar; None shows none.
      devices: data-parallel over these; by default all.

    Raises:
      ValueError: if a batch is larger than the split or does not divide over the devices, or
        the checkpoint is one of another model.
      FloatingPointError: if loss or parameters stop being finite; the checkpoints stay.
      OSError: if the disk cannot be written.
    """
    mesh = data_mesh(devices)
    if config.batch_size % mesh.size:
        raise ValueError(
            f"`batch_size` must be a multiple of the {mesh.size} devices, got "
            f"{config.batch_size}: choose another"
        )
    n = len(data.train_labels)
    per_epoch, length = config.steps_per_epoch(n), config.steps_a_call(n)
    everywhere = NamedSharding(mesh, PartitionSpec())
    # Copied, because the state is donated and a device_put may be none.
    state = jax.device_put(jax.tree.map(jnp.copy, state), everywhere)
    restored = None if checkpoints is None else checkpoints.restore(state)
    step, state = (0, state) if restored is None else restored[:2]
    if log is not None:
        truncate_log(log, step)
    images, labels = jax.device_put((data.train_images, data.train_labels), everywhere)
    chunk = make_chunk(data, config, model=model, tx=tx, mesh=mesh)
    total = config.epochs * per_epoch
    with tqdm(total=total, initial=step, desc=progress, disable=progress is None) as bar:
        while step < total:
            began = time.perf_counter()
            state, sums = chunk(state, images, labels)
            sums, described = jax.device_get((sums, describe(state) if describe else {}))
            step += length
            _check_finite(sums, step, checkpoints)
            row = {"step": step, "epoch": round(step / per_epoch, 4)}
            row["loss"] = float(sums["loss"]) / length
            row["accuracy"] = 100 * int(sums["correct"]) / (length * config.batch_size)
            row["seconds"] = round(time.perf_counter() - began, 4)
            if log is not None:
                append_log(log, row | jax.tree.map(lambda x: np.asarray(x).tolist(), described))
            bar.update(length)
            bar.set_postfix(loss=f"{row['loss']:.3f}", accuracy=f"{row['accuracy']:.1f}%")
            due = step % (config.checkpoint_every * per_epoch) == 0 or step == total
            if checkpoints is not None and due:
                checkpoints.save(step, state, metadata)
    return state


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


def append_log(path: str | Path, row: dict) -> None:
    """Appends a row to a JSONL file."""
    with open(path, "a") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def truncate_log(path: str | Path, step: int) -> None:
    """Drops the rows after `step`, and a last one that was not completely written."""
    path = Path(path)
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] > step:
            break
        kept.append(line + "\n")
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    os.replace(partial, path)
