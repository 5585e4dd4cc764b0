"""The networks against published sizes, and their fast operations against the plain ones."""

import functools
import math

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from small_models import QUICKLY

from compand_jax.models import BLOCK_ORDERS, MODELS, AlexNet, ResNet, create_model
from compand_jax.models.cpu_conv import conv_general_dilated, plain_convolutions
from compand_jax.models.layers import ConvSpec, conv_stack, max_pool
from compand_jax.models.resnet import shortcut

# Sources: bearpaw/pytorch-classification (AlexNet 2.47M, VGG19 with batch norm 20.04M); for
# ResNets He et al., table 6 (0.27M, 0.46M, 0.66M, 0.85M), counted by akamaster's repository.
PARAMETERS = {
    "cnn": 30_762,
    "alexnet": 2_472_266,
    "alexnet-bn": 2_473_418,
    "vgg11": 9_228_362,
    "vgg13": 9_413_066,
    "vgg16": 14_724_042,
    "vgg19": 20_035_018,
    # 9 (3 + 128) 128 + 9 (128 + 256) 256 + 9 (256 + 512) 512, norms, and 8192 to 10.
    "vgg-small": 4_660_106,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
}
NHWC = lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), ("NHWC", "HWIO", "NHWC"))


def normal(shape, dtype=jnp.float32):
    # By numpy: compiling jax.random.normal for a shape takes longer than most tests here.
    return jnp.asarray(np.random.default_rng(math.prod(shape)).normal(size=shape), dtype)


def images(name, batch=2):
    return normal((batch, 8, 8, 1) if name == "cnn" else (batch, 32, 32, 3))


def shapes(model, x):
    return jax.eval_shape(model.init, jax.random.key(0), x)


def drawn(variables):
    """Random values, of about the size that init gives, without the time to compile it."""
    return jax.tree.map(lambda v: normal(v.shape) / math.sqrt(math.prod(v.shape[:-1])), variables)


def kernels(variables):
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    named = {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
    return {name: shape for name, shape in named.items() if "conv" in name or "dense" in name}


@pytest.mark.quick
@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts_are_the_published_ones(name):
    variables = shapes(create_model(name, 10), images(name))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == PARAMETERS[name]


@pytest.mark.parametrize("name", MODELS)
def test_block_orders_share_kernels(name):
    post, pre = (shapes(create_model(name, 100, order), images(name)) for order in BLOCK_ORDERS)
    assert kernels(post) == kernels(pre)
    assert kernels(post)["['dense']['kernel']"][-1] == 100


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("order", BLOCK_ORDERS)
@pytest.mark.parametrize("name", ["cnn", "alexnet", "alexnet-bn", "vgg11", "resnet20"])
def test_types(name, order, dtype):
    model, x = create_model(name, 10, order, dtype), images(name)
    variables = shapes(model, x)
    apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    logits, updated = jax.eval_shape(apply, variables, x)
    assert (logits.shape, logits.dtype) == ((2, 10), jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert updated.get("batch_stats") == variables.get("batch_stats")


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("cnn", "conv_norm_act"),
        ("cnn", "norm_act_conv"),
        ("alexnet", "conv_norm_act"),
        ("resnet20", "norm_act_conv"),
    ],
)
def test_every_parameter_learns(name, order):
    model, x = create_model(name, 10, order), images(name, batch=8)
    variables = drawn(shapes(model, x))

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    @jax.grad
    def gradient(params):
        run = {**variables, "params": params}
        logits, _ = model.apply(run, x, train=True, mutable=["batch_stats"])
        return -jax.nn.log_softmax(logits)[:, 0].mean()

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(variables["params"])):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


def test_training_updates_batch_statistics_and_evaluation_does_not():
    model, x = create_model("cnn", 10), images("cnn", batch=4)

    variables = drawn(shapes(model, x))
    run = jax.jit(functools.partial(model.apply, mutable=["batch_stats"]), static_argnames="train")
    trained, evaluated = (run(variables, x, train=train)[1] for train in (True, False))
    before, trained, evaluated = (
        run["batch_stats"]["norm1"]["mean"] for run in (variables, trained, evaluated)
    )
    assert (trained != before).all()
    np.testing.assert_array_equal(evaluated, before)


class Stack(nn.Module):
    norm: str
    block_order: str

    @nn.compact
    def __call__(self, x):
        specs = (ConvSpec(8, pool=True), ConvSpec(8, pool=True))
        kwargs = {"dtype": jnp.float32, "train": True}
        return conv_stack(x, specs, norm=self.norm, block_order=self.block_order, **kwargs)


@pytest.mark.quick
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_orders_differ_with_a_norm_only(norm):
    x = images("cnn")

    @jax.jit
    def outputs(variables):
        return [Stack(norm, order).apply(variables, x, mutable=True)[0] for order in BLOCK_ORDERS]

    post, pre = outputs(drawn(shapes(Stack(norm, BLOCK_ORDERS[0]), x)))
    assert post.shape == pre.shape == (2, 2, 2, 8)
    assert (np.abs(post - pre).max() < 1e-6) == (norm == "none")


@pytest.mark.quick
def test_shortcut_subsamples_and_pads_channels_evenly():
    x = images("resnet20")
    y = shortcut(x, 7, 2)
    assert y.shape == (2, 16, 16, 7)
    np.testing.assert_array_equal(y[..., 2:5], x[:, ::2, ::2])
    assert not y[..., :2].any()
    assert not y[..., 5:].any()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: create_model("resnet21", 10), r"`name` must be one of cnn, alexnet, .*'resnet21'"),
        (lambda: create_model("cnn", 10, "pool_first"), r"`block_order` must be .*'pool_first'"),
        (lambda: shapes(AlexNet(norm="layer"), images("alexnet")), r"`norm` must be .*'layer'"),
        (lambda: shapes(AlexNet(), images("cnn")), r"`x` must have .* got 1x1: give .* larger"),
        (lambda: shapes(ResNet(depth=21), images("resnet")), r"`depth` must be one of 20, .* 21"),
    ],
)
def test_bad_arguments_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def value_and_gradients(function, *arguments):
    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def run(cotangent, *arguments):
        y, pull = jax.vjp(function, *arguments)
        return y, *pull(cotangent)

    out = jax.eval_shape(function, *arguments)
    return run(normal(out.shape, out.dtype), *arguments)


def both_convs(x, kernel, padding, wrap=lambda f: f, strides=(1, 1), **kwargs):
    """Value and gradients by the matrix products, and by lax."""
    kwargs = {"dimension_numbers": NHWC, **kwargs}
    for conv in (conv_general_dilated, lax.conv_general_dilated):
        run = wrap(lambda x, k, conv=conv: conv(x, k, strides, padding, **kwargs))
        yield value_and_gradients(run, x, kernel)


def operands(shape, kernel, dtype=jnp.float32):
    return normal(shape, dtype), normal(kernel, dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize(
    ("size", "taps", "padding"),
    [
        ((2, 2), (3, 3), "SAME"),
        ((4, 4), (5, 5), ((2, 2), (2, 2))),
        ((1, 1), (3, 3), "SAME"),
        ((2, 3), (3, 4), ((1, 2), (3, 0))),
        ((2, 2), (3, 1), ((4, 5), (-1, 0))),
    ],
)
def test_small_map_convolution(size, taps, padding, dtype, tolerance):
    x, kernel = operands((3, *size, 5), (*taps, 5, 4), dtype)
    for got, expected in zip(*both_convs(x, kernel, padding), strict=True):
        assert (got.shape, got.dtype) == (expected.shape, dtype)
        got, expected = (np.asarray(a, np.float32) for a in (got, expected))
        np.testing.assert_allclose(got, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, jax.vmap], ids=lambda f: f.__name__)
def test_small_map_convolution_under_transformations(wrap):
    batched = wrap is jax.vmap
    x, kernel = operands((2, 2, 2, 3), (3, 3, 3, 4))
    if batched:
        x, kernel = jnp.stack([x, -x]), jnp.stack([kernel, kernel[::-1]])
    for got, expected in zip(*both_convs(x, kernel, "SAME", wrap), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.quick
def test_operands_of_a_small_map_convolution_are_made_once():
    x, kernel = operands((3, 2, 2, 5), (3, 3, 5, 4))

    def clipped(x, kernel):
        x, kernel = (jnp.where(a > 1, 1, a) for a in (x, kernel))
        return conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC)

    text = jax.jit(clipped).lower(x, kernel).compile().as_text()
    assert text is not None
    assert text.count(" compare(") == 2


@pytest.mark.quick
@pytest.mark.parametrize(
    ("kernel", "kwargs"),
    [
        ((3, 3, 4, 4), {"strides": (2, 2)}),
        ((3, 3, 4, 4), {"rhs_dilation": (2, 2), "padding": ((2, 2), (2, 2))}),
        ((3, 3, 4, 4), {"lhs_dilation": (2, 2)}),
        ((3, 3, 2, 4), {"feature_group_count": 2}),
        ((3, 3, 4, 4), {"preferred_element_type": jnp.float32}),
        ((2, 2, 4, 4), {}),
    ],
)
def test_all_else_is_left_to_lax(kernel, kwargs):
    x, kernel = operands((2, 2, 2, 4), kernel)
    got, expected = both_convs(x, kernel, **{"padding": ((1, 1), (1, 1)), **kwargs})
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize(
    ("platform", "convolutions", "products"),
    # One per output pixel, 16 of conv2 and 4 each of conv3, conv4, conv5, and the dense layer.
    [("cpu", 1, 16 + 3 * 4 + 1), ("cuda", 5, 1), ("tpu", 5, 1)],
)
def test_which_convolutions_are_matrix_products(platform, convolutions, products):
    x = images("alexnet")
    variables = jax.eval_shape(AlexNet().init, jax.random.key(0), x)
    text = jax.export.export(jax.jit(AlexNet().apply), platforms=[platform])(variables, x)
    text = text.mlir_module()
    assert text.count("stablehlo.convolution(") == convolutions
    assert text.count("stablehlo.dot_general ") == products


@pytest.mark.quick
def test_converters_see_plain_convolutions():
    x = images("alexnet")
    variables = jax.eval_shape(AlexNet().init, jax.random.key(0), x)
    with plain_convolutions():
        text = str(jax.make_jaxpr(AlexNet().apply)(variables, x))
    assert text.count("conv_general_dilated[") == 5
    assert "platform_index" not in text
    assert "platform_index" in str(jax.make_jaxpr(AlexNet().apply)(variables, x))


@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_max_pool_is_linens(size):
    # Few distinct values, so that every kind of tie occurs in a window; and one NaN.
    clean = jnp.round(normal((16, *size, 3)))
    x = clean.at[0, 1, 1, 0].set(jnp.nan)
    linens = functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))
    np.testing.assert_array_equal(max_pool(x), linens(x))
    got, expected = (value_and_gradients(pool, clean) for pool in (max_pool, linens))
    jax.tree.map(np.testing.assert_array_equal, got, expected)
