"""One step, and the evaluation."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_runs import TinyNet, tiny_data, tiny_variables

from compand_jax import QuantConfig, quantize_model
from compand_jax.data.images import normalize
from compand_jax.training import steps


def batch(data, n=16):
    return normalize(data.train_images[:n], data.mean, data.std), jnp.asarray(data.train_labels[:n])


@pytest.mark.quick
def test_state_separates_what_is_trained():
    variables = tiny_variables()
    state = steps.create_state(variables, optax.sgd(0.1), jax.random.key(0))
    assert set(state.params) == {"params"}
    assert set(state.model_state) == {"batch_stats"}
    chex.assert_trees_all_equal(state.variables, variables)
    variables["compand"] = {"dense": {"weight_mu": jnp.ones(())}}
    state = steps.create_state(variables, optax.sgd(0.1), jax.random.key(0))
    assert set(state.params) == {"params", "compand"}


def test_step_is_gradient_descent_on_the_mean_cross_entropy():
    data, model = tiny_data(), TinyNet()
    variables = tiny_variables()
    images, labels = batch(data)

    def loss(params):
        logits, _ = model.apply(
            {"params": params, "batch_stats": variables["batch_stats"]},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
        return -chosen.mean(), (logits.argmax(-1) == labels).sum()

    (expected, correct), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        variables["params"]
    )
    tx = optax.sgd(0.5)
    state = steps.create_state(variables, tx, jax.random.key(0))
    step = jax.jit(functools.partial(steps.train_step, model=model, tx=tx))
    after, measured = step(state, images, labels)
    assert int(after.step) == 1
    assert int(measured["correct"]) == int(correct)
    np.testing.assert_allclose(measured["loss"], expected, rtol=1e-6)
    wanted = jax.tree.map(lambda p, g: p - 0.5 * g, variables["params"], grads)
    chex.assert_trees_all_close(after.params["params"], wanted, rtol=1e-5, atol=1e-6)
    # Batch statistics are those of the batch, at momentum 1/2.
    conv = nn_conv_output(variables, images)
    mean = after.model_state["batch_stats"]["norm"]["mean"]
    np.testing.assert_allclose(mean, 0.5 * conv.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)


def nn_conv_output(variables, images):
    kernel = np.asarray(variables["params"]["conv"]["kernel"])[:, :, 0]
    padded = np.pad(np.asarray(images)[..., 0], ((0, 0), (1, 1), (1, 1)))
    result = 0
    for i in range(3):
        for j in range(3):
            result = result + padded[:, i : i + 4, j : j + 4, None] * kernel[i, j]
    return result


def numpy_count(model, variables, data):
    """The count without batches: one forward pass over all images, argmax by NumPy."""
    images = normalize(data.test_images, data.mean, data.std)
    logits = np.asarray(model.apply(variables, images, train=False))
    return int((logits.argmax(-1) == data.test_labels).sum()), logits.argmax(-1)


def evaluate(model, variables, data, labels, batch_size):
    return steps.evaluate(
        model,
        variables,
        data.test_images,
        labels,
        mean=data.mean,
        std=data.std,
        batch_size=batch_size,
    )


@pytest.mark.parametrize("quantized", [False, True])
def test_evaluation_is_exact_to_the_last_image(quantized):
    data, model = tiny_data(), TinyNet()
    variables = tiny_variables(key=3)
    if quantized:
        images = normalize(data.train_images, data.mean, data.std)
        model = quantize_model(model, QuantConfig())
        model, variables = model.calibrate(variables, [images], train=False)
    expected, predicted = numpy_count(model, variables, data)
    assert 0 < expected < 19
    last_right, last_wrong = predicted.astype(np.int32), predicted.astype(np.int32)
    last_wrong[-1] = (last_wrong[-1] + 1) % 3
    for batch_size in (8, 19, 32):  # 19 images: padded, exact, one padded batch
        assert evaluate(model, variables, data, data.test_labels, batch_size) == expected
        # The last image is what fills the padding: it must count once.
        assert evaluate(model, variables, data, last_right, batch_size) == 19
        assert evaluate(model, variables, data, last_wrong, batch_size) == 18


@pytest.mark.quick
def test_evaluation_of_no_images():
    data = tiny_data()
    with pytest.raises(ValueError, match="`images` must hold at least one image, got an empty"):
        steps.evaluate(
            TinyNet(),
            tiny_variables(),
            data.test_images[:0],
            data.test_labels[:0],
            mean=data.mean,
            std=data.std,
            batch_size=4,
        )
