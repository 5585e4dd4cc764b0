"""One optimizer for each kind of leaf, and nothing of one that reaches another."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import SetUp, drawn, normal

import compand_jax as cj
from compand_jax.layers.parametrization import mu_from_theta
from compand_jax.layers.partition import label_parameters

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def _optax_promotes():
    # Adam's bias correction raises a float to an integer's power, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        yield


def parameters():
    layer = {"weight_mu": 0.7, "weight_scale": 0.2, "act_mu": 0.4, "act_scale": -0.3}
    tree = {
        "params": {"conv": {"kernel": 1.0, "bias": 2.0}, "norm": {"scale": 3.0}, "mu": 4.0},
        "compand": {"conv": layer, "_shared": {"mu": 1.1}},
    }
    return jax.tree.map(jnp.float32, tree)


def test_labels_follow_the_collection_and_the_last_key():
    layer = {"weight_mu": "mu", "weight_scale": "scale", "act_mu": "mu", "act_scale": "scale"}
    assert label_parameters(parameters()) == {
        "params": {
            "conv": {"kernel": "weights", "bias": "weights"},
            "norm": {"scale": "weights"},
            "mu": "weights",
        },
        "compand": {"conv": layer, "_shared": {"mu": "mu"}},
    }


def test_each_part_has_its_own_optimizer():
    tx = cj.partition_optimizer(optax.sgd(1.0), mu=optax.sgd(10.0), scale=optax.sgd(100.0))
    before = parameters()
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, before), tx.init(before), before)
    steps = {"weights": -1.0, "mu": -10.0, "scale": -100.0}
    expected = jax.tree.map(steps.get, label_parameters(before))
    assert jax.tree.map(float, updates) == expected


@pytest.mark.parametrize("decay", [optax.add_decayed_weights(0.1), optax.adamw(0.1)])
def test_weight_decay_stays_with_the_weights(decay):
    weights = optax.chain(decay, optax.scale(-1.0))
    tx = cj.partition_optimizer(weights, mu=optax.adam(0.1), scale=optax.adam(0.1))
    before = parameters()
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, before), tx.init(before), before)
    assert all(float(leaf) == 0 for leaf in jax.tree.leaves(updates["compand"]))
    assert all(float(leaf) != 0 for leaf in jax.tree.leaves(updates["params"]))


def test_a_global_norm_is_the_parts_own():
    clip = optax.chain(optax.clip_by_global_norm(1.0), optax.scale(-1.0))
    tx = cj.partition_optimizer(clip, mu=optax.sgd(1.0), scale=optax.sgd(1.0))
    before = parameters()
    gradients = {
        "params": jax.tree.map(lambda p: 3 * jnp.ones_like(p), before["params"]),
        "compand": jax.tree.map(lambda p: 1e6 * jnp.ones_like(p), before["compand"]),
    }
    updates, _ = tx.update(gradients, tx.init(before), before)
    norm = np.linalg.norm([float(leaf) for leaf in jax.tree.leaves(updates["params"])])
    assert norm == pytest.approx(1.0)
    assert {float(leaf) for leaf in jax.tree.leaves(updates["compand"])} == {-1e6}


def test_full_precision_has_no_compand():
    tx = cj.partition_optimizer(optax.sgd(1.0), mu=optax.adam(1.0), scale=optax.adam(1.0))
    before = {"params": parameters()["params"]}
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, before), tx.init(before), before)
    assert {float(leaf) for leaf in jax.tree.leaves(updates)} == {-1.0}


@pytest.mark.parametrize(
    ("tree", "name"),
    [
        ({"params": {"a": 1.0}, "batch_stats": {"mean": 1.0}}, "batch_stats/mean"),
        ({"compand": {"conv": {"weight_bias": 1.0}}}, "compand/conv/weight_bias"),
        ({"kernel": 1.0}, "kernel"),
        (1.0, "a leaf"),
    ],
)
def test_unknown_leaves(tree, name):
    tx = cj.partition_optimizer(optax.sgd(1.0), mu=optax.sgd(1.0), scale=optax.sgd(1.0))
    with pytest.raises(ValueError, match=rf"`params` of the optimizer must be .*got {name}"):
        tx.init(tree)


@pytest.mark.parametrize("step", [30.0, -30.0])
def test_mu_stays_in_bounds_whatever_the_optimizer_does(step):
    tx = cj.partition_optimizer(optax.set_to_zero(), mu=optax.sgd(step), scale=optax.sgd(step))
    values = parameters()
    state = tx.init(values)
    for gradient in (1.0, 1.0, -7.0, 3.0):
        gradients = jax.tree.map(lambda p, g=gradient: g * jnp.ones_like(p), values)
        updates, state = tx.update(gradients, state, values)
        values = optax.apply_updates(values, updates)
        mu = float(mu_from_theta(values["compand"]["_shared"]["mu"]))
        assert 0 <= mu <= 255
        assert mu in (0.0, pytest.approx(255.0))


@pytest.mark.filterwarnings("ignore:the quantized model is not calibrated")
def test_a_step_trains_each_part():
    x = normal(5, 4)
    qmodel = cj.quantize_model(SetUp(), cj.QuantConfig(weight_bits=3, act_bits=3))
    before = drawn(qmodel, x)
    tx = cj.partition_optimizer(optax.sgd(0.1), mu=optax.adam(0.01), scale=optax.adam(0.02))

    @jax.jit
    def step(variables):
        gradients = jax.grad(lambda v: jnp.sum(qmodel.apply(v, x) ** 2))(variables)
        updates, _ = tx.update(gradients, tx.init(variables), variables)
        return optax.apply_updates(variables, updates), gradients

    after, gradients = step(before)
    moved = jax.tree.map(lambda a, b: np.asarray(a - b), after, before)
    for path, change in jax.tree_util.tree_leaves_with_path(moved["compand"]):
        size = 0.01 if path[-1].key.endswith("mu") else 0.02  # Adam's first step
        np.testing.assert_allclose(np.abs(change), size, rtol=1e-3)
    np.testing.assert_allclose(
        moved["params"]["first"]["kernel"],
        -0.1 * gradients["params"]["first"]["kernel"],
        rtol=1e-3,
        atol=1e-6,
    )
