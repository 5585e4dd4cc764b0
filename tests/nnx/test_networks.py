"""NNX networks: attention, recurrent cells, a vision transformer, a decoder with a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nnx_models import (
    Decoder,
    Transformer,
    draw,
    split_linens,
    values_of,
    with_gradients,
    with_values,
)
from small_models import (
    BITS,
    QUICKLY,
    VisionTransformer,
    assert_same,
    normal,
    quantize_by_hand,
)

import compand_jax as cj

pytestmark = pytest.mark.filterwarnings(
    "ignore:(site .*|the quantized model) is not calibrated"  # mu and scales are drawn here
)
CONFIG = cj.QuantConfig(weight_bits=BITS, act_bits=BITS)


@pytest.fixture(autouse=True)
def _flax_promotes():
    with jax.numpy_dtype_promotion("standard"):  # norms and cells do, in bfloat16
        yield


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_a_vision_transformer_is_linens(dtype):
    qmodel = cj.nnx.quantize(Transformer(nnx.Rngs(0), dtype), CONFIG)
    draw(qmodel)
    expected = cj.quantize_model(VisionTransformer(dtype), CONFIG)

    def linens(values, x):
        params, compand = split_linens(values)
        return expected.apply({"params": params, "compand": compand}, x)

    functions = [lambda values, x: with_values(qmodel, values)(x), linens]
    x = normal(2, 8, 8, 3, dtype=dtype or jnp.float32)
    assert len(cj.nnx.sites(qmodel)) == 8
    run = jax.jit(lambda values, x: [f(values, x) for f in functions], compiler_options=QUICKLY)
    y, expected = run(values_of(qmodel), x)
    assert_same(y, expected, 2e-2 if dtype else 1e-5)


def cell_by_hand(kind, values, x):
    """Runs a cell over time, every product of it quantized."""

    def product(name, x):
        leaves = values[name]["promote_dtype"]
        kernel = quantize_by_hand(values[name]["kernel"], leaves, "weight")
        y = quantize_by_hand(x, leaves, "act") @ kernel
        return y + values[name]["bias"][None] if "bias" in values[name] else y

    c = h = jnp.zeros((x.shape[0], 4))
    outputs = []
    for step in range(x.shape[1]):
        now = x[:, step]
        if kind == "lstm":
            i, f, o = (
                jax.nn.sigmoid(product(a, now) + product(b, h))
                for a, b in (("ii", "hi"), ("if_", "hf"), ("io", "ho"))
            )
            c = f * c + i * jnp.tanh(product("ig", now) + product("hg", h))
            h = o * jnp.tanh(c)
        else:
            r, z, n = jnp.split(product("dense_i", now), 3, -1)
            hr, hz, hn = jnp.split(product("dense_h", h), 3, -1)
            z = jax.nn.sigmoid(z + hz)
            n = jnp.tanh(n + jax.nn.sigmoid(r + hr) * hn)
            h = (1 - z) * n + z * h
        outputs.append(h)
    return jnp.stack(outputs, 1)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_gates_of_recurrent_cells(kind):
    make = {"lstm": nnx.LSTMCell, "gru": nnx.GRUCell}[kind]
    qmodel = cj.nnx.quantize(nnx.RNN(make(4, 4, rngs=nnx.Rngs(0))), CONFIG)
    draw(qmodel)
    values = values_of(qmodel)
    assert len(cj.nnx.sites(qmodel)) == len(values["cell"]) == {"lstm": 8, "gru": 2}[kind]
    functions = [
        lambda values, x: with_values(qmodel, values)(x),
        lambda values, x: cell_by_hand(kind, values["cell"], x),
    ]
    x = normal(2, 3, 4)
    (y, gradients), (other, other_gradients) = with_gradients(functions, values, x)
    assert_same(y, other, 5e-6)
    assert_same(gradients, other_gradients, 5e-5)


def test_a_decoder_with_a_cache():
    qmodel = cj.nnx.quantize(Decoder(nnx.Rngs(0)), CONFIG)
    assert sorted(cj.nnx.sites(qmodel)) == [
        *(f"attention/{name}" for name in ("key", "out", "query", "value")), "dense", "embed",
    ]  # fmt: skip
    draw(qmodel)
    ids = jnp.arange(10, dtype=jnp.int32).reshape(2, 5) % 7
    whole = nnx.jit(lambda model, ids: model(ids))(qmodel, ids)
    qmodel.attention.init_cache((2, 5, 8))
    step = nnx.jit(lambda model, ids: model(ids, decode=True))
    steps = [step(qmodel, ids[:, i : i + 1]) for i in range(5)]
    assert_same(jnp.concatenate(steps, 1), whole, 1e-5)
    assert int(qmodel.attention.cache_index[...]) == 5
    cj.nnx.calibrate(qmodel, [ids], calibration="absmax")
    assert int(qmodel.attention.cache_index[...]) == 5
    found = cj.nnx.quantizers(qmodel)["embed"]
    table = qmodel.embed.embedding[...]
    table = cj.fake_quantize(table, found["weight_mu"], found["weight_scale"], bits=BITS)
    np.testing.assert_array_equal(qmodel.embed(ids), table[ids])
