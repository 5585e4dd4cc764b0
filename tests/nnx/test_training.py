"""Training NNX models: filters, one optimizer, Flax's modes, bounds of mu, checkpoints."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from nnx_models import TRAINED
from small_models import normal

import compand_jax as cj

HAS_TREE_MODE = hasattr(nnx, "set_graph_mode")
X, Y = normal(16, 4), normal(16, 2, seed=1)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.last = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


@pytest.fixture(autouse=True, scope="module")
def _optax_promotes():
    with jax.numpy_dtype_promotion("standard"):  # adam divides by its count
        yield


def calibrated(**fields):
    qmodel = cj.nnx.quantize(Net(nnx.Rngs(0)), cj.QuantConfig(**fields))
    cj.nnx.calibrate(qmodel, [X], calibration="absmax", mu=2.0)
    return qmodel


def loss(model):
    return jnp.mean((model(X) - Y) ** 2)


@nnx.jit
def filtered_step(model, optimizer):
    value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, TRAINED))(model)
    optimizer.update(model, gradients)
    return value


@nnx.jit
def split_step(model, optimizer):
    graphdef, trained, rest = nnx.split(model, TRAINED, ...)

    def split_loss(trained):
        model = nnx.merge(graphdef, trained, nnx.clone(rest))
        return loss(model), nnx.state(model, nnx.Not(TRAINED))

    (value, rest), gradients = jax.value_and_grad(split_loss, has_aux=True)(trained)
    nnx.update(model, rest)
    optimizer.update(model, gradients)
    return value


def optimizer_of(model, mu=0.05, scale=0.02):
    tx = cj.nnx.partition_optimizer(
        optax.adamw(0.01, weight_decay=0.1), mu=optax.sgd(mu), scale=optax.adam(scale)
    )
    return nnx.Optimizer(model, tx, wrt=TRAINED)


def numbers(model):
    state = nnx.state(model, nnx.Not(nnx.RngState))
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}


def trained(step, mode, **fields):
    """Returns the numbers of a model and its losses, after steps in a mode of Flax."""
    with contextlib.ExitStack() as stack:
        if mode == "tree":
            stack.enter_context(nnx.set_graph_mode(False))
        model = calibrated(**fields)
        optimizer = optimizer_of(model)
        losses = [float(step(model, optimizer)) for _ in range(3)]
        return numbers(model), losses


@pytest.fixture(scope="module")
def expected():
    return trained(filtered_step, "graph")


@pytest.mark.parametrize("mode", ["graph", "tree"] if HAS_TREE_MODE else ["graph"])
def test_every_way_of_training_gives_the_same(mode, expected):
    found, losses = trained(split_step, mode)
    np.testing.assert_allclose(losses, expected[1], rtol=1e-5)
    assert found.keys() == expected[0].keys()
    for path, value in expected[0].items():
        np.testing.assert_allclose(found[path], value, rtol=1e-4, atol=1e-5, err_msg=str(path))


def test_training_moves_everything(expected):
    before, (after, _) = numbers(calibrated()), expected
    for path, value in before.items():
        assert not np.array_equal(after[path], value), path


@pytest.mark.skipif(not HAS_TREE_MODE, reason="Flax 0.11 has no tree mode")
def test_shared_mus_are_refused_in_tree_mode():
    with (
        nnx.set_graph_mode(False),
        pytest.raises(ValueError, match="`mu_scope` must be 'per_layer' in Flax's tree mode"),
    ):
        calibrated(mu_scope="separate")


def test_the_parts_of_the_optimizer_are_apart():
    model = calibrated(mu_scope="single")
    tx = cj.nnx.partition_optimizer(
        optax.set_to_zero(), mu=optax.sgd(1e3), scale=optax.set_to_zero()
    )
    optimizer, before = nnx.Optimizer(model, tx, wrt=TRAINED), numbers(model)
    filtered_step(model, optimizer)
    moved = [
        path for path, value in numbers(model).items() if not np.array_equal(value, before[path])
    ]
    mus = [path for path in moved if path[-2] == "promote_dtype"]
    assert len(mus) == 1  # the one that all share
    assert mus[0][-1].endswith("mu")
    assert {path[-1] for path in moved} == {mus[0][-1], "mean", "var"}
    for site in cj.nnx.quantizers(model).values():  # whatever the step was
        assert 0 <= float(site["weight_mu"]) <= 255
    model.first.promote_dtype.act_mu[...] = jnp.float32(1e9)
    assert float(cj.nnx.quantizers(model)["last"]["weight_mu"]) == pytest.approx(255, rel=1e-5)


def test_a_model_in_full_precision_is_trained_too():
    model = Net(nnx.Rngs(0))
    tx = cj.nnx.partition_optimizer(optax.sgd(0.1), mu=optax.sgd(0.1), scale=optax.sgd(0.1))
    optimizer, before = nnx.Optimizer(model, tx, wrt=TRAINED), np.asarray(model.last.kernel[...])
    gradient = nnx.grad(loss)(nnx.clone(model)).last.kernel[...]
    filtered_step(model, optimizer)
    np.testing.assert_allclose(model.last.kernel[...], before - 0.1 * gradient, atol=1e-6)


def test_a_checkpoint_is_resumed_to_the_same_end(tmp_path):
    model = calibrated()
    optimizer = optimizer_of(model)
    filtered_step(model, optimizer)
    text = cj.sites_to_json(cj.nnx.sites(model))
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    state = nnx.to_pure_dict(nnx.state((model, optimizer)))
    state = jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", jax.tree.map(np.asarray, state))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", state)
    filtered_step(model, optimizer)

    again = cj.nnx.quantize(Net(nnx.Rngs(1)), cj.QuantConfig(), sites=cj.sites_from_json(text))
    pair = again, optimizer_of(again)
    abstract = nnx.to_pure_dict(nnx.state(pair))
    restored = jax.tree.map(
        lambda leaf, kind: jax.random.wrap_key_data(leaf) if is_key(kind) else jnp.asarray(leaf),
        restored,
        abstract,
    )
    nnx.update(pair, restored)
    filtered_step(*pair)
    for path, value in numbers(model).items():
        np.testing.assert_array_equal(numbers(again)[path], value, err_msg=str(path))
