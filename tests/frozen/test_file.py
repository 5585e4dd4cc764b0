"""The file of a frozen model: small, readable without this library, and never trusted."""

import hashlib
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from frozen_files import X, saved_model, split
from small_models import KEY, NormedNet, drawn, normal

import compand_jax as cj
from compand_jax.frozen.file import MAX_HEADER, read_sealed, write_sealed
from compand_jax.frozen.model import read_info

pytestmark = pytest.mark.filterwarnings(
    "ignore:the quantized model is not calibrated"  # its mu and scales are drawn at random here
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("frozen") / "model.safetensors")


def test_saved_and_loaded(made, tmp_path):
    path, _, expected = made
    loaded = cj.load_frozen(path, NormedNet())
    np.testing.assert_array_equal(loaded.apply(normal(*X)), expected)
    assert read_info(path) == {"name": "normed"}
    loaded.save(tmp_path / "again.safetensors", info={"name": "normed"})
    again, first = read_sealed(tmp_path / "again.safetensors"), read_sealed(path)
    assert again[0] == first[0]
    assert again[1].keys() == first[1].keys()
    assert all(again[1][name].tobytes() == first[1][name].tobytes() for name in first[1])
    assert [found.name for found in tmp_path.iterdir()] == ["again.safetensors"]


class Scaled(nn.Module):
    """A layer, and a parameter without axes."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="dense")(x) * self.param("scale", nn.initializers.ones, ())


def test_a_parameter_without_axes(tmp_path):
    qmodel, x = cj.quantize_model(Scaled(), cj.QuantConfig()), normal(*X)
    frozen = cj.freeze(qmodel, drawn(qmodel, x), x)
    frozen.save(tmp_path / "scaled.safetensors")
    loaded = cj.load_frozen(tmp_path / "scaled.safetensors", Scaled())
    assert loaded.arrays["variables"]["params/scale"].shape == ()
    np.testing.assert_array_equal(loaded.apply(x), frozen.apply(x))


def test_read_with_numpy_and_json_alone(made):
    """As docs/frozen_format.md describes the format."""
    path, frozen, _ = made
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    types = {"U8": np.uint8, "F32": np.float32}

    def array(name):
        entry = header[name]
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        return np.frombuffer(data[start:stop], types[entry["dtype"]]).reshape(entry["shape"])

    metadata = header["__metadata__"]
    unsealed = data.replace(metadata["sha256"].encode(), b"0" * 64)
    assert hashlib.sha256(unsealed).hexdigest() == metadata["sha256"]
    description = json.loads(metadata["description"])
    assert set(description["sites"]) == {"first", "second"}
    for site, fields in description["sites"].items():
        weight = fields["weight"]
        count, bits = int(np.prod(weight["shape"])), weight["bits"]
        stream = np.unpackbits(array(f"codes/{site}"), bitorder="little")[: count * bits]
        codes = stream.reshape(count, bits) @ (1 << np.arange(bits))
        codes = codes.reshape(weight["shape"])
        assert weight["scale_shape"] == [1, weight["shape"][-1]]
        values = array(f"levels/{site}")[codes] * array(f"scales/{site}")
        np.testing.assert_array_equal(values, frozen.weight(site))
    bias = array("variables/params/first/bias")
    np.testing.assert_array_equal(bias, frozen.arrays["variables"]["params/first/bias"])


@pytest.mark.parametrize(("bits", "ratio"), [(4, 7.9), (3, 10.4)])
def test_a_file_has_the_size_that_its_bits_promise(bits, ratio, tmp_path):
    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(3):
                x = nn.Dense(1024, name=f"dense{i}")(x)
            return x

    x = jnp.ones((1, 1024))
    qmodel = cj.quantize_model(Wide(), cj.QuantConfig(weight_bits=bits, act_bits=4))
    variables = qmodel.init(KEY, x)
    frozen = cj.freeze(qmodel, variables, x)
    frozen.save(tmp_path / "wide.safetensors")
    size = (tmp_path / "wide.safetensors").stat().st_size
    codes, biases = 3 * 1024 * 1024 * bits // 8, 3 * 1024 * 4
    tables = 3 * 4 * (2**bits + 2 * 2**4)
    assert size <= 1.05 * (codes + biases) + tables + 65536
    assert size <= sum(leaf.nbytes for leaf in jax.tree.leaves(variables["params"])) / ratio
    row = next(line for line in frozen.summary().splitlines() if line.startswith("all"))
    assert row.split()[3] == str(codes + biases)


def test_compressed_where_that_gains(tmp_path):
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.laplace(size=(256, 256)) ** 3, jnp.float32)  # most codes are zero
    variables = {"params": {"kernel": kernel, "bias": jnp.zeros(256)}}
    qmodel = cj.quantize_model(nn.Dense(256), cj.QuantConfig(weight_bits=4, act_bits=None))
    compand = qmodel.init(KEY, jnp.ones((1, 256)))["compand"]
    compand["weight_scale"] = jnp.log(jnp.abs(kernel).max())
    frozen = cj.freeze(qmodel, {**variables, "compand": compand}, jnp.ones((1, 256)))
    for compress in (False, True):
        frozen.save(tmp_path / f"{compress}.safetensors", compress=compress)
    sizes = [(tmp_path / f"{c}.safetensors").stat().st_size for c in (False, True)]
    ideal = int(frozen.summary().splitlines()[1].split()[6])
    assert ideal < sizes[1] < 0.8 * sizes[0]
    again = cj.load_frozen(tmp_path / "True.safetensors", nn.Dense(256))
    np.testing.assert_array_equal(again.arrays["codes"][""], frozen.arrays["codes"][""])

    random = jnp.asarray(rng.uniform(-1, 1, (64, 64)), jnp.float32)  # nothing to gain
    config = cj.QuantConfig(quantizer="uniform", grid="midrise")  # 16 levels, all as frequent
    qmodel = cj.quantize_model(nn.Dense(64, use_bias=False), config)
    compand = {"weight_scale": jnp.zeros(())}
    frozen = cj.freeze(
        qmodel, {"params": {"kernel": random}, "compand": compand}, jnp.ones((1, 64))
    )
    frozen.save(tmp_path / "random.safetensors", compress=True)
    header, _ = split((tmp_path / "random.safetensors").read_bytes())
    assert json.loads(header["__metadata__"]["description"])["sites"][""]["encoding"] == "packed"


def test_of_another_model(made):
    with pytest.raises(ValueError, match="`model` must be the one that .* was made of"):
        cj.load_frozen(made[0], nn.Dense(3))

    class Wider(NormedNet):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.BatchNorm(use_running_average=True, name="norm")(nn.Dense(7, name="first")(x))
            return nn.Dense(3, name="second")(x)

    with pytest.raises(ValueError, match=r"batch_stats/norm/mean of shape \(7,\), not \(6,\)"):
        cj.load_frozen(made[0], Wider())


def test_what_cannot_be_saved(made, tmp_path):
    frozen = made[1]
    with pytest.raises(ValueError, match="JSON"):
        frozen.save(tmp_path / "x", info={"x": float("nan")})
    with pytest.raises(OSError, match="No such file"):
        frozen.save(tmp_path / "none" / "x")
    with pytest.raises(ValueError, match="at most 8388608 bytes of names and shapes"):
        write_sealed(tmp_path / "x", {"x": "y" * MAX_HEADER}, {})
    assert not list(tmp_path.iterdir())
