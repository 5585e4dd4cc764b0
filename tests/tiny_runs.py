"""The smallest network, data set and run that the tests of the training share."""

import dataclasses
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compand_jax.data.images import ImageData, pixel_statistics
from compand_jax.experiments.ptq.settings import Setting
from compand_jax.experiments.runs import run as experiments
from compand_jax.experiments.runs import stages
from compand_jax.experiments.runs.config import RunConfig
from compand_jax.layers.config import QuantConfig

SCRIPTS = Path(__file__).parents[1] / "scripts"
CLASSES = 3


class TinyNet(nn.Module):
    """One convolution, batch norm, and a dense layer."""

    num_classes: int = CLASSES
    width: int = 4

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Conv(self.width, (3, 3), use_bias=False, name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(x)
        x = nn.relu(x).reshape(x.shape[0], -1)
        return nn.Dense(self.num_classes, name="dense")(x)


def tiny_data(train: int = 64, test: int = 19, seed: int = 0) -> ImageData:
    """Images of 4 x 4 pixels that can be told apart, but not perfectly."""
    rng = np.random.default_rng(seed)
    splits = []
    for n in (train, test):
        labels = rng.integers(0, CLASSES, n).astype(np.int32)
        images = rng.integers(0, 200, (n, 4, 4, 1)).astype(np.uint8)
        images[np.arange(n), labels] = rng.integers(60, 256, (n, 4, 1))
        splits.append((images, labels))
    mean, std = pixel_statistics(splits[0][0])
    return ImageData("tiny", *splits[0], *splits[1], CLASSES, mean, std)


def tiny_config(run_dir: Path, **fields) -> RunConfig:
    """Four steps an epoch, two calls of two steps."""
    defaults = {
        "batch_size": 16,
        "epochs": 2,
        "finetune_epochs": 1,
        "warmup_epochs": 0.5,
        "learning_rate": 0.05,
        "calibration": "absmax",  # compiles in half the time
        "calibration_batches": 2,
        "steps_per_call": 2,
        "run_dir": run_dir,
    }
    return RunConfig(**(defaults | fields))


def tiny_variables(model=None, key: int = 0) -> dict:
    return (model or TinyNet()).init(jax.random.key(key), jnp.zeros((1, 4, 4, 1)))


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    """For modules that import it: optax's Adam and schedules mix types; ours are held elsewhere."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def tiny(monkeypatch):
    """Makes every run one of the tiny network on the tiny data; returns the data."""
    use_tiny(monkeypatch)
    return tiny_data()


def use_tiny(monkeypatch) -> None:
    monkeypatch.setattr(experiments, "load_data", lambda *_: tiny_data())
    monkeypatch.setattr(stages, "create_model", lambda name, classes, *_: TinyNet(classes))


def tree_bytes(tree) -> dict[str, bytes]:
    """Every leaf's bytes by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(_raw(leaf)).tobytes() for path, leaf in leaves}


def _raw(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def rows_without_time(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, by its name there."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def replace(config: RunConfig, **fields) -> RunConfig:
    return dataclasses.replace(config, **fields)


def quantized_to(weight_bits: int, act_bits: int | None = None, **fields) -> Setting:
    """A setting of post-training quantization, by its fields and those of its configuration."""
    return Setting(QuantConfig()).changed(weight_bits=weight_bits, act_bits=act_bits, **fields)
