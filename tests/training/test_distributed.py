"""Two processes with a device each, against one process with two."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from small_models import QUICKLY_FLAGS

from compand_jax.training.checkpoints import Checkpoints
from compand_jax.training.distributed import data_mesh, initialize, replicate
from compand_jax.training.metrics_log import read_log

WORKER = Path(__file__).parents[1] / "distributed_worker.py"
TIMEOUT = 400


def start(out, devices, **variables):
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICKLY_FLAGS}",
        "PYTHONPATH": os.pathsep.join([str(WORKER.parents[1]), *sys.path]),
        "JAX_PLATFORMS": "cpu",
    }
    out.mkdir(exist_ok=True)
    # To a file: a pipe that is full would hang.
    with open(out / f"log{variables.get('JAX_PROCESS_ID', '')}.txt", "w") as log:
        return subprocess.Popen(
            [sys.executable, str(WORKER), str(out)],
            env=environment | variables,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def free_port():
    with contextlib.closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def finish(processes, out):
    try:
        codes = [process.wait(TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = "\n".join(path.read_text()[-3000:] for path in sorted(out.glob("log*.txt")))
    assert set(codes) == {0}, logs


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("distributed")
    finish([start(root / "one", devices=2)], root / "one")
    where = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
    }
    two = [start(root / "two", devices=1, JAX_PROCESS_ID=str(i), **where) for i in range(2)]
    finish(two, root / "two")
    return root


@pytest.mark.parametrize("name", ["full", "quantized"])
def test_same_loss_and_gradients(outputs, name):
    one, two = (dict(np.load(outputs / count / f"{name}.npz")) for count in ("one", "two"))
    assert one.keys() == two.keys()
    assert any("compand" in key for key in one) == (name == "quantized")
    assert max(np.abs(grad).max() for key, grad in one.items() if key != "loss") > 1e-3
    # A code that flips by a rounding moves a gradient by more than rounding.
    tolerance = 1e-5 if name == "full" else 1e-3
    np.testing.assert_allclose(one["loss"], two["loss"], rtol=tolerance)
    for key in one:
        largest = np.abs(one[key]).max()
        np.testing.assert_allclose(
            two[key], one[key], rtol=0, atol=tolerance * largest + 1e-6, err_msg=key
        )


def test_same_end_of_training_and_evaluation(outputs):
    one, two = (dict(np.load(outputs / count / "end.npz")) for count in ("one", "two"))
    assert abs(int(one.pop("correct")) - int(two.pop("correct"))) <= 1
    assert one.keys() == two.keys()
    for key in one:
        np.testing.assert_allclose(two[key], one[key], rtol=0, atol=2e-3, err_msg=key)


def test_written_once_and_readable_by_either(outputs):
    for count in ("one", "two"):
        assert len(read_log(outputs / count / "log.jsonl")) == 1
    trees = []
    for count in ("one", "two"):
        with Checkpoints(outputs / count / "checkpoints") as checkpoints:
            assert checkpoints.steps() == [2, 4]
            leaves = checkpoints._description(4)["leaves"]
            target = {
                name: jax.ShapeDtypeStruct(tuple(shape), dtype)
                for name, (dtype, shape) in leaves.items()
            }
            found = checkpoints.restore(traverse_util.unflatten_dict(target, sep="/"))
            assert found is not None
            trees.append(found[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), *trees)


def test_replicate_copies():
    key, x = jax.random.key(0), jnp.arange(3)
    copies = replicate({"key": key, "x": x}, data_mesh(jax.devices()[:2]))
    assert len(copies["x"].sharding.device_set) == 2
    jax.jit(lambda x: x + 1, donate_argnums=0)(copies["x"])
    assert x.tolist() == [0, 1, 2]
    assert (jax.random.key_data(copies["key"]) == jax.random.key_data(key)).all()


@pytest.mark.quick
def test_numbers_that_are_none(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match="`JAX_NUM_PROCESSES` must be a whole number, got 'two'"):
        initialize()


@pytest.mark.quick
def test_alone_and_not_told_where(monkeypatch):
    def fail(**numbers):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(ValueError, match="`distributed` must find the other processes, got none"):
        initialize()
