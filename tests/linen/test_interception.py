"""What the interceptor reaches, what it must not miss, and that it leaves nothing behind."""

import threading
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeParamShapeError
from small_models import Net, ScaledConv, SetUp, Stack, Tokens, drawn, normal

import compand_jax as cj
from compand_jax.layers.observation import Observer
from compand_jax.linen.interception import intercept_layers
from compand_jax.linen.observation import observe_layers
from compand_jax.linen.reach import layers_run

pytestmark = pytest.mark.filterwarnings(
    "ignore:the quantized model is not calibrated"  # its mu and scales are drawn at random here
)
CONFIG = cj.QuantConfig(weight_bits=3, act_bits=3)
X = normal(5, 4)


class Fails(nn.Module):
    """Raises between two layers, where told to."""

    on_the_way: Callable[[], None]

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="first")(x)
        self.on_the_way()
        return nn.Dense(3, name="second")(x)


def test_nothing_is_left_after_an_exception():
    stop = [False]

    def on_the_way():
        if stop[0]:
            raise RuntimeError("stopped")

    model = Fails(on_the_way)
    qmodel = cj.quantize_model(model, CONFIG)
    variables = drawn(qmodel, X)
    before = model.apply({"params": variables["params"]}, X)
    stop[0] = True
    with pytest.raises(RuntimeError, match="stopped"):
        qmodel.apply(variables, X)
    stop[0] = False
    np.testing.assert_array_equal(model.apply({"params": variables["params"]}, X), before)


def test_nothing_is_left_in_a_layer_after_an_exception():
    layer = nn.Dense(3)
    qmodel = cj.quantize_model(layer, CONFIG)
    variables = drawn(qmodel, X)
    with pytest.raises(ScopeParamShapeError, match="shape"):
        qmodel.apply(variables, normal(5, 7))
    assert layer.promote_dtype is nn.Dense(3).promote_dtype
    expected = X @ variables["params"]["kernel"] + variables["params"]["bias"][None]
    np.testing.assert_allclose(
        layer.apply({"params": variables["params"]}, X), expected, rtol=1e-5, atol=1e-6
    )


def test_another_thread_at_the_same_time_stays_in_full_precision():
    seen, running = [], [False]

    def on_the_way():
        if not running[0]:
            return
        running[0] = False  # the other thread runs this model, too
        thread = threading.Thread(target=lambda: seen.append(model.apply(plain, X)))
        thread.start()
        thread.join()

    model = Fails(on_the_way)
    qmodel = cj.quantize_model(model, CONFIG)
    variables = drawn(qmodel, X)
    plain = {"params": variables["params"]}
    full_precision, alone = model.apply(plain, X), qmodel.apply(variables, X)
    running[0] = True
    beside = qmodel.apply(variables, X)
    np.testing.assert_array_equal(seen[0], full_precision)
    np.testing.assert_array_equal(beside, alone)
    assert np.any(alone != full_precision)


class Recorder:
    """A visitor that counts its calls."""

    def __init__(self):
        self.calls = []

    def operands(self, layer, activation, weight):
        self.calls.append((layer.site, activation is None))
        return activation, weight

    def output(self, layer, output):
        self.calls.append((layer.site, "output"))
        return output


def calls(model, x):
    variables, recorder = drawn(model, x), Recorder()
    with intercept_layers(model, recorder) as intercepted:
        y = intercepted.apply(variables, x)
    np.testing.assert_array_equal(y, model.apply(variables, x))
    return recorder.calls


@pytest.mark.quick
def test_a_subclass_is_visited_once():
    assert calls(Net(ScaledConv(6, (3, 3))), normal(2, 5, 5, 4)) == [
        ("layer", False),
        ("layer", "output"),
        ("head", False),
        ("head", "output"),
    ]


@pytest.mark.quick
def test_ids_are_no_activation():
    assert calls(Tokens(), jnp.arange(5, dtype=jnp.int32)) == [
        ("embed", True),
        ("dense", False),
        ("dense", "output"),
        ("embed", False),
        ("embed", "output"),
    ]


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["scan", "vmap"])
def test_a_stack_is_one_site(kind):
    x = normal(3, 5, 4) if kind == "vmap" else X
    assert {name for name, *_ in calls(Stack(kind), x)} == {"stack/dense"}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("equation", "shape", "sizes", "axes"),
    [
        ("bd,df->bf", (4, 6), (5, 4), (-1,)),
        ("...d,hdk->...hk", (2, 4, 3), (5, 4), (-3, -1)),
        ("bd, fd -> bf", (6, 4), (5, 4), (-2,)),
        ("bnd,nde->bne", (3, 4, 6), (5, 3, 4), (-1,)),
    ],
)
def test_the_channels_of_an_einsum(equation, shape, sizes, axes):
    seen = []

    class Channels(Recorder):
        def operands(self, layer, activation, weight):
            seen.append(layer.channel_axes)
            return activation, weight

    given = nn.Einsum(shape, equation, use_bias=False)
    left_out = nn.Einsum(shape, use_bias=False)
    variables, x = drawn(given, normal(*sizes)), normal(*sizes)
    with intercept_layers(given, Channels()) as intercepted:
        intercepted.apply(variables, x)
    with intercept_layers(left_out, Channels()) as intercepted:
        intercepted.apply(variables, x, equation)
        intercepted.apply(variables, x, einsum_str=equation)
    assert seen == [axes] * 3


@pytest.mark.quick
def test_integers_are_quantized_as_numbers():
    x = jnp.asarray([[0, 1, 2, 3]], jnp.int32)
    qmodel = cj.quantize_model(nn.Dense(3), CONFIG)
    variables = drawn(qmodel, X)
    with jax.numpy_dtype_promotion("standard"):
        found, expected = (qmodel.apply(variables, x) for x in (x, x.astype(jnp.float32)))
    np.testing.assert_array_equal(found, expected)


class Branches(nn.Module):
    """Other layers in training, and by another method."""

    def setup(self):
        self.trunk, self.auxiliary, self.decoder = nn.Dense(4), nn.Dense(2), nn.Dense(4)

    def __call__(self, x, train=False):
        x = self.trunk(x)
        return (x, self.auxiliary(x)) if train else (x, x)

    def decode(self, x):
        return self.decoder(self.trunk(x))

    def everything(self, x):
        return self(x, train=True), self.decode(x)


@pytest.mark.quick
def test_layers_are_found_by_method_and_static_arguments():
    model = Branches()
    variables = drawn(model, X, method="everything")

    def found(**kwargs):
        return layers_run(model, variables, (X,), False, kwargs)

    assert found() == found(train=False) == {"trunk"}
    assert found(train=True) == {"trunk", "auxiliary"}
    assert found(method="decode") == found(method=model.decode) == {"trunk", "decoder"}
    assert found(method=Branches.decode) == {"trunk", "decoder"}


def test_a_branch_or_method_that_does_not_run_is_no_error():
    model = Branches()
    qmodel = cj.quantize_model(model, CONFIG)
    variables = drawn(qmodel, X, method="everything")
    trained = qmodel.apply(variables, X, train=True)
    evaluated = qmodel.apply(variables, X)
    np.testing.assert_array_equal(trained[0], evaluated[0])
    assert qmodel.apply(variables, X, method="decode").shape == (5, 4)
    bound, unbound = (qmodel.apply(variables, X, method=m) for m in (model.decode, Branches.decode))
    np.testing.assert_array_equal(bound, unbound)


@pytest.mark.quick
def test_the_layers_are_looked_for_once():
    traces = []
    model = Fails(lambda: traces.append(1))
    variables = drawn(model, X)
    traces.clear()
    for _ in range(3):
        layers_run(model, variables, (X,), False, {})
    assert len(traces) == 2  # of which the second tells what jax.jit keeps
    layers_run(model, variables, (X[:2],), False, {})
    assert len(traces) == 4


@pytest.mark.quick
def test_an_observer_keeps_what_was_computed_wherever_it_ran():
    model, x = Stack("scan"), X
    variables = drawn(model, x)
    observer, _ = observe_layers(
        model,
        lambda: Observer(activation=lambda a: jnp.max(jnp.abs(a)), weight=lambda w: w),
        lambda model: model.apply(variables, x),
    )
    jax.effects_barrier()
    assert list(observer.layers) == ["stack/dense"]
    assert observer.last_site == "stack/dense"
    weights = observer.values("weight", "stack/dense")
    kernel = np.asarray(variables["params"]["stack"]["dense"]["kernel"])
    assert sorted(w.tobytes() for w in weights) == sorted(k.tobytes() for k in kernel)
    peaks = observer.values("activation", "stack/dense")
    assert len(peaks) == 3
    assert np.max(np.abs(X)) in np.asarray(peaks)


@pytest.mark.quick
def test_setup_is_not_taken_for_a_call():
    assert [name for name, what in calls(SetUp(), X) if what != "output"] == ["first", "second"]
