"""A dozen whole models, calibrated at their layers' outputs, trained, frozen, saved and loaded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from small_models import QUICKLY, normal
from whole_models import LENGTH, WHOLES, Decoder, assert_close, evaluated, initialized

import compand_jax as cj

CONFIG = cj.QuantConfig(weight_bits=4, act_bits=4)
ROUNDING = 4 * float(jnp.finfo(jnp.float32).eps)  # as the page on files has it


@pytest.fixture(autouse=True)
def _jax_as_it_is_by_default():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@functools.lru_cache
def calibrated(name):
    found, variables = initialized(name)
    return cj.quantize_model(found.model, CONFIG).calibrate(
        variables, found.batches, calibration="output", error_feedback=True, batch_stats=True
    )


@functools.lru_cache
def trained(name):
    """Returns the losses of a few steps, batch after batch, and the variables after them."""
    found, plain = initialized(name)
    qmodel, variables = calibrated(name)
    shapes = jax.eval_shape(evaluated(found.model, found), plain, *found.batches[0])
    targets = [normal(*y.shape) for y in shapes]
    tx = cj.partition_optimizer(optax.adam(1e-2), mu=optax.adam(1e-2), scale=optax.adam(1e-2))

    def loss_fn(trainable, state, args):
        output, state = qmodel.apply(
            {**trainable, **state}, *args, mutable=["batch_stats"], **found.train
        )
        pairs = zip(found.arrays(output), targets, strict=True)
        return sum(jnp.mean((y - z) ** 2) for y, z in pairs), state

    def step(trainable, state, opt_state, args):
        (loss, state), grads = jax.value_and_grad(loss_fn, has_aux=True)(trainable, state, args)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), state, opt_state, loss

    step = jax.jit(step, compiler_options=QUICKLY)
    trainable = {key: variables[key] for key in ("params", "compand")}
    state = {"batch_stats": variables["batch_stats"]} if "batch_stats" in variables else {}
    opt_state, losses = tx.init(trainable), []
    for args in 3 * found.batches:
        trainable, state, opt_state, loss = step(trainable, state, opt_state, args)
        losses.append(float(loss))
    return losses, {**trainable, **state}


@pytest.mark.parametrize("name", WHOLES)
def test_trained(name):
    losses, after = trained(name)
    qmodel, before = calibrated(name)
    assert np.all(np.isfinite(losses))
    rounds = np.reshape(losses, (3, -1)).sum(1)
    assert rounds[2] < rounds[0]
    before, flat = flatten_dict(before), flatten_dict(after)
    assert flat.keys() == before.keys()
    for path, leaf in flat.items():
        assert np.all(np.isfinite(leaf)), path
        at_bound = path[-1].endswith("mu") and before[path] <= 0
        # A weight that starts at zero is followed by its scale, which is no parameter until then.
        kernel = before.get(("params", *path[1:-1], "kernel"))
        follows = path[-1] == "weight_scale" and kernel is not None and not np.any(kernel)
        assert at_bound or follows or np.any(leaf != before[path]), path
    for site, own in qmodel.quantizers(after).items():
        for key, value in own.items():
            assert np.all(value >= 0), (site, key)
            assert np.all(value <= 255) or key.endswith("scale"), (site, key)


@pytest.mark.parametrize("name", WHOLES)
def test_frozen_saved_and_loaded(name, tmp_path):
    found, _ = initialized(name)
    qmodel, _ = calibrated(name)
    _, variables = trained(name)
    frozen = cj.freeze(qmodel, variables, *found.batches[0])
    frozen.save(tmp_path / "model.safetensors")
    loaded = cj.load_frozen(tmp_path / "model.safetensors", found.model)
    quantized = evaluated(qmodel, found)
    for args in found.batches:
        outputs = found.arrays(frozen.apply(*args))
        assert_close(outputs, quantized(variables, *args), ROUNDING)
        for y, z in zip(found.arrays(loaded.apply(*args)), outputs, strict=True):
            np.testing.assert_array_equal(y, z)


def greedy(step, state, tokens):
    """Returns the logits of each step, and the words that were written, from a first one on."""
    logits, written = [], [tokens]
    for _ in range(LENGTH):
        one, state = step(state, tokens)
        tokens = one.argmax(-1).astype(tokens.dtype)
        logits.append(one)
        written.append(tokens)
    return jnp.concatenate(logits, 1), jnp.concatenate(written, 1)


def test_a_decoder_writes_word_by_word(tmp_path):
    qmodel, _ = calibrated("decoder")
    _, variables = trained("decoder")
    ids = initialized("decoder")[0].batches[0][0]
    model, first = Decoder(decode=True), ids[:, :1]
    writer = cj.quantize_model(model, CONFIG, sites=qmodel.sites)
    state = {"cache": model.init(jax.random.key(0), ids)["cache"]}
    write = jax.jit(lambda state, ids: writer.apply(variables | state, ids, mutable=["cache"]))
    logits, written = greedy(write, state, first)
    whole = jax.jit(qmodel.apply)(variables, written[:, :LENGTH])
    np.testing.assert_allclose(logits, whole, rtol=0, atol=1e-5)

    frozen = cj.freeze(writer, variables | state, first)
    frozen.save(tmp_path / "writer.safetensors")
    loaded = cj.load_frozen(tmp_path / "writer.safetensors", model)
    for each in (frozen, loaded):
        found = greedy(
            lambda state, ids, each=each: each.with_state(state).apply(ids, mutable=["cache"]),
            {}, first,
        )  # fmt: skip
        assert_close([found[0]], [logits], ROUNDING)
        np.testing.assert_array_equal(found[1], written)
