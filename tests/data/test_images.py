"""Loading and normalization."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compand_jax.data import images as data


@pytest.mark.quick
def test_digits_are_split_once_by_class():
    first, second = data.load_data("digits"), data.load_data("digits")
    assert first.train_images.shape == (1437, 8, 8, 1)
    assert first.test_images.shape == (360, 8, 8, 1)
    assert first.train_images.dtype == np.uint8
    assert first.train_labels.dtype == first.test_labels.dtype == np.int32
    assert first.train_images.max() == 255
    assert len(np.unique(np.concatenate([first.train_images, first.test_images]))) == 17
    assert np.ptp(np.bincount(first.test_labels, minlength=first.num_classes)) <= 3
    for field in ("train_images", "train_labels", "test_images", "test_labels"):
        np.testing.assert_array_equal(getattr(first, field), getattr(second, field))
    pixels = first.train_images / 255
    np.testing.assert_allclose(first.mean, pixels.mean(), rtol=1e-12)
    np.testing.assert_allclose(first.std, pixels.std(), rtol=1e-12)


@pytest.mark.quick
def test_pixel_statistics_equal_numpys():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 3, 3), np.uint8)
    mean, std = data.pixel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255).std((0, 1, 2)), rtol=1e-12)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["mnist", "CIFAR10", ""])
def test_unknown_data_set(name):
    with pytest.raises(ValueError, match="`name` must be one of digits, cifar10, cifar100, got"):
        data.load_data(name)


@pytest.mark.quick
def test_data_set_that_cannot_be_prepared(tmp_path):
    with pytest.raises(ValueError, match="`name` must be one of cifar10, cifar100, got 'digits'"):
        data.prepare_cifar("digits", data_dir=tmp_path)


@pytest.mark.quick
def test_not_prepared(tmp_path):
    folder = tmp_path / "my data"
    message = (
        "`data_dir` must hold cifar10, got '.*my data', in which cifar10 is not prepared: "
        "run `compand prepare_data cifar10 --data-dir '.*my data'`"
    )
    with pytest.raises(FileNotFoundError, match=message):
        data.load_data("cifar10", folder)
    assert not folder.exists()


def image_data(**changes):
    fields = {
        "name": "own",
        "train_images": np.zeros((3, 2, 2, 1), np.uint8),
        "train_labels": np.array([0, 1, 1], np.int32),
        "test_images": np.zeros((1, 2, 2, 1), np.uint8),
        "test_labels": np.array([0], np.int32),
        "num_classes": 2,
        "mean": (0.0,),
        "std": (1.0,),
    }
    return data.ImageData(**(fields | changes))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"test_images": np.zeros((0, 2, 2, 1), np.uint8), "test_labels": np.zeros(0, np.int32)},
            "`test_images` must hold at least one image, got an empty split: prepare or choose",
        ),
        (
            {"train_images": np.zeros((3, 2, 2, 1), np.float32)},
            r"`train_images` must be uint8 \[n, h, w, c\], got float32 \[3, 2, 2, 1\]: convert",
        ),
        (
            {"train_images": np.zeros((3, 2, 2), np.uint8)},
            r"`train_images` must be uint8 \[n, h, w, c\], got uint8 \[3, 2, 2\]: convert",
        ),
        (
            {"train_labels": np.zeros(2, np.int32)},
            r"`train_labels` must be int32 \[3\], got int32 \[2\]: give one label per image",
        ),
        (
            {"train_labels": np.array([0, 1, 2], np.int32)},
            r"`train_labels` must be in \[0, 2\), got 0 to 2: correct the labels",
        ),
    ],
)
def test_image_data_is_checked(changes, message):
    assert image_data().num_classes == 2
    with pytest.raises(ValueError, match=message):
        image_data(**changes)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_normalize(dtype):
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 5, 3), np.uint8)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.25, 1.0)
    result = jax.jit(lambda x: data.normalize(x, mean, std, dtype))(images)
    assert result.dtype == dtype
    expected = (images / 255 - np.array(mean)) / np.array(std)
    tolerance = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.asarray(result, np.float64), expected, rtol=4 * tolerance, atol=4e-6
    )


@pytest.mark.quick
def test_normalize_errors():
    images = jnp.zeros((1, 2, 2, 3), jnp.uint8)
    with pytest.raises(TypeError, match="`images` must be uint8, got float32: give pixels from 0"):
        data.normalize(images.astype(jnp.float32), (0.0,) * 3, (1.0,) * 3)
    with pytest.raises(
        ValueError, match="`mean` must have one value for each of 3 channels, got 1"
    ):
        data.normalize(images, (0.0,), (1.0,) * 3)
    with pytest.raises(ValueError, match="`std` must have one value for each of 3 channels, got 2"):
        data.normalize(images, (0.0,) * 3, (1.0,) * 2)
