"""Images that a trained network is calibrated with: of its training, and augmented as in it.

A network's batch-norm statistics are those of augmented images; estimated from plain ones they are
off even in full precision.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Array

from compand_jax.data.augmentation import augment
from compand_jax.data.images import ImageData, normalize

BATCH_SIZE = 256


@dataclasses.dataclass(frozen=True, eq=False)
class CalibrationImages:
    """Batches of normalized training images, augmented as in training; the same in every pass.

    Attributes:
      images: uint8 [n, h, w, c], n >= 1.
      key: PRNG key of the augmentation.
      pad: zeros around an image before it is cropped at random, in pixels.
      flip: whether images are mirrored at random.
      mean: per channel, of pixels in [0, 1].
      std: per channel, of pixels in [0, 1].
      batch_size: most images of a batch; batches are of nearly equal size.
    """

    images: np.ndarray
    key: Array
    pad: int
    flip: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch_size: int = BATCH_SIZE

    def __iter__(self) -> Iterator[Array]:
        """Yields batches [b, h, w, c]."""
        count = math.ceil(len(self.images) / self.batch_size)
        for i, images in enumerate(np.array_split(self.images, count)):
            key = jax.random.fold_in(self.key, i)
            images = _augment(key, images, pad=self.pad, flip=self.flip)
            yield normalize(images, self.mean, self.std)

    def first(self, count: int) -> "CalibrationImages":
        """Returns the calibration images with the first `count` of them."""
        return dataclasses.replace(self, images=self.images[:count])


_augment = jax.jit(augment, static_argnames=("pad", "flip"))


def choose_calibration_images(
    data: ImageData, count: int, *, pad: int, flip: bool, seed: int
) -> CalibrationImages:
    """Returns `count` of the training images, chosen at random.

    Raises:
      ValueError: `count` is not from 1 to the number of training images.
    """
    if not 1 <= count <= len(data.train_images):
        raise ValueError(
            f"`images` must be from 1 to the {len(data.train_images)} training images, got "
            f"{count}: calibration needs some, such as 2048"
        )
    order_key, key = jax.random.split(jax.random.key(seed))
    return sample_training_images(data, count, order_key, key, pad=pad, flip=flip)


def sample_training_images(
    data: ImageData,
    count: int,
    order_key: Array,
    key: Array,
    *,
    pad: int,
    flip: bool,
    batch_size: int = BATCH_SIZE,
) -> CalibrationImages:
    """Returns training images in a random order; more than there are go through them again.

    Args:
      data: whose training images.
      count: how many.
      order_key: PRNG key of the order.
      key: PRNG key of the augmentation, each batch's its own.
      pad: as `CalibrationImages`.
      flip: as `CalibrationImages`.
      batch_size: as `CalibrationImages`.
    """
    order = jax.device_get(jax.random.permutation(order_key, len(data.train_images)))
    images = data.train_images[order[np.arange(count) % len(order)]]
    return CalibrationImages(images, key, pad, flip, data.mean, data.std, batch_size)
