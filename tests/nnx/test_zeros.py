"""Weights of NNX layers that start at zero: they add nothing, and their scale follows them."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import normal

import compand_jax as cj

X = normal(16, 6)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_layer_that_starts_at_zero(granularity, calibrated):
    config = cj.QuantConfig(
        weight_bits=3, act_bits=None, grid="midrise", weight_granularity=granularity
    )
    layer = nnx.Linear(6, 3, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
    qmodel = cj.nnx.quantize(layer, config)
    if calibrated:
        cj.nnx.calibrate(qmodel, [X])
    assert np.abs(qmodel(X)).max() < 1e-20
    kernel = 0.01 * normal(6, 3)
    qmodel.kernel[...] = kernel  # after a step of training
    found = cj.nnx.quantizers(qmodel)[""]
    largest = jnp.max(jnp.abs(kernel), 0, keepdims=True) if granularity == "channel" else None
    expected = jnp.max(jnp.abs(kernel)) if largest is None else largest
    np.testing.assert_allclose(found["weight_scale"], expected, rtol=1e-5)
    by_hand = cj.fake_quantize(
        kernel, found["weight_mu"], found["weight_scale"], bits=3, grid="midrise"
    )
    np.testing.assert_allclose(qmodel(X), X @ by_hand, rtol=1e-4, atol=1e-6)


def test_a_stack_has_a_scale_that_follows_for_each_layer():
    @nnx.split_rngs(splits=4)
    @nnx.vmap(in_axes=(0,))
    def make(rngs):
        return nnx.Linear(4, 4, kernel_init=nnx.initializers.zeros, rngs=rngs)

    qmodel = cj.nnx.quantize(make(nnx.Rngs(0)), cj.QuantConfig(weight_bits=3, act_bits=None))
    kernel = normal(4, 4, 4) * jnp.asarray([1e-3, 0.1, 0.0, 1.0])[:, None, None]
    qmodel.kernel[...] = kernel
    expected = np.clip(np.abs(kernel).max((1, 2)), 2.0**-110, 3 / np.sqrt(4))
    found = cj.nnx.quantizers(qmodel)[""]["weight_scale"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
