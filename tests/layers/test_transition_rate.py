"""Transition-rate scheduling: the share of codes that change in a step follows the schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from small_models import SetUp, drawn, normal
from tiny_runs import standard_promotion  # noqa: F401

import compand_jax as cj
from compand_jax.layers.transition_rate import scale_by_transition_rate
from compand_jax.linen.codes import weight_codes

pytestmark = pytest.mark.filterwarnings("ignore:the quantized model is not calibrated")


def codes(params):
    return {"w": cj.quantize(params["w"], 1.0, 2.0, bits=3)}


def shares(target, steps, gradients, rate):
    """Returns, of each step on gradients of one size, the share of codes that it changed."""
    tx = optax.chain(
        optax.trace(0.5),
        scale_by_transition_rate(target, codes, learning_rate=rate, momentum=0.9, gain=5 * rate),
    )

    def step(carry, key):
        params, state = carry
        grads = {"w": gradients * jax.random.normal(key, (8192,)), "b": jnp.ones(2)}
        updates, state = tx.update(grads, state, params)
        after = optax.apply_updates(params, updates)
        changed = jnp.mean(codes(after)["w"] != codes(params)["w"])
        return (after, state), (changed, updates["b"])

    params = {"w": normal(8192), "b": jnp.zeros(2)}
    keys = jax.random.split(jax.random.key(0), steps)
    _, (changed, others) = jax.jit(lambda c: jax.lax.scan(step, c, keys))((params, tx.init(params)))
    np.testing.assert_array_equal(others[0], 1)  # what has no code passes on, momentum and all
    return np.asarray(changed)


@pytest.mark.parametrize("gradients", [0.1, 10.0])
def test_the_share_of_codes_that_change_follows_the_schedule(gradients):
    steps = 600
    target = optax.linear_schedule(0.02, 0.004, steps)
    found = shares(target, steps, gradients, rate=0.1 / gradients)
    wanted = np.linspace(0.02, 0.004, steps)
    for part in (slice(200, 400), slice(400, 600)):
        assert found[part].mean() == pytest.approx(wanted[part].mean(), rel=0.15)


def test_the_rate_is_the_equations():
    params = {"w": jnp.array([0.1, 0.9, -0.6, 1.9])}
    tx = scale_by_transition_rate(0.1, codes, learning_rate=0.5, momentum=0.75)
    state = tx.init(params)
    moved = {"w": jnp.array([0.1, 0.1, -0.6, 1.9])}  # one code of four is another
    updates, state = tx.update({"w": jnp.ones(4)}, state, moved)
    rate = 0.25 * 0.25
    np.testing.assert_allclose(state.rate, rate, rtol=1e-6)
    np.testing.assert_allclose(updates["w"], -(0.5 + 0.5 * (0.1 - rate)), rtol=1e-6)
    far = scale_by_transition_rate(0.0, codes, learning_rate=0.5, momentum=0.0, gain=10.0)
    updates, _ = far.update({"w": jnp.ones(4)}, far.init(params), moved)
    np.testing.assert_array_equal(updates["w"], 0)  # never up the gradient


@pytest.mark.parametrize("standardized", [False, True])
def test_codes_of_a_models_weights_are_those_that_it_multiplies_with(standardized):
    rules = (cj.Rule("second", weight_bits=None),)
    config = cj.QuantConfig(3, None, weight_standardization=standardized, rules=rules)
    qmodel = cj.quantize_model(SetUp(), config)
    variables = drawn(qmodel, normal(5, 4))
    found = weight_codes(qmodel, variables)
    assert list(found) == ["params"]
    assert list(found["params"]) == ["first"]
    kernel, own = variables["params"]["first"]["kernel"], qmodel.quantizers(variables)["first"]
    levels = cj.dequantize(
        found["params"]["first"]["kernel"], own["weight_mu"], own["weight_scale"], bits=3
    )
    mean = kernel.mean() if standardized else 0
    alone = cj.quantize_model(nn.Dense(6, use_bias=False), config)
    of_first = {"params": {"kernel": kernel}, "compand": variables["compand"]["first"]}
    np.testing.assert_allclose(alone.apply(of_first, jnp.eye(4)), mean + levels, atol=1e-6)


@pytest.mark.quick
def test_arguments():
    params = {"w": jnp.ones(4)}
    with pytest.raises(ValueError, match=r"`momentum` must be in \[0, 1\), got 1.0: 0.99 is"):
        scale_by_transition_rate(0.1, codes, learning_rate=0.1, momentum=1.0)
    with pytest.raises(ValueError, match="`learning_rate` must be positive, got 0.0: give the one"):
        scale_by_transition_rate(0.1, codes, learning_rate=0.0)
    with pytest.raises(ValueError, match="`codes` must return .* got none: quantize weights"):
        scale_by_transition_rate(0.1, lambda params: {}, learning_rate=0.1).init(params)
    tx = scale_by_transition_rate(0.1, codes, learning_rate=0.1)
    with pytest.raises(ValueError, match="`params` must be given to `update`"):
        tx.update(params, tx.init(params))
