"""Networks in StableHLO and ONNX: run by other programs, with the same answers."""

import importlib
import subprocess
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import KEY, drawn

import compand_jax as cj
from compand_jax.data.images import normalize
from compand_jax.experiments.errors import UserError
from compand_jax.experiments.runs.export import load_predictor, to_onnx, to_stablehlo
from compand_jax.models import AlexNet

pytestmark = pytest.mark.filterwarnings(
    "ignore:the quantized model is not calibrated"  # its mu and scales are drawn at random here
)
SHAPE = (8, 8, 1)


class Small(nn.Module):
    """A convolution, batch norm and a dense layer, for images of 8 x 8 pixels."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        return nn.Dense(10, name="dense")(x.reshape(x.shape[0], -1))


def images(n):
    return np.random.default_rng(n).integers(0, 256, (n, *SHAPE)).astype(np.uint8)


def network(**config):
    x = normalize(images(1), (0.5,), (0.3,))
    qmodel = cj.quantize_model(Small(), cj.QuantConfig(**config))
    frozen = cj.freeze(qmodel, drawn(qmodel, x), x)
    return frozen, jax.jit(lambda x: frozen.apply(normalize(x, (0.5,), (0.3,))))


ALONE = """
import sys
import jax, numpy as np
exported = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
assert set(exported.platforms) == {"cpu", "cuda", "tpu"}, exported.platforms
for name in sys.argv[2:]:
    np.save(name + ".out.npy", exported.call(np.load(name)))
assert not [name for name in sys.modules if name.partition(".")[0] in ("compand_jax", "flax")]
"""


def test_stablehlo_runs_without_this_library(tmp_path):
    _, predict = network(weight_bits=3)
    path = tmp_path / "model.stablehlo"
    path.write_bytes(to_stablehlo(predict, SHAPE, np.uint8))
    names = []
    for n in (1, 7):
        names.append(str(tmp_path / f"{n}.npy"))
        np.save(names[-1], images(n))
    script = [sys.executable, "-c", f"import jax.export{ALONE}", str(path), *names]
    process = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    for n, name in zip((1, 7), names, strict=True):
        np.testing.assert_allclose(np.load(name + ".out.npy"), predict(images(n)), atol=1e-5)
    found, data_set = load_predictor(path)
    np.testing.assert_allclose(found(images(7)), predict(images(7)), atol=1e-5)
    assert data_set == "digits"


def test_files_that_cannot_be_run(tmp_path):
    for suffix, message in {
        "stablehlo": "`path` must be a StableHLO file",
        "safetensors": "`path` must be a frozen model's file",
        "pt": "`path` must end in one of .safetensors, .stablehlo, .onnx, got",
    }.items():
        path = tmp_path / f"x.{suffix}"
        path.write_bytes(b"not a model" * 99)
        with pytest.raises(UserError, match=message):
            load_predictor(path)
    frozen, _ = network(weight_bits=3)
    frozen.save(tmp_path / "own.safetensors")
    with pytest.raises(UserError, match="without 'model': use load_frozen with your own model"):
        load_predictor(tmp_path / "own.safetensors")
    other = to_stablehlo(lambda x: x.sum((1, 2)), (5, 5, 2), jnp.float32)
    (tmp_path / "other.stablehlo").write_bytes(other)
    with pytest.raises(UserError, match="must be for a known data set, got .* \\[5, 5, 2\\]"):
        load_predictor(tmp_path / "other.stablehlo")


@pytest.mark.onnx
@pytest.mark.parametrize(
    "config",
    [
        {"weight_bits": 3, "act_bits": None},
        {"weight_bits": 4, "act_bits": None, "weight_granularity": "channel", "grid": "midrise"},
        {"weight_bits": 8, "act_bits": 5},
    ],
)
def test_onnx(config, tmp_path):
    frozen, predict = network(**config)
    written = to_onnx(lambda x: frozen.apply_dense(normalize(x, (0.5,), (0.3,))), SHAPE, np.uint8)
    path = tmp_path / "model.onnx"
    path.write_bytes(written)
    found, data_set = load_predictor(path)
    assert data_set == "digits"
    for n in (1, 64):
        expected = np.asarray(predict(images(n)))
        same = np.isclose(found(images(n)), expected, atol=1e-4).all(1)
        # A last bit in the convolution can flip an activation's code.
        assert same.all() if config["act_bits"] is None else same.mean() > 0.8
    path.write_bytes(written[: len(written) // 2])
    with pytest.raises(UserError, match="`path` must be an ONNX file"):
        load_predictor(path)


@pytest.mark.quick
def test_a_jax_that_jax2onnx_does_not_know(monkeypatch):
    def fail(function, arguments):
        raise AttributeError("no attribute 'ClosedJaxpr'")

    monkeypatch.setitem(sys.modules, "jax2onnx", types.SimpleNamespace(to_onnx=fail))
    with pytest.raises(UserError, match=r"jax2onnx knows, got .* \(no attribute 'ClosedJaxpr'\)"):
        to_onnx(lambda x: x, (3,), jnp.float32)


@pytest.mark.onnx
def test_onnx_has_convolutions_where_a_cpu_would_multiply_matrices():
    onnx = importlib.import_module("onnx")  # of the extra that the marker stands for
    model, x = AlexNet(), jnp.zeros((1, 32, 32, 3))
    variables = jax.jit(model.init)(KEY, x)
    written = to_onnx(lambda x: model.apply(variables, x), (32, 32, 3), jnp.float32)
    operations = [node.op_type for node in onnx.load_from_string(written).graph.node]
    assert operations.count("Conv") == 5
