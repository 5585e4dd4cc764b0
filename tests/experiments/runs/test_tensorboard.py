"""Event files, read back as TensorBoard reads them."""

import json
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from small_models import drawn
from tensorboardX.proto.event_pb2 import Event, SessionLog

# Fixtures are imported to be found (F401), and named again where they are used (F811).
from tiny_runs import TinyNet, standard_promotion, tiny, tiny_config  # noqa: F401

import compand_jax as cj
from compand_jax.experiments.errors import UserError
from compand_jax.experiments.runs.config import FULL_PRECISION
from compand_jax.experiments.runs.run import run
from compand_jax.experiments.runs.stages import finished
from compand_jax.experiments.runs.tensorboard import weight_histograms
from compand_jax.training.events import Events
from compand_jax.training.metrics_log import read_log
from compand_jax.training.steps import create_state

LAYERS = ("conv", "dense")


def read(directory):
    """Yields events, of records: a length and its checksum, bytes and their checksum."""
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def values(directory, kind):
    """Returns the scalars, or histograms, by tag and step."""
    found = {}
    for event in read(directory):
        for value in event.summary.value:
            if value.WhichOneof("value") == kind:
                found[value.tag, event.step] = getattr(value, kind)
    return found


def test_a_run_writes_its_metrics_and_its_weights(tiny, tmp_path):  # noqa: F811
    config = tiny_config(tmp_path, methods=(), epochs=1, tensorboard=True)
    run(config, progress=False)
    directory = tmp_path / FULL_PRECISION
    scalars = values(directory / "tensorboard", "simple_value")
    rows = read_log(directory / "metrics.jsonl")
    assert len(rows) == 2
    result = json.loads((directory / "result.json").read_text())
    np.testing.assert_allclose(scalars["test_accuracy", 4], result["test_accuracy"], rtol=1e-6)
    for row in rows:
        for tag in ("loss", "accuracy", "learning_rate"):
            np.testing.assert_allclose(scalars[tag, row["step"]], row[tag], rtol=1e-6)
    histograms = values(directory / "tensorboard", "histo")
    assert set(histograms) == {("weights/conv/kernel", 4), ("weights/dense/kernel", 4)}
    _, state = finished(config, tiny, FULL_PRECISION)
    weight = np.asarray(state.params["params"]["conv"]["kernel"])
    own, (_, edges) = histograms["weights/conv/kernel", 4], np.histogram(weight, 64)
    np.testing.assert_allclose(own.bucket_limit, edges[1:], rtol=1e-4, atol=1e-6)
    assert sum(own.bucket) == own.num == weight.size


def test_levels_have_a_bucket_each():
    qmodel = cj.quantize_model(TinyNet(), cj.QuantConfig(weight_bits=4, act_bits=None))
    variables = drawn(qmodel, jnp.zeros((1, 4, 4, 1)))
    state = create_state(variables, optax.identity(), jax.random.key(0))
    found = weight_histograms(qmodel)(state)
    assert set(found) == {f"{kind}/{name}" for kind in ("weights", "levels") for name in LAYERS}
    weight = np.asarray(variables["params"]["dense"]["kernel"])
    own = qmodel.quantizers(variables)["dense"]
    mu, scale = float(own["weight_mu"]), float(own["weight_scale"])
    codes = oracle.quantize(weight, mu, scale, 4, True, "midtread")
    levels, thresholds = oracle.codebook(mu, 1.0, 4, True, "midtread")
    limits, counts, centres, lowest = found["levels/dense"]
    np.testing.assert_array_equal(counts, np.bincount(codes.ravel() + 7, minlength=15))
    np.testing.assert_allclose(limits, [*thresholds, 1], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(centres, levels, rtol=1e-5, atol=1e-7)
    assert lowest == -1
    for quantizer, granularity in (("uniform", 4), ("normal_float", "tensor")):
        config = cj.QuantConfig(
            4,
            None,
            quantizer=quantizer,
            rules=(cj.Rule("dense", weight_granularity=granularity),),
        )
        qmodel = cj.quantize_model(TinyNet(), config)
        variables = drawn(qmodel, jnp.zeros((1, 4, 4, 1)))
        state = create_state(variables, optax.identity(), jax.random.key(0))
        found = weight_histograms(qmodel)(state)["levels/dense"]
        scale = np.asarray(qmodel.quantizers(variables)["dense"]["weight_scale"])
        weight = np.asarray(variables["params"]["dense"]["kernel"])
        if granularity == 4:
            weight = weight.reshape(-1, 4, 3)
        nearest = np.argmin(np.abs((weight / scale)[..., None] - np.asarray(found.centres)), -1)
        np.testing.assert_array_equal(found.counts, np.bincount(nearest.ravel(), minlength=15))


def test_what_is_trained_again_takes_the_place_of_what_was_written(tmp_path):
    for step, losses in ((0, (1.0, 2.0)), (1, (3.0,))):
        events = Events(tmp_path / str(step), step, lambda state: {})
        for i, loss in enumerate(losses, step + 1):
            quantizers = {"conv": {"weight_mu": 5.0, "weight_scale": [[1.0], [2.0], [6.0]]}}
            events.row({"step": i, "loss": loss, "quantizers": quantizers})
        events.close()
    sessions = [event for event in read(tmp_path / "1") if event.HasField("session_log")]
    assert [(e.session_log.status, e.step) for e in sessions] == [(SessionLog.START, 2)]
    scalars = values(tmp_path / "1", "simple_value")
    assert scalars == {
        ("loss", 2): 3,
        ("quantizers/conv/weight_mu", 2): 5,
        ("quantizers/conv/weight_scale/min", 2): 1,
        ("quantizers/conv/weight_scale/mean", 2): 3,
        ("quantizers/conv/weight_scale/max", 2): 6,
    }


def test_without_the_extra(tiny, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"`tensorboard` needs compand-jax\[tensorboard\] .*pip in"):
        run(tiny_config(tmp_path / "run", tensorboard=True), progress=False)
    assert not list(tmp_path.iterdir())
