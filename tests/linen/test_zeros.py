"""Weights, channels and activations that are zero: what they add, and how they begin to train."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from small_models import KEY, QUICKLY, Block, NormedNet, normal

import compand_jax as cj
from compand_jax.layers import parametrization as par

X = normal(16, 6)
NOTHING = 1e-20


def quantized(model, **config):
    return cj.quantize_model(model, cj.QuantConfig(**{"act_bits": None, **config}))


def apply_quickly(qmodel, variables, x):
    return jax.jit(qmodel.apply, compiler_options=QUICKLY)(variables, x)


# The scale that follows


def scale_in_float64(rho, weight):
    """The rule, one channel at a time."""
    rho, weight = np.float64(rho), np.abs(np.asarray(weight, np.float64))
    if rho >= -80:
        return np.exp(rho)
    return max(min(np.exp(rho + 100), weight.max() * (1 + 2**-20)), 2.0**-110)


@pytest.mark.quick
@pytest.mark.parametrize("rho", [-70.0, -1.5, -100.5, -99.0, -97.0])
@pytest.mark.parametrize("size", [0.0, 1e-39, 1e-12, 0.3, 2.0])
def test_the_rule_of_a_scale(rho, size):
    weight = size * normal(5, 4)
    expected = scale_in_float64(rho, weight)
    found = par.weight_scale(jnp.float32(rho), weight)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    stack = jnp.stack([weight, 0 * weight])  # of layers that share it
    np.testing.assert_array_equal(par.weight_scale(jnp.float32(rho), stack), found)
    by_channel = par.weight_scale(jnp.full((1, 4), rho, jnp.float32), stack)
    expected = [scale_in_float64(rho, column) for column in np.asarray(weight).T]
    assert by_channel.shape == (1, 4)
    np.testing.assert_allclose(by_channel[0], expected, rtol=1e-5)


@pytest.mark.quick
def test_a_scale_that_does_not_follow_is_exp_rho_to_the_last_bit():
    rho = normal(1, 40) * 10
    weight = normal(7, 40)
    compute = jax.jit(par.weight_scale)
    np.testing.assert_array_equal(compute(rho, weight), jax.jit(jnp.exp)(rho))
    gradient = jax.grad(lambda rho: par.weight_scale(rho, weight).sum())(rho)
    np.testing.assert_array_equal(gradient, jnp.exp(rho))


@pytest.mark.quick
def test_a_scale_is_learned_as_soon_as_it_does_not_follow():
    weight = jnp.asarray([[0.5, 2.0, 0.0]])
    rho = jnp.full((1, 3), -100.0)  # a scale of 1, where the weight reaches it
    scale, pull = jax.vjp(lambda rho: par.weight_scale(rho, weight), rho)
    np.testing.assert_allclose(scale[0], [0.5, 1, 2.0**-110], rtol=1e-5)
    np.testing.assert_allclose(pull(jnp.ones((1, 3)))[0][0], [0, 1, 0])


# Pruned channels


@pytest.mark.parametrize(
    ("grid", "bits", "calibration", "size"),
    [
        ("midtread", 2, "mse", 0.0),
        ("midrise", 1, "absmax", 0.0),
        ("midrise", 2, "output", 1e-38),
        ("midrise", 8, "mse", 1e-40),
    ],
)
def test_a_pruned_channel_adds_nothing_and_changes_no_other(grid, bits, calibration, size):
    kernel = normal(6, 5).at[:, 2].multiply(size)
    options = {"weight_bits": bits, "grid": grid, "weight_granularity": "channel"}
    qmodel = quantized(nn.Dense(5, use_bias=False), **options)
    qmodel, variables = qmodel.calibrate(
        {"params": {"kernel": kernel}}, [X], calibration=calibration
    )
    y = qmodel.apply(variables, X)
    assert np.abs(y[:, 2]).max() < NOTHING
    rest = [0, 1, 3, 4]
    alone = quantized(nn.Dense(4, use_bias=False), **options)
    alone, of_rest = alone.calibrate(
        {"params": {"kernel": kernel[:, rest]}}, [X], calibration=calibration
    )
    found, expected = qmodel.quantizers(variables)[""], alone.quantizers(of_rest)[""]
    for name, value in (("mu", found["weight_mu"]), ("scale", found["weight_scale"][:, rest])):
        np.testing.assert_allclose(value, expected[f"weight_{name}"], rtol=1e-6)
    frozen = cj.freeze(qmodel, variables, X)
    np.testing.assert_array_equal(frozen.apply(X), apply_quickly(qmodel, variables, X))


@pytest.mark.parametrize("grid", ["midtread", "midrise"])
def test_error_feedback_leaves_a_pruned_channel_pruned(grid):
    kernel = normal(6, 5).at[:, 2].set(0)
    qmodel = quantized(
        nn.Dense(5, use_bias=False), weight_bits=2, grid=grid, weight_granularity="channel"
    )
    qmodel, variables = qmodel.calibrate(
        {"params": {"kernel": kernel}}, [X], calibration="output", error_feedback=True
    )
    y = apply_quickly(qmodel, variables, X)
    assert np.abs(y[:, 2]).max() < NOTHING
    error, plain = (np.square(z - X @ kernel).sum() for z in (y, 0 * y))
    assert error < 0.3 * plain


def test_a_mask_that_prunes_a_channel():
    mask = np.ones((6, 5), np.float32)
    mask[:, 1] = 0
    model = nn.Conv(5, (1,), mask=mask[None])
    qmodel = quantized(model, weight_bits=3, grid="midrise", weight_granularity="channel")
    x = X[:, None]
    qmodel, variables = qmodel.calibrate(model.init(KEY, x), [x])
    y = qmodel.apply(variables, x)
    assert np.abs(y[..., 1]).max() < NOTHING
    assert np.abs(y[..., 0]).max() > 0.1
    np.testing.assert_array_equal(
        cj.freeze(qmodel, variables, x).apply(x), jax.jit(qmodel.apply)(variables, x)
    )


def test_a_pruned_channel_before_a_norm_whose_factor_is_zero():
    variables = NormedNet().init(KEY, X)
    params = variables["params"]
    params["first"]["kernel"] = params["first"]["kernel"].at[:, 0].set(0)
    params["norm"]["scale"] = params["norm"]["scale"].at[:2].set(0)
    params["norm"]["bias"] = normal(6)
    qmodel = quantized(NormedNet(), weight_bits=3, grid="midrise", weight_granularity="channel")
    qmodel, variables = qmodel.calibrate(variables, [X])
    expected = qmodel.apply(variables, X)
    for fold in (False, True):
        frozen = cj.freeze(qmodel, variables, X, fold_norms=fold)
        np.testing.assert_allclose(frozen.apply(X), expected, rtol=1e-5, atol=1e-5)


# Kernels that start at zero


class Residual(nn.Module):
    """What is added to the input starts at zero."""

    @nn.compact
    def __call__(self, x):
        y = jnp.tanh(nn.Dense(4, name="a")(x))
        return x + nn.Dense(6, name="b", kernel_init=nn.initializers.zeros)(y)


@pytest.mark.filterwarnings("ignore:the quantized model is not calibrated")
@pytest.mark.parametrize(
    ("grid", "bits", "how"),
    [
        ("midrise", 2, "init"),
        ("midtread", 2, "jitted init"),
        ("midrise", 1, "calibrate"),
        ("midrise", 8, "calibrate"),
    ],
)
def test_a_kernel_that_starts_at_zero_adds_nothing(grid, bits, how):
    qmodel = quantized(Residual(), weight_bits=bits, grid=grid)
    if how == "calibrate":
        qmodel, variables = qmodel.calibrate(Residual().init(KEY, X), [X])
    else:
        init = jax.jit(qmodel.init) if "jit" in how else qmodel.init
        variables = init(KEY, X)
    np.testing.assert_allclose(qmodel.apply(variables, X), X, atol=NOTHING)
    assert float(qmodel.quantizers(variables)["b"]["weight_scale"]) == 2.0**-110
    np.testing.assert_allclose(cj.freeze(qmodel, variables, X).apply(X), X, atol=NOTHING)


def clusters(seed, size=512):
    """Eight classes in 32 dimensions, near enough to each other to be confused now and then."""
    centers = 0.6 * np.random.default_rng(0).normal(size=(8, 32))
    rng = np.random.default_rng(seed)
    labels = rng.integers(8, size=size)
    return jnp.float32(centers[labels] + rng.normal(size=(size, 32))), jnp.asarray(labels)


def accuracy_after_training(apply, variables, tx, steps=150):
    """Returns the accuracy on new data of a classifier trained for some steps."""
    x, labels = clusters(1)

    def loss(variables, index):
        logits = apply(variables, x[index])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[index]).mean()

    def step(carry, key):
        variables, state = carry
        index = jax.random.choice(key, len(x), (64,))
        updates, state = tx.update(jax.grad(loss)(variables, index), state, variables)
        return (optax.apply_updates(variables, updates), state), None

    @jax.jit
    def train(variables):
        keys = jax.random.split(KEY, steps)
        (variables, _), _ = jax.lax.scan(step, (variables, tx.init(variables)), keys)
        x, labels = clusters(2)
        return jnp.mean(jnp.argmax(apply(variables, x), 1) == labels), variables

    with jax.numpy_dtype_promotion("standard"):  # optax takes a decay to the power of a count
        return train(variables)


@pytest.mark.parametrize("weights", [optax.sgd(0.002), optax.adam(3e-4)], ids=["sgd", "adam"])
def test_a_head_that_starts_at_zero_trains_as_in_full_precision(weights):
    model = nn.Dense(8, kernel_init=nn.initializers.zeros)
    variables = model.init(KEY, clusters(1)[0])
    full, _ = accuracy_after_training(model.apply, variables, weights)
    assert full > 0.7
    tx = cj.partition_optimizer(weights, mu=optax.adam(1e-3), scale=optax.adam(1e-3))
    for bits, grid, granularity in (
        (2, "midtread", "tensor"),
        (2, "midtread", "channel"),
        (2, "midrise", "tensor"),
        (3, "midtread", "tensor"),
    ):
        qmodel = quantized(model, weight_bits=bits, grid=grid, weight_granularity=granularity)
        qmodel, started = qmodel.calibrate(variables, [clusters(1)[0]])
        found, trained = accuracy_after_training(qmodel.apply, started, tx)
        assert found > full - 0.1, (bits, grid, granularity)
        x = clusters(2)[0]
        expected = apply_quickly(qmodel, trained, x)
        np.testing.assert_allclose(
            cj.freeze(qmodel, trained, x).apply(x), expected, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(("kind", "granularity"), [("scan", "channel"), ("vmap", "tensor")])
def test_a_stack_of_layers_shares_the_scale_that_follows(kind, granularity):
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            params = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            if kind == "vmap":
                return nn.vmap(Block, in_axes=None, axis_size=3, **params)(name="stack")(x).sum(0)
            return nn.scan(Block, length=3, **params)(carries=True, name="stack")(x)[0]

    x = normal(5, 4)
    variables = jax.tree.map(jnp.zeros_like, Stack().init(KEY, x))
    qmodel = quantized(Stack(), weight_bits=3, grid="midrise", weight_granularity=granularity)
    qmodel, variables = qmodel.calibrate(variables, [x])
    assert np.abs(qmodel.apply(variables, x)).max() < NOTHING
    kernel = 0.05 * normal(3, 4, 4) * jnp.asarray([1.0, 3.0, 0.1])[:, None, None]
    variables["params"]["stack"]["dense"]["kernel"] = kernel  # after a step of training
    largest = np.abs(kernel).max((0, 1))[None] if granularity == "channel" else np.abs(kernel).max()
    found = qmodel.quantizers(variables)["stack/dense"]
    np.testing.assert_allclose(found["weight_scale"], largest, rtol=1e-5)
    by_hand = cj.fake_quantize(
        kernel,
        found["weight_mu"],
        found["weight_scale"][None] if granularity == "channel" else found["weight_scale"],
        bits=3,
        grid="midrise",
    )
    params = {"stack": {"dense": {**variables["params"]["stack"]["dense"], "kernel": by_hand}}}
    y = jax.jit(qmodel.apply)(variables, x)
    np.testing.assert_allclose(y, Stack().apply({"params": params}, x), rtol=1e-5, atol=1e-6)
    frozen = cj.freeze(qmodel, variables, x)
    np.testing.assert_allclose(frozen.apply(x), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale_gradient", ["plain", "lsq"])
def test_gradients_under_shard_map_are_those_of_one_device(scale_gradient):
    model = nn.Dense(3, kernel_init=nn.initializers.zeros)
    qmodel = quantized(
        model, weight_bits=3, weight_granularity="channel", scale_gradient=scale_gradient
    )
    qmodel, variables = qmodel.calibrate(model.init(KEY, X), [X])
    # One channel is where it was, one follows, and one has got beyond.
    variables["params"]["kernel"] = normal(6, 3) * jnp.asarray([[0.0, 0.1, 3.0]])
    targets = normal(16, 3, seed=1)

    def loss(variables, x, targets):
        return jnp.sum((qmodel.apply(variables, x) - targets) ** 2)

    gradient = jax.grad(loss)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P()
    )
    def sharded(variables, x, targets):
        return gradient(variables, x, targets)

    found, expected = jax.jit(sharded)(variables, X, targets), gradient(variables, X, targets)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected
    )
    in_rho = np.asarray(expected["compand"]["weight_scale"][0])
    assert in_rho[2] != 0
    np.testing.assert_array_equal(in_rho[:2], 0)


# Activations, and arrays


@pytest.mark.parametrize(("bits", "signed"), [(4, True), (1, False)])
def test_activations_of_zeros_are_taken_as_unknown(bits, signed):
    model = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(3)])
    variables = model.init(KEY, X)
    variables["params"]["layers_0"]["bias"] -= 100.0  # a relu that lets nothing through
    rules = (cj.Rule("layers_0", act_bits=None),)
    qmodel = quantized(model, act_bits=bits, rules=rules, mu_init=3.0)
    qmodel, variables = qmodel.calibrate(variables, [X])
    found = qmodel.quantizers(variables)["layers_2"]
    assert float(found["act_scale"]) == 1
    assert float(found["act_mu"]) == pytest.approx(3, rel=1e-5)
    assert qmodel.sites["layers_2"].act_signed is signed
    np.testing.assert_allclose(
        qmodel.apply(variables, X),
        np.broadcast_to(variables["params"]["layers_2"]["bias"], (16, 3)),
    )


@pytest.mark.quick
def test_mu_of_zeros_is_the_first_one_unless_it_is_given():
    model = nn.Dense(3, kernel_init=nn.initializers.zeros)
    variables = model.init(KEY, X)
    for mu, expected in ((None, 7), (2.0, 2)):
        qmodel, found = quantized(model, mu_init=7.0).calibrate(variables, [X], mu=mu)
        mu = float(qmodel.quantizers(found)[""]["weight_mu"])
        assert mu == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("calibration", "size"), [("mse", 0.0), ("percentile", 1e-45)])
def test_the_fit_of_an_array_with_zeros(calibration, size):
    x = np.array(normal(40, 5))
    x[:, 2] *= np.float32(size)
    for grid in ("midtread", "midrise"):
        arguments = {"bits": 2, "grid": grid, "calibration": calibration}
        mu, scale = cj.fit(x, axis=-1, **arguments)
        y = cj.fake_quantize(x, mu, scale, bits=2, grid=grid)
        assert np.abs(y[:, 2]).max() < NOTHING
        rest = [0, 1, 3, 4]
        mu_of_rest, scale_of_rest = cj.fit(x[:, rest], axis=-1, **arguments)
        np.testing.assert_allclose(mu, mu_of_rest, rtol=1e-6)
        np.testing.assert_allclose(scale[:, rest], scale_of_rest, rtol=1e-6)
        mu, scale = cj.fit(x[:, 2], **arguments)
        assert np.abs(cj.fake_quantize(x[:, 2], mu, scale, bits=2, grid=grid)).max() < NOTHING


@pytest.mark.filterwarnings("ignore:the quantized model is not calibrated")
@pytest.mark.parametrize(
    ("size", "granularity", "calibration"),
    [(1e-37, "tensor", "absmax"), (1e-40, "channel", "mse"), (1e-45, "tensor", "output")],
)
def test_weights_that_decay_has_shrunk_to_nothing(size, granularity, calibration):
    kernel = np.asarray(normal(6, 3)) * np.float32(size)
    bias = normal(3)
    variables = {"params": {"kernel": jnp.asarray(kernel, jnp.float32), "bias": bias}}
    qmodel = quantized(nn.Dense(3), weight_bits=3, weight_granularity=granularity)
    qmodel, variables = qmodel.calibrate(variables, [X], calibration=calibration)
    y = qmodel.apply(variables, X)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, (16, 3)))
    np.testing.assert_array_equal(cj.freeze(qmodel, variables, X).apply(X), y)
    scale = qmodel.quantizers(variables)[""]["weight_scale"]
    np.testing.assert_array_equal(scale, np.full(scale.shape, 2.0**-110))
    assert np.all(np.isfinite(variables["compand"]["weight_scale"]))
