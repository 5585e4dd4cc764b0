"""The images that networks are calibrated with."""

import dataclasses

import numpy as np
import pytest
from tiny_runs import tiny_data

from compand_jax.data.calibration_images import BATCH_SIZE, choose_calibration_images


def wanted(data, images):
    return (images / 255.0 - np.array(data.mean)) / np.array(data.std)


def rows_of(images):
    return {image.tobytes() for image in images}


def test_plain_images_are_chosen_without_repetition_and_normalized():
    data = tiny_data(train=64)
    chosen = choose_calibration_images(data, 20, pad=0, flip=False, seed=3)
    (batch,) = chosen
    np.testing.assert_allclose(batch, wanted(data, chosen.images), atol=1e-6)
    assert len(rows_of(chosen.images)) == 20
    assert rows_of(chosen.images) <= rows_of(data.train_images)
    assert not np.array_equal(chosen.images, data.train_images[:20])
    other = choose_calibration_images(data, 20, pad=0, flip=False, seed=4)
    assert rows_of(other.images) != rows_of(chosen.images)
    assert np.array_equal(chosen.first(5).images, chosen.images[:5])


def test_every_pass_sees_the_same_augmented_images():
    data = tiny_data(train=2 * BATCH_SIZE + 10)
    chosen = choose_calibration_images(data, len(data.train_labels), pad=2, flip=True, seed=0)
    first, second = list(chosen), list(chosen)
    # 522 images are three batches of 174: none is much smaller than another.
    assert [batch.shape for batch in first] == [(174, 4, 4, 1)] * 3
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    plain = list(dataclasses.replace(chosen, pad=0, flip=False))
    moved = [np.any(np.asarray(a != b), axis=(1, 2, 3)).mean()
             for a, b in zip(first, plain, strict=True)]  # fmt: skip
    assert min(moved) > 0.8  # 1 of 50 stays where it was
    pairs = zip(first[0], first[1], strict=True)
    assert any(np.any(np.asarray(a != b)) for a, b in pairs)  # no two batches moved alike


@pytest.mark.quick
@pytest.mark.parametrize("count", [0, 65])
def test_number_of_images(count):
    message = f"`images` must be from 1 to the 64 training images, got {count}: calibration needs"
    with pytest.raises(ValueError, match=message):
        choose_calibration_images(tiny_data(), count, pad=0, flip=False, seed=0)
