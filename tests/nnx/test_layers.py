"""Every kind of NNX layer against quantizing by hand, and against the Linen layer."""

import jax
import jax.numpy as jnp
import pytest
from nnx_models import (
    LAYERS,
    RNGS,
    draw,
    run,
    values_of,
    with_gradients,
    with_values,
)
from small_models import BITS, assert_same, assert_trained, normal, quantize_by_hand

import compand_jax as cj

pytestmark = pytest.mark.filterwarnings(
    "ignore:(site .*|the quantized model) is not calibrated"  # mu and scales are drawn here
)

CELLS = [(jnp.float32, "channel"), (jnp.bfloat16, "tensor")]


@pytest.mark.parametrize(("dtype", "granularity"), CELLS)
@pytest.mark.parametrize("name", LAYERS)
def test_layer_equals_quantizing_by_hand_and_linens(name, dtype, granularity):
    make, make_linen, shape, channel_axes = LAYERS[name]
    kwargs = {} if dtype == jnp.float32 else {"dtype": dtype}
    config = cj.QuantConfig(weight_bits=BITS, act_bits=BITS, weight_granularity=granularity)
    qlayer, x = cj.nnx.quantize(make(**kwargs, rngs=RNGS), config), normal(*shape, dtype=dtype)
    draw(qlayer)
    key = "embedding" if name == "attend" else "kernel"
    sites = {"": cj.Site(BITS, BITS, scale_axes=channel_axes if granularity == "channel" else ())}
    assert cj.nnx.sites(qlayer) == sites
    plain = cj.nnx.dequantize(qlayer)

    def quantized(values, x):
        return run(with_values(qlayer, values), x)

    def by_hand(values, x):
        params = {name: leaf for name, leaf in values.items() if name != "promote_dtype"}
        leaves = values["promote_dtype"]
        params[key] = quantize_by_hand(params[key], leaves, "weight")
        y = run(with_values(plain, params), quantize_by_hand(x, leaves, "act"))
        if name == "lora":  # the base alone is quantized
            seen = quantize_by_hand(x, leaves, "act")
            y += plain_lora(plain, params, x) - plain_lora(plain, params, seen)
        return y

    def linens(values, x):
        params = {name: leaf for name, leaf in values.items() if name != "promote_dtype"}
        variables = {"params": params, "compand": values["promote_dtype"]}
        qmodel = cj.quantize_model(make_linen(**kwargs), config)
        return qmodel.apply(variables, x, method="attend" if name == "attend" else None)

    functions = [quantized, by_hand] + [linens] * (make_linen is not None)
    if dtype == jnp.bfloat16:
        y, expected = jax.jit(lambda *args: (quantized(*args), by_hand(*args)))(
            values_of(qlayer), x
        )
        assert y.dtype == dtype
        assert_same(y, expected, 1e-2)
        return
    (y, gradients), *others = with_gradients(functions, values_of(qlayer), x)
    for expected, expected_gradients in others:
        assert_same(y, expected)
        assert_same(gradients, expected_gradients, 2e-5)
    assert_trained(gradients)


def plain_lora(layer, params, x):
    return with_values(layer, params).lora(x)
