"""`QuantizedModel` as a Linen module: init, apply, scopes, rules, what it refuses."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ModifyScopeVariableError
from small_models import (
    KEY,
    QUICKLY,
    Net,
    NormedNet,
    SetUp,
    Stack,
    Tokens,
    Twice,
    assert_same,
    drawn,
    normal,
)

import compand_jax as cj

pytestmark = pytest.mark.filterwarnings(
    "ignore:the quantized model is not calibrated"  # most of these draw their mu and scales
)
X = normal(5, 4)
MU_0 = float(np.log1p(2.0))


def quantized(model=None, **config):
    config = {"weight_bits": 3, "act_bits": 3, **config}
    return cj.quantize_model(model or SetUp(), cj.QuantConfig(**config))


def leaves(compand):
    found = jax.tree_util.tree_leaves_with_path(compand)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


# init


@pytest.mark.parametrize("jitted", [False, True])
def test_init_sets_scales_to_the_largest_magnitudes(jitted):
    qmodel = quantized()
    variables = (jax.jit(qmodel.init) if jitted else qmodel.init)(KEY, X)
    plain = SetUp().init(KEY, X)
    assert_same(variables["params"], plain["params"], 1e-6)
    hidden = SetUp().apply(plain, X, method="encode")
    expected = {
        "first/weight_scale": plain["params"]["first"]["kernel"],
        "first/act_scale": X,
        "second/weight_scale": plain["params"]["second"]["kernel"],
        "second/act_scale": hidden,
    }
    found = leaves(variables["compand"])
    for name, tensor in expected.items():
        assert found[name] == pytest.approx(np.log(np.max(np.abs(tensor))), abs=1e-5), name
    for name in set(found) - set(expected):
        assert found[name] == pytest.approx(MU_0), name


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("kind", ["scan", "vmap"])
def test_init_of_a_stack_is_the_same_under_jit(kind, granularity):
    x = normal(3, 5, 4) if kind == "vmap" else X
    qmodel = quantized(Stack(kind), weight_granularity=granularity)
    eager, jitted = qmodel.init(KEY, x), jax.jit(qmodel.init, compiler_options=QUICKLY)(KEY, x)
    shapes = jax.eval_shape(qmodel.init, KEY, x)
    assert jax.tree.map(jnp.shape, eager) == jax.tree.map(jnp.shape, jitted)
    assert jax.tree.map(jnp.shape, eager) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    kernel = np.abs(eager["params"]["stack"]["dense"]["kernel"])
    top = kernel.max((0, 1))[None] if granularity == "channel" else kernel.max()
    for variables in (eager, jitted):
        scale = variables["compand"]["stack"]["dense"]["weight_scale"]
        np.testing.assert_allclose(scale, np.log(top), atol=1e-5)
    if kind == "vmap":  # all of its inputs are the network's
        found = eager["compand"]["stack"]["dense"]["act_scale"]
        assert found == pytest.approx(np.log(np.abs(x).max()), abs=1e-5)
    assert np.all(np.isfinite(qmodel.apply(jitted, x)))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_init_of_normalized_weights_sees_them_normalized(granularity):
    model = Net(nn.WeightNorm(nn.Dense(6)))
    variables = quantized(model, weight_granularity=granularity).init(KEY, X)
    raw = variables["params"]["layer"]["layer_instance"]["kernel"]
    kernel = np.abs(np.asarray(raw) / np.linalg.norm(raw, axis=0))
    expected = kernel.max(0, keepdims=True) if granularity == "channel" else kernel.max()
    found = variables["compand"]["layer"]["layer_instance"]["weight_scale"]
    np.testing.assert_allclose(found, np.log(expected), atol=1e-4)


@pytest.mark.quick
def test_init_of_zeros_has_an_activations_scale_of_one_and_a_weights_that_follows():
    model = nn.Dense(3, kernel_init=nn.initializers.zeros)
    variables = quantized(model).init(KEY, jnp.zeros((2, 4)))
    found = leaves(variables["compand"])
    assert found["act_scale"] == 0
    assert found["weight_scale"] == pytest.approx(np.log(3 / np.sqrt(4)) - 100, abs=1e-4)


@pytest.mark.quick
def test_init_takes_rngs_method_and_mutable():
    qmodel = quantized()
    encoder = qmodel.init({"params": KEY}, X, method="encode")
    assert set(encoder["params"]) == set(encoder["compand"]) == {"first"}
    normed = quantized(NormedNet())
    everything = jax.eval_shape(lambda: normed.init({"params": KEY, "dropout": KEY}, X, train=True))
    assert set(everything) == {"params", "batch_stats", "compand"}
    params_only = jax.eval_shape(lambda: qmodel.init(KEY, X, mutable=["params"]))
    assert set(params_only) == {"params", "compand"}


# apply


def test_apply_takes_rngs_method_and_mutable():
    qmodel = quantized(NormedNet())
    variables = drawn(qmodel, X)
    rngs = {"dropout": KEY}
    y, updated = qmodel.apply(variables, X, train=True, mutable=["batch_stats"], rngs=rngs)
    again, _ = qmodel.apply(variables, X, True, mutable="batch_stats", rngs=rngs)
    other, _ = qmodel.apply(
        variables, X, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(9)}
    )
    np.testing.assert_array_equal(y, again)
    assert np.any(y != other)
    assert set(updated) == {"batch_stats"}

    first = {name: variables[name]["first"] for name in ("params", "compand")}
    seen = quantized(nn.Dense(6)).apply(first, X)
    mean = 0.9 * variables["batch_stats"]["norm"]["mean"] + 0.1 * seen.mean(0)
    np.testing.assert_allclose(updated["batch_stats"]["norm"]["mean"], mean, rtol=1e-4, atol=1e-5)

    with pytest.raises(Exception, match="dropout"):
        qmodel.apply(variables, X, train=True, mutable=["batch_stats"])
    with pytest.raises(ModifyScopeVariableError, match="immutable"):
        qmodel.apply(variables, X, train=True, rngs=rngs)


@pytest.mark.quick
def test_apply_returns_what_is_mutable():
    qmodel = quantized(NormedNet())
    variables = drawn(qmodel, X)
    assert isinstance(qmodel.apply(variables, X, mutable=False), jax.Array)
    _, none = qmodel.apply(variables, X, mutable=[])
    _, own = qmodel.apply(variables, X, mutable=["compand"])
    _, everything = qmodel.apply(variables, X, mutable=True)
    assert none == {}
    assert set(own) == {"compand"}
    assert_same(everything, variables, 0)
    _, sown = qmodel.apply(variables, X, capture_intermediates=True, mutable=["intermediates"])
    assert set(sown["intermediates"]) == {"first", "norm", "Dropout_0", "second", "__call__"}


@pytest.mark.quick
def test_a_method_alone_needs_its_own_variables_only():
    qmodel = quantized()
    variables = drawn(qmodel, X)
    encoder = {name: {"first": variables[name]["first"]} for name in ("params", "compand")}
    y = qmodel.apply(encoder, X, method="encode")
    np.testing.assert_array_equal(y, qmodel.apply(variables, X, method=SetUp.encode))
    partly = {"params": variables["params"], "compand": encoder["compand"]}
    match = r"`variables` must hold compand/second/act_scale: .* without running site 'second'"
    with pytest.raises(ValueError, match=match):
        qmodel.apply(partly, X)


@pytest.mark.quick
def test_a_checkpoint_of_the_full_precision_model_loads_as_it_is():
    plain = SetUp().init(jax.random.key(3), X)
    qmodel = quantized(weight_bits=None, act_bits=None)
    variables = qmodel.init(KEY, X)
    np.testing.assert_array_equal(
        qmodel.apply({**plain, "compand": variables["compand"]}, X), SetUp().apply(plain, X)
    )


def test_jitted_and_vmapped():
    qmodel = quantized()
    variables = drawn(qmodel, X)
    y = qmodel.apply(variables, X)
    np.testing.assert_allclose(jax.jit(qmodel.apply)(variables, X), y, atol=1e-6)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), variables)
    both = jax.vmap(qmodel.apply, (0, None))(stacked, X)
    np.testing.assert_allclose(both, jnp.stack([y, y]), atol=1e-6)


@pytest.mark.quick
def test_a_weakly_typed_or_other_static_argument():
    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x, factor, dtype):
            return nn.Dense(3, dtype=dtype)(x) * factor

    qmodel = quantized(Scaled())
    arguments = X, jnp.asarray(2.0), jnp.bfloat16
    variables = qmodel.init(KEY, *arguments)
    assert qmodel.apply(variables, *arguments).dtype == jnp.bfloat16


class Sized(nn.Module):
    """With a field that cannot be hashed."""

    features: list

    @nn.compact
    def __call__(self, x):
        for size in self.features:
            x = nn.Dense(size)(x)
        return x


@pytest.mark.quick
def test_a_model_that_cannot_be_hashed():
    qmodel = quantized(Sized([4, 3]))
    assert qmodel.apply(drawn(qmodel, X), X).shape == (5, 3)


@pytest.mark.quick
def test_a_quantized_model_is_a_value():
    a, b = (quantized(Net(nn.Dense(6))) for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    assert len({a, b, quantized(Net(nn.Dense(6)), weight_bits=2), quantized(SetUp())}) == 3
    variables, traces = drawn(a, X), []

    def run(qmodel, variables):
        traces.append(qmodel)
        return qmodel.apply(variables, X)

    jitted = jax.jit(run, static_argnums=0)
    np.testing.assert_array_equal(jitted(a, variables), jitted(b, variables))
    assert len(traces) == 1
    with pytest.raises(AttributeError):
        a.sites = {}


@pytest.mark.quick
def test_an_uncalibrated_model_warns_once():
    class Fresh(SetUp):
        """No other test's."""

    qmodel = quantized(Fresh())
    variables = drawn(qmodel, X)
    with pytest.warns(UserWarning, match="not calibrated: .* call calibrate, or pass `sites`"):
        qmodel.apply(variables, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qmodel.apply(variables, X)
        quantized(Fresh()).apply(variables, X)
    with pytest.warns(UserWarning, match="not calibrated"):
        quantized(Fresh(), act_signed=True).apply(variables, X)


def test_tokens_have_no_activation_where_they_are_looked_up():
    class Lookup(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return nn.Dense(3, name="dense")(nn.Embed(7, 6, name="embed")(ids))

    ids = jnp.arange(5, dtype=jnp.int32)
    found = quantized(Lookup()).init(KEY, ids)["compand"]
    assert set(found["embed"]) == {"weight_mu", "weight_scale"}
    assert set(found["dense"]) == {"weight_mu", "weight_scale", "act_mu", "act_scale"}
    tied = quantized(Tokens()).init(KEY, ids)["compand"]
    assert set(tied["embed"]) == {"weight_mu", "weight_scale", "act_mu", "act_scale"}


@pytest.mark.quick
def test_a_module_used_twice_has_the_larger_scale():
    variables = quantized(Twice()).init(KEY, 0.01 * X)
    plain = {"params": variables["params"]}
    _, seen = Twice().apply(plain, 0.01 * X, capture_intermediates=True, mutable=["intermediates"])
    first, _ = seen["intermediates"]["shared"]["__call__"]
    top = max(np.max(np.abs(0.01 * X)), np.max(np.abs(np.tanh(first))))
    assert leaves(variables["compand"])["shared/act_scale"] == pytest.approx(np.log(top), abs=1e-5)
