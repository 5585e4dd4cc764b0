"""Every kind of layer and of network around it, against quantizing by hand."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from layer_cells import CELLS, IMAGE, JITTED, LAYERS, NETWORKS, PLAIN, network
from small_models import (
    BITS,
    KEY,
    QUICKLY,
    Net,
    assert_same,
    assert_trained,
    drawn,
    normal,
    pull_back,
    pull_back_each,
    quantize_by_hand,
    shapes,
    weights_by_hand,
)

import compand_jax as cj

pytestmark = pytest.mark.filterwarnings(
    "ignore:the quantized model is not calibrated"  # its mu and scales are drawn at random here
)

CONFIG = functools.partial(cj.QuantConfig, weight_bits=BITS, act_bits=BITS)
VERSIONS = ("dense", "conv_depthwise", "vmap")
# The head is quantized as well, which is half of what is compiled, after layers that could have an
# effect on the next one: a dense one, and those that are traced in a way of their own.
BOTH = ("dense", "conv_subclass", "remat", "nn_jit", "vmap", "weight_norm")
FULL_PRECISION_HEAD = (cj.Rule("head", weight_bits=None, act_bits=None),)


def cells():
    for name in LAYERS:
        for dtype, act_site, granularity in CELLS:
            versions = name in VERSIONS and (act_site, granularity) == ("output", "channel")
            yield pytest.param(
                name, dtype, act_site, granularity,
                marks=[pytest.mark.versions] if versions else [],
                id=f"{name}-{dtype.__name__}-{act_site}-{granularity}",
            )  # fmt: skip


def layer_by_hand(name, layer, params, leaves, x, quantize_input):
    """Runs the layer alone, its kernel quantized where it lies in its parameters."""
    x = quantize_by_hand(x, leaves, "act") if quantize_input else x
    if name == "weight_norm":  # normalized first, then quantized
        (scale,) = (v for k, v in params.items() if k != "layer_instance")
        dense = params["layer_instance"]
        norm = jnp.linalg.norm(dense["kernel"], axis=0, keepdims=True)
        kernel = dense["kernel"] / norm * scale[None]
        layer, params = layer.layer_instance.clone(), {**dense, "kernel": kernel}
    key = "embedding" if name == "attend" else "kernel"
    params = {**params, key: quantize_by_hand(params[key], leaves, "weight")}
    method = "attend" if name == "attend" else None
    return layer.apply({"params": params}, x, method=method)


@pytest.mark.parametrize(("name", "dtype", "act_site", "granularity"), list(cells()))
def test_layer_equals_quantizing_by_hand(name, dtype, act_site, granularity):
    make, shape, channel_axes = LAYERS[name]
    kwargs = {} if dtype == jnp.float32 else {"dtype": dtype}
    model, x = Net(make(**kwargs), **kwargs), normal(*shape, dtype=dtype)
    rules = () if name in BOTH else FULL_PRECISION_HEAD
    config = CONFIG(act_site=act_site, weight_granularity=granularity, rules=rules)
    qmodel = cj.quantize_model(model, config)
    variables = drawn(qmodel, x)
    assert shapes(model, x)["params"] == shapes(qmodel, x)["params"]

    def by_hand(variables, x):
        params, compand = variables["params"], variables["compand"]
        leaves = compand["layer"].get("layer_instance", compand["layer"])
        plain = PLAIN[name](6, **kwargs) if name in PLAIN else make(**kwargs)
        y = layer_by_hand(name, plain, params["layer"], leaves, x, act_site == "input")
        if act_site == "output":
            y = quantize_by_hand(y, leaves, "act")
        y, head = jnp.tanh(y), params["head"]
        if name in BOTH:
            if act_site == "input":
                y = quantize_by_hand(y, compand["head"], "act")
            kernel = quantize_by_hand(head["kernel"], compand["head"], "weight")
            head = {**head, "kernel": kernel}
        return nn.Dense(3, **kwargs).apply({"params": head}, y)

    (y, gradients), (expected, expected_gradients) = pull_back_each(
        (qmodel.apply, by_hand), variables, x
    )
    assert y.dtype == dtype
    tolerance = 2e-6 if dtype == jnp.float32 else 1e-2
    assert_same(y, expected, tolerance)
    assert_same(gradients, expected_gradients, 10 * tolerance)
    assert_trained(gradients)

    found = qmodel.quantizers(variables)
    site = "layer/layer_instance" if name == "weight_norm" else "layer"
    assert set(found) == ({site, "head"} if name in BOTH else {site})
    if name in BOTH:  # the last layer's output is not quantized
        assert ("act_scale" in found["head"]) == (act_site == "input")
    sizes = found[site]["weight_scale"].shape
    kept = tuple(i - len(sizes) for i, n in enumerate(sizes) if n > 1)
    assert kept == (channel_axes if granularity == "channel" else ())


BARE = {
    "dense": (nn.Dense(6), (5, 4)),
    "conv": (nn.Conv(6, (3, 3)), IMAGE),
    "nn_jit": (JITTED(6), (5, 4)),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", BARE)
def test_a_bare_layer_is_the_site_without_a_name(name):
    model, shape = BARE[name]
    qmodel, x = cj.quantize_model(model, CONFIG()), normal(*shape)
    variables = drawn(qmodel, x)
    compand, params = variables["compand"], variables["params"]
    kernel = quantize_by_hand(params["kernel"], compand, "weight")
    expected = model.apply(
        {"params": {**params, "kernel": kernel}}, quantize_by_hand(x, compand, "act")
    )
    assert_same(qmodel.apply(variables, x), expected)
    assert set(qmodel.quantizers(variables)) == {""}


@pytest.fixture(autouse=True)
def _flax_norms_promote(request):
    # Linen's LayerNorm promotes bfloat16 to float32 by itself, which strict promotion refuses.
    kind = "standard" if "vision_transformer_bfloat16" in request.node.name else "strict"
    with jax.numpy_dtype_promotion(kind):
        yield


@pytest.mark.parametrize("name", list(NETWORKS)[:-1])  # one type of the large one
def test_weights_equal_quantizing_params_by_hand(name):
    model, x, sites = network(name)
    qmodel = cj.quantize_model(model, CONFIG(act_bits=None))
    variables = drawn(qmodel, x)
    assert shapes(model, x)["params"] == shapes(qmodel, x)["params"]
    found = qmodel.quantizers(variables)
    assert sorted(found) == sites or (sites is None and len(found) == 8)

    def by_hand(variables, x):
        return model.apply({"params": weights_by_hand(variables)}, x)

    (y, gradients), (expected, expected_gradients) = pull_back_each(
        (qmodel.apply, by_hand), variables, x
    )
    tolerance = 2e-2 if "bfloat16" in name else 5e-6
    assert_same(y, expected, tolerance)
    assert_same(gradients, expected_gradients, 10 * tolerance)


@pytest.mark.parametrize("name", NETWORKS)
def test_everything_is_trained(name):
    model, x, _ = network(name)
    act_site = "input" if "bfloat16" in name else "output"
    config = CONFIG(act_site=act_site, weight_granularity="channel")
    qmodel = cj.quantize_model(model, config)
    variables = drawn(qmodel, x)
    _, gradients = pull_back(qmodel.apply, variables, x)
    assert_trained(gradients["compand"])
    if "attention" not in name and "transformer" not in name:  # softmax cancels the keys' bias
        assert_trained(gradients["params"])


def dense(params, leaves, x):
    x = quantize_by_hand(x, leaves, "act")
    return x @ quantize_by_hand(params["kernel"], leaves, "weight") + params["bias"][None]


def nth(stacked, i):
    return jax.tree.map(lambda leaf: leaf[i], stacked)


def set_up_by_hand(p, c, x):
    return dense(p["second"], c["second"], jnp.tanh(dense(p["first"], c["first"], x)))


def twice_by_hand(p, c, x):
    p, c = p["shared"], c["shared"]
    return dense(p, c, jnp.tanh(dense(p, c, x)))


def scan_by_hand(p, c, x):
    for i in range(3):
        x = jnp.tanh(dense(nth(p["stack"]["dense"], i), c["stack"]["dense"], x))
    return x


def scan_same_by_hand(p, c, x):
    for _ in range(3):
        x = jnp.tanh(dense(p["stack"]["dense"], c["stack"]["dense"], x))
    return x


def vmap_by_hand(p, c, x):
    p, c = p["stack"]["dense"], c["stack"]["dense"]
    return jnp.stack([jnp.tanh(dense(nth(p, i), c, x[i])) for i in range(3)])


def remat_by_hand(p, c, x):
    return jnp.tanh(dense(p["dense"], c["dense"], x))


def inside_jit_by_hand(p, c, x):
    return dense(p["second"], c["second"], jax.nn.gelu(dense(p["first"], c["first"], x)))


def attention_by_hand(p, c, x):
    p, c = p["attention"], c["attention"]

    def project(name):
        kernel = quantize_by_hand(p[name]["kernel"], c[name], "weight")
        y = jnp.einsum("btd,dhk->bthk", quantize_by_hand(x, c[name], "act"), kernel)
        return y + p[name]["bias"][None, None]

    query, key, value = map(project, ("query", "key", "value"))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / jnp.sqrt(jnp.float32(query.shape[-1]))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, -1), value)
    kernel = quantize_by_hand(p["out"]["kernel"], c["out"], "weight")
    out = jnp.einsum("bthk,hkd->btd", quantize_by_hand(mixed, c["out"], "act"), kernel)
    return out + p["out"]["bias"][None, None]


def tokens_by_hand(p, c, ids):
    table = quantize_by_hand(p["embed"]["embedding"], c["embed"], "weight")
    x = dense(p["dense"], c["dense"], jnp.tanh(table[ids].reshape(-1, 6)))
    return (quantize_by_hand(x, c["embed"], "act") @ table.T).reshape(*ids.shape, 7)


BY_HAND = {
    "set_up": set_up_by_hand,
    "twice": twice_by_hand,
    "scan": scan_by_hand,
    "scan_same": scan_same_by_hand,
    "vmap": vmap_by_hand,
    "remat": remat_by_hand,
    "inside_jit": inside_jit_by_hand,
    "attention": attention_by_hand,
    "tokens": tokens_by_hand,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_activations_inside_networks_equal_quantizing_by_hand(name):
    model, x, _ = network(name)
    qmodel = cj.quantize_model(model, CONFIG())
    variables = drawn(qmodel, x)
    by_hand = lambda v, x: BY_HAND[name](v["params"], v["compand"], x)  # noqa: E731
    (y, gradients), (expected, expected_gradients) = pull_back_each(
        (qmodel.apply, by_hand), variables, x
    )
    assert_same(y, expected, 5e-6)
    assert_same(gradients, expected_gradients, 5e-5)
    assert_trained(gradients["compand"])


INITIALIZED = ("conv_transpose_kernel", "conv_local", "attend", "nn_jit", "vmap", "weight_norm")


@pytest.mark.parametrize(
    "name", [*INITIALIZED, *(name for name in NETWORKS if "bfloat16" not in name)]
)
def test_params_are_the_full_precision_models(name):
    if name in LAYERS:
        make, shape, _ = LAYERS[name]
        model, x = Net(make()), normal(*shape)
    else:
        model, x, _ = network(name)
    qmodel = cj.quantize_model(model, CONFIG(weight_granularity="channel"))
    init = lambda x: (model.init(KEY, x), qmodel.init(KEY, x))  # noqa: E731
    plain, quantized = jax.jit(init, compiler_options=QUICKLY)(x)
    assert set(quantized) == {*plain, "compand"}
    assert_same(quantized["params"], plain["params"], 1e-6)
