"""Operands of other types: complex ones and integers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import standard_promotion  # noqa: F401 - a fixture

import compand_jax as cj

# As every user has it: a layer's own types are promoted.
pytestmark = pytest.mark.usefixtures("standard_promotion")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, 4)).astype(np.float32)
Z = (X + 1j * RNG.normal(size=(5, 4))).astype(np.complex64)


class Spectrum(nn.Module):
    """A complex layer, its magnitudes, and a real one."""

    @nn.compact
    def __call__(self, z):
        z = nn.Dense(6, name="complex", dtype=jnp.complex64, param_dtype=jnp.complex64)(z)
        return nn.Dense(3, name="real")(jnp.abs(z))


def quantized(**fields):
    rule = cj.Rule("complex", **fields)
    return cj.quantize_model(Spectrum(), cj.QuantConfig(weight_bits=4, act_bits=4, rules=(rule,)))


def test_what_is_not_quantized_stays_complex():
    qmodel = quantized(weight_bits=None, act_bits=None)
    variables = Spectrum().init(jax.random.key(0), Z)
    for arguments in ({}, {"calibration": "output", "error_feedback": True}):
        _, found = qmodel.calibrate(variables, [Z], **arguments)
        own, params = found["params"]["real"], variables["params"]
        kernel, bias = (np.asarray(params["complex"][name]) for name in ("kernel", "bias"))
        x = jnp.asarray(np.abs(Z @ kernel + bias))
        values = qmodel.quantizers(found)["real"]
        calibrated, _ = qmodel.calibrate(variables, [Z])
        signed = calibrated.sites["real"].act_signed
        x = cj.fake_quantize(x, values["act_mu"], values["act_scale"], bits=4, signed=signed)
        weight = cj.fake_quantize(
            own["kernel"], values["weight_mu"], values["weight_scale"], bits=4
        )
        wanted = x @ weight + own["bias"][None]
        np.testing.assert_allclose(calibrated.apply(found, Z), wanted, rtol=1e-5, atol=1e-6)
    first = qmodel.init(jax.random.key(0), Z)
    assert set(first["compand"]) == {"real"}
    frozen = cj.freeze(calibrated, found, Z)
    np.testing.assert_allclose(frozen.apply(Z), calibrated.apply(found, Z), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "what"),
    [({}, "weights|activations"), ({"act_bits": None}, "weights"),
     ({"weight_bits": None}, "activations")],
)  # fmt: skip
def test_what_would_be_quantized_is_refused_by_name(fields, what):
    qmodel, variables = quantized(**fields), Spectrum().init(jax.random.key(0), Z)
    match = rf"site 'complex' has ({what}) of type complex64, which cannot be quantized: leave it"
    for call in (
        lambda: qmodel.calibrate(variables, [Z]),
        lambda: qmodel.init(jax.random.key(0), Z),
    ):
        with pytest.raises(TypeError, match=match):
            call()


def test_a_real_model_that_is_given_complex_inputs():
    model = nn.Dense(3)
    qmodel, found = cj.quantize_model(model, cj.QuantConfig()).calibrate(
        model.init(jax.random.key(0), X), [X]
    )
    with pytest.raises(TypeError, match=r"site '' has activations of type complex64, which"):
        qmodel.apply(found, Z)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.bool_])
def test_integers(dtype):
    x = (X > 0).astype(dtype)
    model = nn.Dense(3, param_dtype=jnp.bfloat16)
    variables = model.init(jax.random.key(0), x)
    config = cj.QuantConfig(weight_bits=8, act_bits=None, rules=(cj.Rule("", weight_bits=None),))
    qmodel, found = cj.quantize_model(model, config).calibrate(variables, [x])
    plain, result = model.apply(variables, x), qmodel.apply(found, x)
    assert result.dtype == plain.dtype
    np.testing.assert_array_equal(result, plain)
    qmodel, found = cj.quantize_model(model, cj.QuantConfig()).calibrate(variables, [x])
    assert np.all(np.isfinite(np.asarray(qmodel.apply(found, x), np.float32)))
