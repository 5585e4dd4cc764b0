"""Crops and flips, against NumPy and by how often each is drawn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compand_jax.data import augmentation


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
    result = jax.jit(functools.partial(augmentation.crop_and_flip, pad=pad))(images, offsets, flips)
    np.testing.assert_array_equal(result, oracle(images, offsets, flips, pad))
    assert result.dtype == jnp.uint8


@functools.partial(jax.jit, static_argnames=("pad", "flip"))
def augment(key, images, pad, flip):
    return augmentation.augment(key, images, pad=pad, flip=flip)


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
        augmentation.augment(key, jnp.zeros((4, 4, 3), jnp.uint8), pad=1, flip=True)
    with pytest.raises(ValueError, match="`pad` must be at least 0 pixels, got -1: 0 turns it off"):
        augmentation.augment(key, jnp.zeros((1, 4, 4, 3), jnp.uint8), pad=-1, flip=True)
