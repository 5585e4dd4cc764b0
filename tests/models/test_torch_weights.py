"""State dicts of PyTorch networks, against those networks in plain NumPy, [n, c, h, w], float64."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from torch_networks import made

from compand_jax.models import CNN, MODELS, VGG, AlexNet, ResNet, create_model
from compand_jax.models.torch_weights import (
    import_state_dict,
    load_npz_state_dict,
    load_safetensors_state_dict,
)


# The public networks' own lists: (out, kernel, stride, padding) a convolution, "M" a max pool.
@pytest.fixture(scope="module")
def of_alexnet():
    return made("alexnet")[0]


@pytest.fixture(scope="module")
def of_resnet():
    return made("resnet20")[0]


def assert_same(variables, expected):
    assert jax.tree.structure(variables) == jax.tree.structure(expected)
    assert jax.tree.all(jax.tree.map(np.array_equal, variables, expected))


@pytest.mark.parametrize("network", ["alexnet", "alexnet-bn", "vgg11", "resnet20"])
def test_forward_is_that_of_the_pytorch_network(network):
    state_dict, x, logits = made(network, batch=2)
    # A network that did not see its images would prove nothing.
    assert np.abs(logits[0] - logits[1]).max() > 0.1 * np.abs(logits).max() > 0
    model = create_model(network, 10)
    ours = jax.jit(model.apply)(import_state_dict(state_dict, model), x)
    assert np.abs(ours - logits).max() < 1e-4 * np.abs(logits).max()


@pytest.mark.parametrize("network", sorted(MODELS.keys() - {"cnn", "vgg-small"}))
def test_tree_is_that_of_init(network):
    model = create_model(network, 10)
    variables = import_state_dict(made(network)[0], model)
    expected = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert jax.tree.structure(variables) == jax.tree.structure(expected)
    for ours, shape in zip(jax.tree.leaves(variables), jax.tree.leaves(expected), strict=True):
        assert (ours.shape, ours.dtype) == (shape.shape, jnp.float32)


@pytest.mark.quick
def test_other_names_of_the_same(of_alexnet):
    expected = import_state_dict(of_alexnet, AlexNet())
    parallel = {f"module.{name}": value for name, value in of_alexnet.items()}
    assert_same(import_state_dict(parallel, AlexNet()), expected)
    for dense in ("classifier.0", "classifier.1", "fc", "linear"):
        renamed = {name.replace("classifier", dense): of_alexnet[name] for name in of_alexnet}
        assert_same(import_state_dict(renamed, AlexNet()), expected)
    # Without a norm the block orders compute the same.
    assert_same(import_state_dict(of_alexnet, AlexNet(block_order="norm_act_conv")), expected)


def test_biases_before_a_norm_may_be_missing():
    state_dict = made("vgg11")[0]
    bias, mean = state_dict["features.4.bias"], state_dict["features.5.running_mean"]
    folded = import_state_dict(state_dict, VGG(depth=11))
    np.testing.assert_array_equal(
        folded["batch_stats"]["norm2"]["mean"], (mean.astype(float) - bias).astype(np.float32)
    )
    biases = [f"features.{n}.bias" for n in (0, 4, 8, 11, 15, 18, 22, 25)]
    without = {name: value for name, value in state_dict.items() if name not in biases}
    assert len(without) == len(state_dict) - 8
    plain = import_state_dict(without, VGG(depth=11))
    np.testing.assert_array_equal(plain["batch_stats"]["norm2"]["mean"], mean)
    assert_same(plain["params"], folded["params"])


@pytest.mark.quick
def test_input_is_neither_changed_nor_shared(of_resnet):
    given = {name: np.array(value) for name, value in of_resnet.items()}
    given["conv1.bias"] = np.ones(16, np.float32)
    before = {name: value.copy() for name, value in given.items()}
    variables = import_state_dict(given, ResNet())
    kept = jax.tree.map(np.array, variables)
    assert given.keys() == before.keys()
    for name, value in given.items():
        np.testing.assert_array_equal(value, before[name])
        value[...] = 0
    assert_same(variables, kept)


@pytest.mark.quick
def test_types_and_values_are_taken_as_they_are(of_resnet):
    given = {name: jnp.asarray(value) for name, value in of_resnet.items()}
    given["linear.bias"] = np.array([np.nan, np.inf, *range(8)], np.float64)
    given["conv1.weight"] = jnp.asarray(of_resnet["conv1.weight"], jnp.bfloat16)
    given["bn1.bias"] = of_resnet["bn1.bias"].astype(np.float16)
    variables = import_state_dict(given, ResNet(dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(variables["params"]["dense"]["bias"], given["linear.bias"])
    np.testing.assert_array_equal(
        variables["params"]["conv1"]["kernel"][1, 2, 0, 5], given["conv1.weight"][5, 0, 1, 2]
    )


def error_of(state_dict, model):
    with pytest.raises(ValueError, match="`state_dict` must") as caught:
        import_state_dict(state_dict, model)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.quick
def test_every_difference_is_listed(of_resnet):
    given = dict(of_resnet)
    del given["layer2.1.bn2.running_var"], given["linear.bias"]
    given |= {
        "conv1.weight": np.zeros((16, 3, 5, 5)),
        "bn1.weight": np.zeros(16, np.int8),
        "bn1.bias": np.float32(0),
        "layer1.0.conv1.bias": np.zeros(15),
        "layer2.0.downsample.0.weight": np.zeros((32, 16, 1, 1)),
        "module.linear.weight": given["linear.weight"],
        "epoch": 164,
    }
    assert error_of(given, ResNet()) == (
        "`state_dict` must hold the arrays of ResNet(depth=20, num_classes=10), 9 of which differ: "
        "bn1.bias: required [16], got []; bn1.weight: required [16], got int8 [16]; "
        "conv1.weight: required [16, 3, 3, 3], got [16, 3, 5, 5]; "
        "epoch: required none, got int64 []; "
        "layer1.0.conv1.bias: required [16], got [15]; "
        "layer2.0.downsample.0.weight: required none, got [32, 16, 1, 1]; "
        "layer2.1.bn2.running_var: required [32], got none; "
        "linear.bias: required [10], got none; "
        "module.linear.weight: required none, got [10, 64]: "
        "give the model it was trained as"
    )


@pytest.mark.quick
def test_another_network(of_resnet, of_alexnet):
    message = error_of(of_resnet, ResNet(num_classes=100))
    assert "ResNet(depth=20, num_classes=100), 2 of which differ" in message
    assert "linear.weight: required [100, 64], got [10, 64]" in message
    # Two more blocks of two convolutions (1 array each) and two norms (4) in a stage.
    assert error_of(of_resnet, ResNet(depth=32)).count("got none") == 3 * 2 * 2 * 5
    assert "features.1.running_mean: required [64], got none" in error_of(
        of_alexnet, AlexNet(norm="batch")
    )
    assert error_of({}, AlexNet()).count("got none") == 12
    assert "conv1.weight: required none, got [16, 3, 3, 3]" in error_of(of_resnet, AlexNet())


@pytest.mark.quick
def test_what_is_no_state_dict(of_resnet):
    checkpoint = {"best_prec1": 91.7, "state_dict": of_resnet}
    assert "got a mapping under 'state_dict'" in error_of(checkpoint, ResNet())
    ragged = error_of({"conv1.weight": [[1.0], [1.0, 2.0]]}, ResNet())
    assert "got list under 'conv1.weight', which NumPy cannot take" in ragged


@pytest.mark.quick
@pytest.mark.parametrize("model", [VGG, ResNet])
def test_another_order_of_blocks(of_resnet, model):
    match = "`model` must have block_order='conv_norm_act'.*, got 'norm_act_conv'"
    with pytest.raises(ValueError, match=match):
        import_state_dict(of_resnet, model(block_order="norm_act_conv"))


@pytest.mark.quick
def test_another_kind_of_model(of_resnet):
    with pytest.raises(TypeError, match=r"`model` must be an AlexNet, VGG or ResNet .*, got CNN"):
        import_state_dict(of_resnet, CNN())


@pytest.mark.quick
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_file(tmp_path, save, of_resnet):
    save(tmp_path / "w.npz", **of_resnet)
    loaded = load_npz_state_dict(str(tmp_path / "w.npz"))
    assert loaded.keys() == of_resnet.keys()
    assert_same(import_state_dict(loaded, ResNet()), import_state_dict(of_resnet, ResNet()))


@pytest.mark.quick
def test_npz_file_that_is_not_there(tmp_path):
    path = tmp_path / "none.npz"
    with pytest.raises(FileNotFoundError, match=re.escape(f"got {path}, which does not exist")):
        load_npz_state_dict(path)
    with pytest.raises(OSError, match=re.escape(str(tmp_path))):
        load_npz_state_dict(tmp_path)


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


@pytest.mark.quick
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_file_that_is_damaged(tmp_path, save):
    path = tmp_path / "w.npz"
    save(path, **{"linear.bias": np.arange(100.0), "linear.weight": np.ones(3)})
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        assert_not_npz(path, whole[:size])
    for at in range(0, len(whole), 7):
        path.write_bytes(flipped(whole, at))
        # Not every byte matters, but no other error may come of it.
        with contextlib.suppress(ValueError):
            load_npz_state_dict(path)


@pytest.mark.quick
def test_file_of_another_format(tmp_path):
    path = tmp_path / "w.npz"
    np.save(tmp_path / "array.npy", np.ones(3))
    np.savez(tmp_path / "objects.npz", a=np.array([None], object))
    files = [(tmp_path / name).read_bytes() for name in ("array.npy", "objects.npz")]
    for data in (*files, b"\x80\x02pickle", b"text"):
        assert_not_npz(path, data)


def assert_not_npz(path, data):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(f"got {path}, which is damaged")) as caught:
        load_npz_state_dict(path)
    assert "\n" not in str(caught.value)


@pytest.mark.quick
@pytest.mark.parametrize("given", [None, [1, 2], np.zeros(3)])
def test_a_state_dict_is_a_mapping(given):
    plainly = getattr(import_state_dict, "__wrapped__", import_state_dict)
    with pytest.raises(TypeError, match=r"`state_dict` must map names to arrays, got (None|li|nd)"):
        plainly(given, AlexNet())


def test_safetensors_file_as_it_was_saved(tmp_path):
    arrays = {"a": np.arange(3, dtype=np.float16), "b": np.full((2, 1), 7, np.int64)}
    safetensors.numpy.save_file(arrays, tmp_path / "w.safetensors")
    found = load_safetensors_state_dict(tmp_path / "w.safetensors")
    assert {name: x.dtype for name, x in found.items()} == {"a": np.float16, "b": np.int64}
    assert_same(found, arrays)


def test_safetensors_file_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`path` must be that of a \.safetensors file"):
        load_safetensors_state_dict(tmp_path / "none")
    (tmp_path / "cut").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError, match=r"whole \.safetensors file, got .* damaged"):
        load_safetensors_state_dict(tmp_path / "cut")
