"""Quantized models under `jax.shard_map`, `jax.pmap`, and meshes with explicit axes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from small_models import normal

import compand_jax as cj

X, TARGETS = normal(16, 6), normal(16, 3, seed=1)
# softplus is unsigned like relu, and smooth: at 2 bits outputs cancel to 0 but for rounding, where
# relu's gradient would hang on the order of the sums.
MODEL = nn.Sequential([nn.Dense(4), nn.softplus, nn.Dense(3)])


def data_mesh(kind=AxisType.Auto):
    return jax.make_mesh((4,), ("data",), axis_types=(kind,))


@functools.cache
def calibrated(bits=3, **options):
    config = cj.QuantConfig(weight_bits=bits, act_bits=bits, **options)
    qmodel, variables = cj.quantize_model(MODEL, config).calibrate(
        MODEL.init(jax.random.key(0), X), [X], mu=3.0, calibration="absmax"
    )
    # Smaller scales: so that something is clipped.
    compand = jax.tree.map(lambda leaf: leaf - 0.2, variables["compand"])
    return qmodel, {**variables, "compand": compand}


def loss_of(qmodel):
    def loss(variables, x, targets):
        return jnp.sum((qmodel.apply(variables, x) - targets) ** 2)

    return loss


def assert_equal_gradients(got, wanted):
    (loss, gradients), (wanted_loss, wanted) = got, wanted
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    for leaf, right in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        assert np.max(np.abs(right)) > 1e-4
        np.testing.assert_allclose(leaf, right, rtol=1e-4, atol=1e-5 * np.max(np.abs(right)))


OPTIONS = [
    {"mu_scope": "per_layer"},
    {"mu_scope": "single", "weight_granularity": "channel", "scale_gradient": "lsq"},
    {"mu_scope": "separate", "scale_gradient": "lsq", "bits": 4},
    {"mu_scope": "separate", "weight_granularity": "channel", "bits": 8},
    {"grid": "midrise", "bits": 2},
    {"act_site": "output", "bits": 5},
    {"quantizer": "uniform", "bits": 6},
    {"scale_gradient": "lsq", "bits": 7},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_shard_map_gives_the_gradients_of_one_device(options):
    qmodel, variables = calibrated(**options)
    value_and_grad = jax.value_and_grad(loss_of(qmodel))

    @functools.partial(
        jax.shard_map, mesh=data_mesh(), in_specs=(P(), P("data"), P("data")), out_specs=P()
    )
    def sharded(variables, x, targets):
        loss, gradients = value_and_grad(variables, x, targets)
        return jax.lax.psum(loss, "data"), gradients  # the gradients are summed already

    args = variables, X, TARGETS
    assert_equal_gradients(jax.jit(sharded)(*args), jax.jit(value_and_grad)(*args))


def test_shard_map_without_its_checks_and_pmap_are_summed_by_hand():
    qmodel, variables = calibrated()
    value_and_grad = jax.value_and_grad(loss_of(qmodel))

    def summed(variables, x, targets):
        return jax.lax.psum(value_and_grad(variables, x, targets), "data")

    wanted = value_and_grad(variables, X, TARGETS)
    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": P()}
    unchecked = jax.shard_map(summed, mesh=data_mesh(), check_vma=False, **specs)
    assert_equal_gradients(jax.jit(unchecked)(variables, X, TARGETS), wanted)
    parts = X.reshape(4, 4, 6), TARGETS.reshape(4, 4, 3)
    found = jax.pmap(summed, "data", in_axes=(None, 0, 0))(variables, *parts)
    assert_equal_gradients(jax.tree.map(lambda leaf: leaf[0], found), wanted)


def test_parameters_cast_to_differ_have_the_lsq_gradients_of_one_device():
    qmodel, variables = calibrated(scale_gradient="lsq")
    value_and_grad = jax.value_and_grad(loss_of(qmodel))
    differ = (
        functools.partial(jax.lax.pcast, axis_name="data", to="varying")
        if hasattr(jax.lax, "pcast")  # since jax 0.8
        else functools.partial(jax.lax.pvary, axis_name="data")
    )

    @functools.partial(
        jax.shard_map, mesh=data_mesh(), in_specs=(P(), P("data"), P("data")), out_specs=P()
    )
    def sharded(variables, x, targets):
        return jax.lax.psum(value_and_grad(jax.tree.map(differ, variables), x, targets), "data")

    args = variables, X, TARGETS
    assert_equal_gradients(jax.jit(sharded)(*args), value_and_grad(*args))


@pytest.mark.parametrize("bits", [3, 8])
def test_frozen_models_run_under_shard_map(bits):
    qmodel, variables = calibrated(bits=bits, weight_granularity="channel")
    frozen = cj.freeze(qmodel, variables, X)

    @functools.partial(
        jax.shard_map, mesh=data_mesh(), in_specs=(P(), P("data")), out_specs=P("data")
    )
    def sharded(frozen, x):
        return frozen.apply(x)

    wanted = jax.jit(qmodel.apply)(variables, X)
    np.testing.assert_allclose(jax.jit(sharded)(frozen, X), wanted, rtol=1e-5, atol=1e-5)
