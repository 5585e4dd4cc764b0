"""Whether a weight is computed is told by the trace: its values may well be a parameter's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import Net, Stack, drawn, normal, quantize_by_hand

import compand_jax as cj

pytestmark = pytest.mark.filterwarnings(
    "ignore:the quantized model is not calibrated"  # its mu and scales are drawn at random here
)
CONFIG = cj.QuantConfig(weight_bits=3, act_bits=None)
CHANNELS = cj.QuantConfig(weight_bits=3, act_bits=None, weight_granularity="channel")


class Masked(nn.Module):
    """A convolution of one pixel whose mask masks nothing."""

    @nn.compact
    def __call__(self, x):
        return nn.Conv(4, (1,), mask=jnp.ones((1, 4, 4)), name="base")(x[:, None])[:, 0]


class LoRA(nn.Module):
    """A dense layer whose kernel is a sum, of which the second part starts at zero."""

    @nn.compact
    def __call__(self, x):
        a = self.param("a", nn.initializers.normal(), (4, 2))
        b = self.param("b", nn.initializers.zeros, (2, 4))
        add = lambda tree: jax.tree.map(lambda w: w + a @ b if w.ndim == 2 else w, tree)  # noqa: E731
        return nn.map_variables(nn.Dense, "params", add, init=True)(4, name="base")(x)


class Transposed(nn.Module):
    """A dense layer whose square kernel is stored the other way round."""

    @nn.compact
    def __call__(self, x):
        turn = lambda tree: jax.tree.map(lambda w: w.T if w.ndim == 2 else w, tree)  # noqa: E731
        layer = nn.map_variables(nn.Dense, "params", turn, turn, mutable=self.is_initializing())
        return layer(4, name="base")(x)


KERNELS = {
    Masked: lambda params: params["base"]["kernel"][0],
    LoRA: lambda params: params["base"]["kernel"] + params["a"] @ params["b"],
    Transposed: lambda params: params["base"]["kernel"].T,
}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("make", KERNELS)
def test_computed_weights_by_hand(make, trained, tmp_path):
    model, x = make(), normal(5, 4)
    qmodel = cj.quantize_model(model, CHANNELS)
    variables = drawn(qmodel, x)
    if make is LoRA and not trained:
        variables["params"]["b"] = jnp.zeros((2, 4))
    leaves, params = variables["compand"]["base"], variables["params"]
    leaves["weight_scale"] = leaves["weight_scale"].reshape(1, 4)
    weight = quantize_by_hand(KERNELS[make](params), leaves, "weight")
    leaves["weight_scale"] = leaves["weight_scale"].reshape((1, 1, 4) if make is Masked else (1, 4))
    frozen = cj.freeze(qmodel, variables, x)
    assert frozen.sites["base"].weight.computed
    assert "params/base/kernel" not in frozen.arrays["variables"]
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64)
    expected += np.asarray(params["base"]["bias"])
    np.testing.assert_allclose(frozen.apply(x), expected, atol=2e-6)
    np.testing.assert_array_equal(frozen.apply(x), jax.jit(qmodel.apply)(variables, x))
    frozen.save(tmp_path / "computed.safetensors")
    loaded = cj.load_frozen(tmp_path / "computed.safetensors", model)
    np.testing.assert_array_equal(loaded.apply(x), frozen.apply(x))


class Spectral(nn.Module):
    """Spectral norm, before and in training."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.SpectralNorm(nn.Dense(6, name="base"))(x, update_stats=train)


@pytest.mark.parametrize("train", [False, True])
def test_spectral_norm(train):
    qmodel, x = cj.quantize_model(Spectral(), CONFIG), normal(5, 4)
    variables = qmodel.init(jax.random.key(0), x)
    frozen = cj.freeze(qmodel, variables, x, train=train)
    run = jax.jit(lambda v: qmodel.apply(v, x, train=train, mutable=["batch_stats"]))
    expected, found = run(variables), frozen.apply(x, train=train, mutable=["batch_stats"])
    # In training the norm is of the kernel itself, which then stays.
    assert ("params/base/kernel" in frozen.arrays["variables"]) == train
    np.testing.assert_array_equal(found[0], expected[0])
    jax.tree.map(
        np.testing.assert_array_equal,
        found[1],
        expected[1]["batch_stats"] and {"batch_stats": expected[1]["batch_stats"]},
    )


class Given(nn.Dense):
    """A dense layer that is given its kernel."""

    def __call__(self, x, kernel):
        x, kernel, _ = self.promote_dtype(x, kernel, None, dtype=None)
        return x @ kernel


class Shares(nn.Module):
    """Two layers with one kernel, of which each has its own quantizer."""

    @nn.compact
    def __call__(self, x):
        first = nn.Dense(4, name="first")
        y = first(x)
        return Given(4, name="second")(y, first.variables["params"]["kernel"])


@pytest.mark.quick
def test_two_layers_with_one_kernel():
    qmodel, x = cj.quantize_model(Shares(), CONFIG), normal(5, 4)
    variables = drawn(qmodel, x)
    frozen = cj.freeze(qmodel, variables, x)
    first, compand = variables["params"]["first"], variables["compand"]
    weights = [
        np.asarray(quantize_by_hand(first["kernel"], compand[name], "weight"), np.float64)
        for name in compand
    ]
    expected = (np.asarray(x, np.float64) @ weights[0] + np.asarray(first["bias"])) @ weights[1]
    np.testing.assert_allclose(frozen.apply(x), expected, rtol=1e-5, atol=1e-6)
    assert not [name for name in frozen.arrays["variables"] if "kernel" in name]


class Sown(nn.Module):
    """A dense layer whose kernel is looked at besides."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(4, name="base")
        y = layer(x)
        self.sow("intermediates", "norm", jnp.sum(layer.variables["params"]["kernel"] ** 2))
        return y


@pytest.mark.quick
def test_a_kernel_that_is_looked_at_stays():
    qmodel, x = cj.quantize_model(Sown(), CONFIG), normal(5, 4)
    variables = drawn(qmodel, x)
    frozen = cj.freeze(qmodel, variables, x)
    y, state = frozen.apply(x, mutable=["intermediates"])
    kernel = np.asarray(variables["params"]["base"]["kernel"], np.float64)
    np.testing.assert_allclose(state["intermediates"]["norm"][0], (kernel**2).sum(), rtol=1e-6)
    np.testing.assert_array_equal(y, jax.jit(qmodel.apply)(variables, x))


class Dynamic(nn.Module):
    """A layer whose kernel another layer makes of the input."""

    @nn.compact
    def __call__(self, x):
        kernel = nn.Dense(16, name="maker")(x.mean(0)).reshape(4, 4)
        return Given(4, name="made")(x, kernel)


class Dropped(nn.Module):
    """A layer whose kernel is dropped out at random."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(), (4, 4))
        kernel = nn.Dropout(0.5, deterministic=False)(kernel)
        return Given(4, name="made")(x, kernel)


@pytest.mark.parametrize("wrap", [lambda cls: cls, nn.remat, nn.jit])
@pytest.mark.parametrize("make", [Dynamic, Dropped])
def test_weights_that_are_no_constants_are_refused(make, wrap):
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return wrap(make)(name="inner")(x)

    x = normal(5, 4)
    qmodel = cj.quantize_model(Outer(), CONFIG)
    variables = qmodel.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)
    with pytest.raises(ValueError, match="site 'inner/made' computes its weight from the model's"):
        cj.freeze(qmodel, variables, x)


@pytest.mark.parametrize("kind", ["scan", "same", "vmap"])
def test_stacks_are_no_computation(kind):
    x = normal(3, 5, 4) if kind == "vmap" else normal(5, 4)
    qmodel = cj.quantize_model(Stack(kind), CONFIG)
    frozen = cj.freeze(qmodel, drawn(qmodel, x), x)
    weight = frozen.sites["stack/dense"].weight
    assert (weight.leaf, weight.computed) == ("params/stack/dense/kernel", False)


class Slashes(nn.Module):
    """Modules with slashes in their names."""

    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Dense(64, name="enc/a")(x))
        y = nn.BatchNorm(use_running_average=True, name="norm/a")(nn.Dense(8, name="x/y/z")(y))
        return nn.Dense(3, name="~1/")(y)


class Plain(nn.Module):
    """The same without."""

    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Dense(64, name="enc_a")(x))
        y = nn.BatchNorm(use_running_average=True, name="norm_a")(nn.Dense(8, name="x_y_z")(y))
        return nn.Dense(3, name="_1_")(y)


@pytest.mark.parametrize("fold_norms", [False, True])
def test_slashes_in_names(fold_norms, tmp_path):
    x, sizes = normal(5, 4), []
    for model in (Slashes(), Plain()):
        qmodel = cj.quantize_model(model, CHANNELS)
        variables = drawn(qmodel, x)
        frozen = cj.freeze(qmodel, variables, x, fold_norms=fold_norms)
        assert not [name for name in frozen.arrays["variables"] if name.endswith("kernel")]
        path = tmp_path / "model.safetensors"
        frozen.save(path)
        np.testing.assert_array_equal(cj.load_frozen(path, model).apply(x), frozen.apply(x))
        expected = jax.jit(qmodel.apply)(variables, x)
        np.testing.assert_allclose(frozen.apply(x), expected, atol=1e-5 if fold_norms else 0)
        sizes.append(path.stat().st_size)
    assert abs(sizes[0] - sizes[1]) < 400  # `~1` in place of `_`, and no kernel of 2 KB


def test_weights_of_a_stack_that_differ_are_refused():
    class Layers(nn.Module):
        @nn.compact
        def __call__(self, x):
            base = Given(4, name="base")
            first = self.param("first", nn.initializers.normal(), (4, 4))
            return base(base(x, first * 2), first * 3)

    qmodel, x = cj.quantize_model(Net(Layers()), CONFIG), normal(5, 4)
    with pytest.raises(ValueError, match="site 'layer/base' computes several weights"):
        cj.freeze(qmodel, drawn(qmodel, x), x)
