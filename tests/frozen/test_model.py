"""Frozen models: what the jitted quantized model computes, from packed codes alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from layer_cells import CELLS, LAYERS, NETWORKS, network
from small_models import KEY, Net, NormedNet, Stack, Tokens, Twice, drawn, normal

import compand_jax as cj
from compand_jax.frozen.packing import packed_bytes, unpack
from compand_jax.frozen.tree import join_path, split_path

pytestmark = pytest.mark.filterwarnings(
    "ignore:the quantized model is not calibrated"  # its mu and scales are drawn at random here
)


# XLA rounds a function by the loop that it is in. That moved an output here by 1e-7 of the largest
# at most; a code that is wrong moves it by more than 1e-3.
ROUNDING = 4 * float(jnp.finfo(jnp.float32).eps)


def assert_frozen_equals(model, config, x, rounding=ROUNDING):
    qmodel = cj.quantize_model(model, config)
    variables = drawn(qmodel, x)
    frozen = cj.freeze(qmodel, variables, x)
    expected = jax.jit(qmodel.apply)(variables, x)
    found = frozen.apply(x)
    assert found.dtype == expected.dtype
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    largest = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=rounding * largest)
    return qmodel, variables, frozen


def one_cell_each():
    """Every layer at one of three settings in turn; bits from 2 to 8, both grids."""
    for i, name in enumerate(LAYERS):
        dtype, act_site, granularity = CELLS[i % len(CELLS)]
        config = cj.QuantConfig(
            weight_bits=2 + i % 7,
            act_bits=2 + i % 3,
            act_site=act_site,
            weight_granularity=granularity,
            grid=("midtread", "midrise")[i % 2],
        )
        yield name, dtype, config


def layer_and_input(name, dtype):
    make, shape, _ = LAYERS[name]
    kwargs = {} if dtype == jnp.float32 else {"dtype": dtype}
    return make(**kwargs), normal(*shape, dtype=dtype), kwargs


@pytest.mark.parametrize(("name", "dtype", "config"), list(one_cell_each()))
def test_layers_in_a_network_are_the_same_within_rounding(name, dtype, config):
    layer, x, kwargs = layer_and_input(name, dtype)
    _, _, frozen = assert_frozen_equals(Net(layer, **kwargs), config, x)
    assert_no_kernels(frozen)


# To attend is no call of the layer by itself.
@pytest.mark.parametrize(
    ("name", "dtype", "config"), [cell for cell in one_cell_each() if cell[0] != "attend"]
)
def test_layers_alone_are_bit_identical(name, dtype, config):
    layer, x, _ = layer_and_input(name, dtype)
    assert_frozen_equals(layer, config, x, rounding=0)


def assert_no_kernels(frozen):
    """No kernel in float is stored, and codes take no more than their bits."""
    for site, found in frozen.sites.items():
        assert found.weight is not None
        count = int(np.prod(found.weight.shape))
        codes = frozen.arrays["codes"][site]
        assert codes.dtype == jnp.uint8
        assert codes.size == packed_bytes(count, found.weight.bits)
    names = {split_path(name)[-1] for name in frozen.arrays["variables"]}
    assert not names & {"kernel", "embedding"}


SMALL = [name for name in NETWORKS if "transformer" not in name]


@pytest.mark.parametrize("name", SMALL)
def test_networks_are_the_same_within_rounding(name):
    model, x, _ = network(name)
    i = SMALL.index(name)
    config = cj.QuantConfig(
        weight_bits=2 + i % 7,
        act_bits=3,
        weight_granularity=("tensor", "channel")[i % 2],
        scale_gradient=("lsq", "plain")[i % 2],
    )
    _, _, frozen = assert_frozen_equals(model, config, x)
    assert_no_kernels(frozen)


def test_many_levels_of_activations():
    _, _, frozen = assert_frozen_equals(
        NormedNet(), cj.QuantConfig(weight_bits=8, act_bits=8), normal(64, 4)
    )
    with pytest.raises(ValueError, match="`site` must have a quantized weight, got 'none' without"):
        frozen.weight("none")


def test_the_gradient_to_the_input_is_that_of_the_weights():
    qmodel, x = cj.quantize_model(nn.Dense(3), cj.QuantConfig(act_bits=None)), normal(2, 4)
    frozen = cj.freeze(qmodel, drawn(qmodel, x), x)
    gradient = jax.grad(lambda x: frozen.apply(x)[0].sum())(x)
    np.testing.assert_allclose(gradient[0], frozen.weight("").sum(1), rtol=1e-6)
    assert not gradient[1].any()


@pytest.mark.parametrize("fields", [{"weight_bits": None}, {"act_bits": None}])
def test_one_operand_in_full_precision(fields):
    _, _, frozen = assert_frozen_equals(NormedNet(), cj.QuantConfig(**fields), normal(5, 4))
    kinds = {kind for kind, found in frozen.arrays.items() if found}
    left_out = {"codes", "levels"} if "weight_bits" in fields else {"act_levels", "act_thresholds"}
    assert kinds == {"codes", "levels", "act_levels", "act_thresholds", "variables"} - left_out


@pytest.mark.quick
def test_a_site_in_full_precision_and_a_uniform_one():
    left_out = cj.Rule("first", weight_bits=None, act_bits=None)
    config = cj.QuantConfig(rules=(left_out, cj.Rule("second", quantizer="uniform")))
    _, variables, frozen = assert_frozen_equals(NormedNet(), config, normal(5, 4))
    assert set(frozen.sites) == {"second"}
    kernel = frozen.arrays["variables"]["params/first/kernel"]
    np.testing.assert_array_equal(kernel, variables["params"]["first"]["kernel"])


def test_calibrated_signs_and_bits_of_one():
    model, x = NormedNet(), normal(32, 4)
    config = cj.QuantConfig(
        weight_bits=1, grid="midrise", rules=(cj.Rule("second", weight_bits=1, act_bits=1),)
    )
    qmodel, variables = cj.quantize_model(model, config).calibrate(model.init(KEY, x), [x])
    frozen = cj.freeze(qmodel, variables, x)
    assert not frozen.sites["second"].act_signed  # after relu
    np.testing.assert_array_equal(frozen.apply(x), jax.jit(qmodel.apply)(variables, x))


@pytest.mark.quick
def test_codes_and_levels_are_quantize_and_codebook():
    qmodel = cj.quantize_model(NormedNet(), cj.QuantConfig(weight_bits=3))
    x = normal(5, 4)
    variables = drawn(qmodel, x)
    frozen, found = cj.freeze(qmodel, variables, x), qmodel.quantizers(variables)["first"]
    mu, scale = found["weight_mu"], found["weight_scale"]
    kernel = variables["params"]["first"]["kernel"]
    expected = cj.quantize(kernel, mu, scale, bits=3).astype(jnp.int32) + 3
    codes = unpack(frozen.arrays["codes"]["first"], 3, kernel.shape)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_allclose(
        frozen.arrays["levels"]["first"], cj.codebook(mu, scale, bits=3)[0], rtol=1e-6
    )
    np.testing.assert_array_equal(
        frozen.weight("first"), frozen.arrays["levels"]["first"][np.asarray(expected)]
    )


def test_a_float_kernel_of_few_bits_stays_of_its_type():
    model = nn.Dense(3, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    x = normal(5, 4, dtype=jnp.bfloat16)
    assert_frozen_equals(model, cj.QuantConfig(weight_granularity="channel"), x)


@pytest.mark.quick
def test_packed_bytes_are_arguments_and_no_kernel_is_a_constant():
    qmodel = cj.quantize_model(nn.Dense(64), cj.QuantConfig(weight_bits=4))
    x = normal(2, 64)
    frozen = cj.freeze(qmodel, qmodel.init(KEY, x), x)
    traced = jax.make_jaxpr(frozen.apply)(x)
    (call,) = (eqn for eqn in traced.jaxpr.eqns if eqn.params.get("name") == "_run")
    shapes = {var.aval.str_short() for var in call.invars}
    assert f"uint8[{64 * 64 // 2}]" in shapes
    assert not call.params["jaxpr"].consts
    leaves = jax.tree.leaves(frozen)  # a pytree: what holds it in a jit passes its arrays
    assert sum(leaf.nbytes for leaf in leaves) < 64 * 64 // 2 + 600


def test_weights_take_their_packed_bytes_and_one_layers_levels():
    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(8):
                x = nn.relu(nn.Dense(256, use_bias=False, name=f"dense{i}")(x))
            return x

    x, one = normal(4, 256), 4 * 256 * 256
    qmodel = cj.quantize_model(Deep(), cj.QuantConfig(weight_bits=4))
    frozen = cj.freeze(qmodel, qmodel.init(KEY, x), x)
    memory = jax.jit(lambda frozen, x: frozen.apply(x)).lower(frozen, x).compile().memory_analysis()
    assert memory.argument_size_in_bytes < 8 * one / 8 + 20_000
    assert memory.temp_size_in_bytes < 2.5 * one  # all eight expanded would be 8


def test_computed_weights():
    model, x = Net(nn.WeightNorm(nn.Dense(6))), normal(5, 4)
    qmodel = cj.quantize_model(model, cj.QuantConfig())
    variables = drawn(qmodel, x)
    frozen = cj.freeze(qmodel, variables, x)
    found = frozen.sites["layer/layer_instance"].weight
    assert found.leaf_shape == (4, 6)
    expected = jax.jit(qmodel.apply)(variables, x)
    np.testing.assert_array_equal(frozen.apply(x), expected)


def test_a_frozen_model_is_its_own(tmp_path):
    x = normal(5, 4)
    qmodel = cj.quantize_model(NormedNet(), cj.QuantConfig(weight_granularity="channel"))
    variables = drawn(qmodel, x)
    mean = np.array(variables["batch_stats"]["norm"]["mean"])
    variables["batch_stats"]["norm"]["mean"] = mean
    expected = np.asarray(jax.jit(qmodel.apply)(variables, x))
    frozen = cj.freeze(qmodel, variables, x)
    mean += 1  # in place
    variables["batch_stats"]["norm"]["mean"] = jnp.asarray(mean)
    train_step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    jax.block_until_ready(train_step(variables))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(variables))
    np.testing.assert_array_equal(frozen.apply(x), expected)
    frozen.save(tmp_path / "own.safetensors")
    loaded = cj.load_frozen(tmp_path / "own.safetensors", NormedNet())
    np.testing.assert_array_equal(loaded.apply(x), expected)


class StackedNorm(nn.Module):
    """Layers that compute their weights, stacked."""

    @nn.compact
    def __call__(self, x):
        layers = nn.vmap(
            lambda module, x: nn.WeightNorm(nn.Dense(4))(x),
            variable_axes={"params": 0},
            split_rngs={"params": True},
        )
        return layers(self, x)


def test_computed_weights_in_a_stack_are_refused():
    qmodel, x = cj.quantize_model(StackedNorm(), cj.QuantConfig()), normal(3, 5, 4)
    variables = drawn(qmodel, x)
    with pytest.raises(ValueError, match="computes several weights from its parameters"):
        cj.freeze(qmodel, variables, x)


class Tied(nn.Module):
    """An embedding whose table is also used directly, which quantization does not reach."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(7, 6, name="embed")
        return embed(ids) @ embed.embedding.T


def test_a_kernel_that_is_used_otherwise_is_kept_for_that():
    ids = jnp.arange(5, dtype=jnp.int32)
    _, variables, frozen = assert_frozen_equals(Tied(), cj.QuantConfig(), ids)
    table = frozen.arrays["variables"]["params/embed/embedding"]
    np.testing.assert_array_equal(table, variables["params"]["embed"]["embedding"])


@pytest.mark.quick
def test_what_cannot_be_frozen():
    qmodel = cj.quantize_model(NormedNet(), cj.QuantConfig())
    x = normal(5, 4)
    variables = drawn(qmodel, x)
    with pytest.raises(ValueError, match="`variables` must hold the collection 'compand'"):
        cj.freeze(qmodel, {"params": variables["params"]}, x)
    kernel = variables["params"]["first"]["kernel"].at[0, 0].set(jnp.nan)
    first = {**variables["params"]["first"], "kernel": kernel}
    broken = {**variables, "params": {**variables["params"], "first": first}}
    with pytest.raises(ValueError, match="must be finite, the weight of site 'first' is not"):
        cj.freeze(qmodel, broken, x)
    with pytest.raises(TypeError, match="`sample` must be the arguments of the model's __call__"):
        cj.freeze(qmodel, variables)
    anything = cj.quantize_model(nn.Sequential([nn.Dense(3)]), cj.QuantConfig())
    with pytest.raises(TypeError, match=r"`sample` must be .* freeze\(qmodel, variables, x\)"):
        cj.freeze(anything, drawn(anything, x))
    with pytest.raises(TypeError, match="got 1 and \\['trian'\\] .*: give freeze an input"):
        cj.freeze(qmodel, variables, x, trian=True)
    freeze = getattr(cj.freeze, "__wrapped__", cj.freeze)  # without the tests' own check of types
    with pytest.raises(TypeError, match="`qmodel` must be a QuantizedModel or .*, got NormedNet"):
        freeze(NormedNet(), variables, x)


def test_options_of_the_call():
    qmodel, x = cj.quantize_model(NormedNet(), cj.QuantConfig()), normal(5, 4)
    variables = drawn(qmodel, x)
    frozen = cj.freeze(qmodel, variables, x, train=False)
    np.testing.assert_array_equal(frozen.apply(x, train=False), frozen.apply(x))
    call = frozen.signature.call
    assert call.args == (jax.ShapeDtypeStruct((5, 4), jnp.float32),)
    assert (call.method, call.kwargs) == ("__call__", {"train": False})
    rngs = {"dropout": KEY}
    trained, _ = frozen.apply(x, train=True, rngs=rngs, mutable=["batch_stats"])
    run = jax.jit(lambda v: qmodel.apply(v, x, train=True, rngs=rngs, mutable=["batch_stats"])[0])
    np.testing.assert_array_equal(trained, run(variables))


@pytest.mark.parametrize("make", [Tokens, Twice, lambda: Stack("scan"), NormedNet])
def test_dense_is_the_same_within_rounding(make):
    model = make()
    x = jnp.arange(10, dtype=jnp.int32).reshape(2, 5) % 7 if make is Tokens else normal(5, 4)
    _, variables, frozen = assert_frozen_equals(model, cj.QuantConfig(act_bits=None), x)
    np.testing.assert_allclose(frozen.apply_dense(x), frozen.apply(x), atol=1e-5)
    paths = set(traverse_util.flatten_dict(frozen.variables(dense=True)))
    assert paths == {p for p in traverse_util.flatten_dict(variables) if p[0] != "compand"}


@pytest.mark.quick
def test_paths_as_names():
    for path in (("a",), ("a", "b/c", "~1"), ("", "x"), ("~", "/")):
        assert split_path(join_path(path)) == path
