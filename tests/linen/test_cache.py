"""A decoder with a cache of keys and values: what is read from it is quantized, as by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import compand_jax as cj

LENGTH, WIDTH = 5, 8


class Decoder(nn.Module):
    """One token at a time attends to all before it."""

    @nn.compact
    def __call__(self, x):
        query, key, value = (nn.Dense(WIDTH, name=n)(x) for n in ("query", "key", "value"))
        shape = (x.shape[0], LENGTH, WIDTH)
        keys = self.variable("cache", "keys", jnp.zeros, shape)
        values = self.variable("cache", "values", jnp.zeros, shape)
        place = self.variable("cache", "place", lambda: jnp.zeros((), jnp.int32))
        i = place.value
        keys.value = keys.value.at[:, i].set(key)
        values.value = values.value.at[:, i].set(value)
        place.value = i + 1
        scores = jnp.einsum("bd,bld->bl", query, keys.value) / WIDTH**0.5
        scores = jnp.where(jnp.arange(LENGTH)[None] <= i, scores, -jnp.inf)
        return jnp.einsum("bl,bld->bd", jax.nn.softmax(scores), values.value)


@pytest.fixture(scope="module")
def decoder():
    """The quantized decoder, its variables, and tokens [length, batch, width]."""
    tokens = jax.random.normal(jax.random.key(0), (LENGTH, 3, WIDTH))
    variables = Decoder().init(jax.random.key(1), tokens[0])
    variables = {**variables, "cache": jax.tree.map(jnp.zeros_like, variables["cache"])}
    # Layers in full precision: what is read from the cache alone is quantized.
    rules = (cj.Rule(".*:left|query|key|value", weight_bits=None, act_bits=None),)
    config = cj.QuantConfig(
        weight_bits=None, act_bits=4, act_signed=True, contractions="all", rules=rules
    )
    qmodel = cj.quantize_model(Decoder(), config)
    return *qmodel.calibrate(variables, list(tokens), calibration="absmax"), tokens


def by_hand(params, found, tokens):
    """Returns the outputs, token by token, in float64."""

    def quantized(site, x):
        own = found[site]
        mu, scale = float(own["act_mu"]), float(own["act_scale"])
        return oracle.fake_quantize(x, mu, scale, 4, True, "midtread")

    def dense(name, x):
        own = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params[name])
        return x @ own["kernel"] + own["bias"]

    keys, values, outputs = [], [], []
    for x in np.asarray(tokens, np.float64):
        keys.append(dense("key", x))
        values.append(dense("value", x))
        read = quantized("product_0:right", np.stack(keys, 1))
        scores = np.einsum("bd,bld->bl", dense("query", x), read) / WIDTH**0.5
        weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        read = quantized("product_1:right", np.stack(values, 1))
        outputs.append(np.einsum("bl,bld->bd", weights, read))
    return np.stack(outputs)


def test_what_is_read_from_the_cache_is_quantized(decoder):
    qmodel, variables, tokens = decoder
    found = qmodel.quantizers(variables)
    assert sorted(found) == ["product_0:right", "product_1:right"]
    step = jax.jit(lambda variables, x: qmodel.apply(variables, x, mutable=["cache"]))
    outputs = []
    for x in tokens:
        y, state = step(variables, x)
        variables = {**variables, **state}
        outputs.append(y)
    expected = by_hand(variables["params"], found, tokens)
    np.testing.assert_allclose(np.stack(outputs), expected, rtol=1e-4, atol=1e-5)
    # The cache itself holds what was computed: it is quantized when it is read.
    own = variables["params"]["key"]
    exact = tokens[1] @ own["kernel"] + own["bias"][None]
    np.testing.assert_allclose(variables["cache"]["keys"][:, 1], exact, rtol=1e-5, atol=1e-6)
