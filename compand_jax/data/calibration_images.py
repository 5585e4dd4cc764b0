"""Images that a trained network is calibrated with: of its training, and augmented as in it.

A network's batch-norm statistics are those of augmented images; estimated from plain ones they are
off even in full precision.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Array

from compand_jax.data.images import ImageData, augment, normalize

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
    """

    images: np.ndarray
    key: Array
    pad: int
    flip: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __iter__(self) -> Iterator[Array]:
        """Yields [b, h, w, c], in batches of nearly equal size, of at most `BATCH_SIZE`."""
        count = math.ceil(len(self.images) / BATCH_SIZE)
        for i, images in enumerate(np.array_split(self.images, count)):
            key = jax.random.fold_in(self.key, i)
            yield _prepared(key, images, self.pad, self.flip, self.mean, self.std)

    def first(self, count: int) -> "CalibrationImages":
        """Returns the calibration images with the first `count` of them."""
        return dataclasses.replace(self, images=self.images[:count])


@functools.partial(jax.jit, static_argnames=("pad", "flip", "mean", "std"))
def _prepared(key, images, pad, flip, mean, std):
    return normalize(augment(key, images, pad=pad, flip=flip), mean, std)


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
    rows = jax.device_get(jax.random.permutation(order_key, len(data.train_images))[:count])
    return CalibrationImages(data.train_images[rows], key, pad, flip, data.mean, data.std)
