"""Frozen NNX models: what the jitted quantized model computes, from packed codes alone."""

import re

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from frozen_files import mutations, resealed
from nnx_models import (
    LAYERS,
    RNGS,
    Block,
    Decoder,
    Stack,
    Tied,
    draw,
    split_linens,
    values_of,
)
from small_models import NormedNet, normal

import compand_jax as cj
from compand_jax.frozen.model import read_info
from compand_jax.frozen.packing import packed_bytes

# As for Linen: a code that is wrong moves an output by more than 1e-3 of the largest.
ROUNDING = 4 * float(jnp.finfo(jnp.float32).eps)
X = normal(5, 4)
CONFIG = cj.QuantConfig(weight_bits=3, act_bits=3)
CHANNELS = cj.QuantConfig(weight_bits=3, act_bits=3, weight_granularity="channel")


def calibrated(model, config):
    """A quantized model with mu and scales drawn at random."""
    sites = cj.nnx.sites(cj.nnx.quantize(model, config))
    qmodel = cj.nnx.quantize(model, config, sites=sites)
    draw(qmodel)
    return qmodel


def jitted(qmodel, *args, method="__call__"):
    return nnx.jit(lambda qmodel, *args: getattr(qmodel, method)(*args))(qmodel, *args)


def assert_equal(found, expected, rounding=0.0):
    assert found.dtype == expected.dtype
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(found, expected, rtol=0, atol=rounding * np.abs(expected).max())


def assert_no_kernels(frozen):
    """No kernel in float is held, and codes take no more than their bits."""
    for site, found in frozen.sites.items():
        assert found.weight is not None
        codes = frozen.arrays["codes"][site]
        assert codes.dtype == jnp.uint8
        assert codes.size == packed_bytes(int(np.prod(found.weight.shape)), found.weight.bits)
    names = {str(path[-1]) for path, _ in nnx.to_flat_state(nnx.state(frozen))}
    assert not names & {"kernel", "embedding", "weight_scale", "act_mu"}


# To freeze a convolution is the same in all its kinds, but for the axis of its channels.
KINDS = [
    name
    for name in LAYERS
    if name not in ("linear_general_batch", "conv_depthwise", "conv_grouped", "conv_transpose")
]


# Every layer at one of two types in turn; bits from 2 to 8, both grids, both granularities.
@pytest.mark.parametrize(("i", "name"), list(enumerate(KINDS)))
def test_layers_alone_are_bit_identical(i, name):
    make, _, shape, _ = LAYERS[name]
    dtype = (jnp.float32, jnp.bfloat16)[i % 3 == 2]
    config = cj.QuantConfig(
        weight_bits=2 + i % 7,
        act_bits=2 + i % 3,
        weight_granularity=("tensor", "channel")[i % 2],
        grid=("midrise", "midtread")[i % 4 < 2],
        quantizer=("mu_law", "uniform")[i % 5 == 4],
    )
    qlayer = calibrated(
        make(rngs=RNGS, **({} if dtype == jnp.float32 else {"dtype": dtype})), config
    )
    x, method = normal(*shape, dtype=dtype), "attend" if name == "attend" else "__call__"
    frozen = cj.freeze(qlayer)
    assert_no_kernels(frozen)
    assert_equal(frozen.apply(x, method=method), jitted(qlayer, x, method=method))
    assert type(frozen.model) is type(qlayer)


IDS = jnp.arange(10, dtype=jnp.int32).reshape(2, 5) % 7
NETWORKS = {
    "tied": (lambda: Tied(nnx.Rngs(0)), X),
    "scan": (lambda: Stack(nnx.Rngs(0)), X),
    "vmap": (lambda: Stack(nnx.Rngs(0), run="vmap"), X),
    "lstm": (lambda: nnx.RNN(nnx.LSTMCell(4, 4, rngs=nnx.Rngs(0))), normal(2, 3, 4)),
    "decoder": (lambda: Decoder(nnx.Rngs(0)), IDS),
}


@pytest.mark.parametrize(("i", "name"), list(enumerate(NETWORKS)))
def test_networks_are_the_same_within_rounding_and_load_as_they_were(i, name, tmp_path):
    make, x = NETWORKS[name]
    config = cj.QuantConfig(
        weight_bits=3 + i % 3, act_bits=3, weight_granularity=("channel", "tensor")[i % 2]
    )
    qmodel, path = calibrated(make(), config), tmp_path / "model.safetensors"
    frozen = cj.freeze(qmodel)
    assert_no_kernels(frozen)
    expected = jitted(qmodel, x)
    assert_equal(frozen.apply(x), expected, ROUNDING)
    frozen.save(path, compress=i % 2 == 0)
    loaded = cj.load_frozen(path, make())
    assert nnx.graphdef(loaded) == nnx.graphdef(frozen)
    held = (jax.tree.leaves(nnx.state(each, nnx.Not(nnx.RngState))) for each in (loaded, frozen))
    for leaf, own in zip(*held, strict=True):
        np.testing.assert_array_equal(leaf, own)
    assert loaded.summary() == frozen.summary()


def test_a_decoder_goes_on_from_its_cache():
    qmodel = calibrated(Decoder(nnx.Rngs(0)), CONFIG)
    whole = jitted(qmodel, IDS)
    qmodel.attention.init_cache((2, 5, 8))
    frozen = cj.freeze(qmodel)
    steps = [frozen.apply(IDS[:, i : i + 1], decode=True) for i in range(5)]
    np.testing.assert_allclose(jnp.concatenate(steps, 1), whole, rtol=0, atol=1e-5)
    assert int(frozen.model.attention.cache_index[...]) == 5
    assert int(qmodel.attention.cache_index[...]) == 0


class Normed(nnx.Module):
    """The `NormedNet` of Linen's tests, and dropout."""

    def __init__(self, rngs, features=6):
        self.first = nnx.Linear(4, features, rngs=rngs)
        self.norm = nnx.BatchNorm(features, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(features, 3, rngs=rngs)

    def __call__(self, x, rngs=None):
        return self.second(self.dropout(nnx.relu(self.norm(self.first(x))), rngs=rngs))


def test_state_is_changed_in_place_as_the_quantized_models():
    qmodel = calibrated(Normed(nnx.Rngs(0)), CONFIG)
    frozen, rngs, own = cj.freeze(qmodel), nnx.Rngs(3), nnx.Rngs(3)
    run = nnx.jit(lambda qmodel, x, rngs: qmodel(x, rngs=rngs))
    for _ in range(2):  # the streams go on, too
        np.testing.assert_array_equal(frozen.apply(X, rngs=rngs), run(qmodel, X, own))
    np.testing.assert_array_equal(frozen.model.norm.mean[...], qmodel.norm.mean[...])
    frozen.eval(), qmodel.eval()
    np.testing.assert_array_equal(frozen.apply(X), run(qmodel, X, rngs))
    np.testing.assert_allclose(frozen(X), frozen.apply(X), atol=1e-6)


class TiedUse(nnx.Module):
    """An embedding whose table is used past the layer, as an attribute, or of the layer's."""

    def __init__(self, rngs, own=False):
        self.embed = nnx.Embed(7, 6, rngs=rngs)
        if own:
            self.table = self.embed.embedding

    def __call__(self, ids):
        table = self.table if hasattr(self, "table") else self.embed.embedding
        return self.embed(ids) @ (2 * table[...].T)


class Twins(nnx.Module):
    """Two layers with one kernel, each with its own scale."""

    def __init__(self, rngs):
        self.first, self.second = (nnx.Linear(4, 4, rngs=rngs) for _ in range(2))
        self.second.kernel = self.first.kernel

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def masked():
    mask = np.ones((3, 4, 4), np.float32)
    mask[0] = 0
    return nnx.Conv(4, 4, (3,), mask=jnp.asarray(mask), rngs=nnx.Rngs(0))


# Whether a sample is needed, and the variables that are kept of those that are quantized.
WEIGHTS_USED_OTHERWISE = {
    "in_a_call": (
        lambda: TiedUse(nnx.Rngs(0)),
        IDS,
        "is used otherwise",
        ["params/embed/embedding"],
    ),
    "as_an_attribute": (
        lambda: TiedUse(nnx.Rngs(0), own=True),
        IDS,
        "",
        ["params/embed/embedding"],
    ),
    "by_two_layers": (lambda: Twins(nnx.Rngs(0)), X, "", []),
    "under_a_mask": (
        masked,
        normal(2, 5, 4),
        "`sample` must be given for a model",
        ["params/kernel"],
    ),
}
if hasattr(nnx, "WeightNorm"):  # not in Flax 0.11
    WEIGHTS_USED_OTHERWISE["normed"] = (
        lambda: nnx.WeightNorm(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)),
        X,
        "`sample` must be given for a model",
        ["params/layer_instance/kernel"],
    )


@pytest.mark.parametrize("name", WEIGHTS_USED_OTHERWISE)
def test_weights_that_are_used_otherwise_are_kept_for_that(name, tmp_path):
    make, x, message, kept = WEIGHTS_USED_OTHERWISE[name]
    qmodel, path = calibrated(make(), CONFIG), tmp_path / "model.safetensors"
    if message:
        with pytest.raises((ValueError, AttributeError), match=message):
            cj.freeze(qmodel).apply(x)
    frozen = cj.freeze(qmodel, x) if message else cj.freeze(qmodel)
    frozen.save(path)
    expected = jitted(qmodel, x)
    for each in (frozen, cj.load_frozen(path, make())):
        assert_equal(each.apply(x), expected, ROUNDING)
    names = set(frozen.arrays["variables"])
    assert {n for n in names if n.endswith(("kernel", "embedding"))} == set(kept)


def test_a_weight_that_is_random_is_refused():
    class Dropped(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.dropout = nnx.Linear(4, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            kernel = self.linear.kernel[...]
            self.linear.kernel[...] = self.dropout(kernel)
            y = self.linear(x)
            self.linear.kernel[...] = kernel
            return y

    qmodel = calibrated(Dropped(nnx.Rngs(0)), CONFIG)
    with pytest.raises(ValueError, match="site 'linear' computes its weight from the model's inp"):
        cj.freeze(qmodel, X)


def linens_and_nnxs():
    """A network in both, with the same weights, mu and scales, both frozen."""
    qmodel = calibrated(Normed(nnx.Rngs(0)), CHANNELS)
    qmodel.eval()
    params, compand = split_linens(values_of(qmodel))
    variables = {"params": params, "compand": compand}
    variables["batch_stats"] = {"norm": {"mean": jnp.zeros(6), "var": jnp.ones(6)}}
    qlinen = cj.quantize_model(NormedNet(), CHANNELS)
    return cj.freeze(qmodel), cj.freeze(qlinen, variables, X)


@pytest.mark.filterwarnings("ignore:the quantized model is not calibrated")
def test_linens_codes_tables_and_files(tmp_path):
    frozen, linens = linens_and_nnxs()
    assert frozen.sites == dict(linens.sites)
    for kind, expected in linens.arrays.items():
        assert set(frozen.arrays[kind]) == set(expected)
        for name, x in expected.items():
            np.testing.assert_array_equal(frozen.arrays[kind][name], x)
    np.testing.assert_array_equal(frozen.weight("first"), linens.weight("first"))
    paths = tmp_path / "nnx", tmp_path / "linen"
    frozen.save(paths[0], info={"name": "normed"})
    linens.save(paths[1])
    assert read_info(paths[0]) == {"name": "normed"}
    model = Normed(nnx.Rngs(1))
    model.eval()
    y = frozen.apply(X)
    np.testing.assert_array_equal(cj.load_frozen(paths[1], model).apply(X), y)
    np.testing.assert_array_equal(
        cj.load_frozen(paths[0], NormedNet(), X).apply(X), linens.apply(X)
    )


class Unstacked(nnx.Module):
    """A `Stack` without its stack."""

    def __init__(self, rngs):
        self.blocks, self.head = Block(rngs), nnx.Linear(4, 2, rngs=rngs)


def test_models_that_were_not_frozen(tmp_path):
    path, stack = tmp_path / "model.safetensors", tmp_path / "stack.safetensors"
    cj.freeze(calibrated(Normed(nnx.Rngs(0)), CONFIG)).save(path)
    cj.freeze(calibrated(Stack(nnx.Rngs(0)), CONFIG)).save(stack)
    qmodel, other = calibrated(Normed(nnx.Rngs(0)), CONFIG), Normed(nnx.Rngs(0))
    other.norm.bias = None
    integers = Normed(nnx.Rngs(0))
    integers.second.bias = nnx.Param(jnp.zeros(3, jnp.int32))
    wrong = {
        "whose layer 'first' has a weight of shape (4, 5), not (4, 6)": (
            path,
            Normed(nnx.Rngs(0), 5),
        ),
        "without the layer 'first'": (path, Tied(nnx.Rngs(0))),
        "with params/norm/bias of shape None, not (6,)": (path, other),
        "with params/second/bias of int32, not float32": (path, integers),
        "that is quantized: give nnx.dequantize of it": (path, qmodel),
        "of shapes alone that draws random numbers": (
            path,
            nnx.eval_shape(lambda: Normed(nnx.Rngs(0))),
        ),
        "with 'blocks/linear' in a stack of (), not (3,)": (stack, Unstacked(nnx.Rngs(0))),
        "of NNX for": (stack, NormedNet()),
        "the Flax module that was frozen, got the class Normed": (path, Normed),
    }
    for message, (file, model) in wrong.items():
        with pytest.raises(ValueError, match=f"`model` must be .*{re.escape(message)}"):
            cj.load_frozen(file, model)
    with pytest.raises(ValueError, match="`sample` must be the arguments of the model's __call__"):
        cj.load_frozen(path, Normed(nnx.Rngs(0)), X, train=True)
    with pytest.raises(ValueError, match="that does not run on its variables: .*dimension"):
        cj.load_frozen(path, Normed(nnx.Rngs(0)), normal(5, 7))
    shapes = nnx.eval_shape(lambda: nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    qlayer = calibrated(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), CONFIG)
    cj.freeze(qlayer).save(path)
    np.testing.assert_array_equal(cj.load_frozen(path, shapes).apply(X), jitted(qlayer, X))
    with pytest.raises(ValueError, match="does not hold it: .*, where a model of NNX was frozen"):
        cj.load_frozen(path, nn.Dense(3))


def test_damaged_and_edited_files(tmp_path):
    """Whoever can compute a checksum gets an error of one line, or a model that is well formed."""
    path, rng = tmp_path / "model.safetensors", np.random.default_rng(0)
    model = Stack(nnx.Rngs(0))
    cj.freeze(calibrated(model, CHANNELS), X).save(path)
    data, refused = path.read_bytes(), 0
    for content in mutations(data, rng, 60):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="`path` must be"):
            cj.load_frozen(path, model)
    for content in resealed(data, rng, 200):
        path.write_bytes(content)
        try:
            cj.load_frozen(path, model)
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017
            refused += 1
    assert refused > 100


def test_what_cannot_be_frozen():
    model = Normed(nnx.Rngs(0))
    qmodel = calibrated(model, CONFIG)
    with pytest.raises(ValueError, match="`model` must be quantized, got one that is not"):
        cj.freeze(model)
    uncalibrated = cj.nnx.quantize(model, CONFIG)
    with pytest.raises(ValueError, match="`qmodel` must be calibrated, site 'first', 'second' is"):
        cj.freeze(uncalibrated)
    cj.freeze(cj.nnx.quantize(model, cj.QuantConfig(act_bits=None)))  # weights have their scales
    with pytest.raises(ValueError, match="`fold_norms` must be False for an NNX model, got True"):
        cj.freeze(qmodel, fold_norms=True)
    with pytest.raises(TypeError, match="`sample` must be the arguments of the model's __call__"):
        cj.freeze(qmodel, X, train=False)
    with pytest.raises(TypeError, match="`variables` must be given for a QuantizedModel"):
        cj.freeze(cj.quantize_model(NormedNet(), CONFIG))
    qmodel.first.kernel[...] = jnp.full((4, 6), jnp.nan)
    with pytest.raises(ValueError, match="must be finite, the weight of site 'first' is not"):
        cj.freeze(qmodel)
    frozen = cj.freeze(
        calibrated(Stack(nnx.Rngs(0), nnx.StateAxes({nnx.Param: 0, ...: None})), CONFIG)
    )
    with pytest.raises(ValueError, match="site 'blocks/linear' must see the codes of one layer"):
        frozen.apply(X)
    with pytest.raises(ValueError, match="`model` must be in full precision, got a quantized one"):
        cj.nnx.quantize(frozen.model, CONFIG)
    with pytest.raises(ValueError, match="`site` must have a quantized weight, got 'none' without"):
        frozen.weight("none")
    assert frozen.weight("blocks/linear").shape == (3, 4, 4)
    with pytest.raises(ValueError, match="got one that is not, or is frozen already"):
        cj.freeze(frozen.model)
    packed = frozen.model.head.kernel
    assert (packed.shape, packed.ndim, packed.size, len(packed)) == ((4, 2), 2, 8, 4)
    assert jnp.zeros(1, packed.dtype).dtype == jnp.float32
    with pytest.raises(ValueError, match="is in packed codes, for its layer alone"):
        jax.lax.stop_gradient(packed)
    with pytest.raises(ValueError, match="is in packed codes, for its layer alone"):
        frozen.model.head.kernel[0]
    with pytest.raises(ValueError, match="is in packed codes, for its layer alone"):
        jnp.asarray(frozen.model.head.kernel)


def test_rules_and_full_precision():
    rules = (
        cj.Rule("first", weight_bits=None, act_bits=None),
        cj.Rule("second", act_bits=None, grid="midrise", weight_bits=1),
    )
    qmodel = calibrated(Normed(nnx.Rngs(0)), cj.QuantConfig(rules=rules))
    qmodel.eval()
    frozen = cj.freeze(qmodel)
    assert set(frozen.sites) == {"second"}
    assert frozen.sites["second"].act_bits is None
    np.testing.assert_array_equal(frozen.model.first.kernel[...], qmodel.first.kernel[...])
    np.testing.assert_array_equal(frozen.apply(X), jitted(qmodel, X))


def test_a_frozen_model_is_its_own_and_exports(tmp_path):
    qmodel = calibrated(Normed(nnx.Rngs(0)), CONFIG)
    qmodel.eval()
    expected = np.asarray(jitted(qmodel, X))
    frozen = cj.freeze(qmodel)
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 2, state), donate_argnums=0)
    state = nnx.state(qmodel, nnx.Not(nnx.RngState))
    jax.block_until_ready(jax.tree.leaves(step(state)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    np.testing.assert_array_equal(frozen.apply(X), expected)
    graphdef, state = nnx.split(frozen.model)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    np.testing.assert_array_equal(run(state, X), expected)
    inside = jax.vmap(lambda x: frozen.apply(x[None])[0]), jax.jit(lambda x: frozen.apply(x))
    for function in inside:  # of which the model is no argument
        np.testing.assert_allclose(function(X), expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(frozen.apply(X), expected)
    exported = jax.export.export(jax.jit(frozen.model))(jax.ShapeDtypeStruct(X.shape, X.dtype))
    np.testing.assert_allclose(exported.call(X), expected, rtol=0, atol=1e-6)


def test_weights_take_their_packed_bytes_and_one_layers_levels():
    class Deep(nnx.Module):
        def __init__(self, rngs):
            layers = [nnx.Linear(128, 128, use_bias=False, rngs=rngs) for _ in range(8)]
            self.layers = nnx.Sequential(*layers)

        def __call__(self, x):
            return self.layers(x)

    one, config = 4 * 128 * 128, cj.QuantConfig(weight_bits=4, act_bits=None)
    frozen = cj.freeze(cj.nnx.quantize(Deep(nnx.Rngs(0)), config))
    graphdef, state = nnx.split(frozen.model)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    memory = run.lower(state, normal(4, 128)).compile().memory_analysis()
    assert memory.argument_size_in_bytes < 8 * one / 8 + 10_000
    assert memory.temp_size_in_bytes < 2.5 * one  # all eight expanded would be 8
