"""Image data sets as uint8 arrays, and their normalization on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from compand_jax.data.packages import needed_for

DATASETS = ("digits", "cifar10", "cifar100")
_DIGITS_TEST = 360
_DIGITS_SEED = 0


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set in the host's memory.

    Attributes:
      name: one of `DATASETS`, or a name of your own.
      train_images: uint8 [n, h, w, c], n >= 1.
      train_labels: int32 [n], in [0, num_classes).
      test_images: uint8 [m, h, w, c], m >= 1.
      test_labels: int32 [m], in [0, num_classes).
      num_classes: number of classes.
      mean: per channel, of the training pixels in [0, 1].
      std: per channel, of the training pixels in [0, 1].

    Raises:
      ValueError: if a split is empty, or shapes, types or labels are not as above.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self):
        _check_split("train", self.train_images, self.train_labels, self.num_classes)
        _check_split("test", self.test_images, self.test_labels, self.num_classes)


def _check_split(split: str, images: np.ndarray, labels: np.ndarray, num_classes: int) -> None:
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(
            f"`{split}_images` must be uint8 [n, h, w, c], got {images.dtype} "
            f"{list(images.shape)}: convert them"
        )
    if len(images) == 0:
        raise ValueError(
            f"`{split}_images` must hold at least one image, got an empty split: "
            "prepare or choose another data set"
        )
    if labels.shape != images.shape[:1] or labels.dtype != np.int32:
        raise ValueError(
            f"`{split}_labels` must be int32 [{len(images)}], got {labels.dtype} "
            f"{list(labels.shape)}: give one label per image"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"`{split}_labels` must be in [0, {num_classes}), got {labels.min()} to "
            f"{labels.max()}: correct the labels or `num_classes`"
        )


def load_data(name: str, data_dir: str | Path = "data") -> ImageData:
    """Loads a data set into the host's memory.

    `digits` is embedded: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels with values 0 to
    16, scaled to 0 to 255 and split once, by class, into 1,437 and 360. `cifar10` and `cifar100`
    are read with tensorflow-datasets from where `prepare_cifar` put them.

    Args:
      name: one of `DATASETS`.
      data_dir: directory of the prepared data sets; not used by digits.

    Returns:
      The images and labels in a fixed order, with mean and std of the training pixels.

    Raises:
      ValueError: if the name is unknown, a split is empty, or the data set damaged.
      FileNotFoundError: if the data set is not prepared in `data_dir`.

    >>> data = load_data("digits")
    >>> data.train_images.shape, data.test_images.shape, data.num_classes
    ((1437, 8, 8, 1), (360, 8, 8, 1), 10)
    """
    if name not in DATASETS:
        raise ValueError(f"`name` must be one of {', '.join(DATASETS)}, got {name!r}: choose one")
    if name == "digits":
        splits, num_classes = _digits(), 10
    else:
        # Imported here because tensorflow-datasets is slow to import.
        from compand_jax.data.cifar import read_prepared

        splits, num_classes = read_prepared(name, data_dir)
    (train_images, train_labels), (test_images, test_labels) = splits["train"], splits["test"]
    mean, std = pixel_statistics(train_images)
    return ImageData(
        name, train_images, train_labels, test_images, test_labels, num_classes, mean, std
    )


def prepare_cifar(
    name: str, archive: str | Path | None = None, data_dir: str | Path = "data"
) -> Path:
    """Makes the tensorflow-datasets data set `name` from CIFAR's binary archive.

    Nothing is left behind when it fails, and nothing is done when the data set is there.

    Args:
      name: `cifar10` or `cifar100`.
      archive: path of the archive; None downloads the official one and verifies its checksum.
      data_dir: directory of the prepared data sets; made if it is not there.

    Returns:
      The data set's own directory, `data_dir/name/version`.

    Raises:
      ValueError: if the name is unknown, the archive damaged or foreign, or what is in
        `data_dir` damaged.
      OSError: if the download fails, or `archive` or `data_dir` cannot be read or written.
    """
    from compand_jax.data.cifar import prepare

    return prepare(name, None if archive is None else Path(archive), Path(data_dir))


def _digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    # Imported here because scikit-learn is slow to import, and only the digits need it.
    with needed_for("the digits", "scikit-learn"):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=_DIGITS_TEST, stratify=labels, random_state=_DIGITS_SEED
    )
    labels = labels.astype(np.int32)
    return {"train": (images[train], labels[train]), "test": (images[test], labels[test])}


def pixel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation per channel of uint8 images, as pixels in [0, 1].

    Args:
      images: uint8 [..., c], not empty.

    Returns:
      Two tuples of c floats.

    >>> pixel_statistics(np.array([[0], [255]], np.uint8))
    ((0.5,), (0.5,))
    """
    # A histogram is exact, and needs no float copy of the images.
    values = np.arange(256) / 255
    mean, std = [], []
    for channel in range(images.shape[-1]):
        counts = np.bincount(images[..., channel].ravel(), minlength=256)
        p = counts / counts.sum()
        mean.append(float(p @ values))
        std.append(float(np.sqrt(p @ (values - mean[-1]) ** 2)))
    return tuple(mean), tuple(std)


def normalize(
    images: Shaped[Array | np.ndarray, "..."],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "..."]:
    """Returns `(images / 255 - mean) / std`, computed in float32.

    Args:
      images: uint8 [..., c], pixels in 0 to 255.
      mean: c floats, of pixels in [0, 1].
      std: c positive floats, of pixels in [0, 1].
      dtype: floating type of the result.

    Returns:
      An array of the images' shape, of type `dtype`.

    Raises:
      TypeError: if the images are not uint8.
      ValueError: if mean or std has another length than c.

    >>> normalize(jnp.array([[0], [255]], jnp.uint8), (0.5,), (0.5,)).tolist()
    [[-1.0], [1.0]]
    """
    if images.dtype != jnp.uint8:
        raise TypeError(f"`images` must be uint8, got {images.dtype}: give pixels from 0 to 255")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != images.shape[-1]:
            raise ValueError(
                f"`{name}` must have one value for each of {images.shape[-1]} channels, got "
                f"{len(values)}: take it from the same data set as the images"
            )
    pixels = jnp.asarray(images).astype(jnp.float32) / 255
    channels = [jnp.broadcast_to(jnp.asarray(v, jnp.float32), images.shape) for v in (mean, std)]
    return ((pixels - channels[0]) / channels[1]).astype(dtype)
