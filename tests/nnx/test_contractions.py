"""NNX models that multiply by themselves: as their Linen counterparts, and as by hand."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contraction_models import IDS, Gemma, GemmaNNX, T5BlockNNX
from flax import nnx
from small_models import BITS, QUICKLY, assert_same, drawn, normal

import compand_jax as cj

HAS_TREE_MODE = hasattr(nnx, "set_graph_mode")
TRAINED = nnx.Any(nnx.Param, cj.nnx.Quantizer)
X = normal(6, 4)


def config(**fields):
    fields = {"weight_bits": BITS, "act_bits": BITS, "contractions": "parameters"} | fields
    return cj.QuantConfig(**fields)


def calibrated(model, batch=X, arguments=None, **fields):
    qmodel = cj.nnx.quantize(model, config(**fields))
    arguments = {"calibration": "absmax", "mu": 2.0} | (arguments or {})
    cj.nnx.calibrate(qmodel, [batch], **arguments)
    return qmodel


def quantized_weight(qmodel, site, variable):
    found = cj.nnx.quantizers(qmodel)[site]
    return cj.fake_quantize(variable[...], found["weight_mu"], found["weight_scale"], bits=BITS)


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def smooth(operand, x, mu, scale, *_):
    """Stands in for a quantizer: compiled fast, and no rounding makes another level of it."""
    return (x + jnp.sin(x) * scale) * (1 + mu)


@pytest.mark.filterwarnings("ignore:the quantized model is not calibrated")
def test_gemma_is_linens(monkeypatch):
    monkeypatch.setattr("compand_jax.layers.layer_quantizer.quantize_operand", smooth)
    monkeypatch.setattr("compand_jax.nnx.promotion.quantize_operand", smooth)
    linen = cj.quantize_model(Gemma(), config(contractions="all"))
    variables = drawn(linen, IDS)
    sites = {name: linen.site(name) for name in linen.quantizers(variables)}
    model = GemmaNNX(nnx.Rngs(0))
    nnx.update(model, variables["params"])
    qmodel = cj.nnx.quantize(model, config(contractions="all"), sites=sites)
    compand = dict(variables["compand"])
    # A stack's layer of Flax has its own mu and scale in each of its layers.
    adapter = jax.tree.map(lambda x: jnp.stack([x, x]), compand["block"]["adapter"])
    compand["block"] = {k: v for k, v in compand["block"].items() if k != "adapter"}
    nnx.update(qmodel.block.adapter.promote_dtype, adapter)
    nnx.update(qmodel.compand_contractions.quantizers, compand)
    graphdef, state = nnx.split(qmodel)

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def both(state, variables):
        return nnx.merge(graphdef, state)(IDS), linen.apply(variables, IDS)

    np.testing.assert_array_equal(*both(state, variables))


def test_t5x_is_quantized_as_by_hand():
    model, x = T5BlockNNX(), normal(2, 3, 4)
    for i, layer in enumerate((model.query, model.key, model.value, model.out)):
        layer.kernel[...] = normal(4, 4, seed=i)
    qmodel = calibrated(model, x, act_bits=None, weight_granularity="channel")
    assert sorted(cj.nnx.sites(qmodel)) == [f"{n}/kernel" for n in ("key", "out", "query", "value")]
    hand = nnx.clone(model)
    for layer in (hand.query, hand.key, hand.value, hand.out):
        kernel = layer.kernel[...]
        scale = jnp.max(jnp.abs(kernel), 0, keepdims=True)
        layer.kernel[...] = cj.fake_quantize(kernel, 2.0, scale, bits=BITS)
    np.testing.assert_allclose(
        cj.nnx.quantizers(qmodel)["out/kernel"]["weight_scale"],
        np.max(np.abs(model.out.kernel[...]), 0, keepdims=True),
        rtol=1e-6,
    )
    call = nnx.jit(lambda model, x: model(x))
    assert_same(call(qmodel, x), call(hand, x), 0.02)


class Mixed(nnx.Module):
    """A product by itself, a layer of Flax, statistics, random numbers, and a method beside."""

    def __init__(self, rngs):
        self.w = nnx.Param(0.5 * jax.random.normal(rngs.params(), (4, 3)))
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)
        self.calls = 0

    def encode(self, x):
        return x @ self.w

    def __call__(self, x):
        return self.head(self.dropout(jnp.tanh(self.norm(self.encode(x)))))

    def first(self, x):
        return float(self(x)[0, 0])

    def count(self, x):
        self.calls += 1
        return self.encode(x)

    def keep(self, x):
        self.kept = nnx.Intermediate(self.encode(x))
        return x

    def widen(self):
        self.calls = 5


def test_the_copy_has_the_models_params_and_dequantize_gives_it_back():
    model = Mixed(nnx.Rngs(0))
    before, qmodel = params_of(model), cj.nnx.quantize(model, config())
    assert nnx.graphdef(qmodel) == nnx.graphdef(cj.nnx.quantize(model, config()))
    with pytest.raises(ValueError, match="must be calibrated with its method '__call__' before"):
        cj.nnx.quantize(model, config(rules=(cj.Rule(".*", act_bits=None),)))(X)
    cj.nnx.calibrate(qmodel, [X], calibration="absmax", mu=2.0)
    assert sorted(cj.nnx.sites(qmodel)) == ["head", "w"]
    assert isinstance(qmodel, Mixed)
    assert cj.nnx.summary(cj.nnx.quantize(model, config())).endswith("weights not quantized: w")
    assert jax.tree.structure(params_of(qmodel)) == jax.tree.structure(before)
    assert_same(params_of(qmodel), before, 0)
    assert nnx.graphdef(cj.nnx.dequantize(qmodel)) == nnx.graphdef(model)
    # Stored, and restored into a model that was never calibrated.
    text = cj.sites_to_json(cj.nnx.sites(qmodel))
    other = cj.nnx.quantize(Mixed(nnx.Rngs(1)), config(), sites=cj.sites_from_json(text))
    assert nnx.graphdef(other) == nnx.graphdef(qmodel)
    assert hash(nnx.graphdef(other)) == hash(nnx.graphdef(qmodel))
    nnx.update(other, nnx.state(qmodel))
    call = nnx.jit(lambda model, x: model(x))
    np.testing.assert_array_equal(call(other, X), call(qmodel, X))


def test_state_is_changed_as_ever_and_methods_are_reached():
    qmodel = calibrated(Mixed(nnx.Rngs(0)), arguments={"batch_stats": True})
    w, found = quantized_weight(qmodel, "w", qmodel.w), cj.nnx.quantizers(qmodel)["w"]
    x = cj.fake_quantize(X, found["act_mu"], found["act_scale"], bits=BITS)
    expected = np.asarray(x @ w)
    assert_same(qmodel.norm.mean[...], np.mean(expected, 0), 1e-6)  # estimated anew
    np.testing.assert_allclose(qmodel.encode(X), expected, rtol=1e-6)
    drawn, mean = int(qmodel.dropout.rngs.count[...]), qmodel.norm.mean[...] + 1
    qmodel.norm.mean[...] = mean
    qmodel(X)
    assert int(qmodel.dropout.rngs.count[...]) == drawn + 1
    assert_same(qmodel.norm.mean[...], 0.99 * mean + 0.01 * np.mean(expected, 0), 1e-5)
    qmodel.keep(X)
    np.testing.assert_allclose(qmodel.kept[...], expected, rtol=1e-6)
    outside = jax.grad(lambda x: jnp.sum(qmodel.encode(x)))(X)  # the model is no argument of it
    inside = np.abs(X[0]) < found["act_scale"]
    np.testing.assert_allclose(outside[0], np.sum(w, 1) * np.asarray(inside, np.float32))
    qmodel.widen()  # no contraction of it: whatever it does, it does
    assert qmodel.calls == 5
    with pytest.warns(UserWarning, match="method 'first' of the model needs the values of arrays"):
        assert isinstance(qmodel.first(X), float)
    with pytest.raises(ValueError, match="`model` must change its state alone when it is run"):
        qmodel.count(X)


def numbers(model):
    flat = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState)))
    return {"/".join(map(str, path)): np.asarray(x[...]) for path, x in flat}


def run_tree(run):
    with nnx.set_graph_mode(False):
        return run()


def trained(mu_scope="per_layer"):
    qmodel = calibrated(Mixed(nnx.Rngs(0)), mu_scope=mu_scope)
    tx = cj.nnx.partition_optimizer(
        optax.set_to_zero(), mu=optax.sgd(1e3), scale=optax.set_to_zero()
    )
    optimizer = nnx.Optimizer(qmodel, tx, wrt=TRAINED)

    @nnx.jit
    def step(qmodel, optimizer):
        graphdef, trained, rest = nnx.split(qmodel, TRAINED, ...)

        def loss(trained):
            qmodel = nnx.merge(graphdef, trained, nnx.clone(rest))
            return jnp.mean(jnp.square(qmodel(X)))

        optimizer.update(qmodel, jax.grad(loss)(trained))

    before = numbers(qmodel)
    step(qmodel, optimizer)
    after = numbers(qmodel)
    return qmodel, {name for name, x in before.items() if not np.array_equal(x, after[name])}


@pytest.mark.parametrize("mode", ["graph", "tree"] if HAS_TREE_MODE else ["graph"])
def test_training_moves_the_part_that_it_is_for(mode):
    qmodel, moved = trained() if mode == "graph" else run_tree(trained)
    own = "compand_contractions/quantizers/w"
    assert {name for name in moved if name.startswith("compand")} <= {
        f"{own}/weight_mu",
        f"{own}/act_mu",
    }
    assert any(name.startswith("compand") for name in moved)
    assert not any("scale" in name or name in ("w", "head/kernel") for name in moved)
    assert 0 <= float(cj.nnx.quantizers(qmodel)["w"]["weight_mu"]) <= 255


def test_a_mu_is_shared_by_layers_and_contractions():
    qmodel, moved = trained("separate")
    assert len(jax.tree.leaves(nnx.state(qmodel, cj.nnx.Mu))) == 2
    found = cj.nnx.quantizers(qmodel)
    assert {name.rpartition("_")[2] for name in moved} == {"mu"}
    for operand in ("weight_mu", "act_mu"):
        np.testing.assert_array_equal(found["w"][operand], found["head"][operand])


class Transformed(nnx.Module):
    """Products by themselves, run twice by a transformation of Flax."""

    def __init__(self, kind, rngs):
        self.kind = kind
        self.block = Product(rngs)

    def __call__(self, x):
        run = {
            "jit": nnx.jit,
            "remat": nnx.remat,
            "cond": lambda f: lambda b, x: nnx.cond(x[0, 0] > -9, f, lambda b, x: x, b, x),
            "vmap": lambda f: nnx.vmap(f, in_axes=(None, 0)),
            "fori_loop": lambda f: (
                lambda b, x: nnx.fori_loop(0, 1, lambda i, both: (both[0], f(*both)), (b, x))[1]
            ),
        }[self.kind](lambda block, x: block(x))
        return run(self.block, run(self.block, x))


class Product(nnx.Module):
    def __init__(self, rngs):
        self.w = nnx.Param(0.5 * jax.random.normal(rngs.params(), (4, 4)))

    def __call__(self, x):
        return jnp.tanh(x @ self.w)


@pytest.mark.parametrize("kind", ["jit", "remat", "cond", "vmap", "fori_loop"])
def test_contractions_are_found_in_transformations(kind):
    qmodel = calibrated(Transformed(kind, nnx.Rngs(0)), act_bits=None)
    w = quantized_weight(qmodel, "block/w", qmodel.block.w)
    expected = np.tanh(np.tanh(X @ w) @ w)
    np.testing.assert_allclose(qmodel(X), expected, rtol=1e-5, atol=1e-6)


class LinenProduct(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("w", nn.initializers.zeros, (4, 4))


def test_error_feedback_is_a_layers():
    own, layer = Product(nnx.Rngs(0)), nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))
    w = np.asarray(own.w[...])
    layer.kernel[...] = own.w[...]
    arguments = {"error_feedback": True}
    found = np.asarray(calibrated(own, arguments=arguments).w[...])
    assert not np.array_equal(found, w)
    layer = calibrated(layer, arguments=arguments, contractions="layers")
    np.testing.assert_allclose(found, layer.kernel[...], rtol=1e-6)
    _, variables = cj.quantize_model(LinenProduct(), config()).calibrate(
        {"params": {"w": jnp.asarray(w)}}, [X], calibration="absmax", mu=2.0, error_feedback=True
    )
    np.testing.assert_allclose(variables["params"]["w"], found, rtol=1e-6)


class Bridged(nnx.Module):
    def __init__(self):
        self.linen = nnx.bridge.ToNNX(nn.Dense(4), rngs=nnx.Rngs(0)).lazy_init(X)

    def __call__(self, x):
        return self.linen(x)


@pytest.mark.parametrize("inside", [False, True])
def test_linen_modules_in_nnx(inside):
    model = Bridged() if inside else Bridged().linen
    qmodel = calibrated(model, act_bits=None)
    name, linen = ("linen/kernel", qmodel.linen) if inside else ("kernel", qmodel)
    assert sorted(cj.nnx.sites(qmodel)) == [name]
    w = quantized_weight(qmodel, name, linen.kernel)
    np.testing.assert_allclose(qmodel(X), X @ w + linen.bias[...][None], rtol=1e-5, atol=1e-6)
    assert nnx.graphdef(cj.nnx.dequantize(qmodel)) == nnx.graphdef(model)


class Captured(nnx.Module):
    """Shows what it computes to `nnx.capture`, or puts it in the place of None."""

    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (4, 4)))
        self.last = nnx.data(None)

    def __call__(self, x):
        y = x @ self.w[...]
        self.sow(nnx.Intermediate, "y", y)
        return y

    def keep(self, x):
        self.last = nnx.Cache(x @ self.w[...])


@pytest.mark.skipif(not hasattr(nnx, "capture"), reason="Flax 0.11 has no nnx.capture")
@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
def test_capture_sees_what_a_call_sows():
    qmodel = calibrated(Captured(nnx.Rngs(0)))
    y, sown = nnx.capture(qmodel, nnx.Intermediate)(X)
    assert_same(sown["y"].get_value()[0], y, 0)
    with pytest.raises(ValueError, match="`model` must change its state alone when it is run"):
        qmodel.keep(X)


def test_refused():
    model = Mixed(nnx.Rngs(0))
    qmodel = calibrated(model)
    with pytest.raises(ValueError, match="`qmodel` must have contractions='layers', got 'param"):
        cj.freeze(qmodel)
    with pytest.raises(ValueError, match="`model` must be in full precision, got a quantized one"):
        cj.nnx.quantize(qmodel, config())
    inside = nnx.Sequential(cj.nnx.quantize(Captured(nnx.Rngs(0)), config()))
    with pytest.raises(ValueError, match="`model` must be in full precision, got a quantized one"):
        cj.nnx.quantize(inside, config())
    with pytest.raises(ValueError, match="`rules` must each match a site, 'v' matches none of"):
        calibrated(model, rules=(cj.Rule("v", weight_bits=8),))
    with pytest.raises(ValueError, match="`sites` must be this model's, 'v' is none of 'head'"):
        cj.nnx.quantize(model, config(), sites={"v": cj.nnx.sites(qmodel)["w"]})
