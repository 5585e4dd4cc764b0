"""Trained networks from state dicts and from runs, and what is wrong with others."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import (
    standard_promotion,  # noqa: F401
    tiny,  # noqa: F401
    tiny_config,
    tree_bytes,
)
from torch_networks import Weights, resnet

from compand_jax.data.images import ImageData
from compand_jax.experiments.errors import UserError
from compand_jax.experiments.ptq import checkpoint as trained_checkpoints
from compand_jax.experiments.ptq.checkpoint import digest, load_checkpoint
from compand_jax.experiments.runs import run as experiments
from compand_jax.experiments.runs.config import FULL_PRECISION
from compand_jax.experiments.runs.stages import finished


def color_data(*_):
    images, labels = np.zeros((3, 32, 32, 3), np.uint8), np.zeros(3, np.int32)
    return ImageData("cifar10", images, labels, images, labels, 10, (0.1, 0.2, 0.3), (0.5,) * 3)


@pytest.fixture(scope="module")
def state_dict():
    weights = Weights()
    resnet(weights, np.zeros((1, 3, 32, 32)), 20)
    return weights.state_dict


@pytest.fixture
def path(state_dict, tmp_path, monkeypatch):
    monkeypatch.setattr(trained_checkpoints, "load_data", color_data)
    np.savez(tmp_path / "net.npz", **state_dict)
    return tmp_path / "net.npz"


def load(path, **fields):
    return load_checkpoint(path, data_dir=path.parent, **fields)


@pytest.mark.quick
def test_state_dict(path, state_dict):
    found = load(path)
    assert (found.name, found.pad, found.flip) == ("resnet20", 4, True)
    kernel = found.variables["params"]["conv1"]["kernel"]
    np.testing.assert_array_equal(kernel, state_dict["conv1.weight"].transpose(2, 3, 1, 0))
    # That of the public networks, not the data's own.
    assert found.data.mean == (0.485, 0.456, 0.406)
    assert found.data.std == (0.229, 0.224, 0.225)
    own = load(path, model="resnet20", dataset="cifar10", mean=(0.0, 0.1, 0.2))
    assert (own.data.mean, own.data.std) == ((0.0, 0.1, 0.2), (0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "resnet32"}, "`state_dict` must hold the arrays of ResNet.*layer1.3.conv1"),
        ({"model": "vgg19"}, "`state_dict` must hold the arrays of VGG.*features.0.weight: re"),
        ({"model": "cnn"}, "`model` must be an AlexNet, VGG or ResNet"),
        ({"mean": (0.5, 0.5)}, r"`mean` must be 3 finite numbers, .*, got \(0.5, 0.5\)"),
        ({"std": (1.0, 0.0, 1.0)}, "`std` must be 3 finite positive numbers, one for each channel"),
        ({"dataset": "digits"}, "`dataset` must be cifar10 or cifar100 for a state dict, got 'dig"),
        ({"std": (1.0, np.nan, 1.0)}, "`std` must be 3 finite positive numbers, one for each chan"),
    ],
)
def test_another_network_or_wrong_numbers(path, fields, message, monkeypatch):
    monkeypatch.setattr(trained_checkpoints, "load_data", None)  # it is not come to
    with pytest.raises(UserError, match=message):
        load(path, **fields)


@pytest.mark.quick
def test_missing_and_truncated(path):
    with pytest.raises(UserError, match="`checkpoint` must be an .npz .* not exist"):
        load(path.with_name("other.npz"))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="`checkpoint` must be that of a whole .npz file"):
        load(path)


def test_run_directory(tmp_path, tiny):  # noqa: F811
    config = tiny_config(tmp_path / "run", methods=(), pad=1, mean=(0.25,), std=(0.5,))
    experiments.run(config, progress=False)
    found = load(tmp_path / "run")
    variables = finished(config, experiments.load_run_data(config), FULL_PRECISION)[1].variables
    assert tree_bytes(found.variables) == tree_bytes(variables)
    assert (found.name, found.pad, found.flip) == (config.model, 1, False)
    assert (found.data.mean, found.data.std) == ((0.25,), (0.5,))  # the run's own
    for name, value in {"model": "resnet20", "mean": (0.5,)}.items():
        with pytest.raises(UserError, match=f"`{name}` must be left out for a run directory"):
            load(tmp_path / "run", **{name: value})
    with pytest.raises(UserError, match="`run_dir` must be a run's directory"):
        load(tmp_path)


@pytest.mark.quick
def test_digest_is_of_every_number_and_name():
    tree = {"a": jnp.zeros(2), "b": jnp.ones((1, 2))}
    others = [
        {"a": jnp.zeros(2), "b": jnp.ones((1, 2)).at[0, 1].set(1 + 1e-6)},
        {"a": jnp.zeros(2), "c": jnp.ones((1, 2))},
        {"a": jnp.zeros(2), "b": jnp.ones((2, 1))},
    ]
    assert digest(tree) == digest(dict(reversed(tree.items())))
    assert len({digest(one) for one in (tree, *others)}) == 4


def test_data_is_otherwise_the_same(path):
    given, found = color_data(), load(path).data
    for field in dataclasses.fields(ImageData):
        if field.name not in ("mean", "std"):
            np.testing.assert_array_equal(getattr(found, field.name), getattr(given, field.name))
