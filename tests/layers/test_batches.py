"""Batches as loaders give them."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from small_models import assert_same

import compand_jax as cj

X = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
LABELS = np.zeros(5, np.int32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))

    def encode(self, x, mask=None):
        return self(x) if mask is None else self(x) * mask


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x)


class DataSet:
    """As of PyTorch: a length and items, no iterator, and an error of its own past the end."""

    def __len__(self):
        return 3

    def __getitem__(self, i):
        if not 0 <= i < 3:
            raise KeyError(i)
        return X[i]


def calibrate(model, batches, **arguments):
    variables = model.init(jax.random.key(0), X[0])
    config = cj.QuantConfig(weight_bits=3, act_bits=3)
    return cj.quantize_model(model, config).calibrate(variables, batches, **arguments)[1]


def test_a_data_set_without_an_iterator():
    assert_same(calibrate(Net(), DataSet()), calibrate(Net(), list(X)))


REMEDY = (
    r"a batch is the model's positional arguments; without labels it is \[x for x, \*_ in batches\]"
)


@pytest.mark.parametrize(
    ("model", "batch", "arguments", "message"),
    [
        (Plain(), (X[0], LABELS), {}, "`batches` must hold the 1 positional arguments .*, got 2: "),
        (
            Net(),
            (X[0], LABELS),
            {},
            "`batches` must not hold the model's `train`, got an array of ",
        ),
        (Net(), (X[0], LABELS), {"train": False}, "`batches` must not hold the model's `train`, "),
        (Net(), (X[0], LABELS, X[1]), {"method": "encode"}, ".* hold the 2 positional .*, got 3: "),
        (Net(), (X[0], LABELS, X[1]), {"method": Net.encode}, ".* the 2 positional .*, got 3: "),
    ],
)
def test_labels_are_named(model, batch, arguments, message):
    with pytest.raises(TypeError, match=message + ".*" + REMEDY):
        calibrate(model, [batch], **arguments)


@pytest.mark.parametrize("batch", [[X[0], LABELS], {"image": X[0], "label": LABELS}])
def test_labels_elsewhere_are_told_beside_the_models_error(batch):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the model's own, whatever it is
        calibrate(Net(), [batch])
    note = caught.value.__notes__[-1]
    assert note.startswith("In calibration, a batch is the model's positional arguments; without")


def test_more_than_one_argument_of_the_model():
    mask = np.ones((5, 3), np.float32)
    found = calibrate(Net(), [(x, mask) for x in X], method="encode")
    assert_same(found, calibrate(Net(), list(X), method=Net.encode))
