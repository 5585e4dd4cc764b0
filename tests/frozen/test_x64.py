"""Frozen models under `jax_enable_x64`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import KEY

import compand_jax as cj


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_float32_weights_have_the_quantized_models_levels(granularity):
    # The context manager was moved in jax 0.8.
    enabled = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    with enabled(True):
        x = jax.random.normal(KEY, (16, 6), jnp.float32)
        model = nn.Dense(3)
        config = cj.QuantConfig(weight_bits=4, act_bits=4, weight_granularity=granularity)
        qmodel, variables = cj.quantize_model(model, config).calibrate(model.init(KEY, x), [x])
        frozen = cj.freeze(qmodel, variables, x)
        tables = [frozen.arrays[kind][""] for kind in ("levels", "act_levels", "act_thresholds")]
        assert {table.dtype for table in tables} == {jnp.dtype(jnp.float32)}
        np.testing.assert_array_equal(frozen.apply(x), jax.jit(qmodel.apply)(variables, x))
