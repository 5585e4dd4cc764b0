"""Whole trainings: one trace, no transfers, resumption, data parallelism, divergence."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_runs import TinyNet, rows_without_time, tiny_data, tiny_variables, tree_bytes

from compand_jax import QuantConfig, partition_optimizer, quantize_model
from compand_jax.data.images import normalize
from compand_jax.training import fit as training
from compand_jax.training import steps
from compand_jax.training.checkpoints import Checkpoints
from compand_jax.training.distributed import data_mesh, everywhere
from compand_jax.training.fit import FitConfig, fit
from compand_jax.training.metrics_log import append_log, read_log, truncate_log
from compand_jax.training.steps import create_state

CONFIG = FitConfig(epochs=2, batch_size=16, pad=1, flip=True, steps_per_call=2)
TX = optax.sgd(0.05, momentum=0.9)
MODEL = TinyNet()


def start(seed=0, tx=TX):
    return create_state(tiny_variables(), tx, jax.random.key(seed))


@functools.cache
def fitted(seed=0, devices=8):
    state = start(seed)
    return fit(state, tiny_data(), CONFIG, model=MODEL, tx=TX, devices=jax.devices()[:devices])


def test_same_seed_same_parameters_bit_for_bit():
    again = fit(start(0), tiny_data(), CONFIG, model=MODEL, tx=TX)
    assert tree_bytes(again) == tree_bytes(fitted(0))
    assert int(again.step) == 8
    other = tree_bytes(fitted(1))
    kernels = [path for path in other if "kernel" in path]
    assert len(kernels) == 4  # of parameters and momentum
    assert all(other[path] != tree_bytes(again)[path] for path in kernels)


def test_step_is_traced_once_over_chunks_and_epochs(monkeypatch):
    chex.clear_trace_counter()
    counted = chex.assert_max_traces(steps.train_step, n=1)
    monkeypatch.setattr(training, "train_step", counted)
    calls = count_chunks(monkeypatch)
    fit(start(), tiny_data(), CONFIG, model=MODEL, tx=TX)
    assert len(calls) == 4
    with pytest.raises(AssertionError, match="traced > 1 times"):
        fit(start(), tiny_data(), CONFIG, model=MODEL, tx=TX)  # another jit: the count counts
    chex.clear_trace_counter()


def count_chunks(monkeypatch):
    """Counts the compiled calls, each of which may move nothing between host and device."""
    calls = []
    make_chunk = training.make_chunk

    def make(*args, **kwargs):
        chunk = make_chunk(*args, **kwargs)

        def guarded(state, images, labels, teacher):
            calls.append(len(calls))
            assert images.dtype == jnp.uint8
            if len(calls) == 1:  # compilation places its constants
                return chunk(state, images, labels, teacher)
            with jax.transfer_guard("disallow"):
                return chunk(state, images, labels, teacher)

        return guarded

    monkeypatch.setattr(training, "make_chunk", make)
    return calls


def test_a_chunk_transfers_nothing_and_donates_its_state():
    data, mesh = tiny_data(), data_mesh()
    copied = everywhere(mesh)
    chunk = training.make_chunk(data, CONFIG, model=MODEL, tx=TX, mesh=mesh)
    first = jax.device_put(start(), copied)
    images, labels = jax.device_put((data.train_images, data.train_labels), copied)
    text = chunk.lower(first, images, labels).as_text()
    assert not any(word in text for word in ("callback", "infeed", "outfeed"))
    second, _ = chunk(first, images, labels)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))
    with jax.transfer_guard("disallow"):
        third, sums = chunk(second, images, labels)
        with pytest.raises(Exception, match="[Dd]isallowed host-to-device"):
            chunk(third, data.train_images, labels)  # the guard works
    assert int(third.step) == 4
    assert int(sums["bad_step"]) == -1
    assert bool(sums["finite"])


def test_fit_leaves_its_state_usable_and_logs_each_call(tmp_path):
    state, log = start(), tmp_path / "metrics.jsonl"
    before = tree_bytes(state)
    after = fit(
        state,
        tiny_data(),
        CONFIG,
        model=MODEL,
        tx=TX,
        log=log,
        describe=lambda state: {"bias": state.params["params"]["dense"]["bias"]},
    )
    assert tree_bytes(state) == before
    rows = read_log(log)
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert [row["epoch"] for row in rows] == [0.5, 1, 1.5, 2]
    assert set(rows[0]) == {"step", "epoch", "loss", "accuracy", "seconds", "bias"}
    assert rows[-1]["bias"] == after.params["params"]["dense"]["bias"].tolist()
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all((row["accuracy"] * 32 / 100).is_integer() for row in rows)


def test_resumed_training_ends_in_the_same_bits(tmp_path):
    data, log = tiny_data(), tmp_path / "metrics.jsonl"
    whole = fit(start(), data, CONFIG, model=MODEL, tx=TX, log=log)
    rows = rows_without_time(read_log(log))
    log.unlink()
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        once = FitConfig(**{**vars(CONFIG), "epochs": 1})
        fit(start(), data, once, model=MODEL, tx=TX, checkpoints=checkpoints, log=log)
        append_log(log, {"step": 6, "lost": True})  # after the checkpoint, before the kill
        step, state, _ = checkpoints.restore(jax.eval_shape(start))
        assert step == 4
        resumed = fit(state, data, CONFIG, model=MODEL, tx=TX, checkpoints=checkpoints, log=log)
        assert checkpoints.steps() == [4, 8]
    assert tree_bytes(resumed) == tree_bytes(whole)
    assert rows_without_time(read_log(log)) == rows


@pytest.mark.quick
def test_log_is_cut_at_a_step_and_at_a_half_written_row(tmp_path):
    log = tmp_path / "metrics.jsonl"
    assert read_log(log) == []
    truncate_log(log, 3)
    assert not log.exists()
    for step in (2, 4, 6):
        append_log(log, {"step": step})
    truncate_log(log, 4)
    assert read_log(log) == [{"step": 2}, {"step": 4}]
    with log.open("a") as file:
        file.write('{"step": 6, "lo')
    truncate_log(log, 6)
    assert read_log(log) == [{"step": 2}, {"step": 4}]
    with pytest.raises(ValueError, match="JSON compliant"):
        append_log(log, {"loss": float("nan")})


def quantized():
    data = tiny_data()
    images = normalize(data.train_images, data.mean, data.std)
    return quantize_model(MODEL, QuantConfig()).calibrate(tiny_variables(), [images], train=False)


@pytest.mark.parametrize("augmented", [False, True])
def test_eight_devices_step_like_one(augmented):
    data, tx = tiny_data(), optax.sgd(1.0)  # so that the difference is the gradient
    config = CONFIG if augmented else FitConfig(epochs=1, batch_size=16, steps_per_call=1)
    results = []
    for count in (1, 8):
        mesh = data_mesh(jax.devices()[:count])
        chunk = training.make_chunk(data, config, model=MODEL, tx=tx, mesh=mesh)
        where = everywhere(mesh)
        state = jax.device_put(start(tx=tx), where)
        placed = jax.device_put((data.train_images, data.train_labels), where)
        state, sums = chunk(state, *placed)
        assert all(len(leaf.devices()) == count for leaf in jax.tree.leaves(state))
        results.append(jax.device_get((state.params, state.model_state, sums)))
    # Two augmented steps at rate 1 carry the first one's rounding on.
    chex.assert_trees_all_close(*results, rtol=1e-5 if augmented else 2e-6, atol=2e-6)
    gradient = jax.tree.map(lambda a, b: np.abs(a - b).max(), results[0][0], start().params)
    assert min(jax.tree.leaves(gradient)) > 1e-3


def test_eight_devices_train_quantized():
    model, variables = quantized()
    tx = partition_optimizer(TX, mu=optax.adam(1e-2), scale=optax.adam(1e-2))
    ends = []
    config = FitConfig(epochs=1, batch_size=16, steps_per_call=1)
    for count in (1, 8):
        devices = jax.devices()[:count]
        with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes types
            state = create_state(variables, tx, jax.random.key(0))
            end = fit(state, tiny_data(), config, model=model, tx=tx, devices=devices)
        ends.append(end)
    # A rounding may carry a value over a threshold, so this is no equality of float32.
    chex.assert_trees_all_close(*jax.device_get([end.params for end in ends]), atol=0.02)
    moved = jax.tree.map(lambda a, b: abs(a - b), ends[1].params["compand"], variables["compand"])
    assert min(jax.tree.leaves(moved)) > 1e-4  # every mu and every scale


@pytest.mark.quick
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 72}, "`batch_size` must be at most the 64 images of the training split"),
        ({"batch_size": 12}, "`batch_size` must be a multiple of the 8 devices, got 12: choose"),
    ],
)
def test_batches_that_do_not_fit(tmp_path, fields, message):
    config = FitConfig(**{"epochs": 1, **fields})
    with pytest.raises(ValueError, match=message):
        fit(start(), tiny_data(), config, model=MODEL, tx=TX, log=tmp_path / "log")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("per_call", [1, 2])
def test_no_loop_on_a_cpu(per_call):
    """Within one, the CPU backend runs a convolution's gradient up to 100 times slower."""
    data, mesh = tiny_data(), data_mesh(jax.devices()[:1])
    config = FitConfig(epochs=1, batch_size=16, steps_per_call=per_call)
    chunk = training.make_chunk(data, config, model=MODEL, tx=TX, mesh=mesh)
    text = chunk.lower(start(), data.train_images, data.train_labels).as_text()
    loops = [part.split(" cond ")[0] for part in text.split("stablehlo.while")[1:]]
    assert not [loop for loop in loops if "tensor<3x3x1x4xf32>" in loop]  # none carries the kernel


@pytest.mark.quick
def test_calls_divide_the_epoch():
    config = FitConfig(epochs=1, batch_size=10, steps_per_call=8)
    assert [config.steps_a_call(n) for n in (10, 70, 129, 130, 140)] == [1, 7, 6, 1, 7]


def bad_rate(step):
    """From step 4 on not a number: the parameters after it, the loss at step 5."""
    return jnp.where(step == 4, jnp.nan, 0.05)


@pytest.mark.parametrize(
    ("per_call", "what"), [(2, "loss at step 5"), (1, "parameters after step 4")]
)
def test_divergence_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path, per_call, what):
    tx = optax.sgd(bad_rate)
    config = FitConfig(**{**vars(CONFIG), "steps_per_call": per_call})
    log = tmp_path / "metrics.jsonl"
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        arguments = {"model": MODEL, "tx": tx, "checkpoints": checkpoints, "log": log}
        message = (
            f"`learning_rate` must keep the training finite, got a NaN or infinite {what} "
            r"\(the checkpoint of step 4 is kept\): lower it"
        )
        with pytest.raises(FloatingPointError, match=message):
            fit(start(tx=tx), tiny_data(), config, **arguments)
        step, state, _ = checkpoints.restore(jax.eval_shape(lambda: start(tx=tx)))
    assert step == 4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.variables))
    assert read_log(log)[-1]["step"] == 4


def test_divergence_without_checkpoints():
    with pytest.raises(FloatingPointError, match="there is no checkpoint"):
        fit(
            start(tx=optax.sgd(np.inf)),
            tiny_data(),
            FitConfig(epochs=1, batch_size=16, steps_per_call=1),
            model=MODEL,
            tx=optax.sgd(np.inf),
        )
