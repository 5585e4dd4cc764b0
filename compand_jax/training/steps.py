"""One training step and one evaluation of a Linen module or a `QuantizedModel`."""

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float, Int, Shaped

from compand_jax.data.images import normalize
from compand_jax.training.distributed import data_mesh, everywhere, replicate, split

TRAINABLE = ("params", "compand")
"""The collections that are trained, where a model has them."""

Model: TypeAlias = Any
"""A Linen module, or anything with its `apply` that can be hashed."""


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


class Teacher(struct.PyTreeNode):
    """A network whose answers another one learns along with the labels.

    Attributes:
      variables: the network's.
      model: applied with `train=False`.
      weight: w, the share of the loss that is the teacher's, from 0 to 1.
      temperature: T > 0, of both softmaxes.
    """

    variables: Any
    model: Any = struct.field(pytree_node=False)
    weight: float = struct.field(pytree_node=False, default=0.5)
    temperature: float = struct.field(pytree_node=False, default=4.0)

    def mixed(
        self,
        losses: Float[Array, " batch"],
        logits: Float[Array, "batch classes"],
        images: Float[Array, "batch h w c"],
    ) -> Float[Array, " batch"]:
        """Returns (1 - w) loss - w T^2 sum_c p_c log q_c, p and q being softmax(logits / T).

        T^2 keeps the gradients' size, as they fall with 1/T^2.

        Args:
          losses: to the labels.
          logits: the learning network's, of q.
          images: what the teacher answers, by p.

        Gradient: in `losses` and `logits`.

        Source: Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015,
        arXiv 1503.02531, section 2.
        """
        own = self.model.apply(self.variables, images, train=False).astype(jnp.float32)
        p = jax.nn.softmax(jax.lax.stop_gradient(own) / self.temperature)
        soft = optax.softmax_cross_entropy(logits / self.temperature, p)
        return (1 - self.weight) * losses + self.weight * self.temperature**2 * soft


def train_step(
    state: TrainState,
    images: Float[Array, "batch h w c"],
    labels: Int[Array, " batch"],
    *,
    model: Model,
    tx: optax.GradientTransformation,
    teacher: Teacher | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """Returns the state after one step on the mean cross-entropy, and what the step measured.

    Args:
      state: the state before.
      images: normalized.
      labels: in [0, number of classes).
      model: applied with `train=True`; its collections but `TRAINABLE` are mutable.
      tx: the state's optimizer.
      teacher: mixes its own answers into the loss; None leaves the labels alone.

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
        if teacher is not None:
            losses = teacher.mixed(losses, logits, images)
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
      batch_size: images at a time, divided among all devices; the last batch is padded, and each
        to a multiple of the devices.

    Raises:
      ValueError: if there are no images.
    """
    n = len(images)
    if n == 0:
        raise ValueError(
            "`images` must hold at least one image, got an empty split: choose another"
        )

    mesh = data_mesh()
    variables = replicate(variables, mesh)
    batch_size = -(-batch_size // mesh.size) * mesh.size
    counts = []
    for start in range(0, n, batch_size):
        rows = np.arange(start, start + batch_size)
        kept = np.minimum(rows, n - 1)
        counted = _count(
            variables,
            images[kept],
            labels[kept],
            rows < n,
            model=model,
            mean=tuple(mean),
            std=tuple(std),
            mesh=mesh,
        )
        counts.append(counted)
    return int(sum(np.asarray(counted) for counted in counts))


@functools.partial(jax.jit, static_argnames=("model", "mean", "std", "mesh"))
def _count(variables, images, labels, mask, *, model, mean, std, mesh):
    batch = normalize(images, mean, std), labels, mask
    count = eval_step(variables, *jax.lax.with_sharding_constraint(batch, split(mesh)), model=model)
    return jax.lax.with_sharding_constraint(count, everywhere(mesh))
