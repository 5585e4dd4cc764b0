"""Frozen models that keep state: a cache, an average, given from step to step."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import drawn, normal, quantize_by_hand

import compand_jax as cj
from compand_jax.frozen.model import _run

pytestmark = [
    pytest.mark.quick,
    # Its mu and scales are drawn at random here.
    pytest.mark.filterwarnings("ignore:the quantized model is not calibrated"),
]


class Running(nn.Module):
    """A dense layer on the sum of all inputs so far, and a constant that it keeps."""

    @nn.compact
    def __call__(self, x):
        total = self.variable("total", "x", lambda: jnp.zeros(4))
        total.value += x.sum(0)
        offset = self.variable("offset", "x", lambda: jnp.ones(3)).value
        return nn.Dense(3, name="dense")(total.value[None]) + offset[None]


def test_state_from_step_to_step(tmp_path):
    qmodel = cj.quantize_model(Running(), cj.QuantConfig(weight_bits=3, act_bits=None))
    inputs = [normal(2, 4, seed=seed) for seed in range(3)]
    variables = drawn(qmodel, inputs[0])
    kernel = quantize_by_hand(
        variables["params"]["dense"]["kernel"], variables["compand"]["dense"], "weight"
    )
    total, expected = np.asarray(variables["total"]["x"], np.float64), []
    for x in inputs:
        total = total + np.asarray(x, np.float64).sum(0)
        expected.append(total @ np.asarray(kernel, np.float64))
        expected[-1] += variables["params"]["dense"]["bias"] + variables["offset"]["x"]

    frozen = cj.freeze(qmodel, variables, inputs[0])
    frozen.save(tmp_path / "x.safetensors")
    for each in (frozen, cj.load_frozen(tmp_path / "x.safetensors", Running())):
        state, before = {}, _run._cache_size()
        for x, wanted in zip(inputs, expected, strict=True):
            y, state = each.with_state(state).apply(x, mutable=["total"])
            np.testing.assert_allclose(y[0], wanted, rtol=1e-5, atol=1e-5)
        assert _run._cache_size() <= before + 1
    y, _ = frozen.apply(inputs[0], mutable=["total"])  # it is as it was
    np.testing.assert_allclose(y[0], expected[0], rtol=1e-5, atol=1e-5)

    def step(state, x):
        y, state = frozen.with_state(state).apply(x, mutable=["total"])
        return state, y[0]

    _, ys = jax.lax.scan(step, {"total": variables["total"]}, jnp.stack(inputs))
    np.testing.assert_allclose(ys, np.stack(expected), rtol=1e-5, atol=1e-5)


def test_weights_are_no_state():
    x = normal(2, 4)
    qmodel = cj.quantize_model(Running(), cj.QuantConfig())
    variables = drawn(qmodel, x)
    frozen = cj.freeze(qmodel, variables, x)
    with pytest.raises(
        ValueError, match="`state` must be of collections without .* got 'params': "
    ):
        frozen.with_state({name: variables[name] for name in ("params", "total")})
