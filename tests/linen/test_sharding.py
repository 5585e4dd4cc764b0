"""Quantized models under `jax.shard_map`, `jax.pmap`, and meshes with explicit axes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
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


def sharding_of(x):
    return jax.typeof(x).sharding.spec


def placed(mesh, tree, spec):
    return jax.device_put(tree, NamedSharding(mesh, spec))


@pytest.mark.parametrize("options", OPTIONS[1::2], ids=str)
def test_explicit_axes_give_the_outputs_and_gradients_of_one_device(options):
    qmodel, variables = calibrated(**options)
    value_and_grad = jax.jit(jax.value_and_grad(loss_of(qmodel)))
    wanted = value_and_grad(variables, X, TARGETS)
    outputs = jax.jit(qmodel.apply)(variables, X)
    mesh = data_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        x, targets = placed(mesh, (X, TARGETS), P("data"))
        found = jax.jit(qmodel.apply)(variables, x)
        assert_equal_gradients(value_and_grad(variables, x, targets), wanted)
    np.testing.assert_allclose(found, outputs, rtol=1e-5, atol=1e-5)
    assert sharding_of(found) == P("data", None)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_a_train_step_on_kernels_that_are_sharded(kind):
    model = nn.Sequential([nn.Dense(4), nn.softplus])
    config = cj.QuantConfig(weight_bits=6, act_bits=6, weight_granularity="channel")
    qmodel, variables = cj.quantize_model(model, config).calibrate(
        model.init(jax.random.key(0), X), [X], mu=3.0, calibration="absmax"
    )

    def step(apply, variables, x):
        gradient = jax.grad(lambda variables: jnp.sum(apply(variables, x) ** 2))(variables)
        return jax.tree.map(lambda leaf, slope: leaf - 0.01 * slope, variables, gradient)

    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, AxisType.Explicit))
    with jax.set_mesh(mesh):
        x = placed(mesh, X, P("data"))
        spread = {
            **variables,
            "params": jax.tree.map(
                lambda leaf: placed(mesh, leaf, P(None, "model") if leaf.ndim == 2 else P("model")),
                variables["params"],
            ),
        }
        plain = {"params": spread["params"]}
        for apply in (qmodel.apply, jax.jit(qmodel.apply)):
            found = apply(spread, x)
            np.testing.assert_allclose(found, qmodel.apply(variables, X), rtol=1e-5, atol=1e-5)
            assert sharding_of(found) == sharding_of(jax.jit(model.apply)(plain, x))
        stepped = jax.jit(functools.partial(step, qmodel.apply))(spread, x)
        plain = jax.jit(functools.partial(step, model.apply))(plain, x)
    for leaf, right in zip(
        jax.tree.leaves(stepped),
        jax.tree.leaves(step(qmodel.apply, variables, X)),
        strict=True,
    ):
        np.testing.assert_allclose(leaf, right, rtol=1e-5, atol=1e-5)
    for leaf, right in zip(*map(jax.tree.leaves, (stepped["params"], plain)), strict=True):
        assert sharding_of(leaf) == sharding_of(right)


def assert_equal_parameters(found, wanted):
    for leaf, right in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(leaf, right, rtol=1e-4, atol=1e-5)


def test_calibration_on_explicit_axes_finds_what_one_device_finds():
    config = cj.QuantConfig(
        weight_bits=4, act_bits=4, act_site="output", weight_granularity="channel"
    )
    qmodel, params = cj.quantize_model(MODEL, config), MODEL.init(jax.random.key(0), X)
    how = {"mu": 3.0, "calibration": "output", "error_feedback": True}
    wanted, variables = qmodel.calibrate(params, [X], **how)
    mesh = data_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        x = placed(mesh, X, P("data"))
        found, spread = qmodel.calibrate(params, [x], **how)
        initial = qmodel.init(jax.random.key(0), x)["compand"]
        assert qmodel.summary(spread) == qmodel.summary(variables)
    assert found.sites == wanted.sites
    assert_equal_parameters(spread, variables)
    assert_equal_parameters(initial, qmodel.init(jax.random.key(0), X)["compand"])


class Normed(nn.Module):
    """A convolution, a batch norm, and a layer for each example, whose values are called back."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (2,))(x[..., None])
        x = nn.BatchNorm(use_running_average=not train)(x).mean(1)
        each = nn.vmap(nn.Dense, variable_axes={"params": None}, split_rngs={"params": False})
        return each(3)(nn.softplus(x))


def test_statistics_and_stacks_are_calibrated_and_frozen_on_explicit_axes():
    model = Normed()
    qmodel = cj.quantize_model(model, cj.QuantConfig(weight_bits=6, act_bits=6))
    variables = model.init(jax.random.key(0), X)
    how = {"mu": 3.0, "calibration": "absmax", "batch_stats": True, "train": True}
    calibrated, wanted = qmodel.calibrate(variables, [X], **how)
    outputs = jax.jit(calibrated.apply)(wanted, X)
    mesh = data_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        x = placed(mesh, X, P("data"))
        _, found = qmodel.calibrate(variables, [x], **how)
        frozen = cj.freeze(calibrated, wanted, x)
        for values in (frozen.apply(x), jax.jit(calibrated.apply)(wanted, x)):
            np.testing.assert_allclose(values, outputs, rtol=1e-5, atol=1e-5)
            assert sharding_of(values) == P("data", None)
    assert_equal_parameters(found, wanted)


@pytest.mark.parametrize(("bits", "spec"), [(3, P()), (8, P(None, "model"))])
def test_frozen_models_run_on_explicit_axes(bits, spec, tmp_path):
    qmodel, variables = calibrated(bits=bits, weight_granularity="channel")
    wanted = jax.jit(qmodel.apply)(variables, X)
    kinds = (AxisType.Explicit, AxisType.Explicit)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)
    with jax.set_mesh(mesh):
        x = placed(mesh, X, P("data"))
        kernel = variables["params"]["layers_0"]["kernel"]
        layer = {**variables["params"]["layers_0"], "kernel": placed(mesh, kernel, spec)}
        spread = {**variables, "params": {**variables["params"], "layers_0": layer}}
        frozen = cj.freeze(qmodel, spread, x)
        frozen.save(tmp_path / "frozen")
        loaded = cj.load_frozen(tmp_path / "frozen", MODEL)
        for values in (frozen.apply(x), loaded.apply(x), frozen.apply_dense(x)):
            np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-5)
            assert sharding_of(values) == P("data", None)


class AsksForItsSharding(nn.Module):
    """A model that only runs on sharded inputs."""

    @nn.compact
    def __call__(self, x):
        assert "data" in sharding_of(x)
        return nn.Dense(3)(x)


def test_a_model_sees_the_sharding_of_its_inputs():
    model = AsksForItsSharding()
    mesh = data_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        x = placed(mesh, X, P("data"))
        qmodel = cj.quantize_model(model, cj.QuantConfig(weight_bits=6, act_bits=6))
        qmodel, variables = qmodel.calibrate(model.init(jax.random.key(0), x), [x], mu=3.0)
        found = jax.jit(qmodel.apply)(variables, x)
    (site,) = qmodel.sites
    by_hand = qmodel.quantizers(variables)[site]
    kernel, bias = (variables["params"][site][name] for name in ("kernel", "bias"))
    weight = cj.fake_quantize(kernel, by_hand["weight_mu"], by_hand["weight_scale"], bits=6)
    signed = qmodel.sites[site].act_signed
    act = cj.fake_quantize(X, by_hand["act_mu"], by_hand["act_scale"], bits=6, signed=signed)
    np.testing.assert_allclose(found, act @ weight + bias[None], rtol=1e-5, atol=1e-5)
