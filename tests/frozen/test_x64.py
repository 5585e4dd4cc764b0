"""Frozen models under `jax_enable_x64`."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import KEY

import compand_jax as cj

# The context manager was moved in jax 0.8.
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
# As users have it: a layer of float32 parameters takes inputs of float64.
promotes = functools.partial(jax.numpy_dtype_promotion, "standard")


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_float32_weights_have_the_quantized_models_levels(granularity):
    with enable_x64(True):
        x = jax.random.normal(KEY, (16, 6), jnp.float32)
        model = nn.Dense(3)
        config = cj.QuantConfig(weight_bits=4, act_bits=4, weight_granularity=granularity)
        qmodel, variables = cj.quantize_model(model, config).calibrate(model.init(KEY, x), [x])
        frozen = cj.freeze(qmodel, variables, x)
        tables = [frozen.arrays[kind][""] for kind in ("levels", "act_levels", "act_thresholds")]
        assert {table.dtype for table in tables} == {jnp.dtype(jnp.float32)}
        np.testing.assert_array_equal(frozen.apply(x), jax.jit(qmodel.apply)(variables, x))


@pytest.mark.parametrize("act_site", ["input", "output"])
def test_activations_of_float64_are_refused(act_site):
    with enable_x64(True), promotes():
        x = jax.random.normal(KEY, (16, 6), jnp.float32)
        model = nn.Sequential([nn.Dense(4), nn.Dense(3)])
        config = cj.QuantConfig(weight_bits=4, act_bits=4, act_site=act_site)
        qmodel, variables = cj.quantize_model(model, config).calibrate(model.init(KEY, x), [x])
        wide = x.astype(jnp.float64)
        assert qmodel.apply(variables, wide).dtype == jnp.float64
        match = "at most 32 bits in a frozen model, site 'layers_0' got float64: .* cast the inputs"
        with pytest.raises(TypeError, match=match):
            cj.freeze(qmodel, variables, wide)
        frozen = cj.freeze(qmodel, variables, x)
        with pytest.raises(TypeError, match=match):
            frozen.apply(wide)


def test_weights_alone_take_activations_of_float64():
    with enable_x64(True), promotes():
        x = jax.random.normal(KEY, (16, 6), jnp.float64)
        model = nn.Dense(3)
        config = cj.QuantConfig(weight_bits=4, act_bits=None)
        qmodel, variables = cj.quantize_model(model, config).calibrate(model.init(KEY, x), [x])
        frozen = cj.freeze(qmodel, variables, x)
        expected = jax.jit(qmodel.apply)(variables, x)
        assert expected.dtype == jnp.float64
        np.testing.assert_allclose(frozen.apply(x), expected, rtol=1e-12)


def test_weights_of_float64_are_refused():
    with enable_x64(True), promotes():
        x = jax.random.normal(KEY, (16, 6), jnp.float64)
        model = nn.Dense(3, param_dtype=jnp.float64)
        config = cj.QuantConfig(weight_bits=4, act_bits=None)
        qmodel, variables = cj.quantize_model(model, config).calibrate(model.init(KEY, x), [x])
        with pytest.raises(
            ValueError, match="site '' has one of float64: .* convert it to float32"
        ):
            cj.freeze(qmodel, variables, x)
