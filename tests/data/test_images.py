"""Loading, normalization and augmentation."""

import functools

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
        "run `python scripts/prepare_data.py cifar10 --data-dir '.*my data'`"
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


def oracle(images, offsets, flips, pad):
    _, h, w, c = images.shape
    result = np.zeros_like(images)
    for i, ((top, left), flip) in enumerate(zip(offsets, flips, strict=True)):
        big = np.zeros((h + 2 * pad, w + 2 * pad, c), images.dtype)
        big[pad : pad + h, pad : pad + w] = images[i]
        crop = big[top : top + h, left : left + w]
        result[i] = crop[:, ::-1] if flip else crop
    return result


def random_images(n=64, h=6, w=5, c=3):
    return np.random.default_rng(1).integers(1, 256, (n, h, w, c), np.uint8)


@pytest.mark.quick
@pytest.mark.parametrize("pad", [0, 1, 4, 7])
def test_crop_and_flip_equals_numpy(pad):
    images = random_images()
    rng = np.random.default_rng(2)
    offsets = rng.integers(0, 2 * pad + 1, (len(images), 2), np.int32)
    flips = rng.random(len(images)) < 0.5
    result = jax.jit(functools.partial(data.crop_and_flip, pad=pad))(images, offsets, flips)
    np.testing.assert_array_equal(result, oracle(images, offsets, flips, pad))
    assert result.dtype == jnp.uint8


@functools.partial(jax.jit, static_argnames=("pad", "flip"))
def augment(key, images, pad, flip):
    return data.augment(key, images, pad=pad, flip=flip)


@pytest.mark.quick
def test_augment_off_is_the_identity():
    images = random_images()
    np.testing.assert_array_equal(augment(jax.random.key(0), images, 0, False), images)


@pytest.mark.quick
def test_augment_depends_on_the_key_alone():
    images = random_images()
    first = augment(jax.random.key(3), images, 4, True)
    np.testing.assert_array_equal(first, augment(jax.random.key(3), images, 4, True))
    np.testing.assert_array_equal(first, augment(jax.random.PRNGKey(3), images, 4, True))
    assert (first != augment(jax.random.key(4), images, 4, True)).any()


def all_outcomes(image, pad, flip):
    """Every image that augmentation can make of one -> (offset, flip)."""
    grid = [(r, c) for r in range(2 * pad + 1) for c in range(2 * pad + 1)]
    choices = [(o, f) for o in grid for f in ((False, True) if flip else (False,))]
    images = np.repeat(image[None], len(choices), axis=0)
    offsets, flips = zip(*choices, strict=True)
    crops = oracle(images, offsets, flips, pad)
    return {crop.tobytes(): choice for crop, choice in zip(crops, choices, strict=True)}


@pytest.mark.parametrize(("pad", "flip"), [(2, True), (2, False), (0, True)])
def test_augment_draws_every_crop_and_flip_equally_often(pad, flip):
    image = random_images(1)[0]
    outcomes = all_outcomes(image, pad, flip)
    draws = 200 * len(outcomes)
    images = np.repeat(image[None], draws, axis=0)
    result = np.asarray(augment(jax.random.key(5), images, pad, flip))
    counts = dict.fromkeys(outcomes, 0)
    for crop in result:
        counts[crop.tobytes()] += 1  # A KeyError is an image that must not be made.
    # Each count is binomial, about 200 with a deviation of 14.
    assert max(abs(count - 200) for count in counts.values()) < 5 * 200**0.5


@pytest.mark.quick
def test_augment_errors():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"`images` must be \[n, h, w, c\], got \[4, 4, 3\]"):
        data.augment(key, jnp.zeros((4, 4, 3), jnp.uint8), pad=1, flip=True)
    with pytest.raises(ValueError, match="`pad` must be at least 0 pixels, got -1: 0 turns it off"):
        data.augment(key, jnp.zeros((1, 4, 4, 3), jnp.uint8), pad=-1, flip=True)
