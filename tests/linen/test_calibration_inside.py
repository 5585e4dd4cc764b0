"""`calibrate` where values are tracers of scan, vmap, remat and cond; and what it keeps of them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import SetUp, Stack, Twice, drawn, elements, normal

import compand_jax as cj
from compand_jax.linen.calibration import observe

X = normal(5, 4)
BATCHES = (X, normal(5, 4, seed=1), 2 * normal(3, 4, seed=2))  # the last one is smaller


def quantized(model):
    config = cj.QuantConfig(weight_bits=3, act_bits=3, weight_granularity="channel")
    return cj.quantize_model(model, config)


@pytest.mark.parametrize("kind", ["scan", "same", "vmap", "remat"])
def test_values_inside_transformations_are_seen(kind):
    model = nn.remat(SetUp)() if kind == "remat" else Stack(kind)
    batches = [normal(3, 5, 4, seed=i) for i in range(3)] if kind == "vmap" else BATCHES
    variables = drawn(model, batches[0])
    qmodel, variables = quantized(model).calibrate(variables, batches, calibration="absmax")
    params, tops = variables["params"], {}
    for x in batches:
        if kind == "remat":
            hidden = SetUp().apply({"params": params}, x, method="encode")
            seen = {"first": [x], "second": [hidden]}
        else:
            stacked, seen = params["stack"]["dense"], {"stack/dense": [x]}
            for i in range(0 if kind == "vmap" else 2):
                own = stacked if kind == "same" else jax.tree.map(lambda a, i=i: a[i], stacked)
                x = jnp.tanh(x @ own["kernel"] + own["bias"][None])
                seen["stack/dense"].append(x)
        for site, values in seen.items():
            tops[site] = max(tops.get(site, 0), *(float(np.abs(v).max()) for v in values))
    found = qmodel.quantizers(variables)
    assert set(found) == set(tops)
    for site, top in tops.items():
        assert float(found[site]["act_scale"]) == pytest.approx(top, rel=1e-5)
    if kind in ("scan", "vmap"):
        kernels = np.abs(params["stack"]["dense"]["kernel"]).max((0, 1))[None]
        np.testing.assert_allclose(found["stack/dense"]["weight_scale"], kernels, rtol=1e-5)
    assert np.all(np.isfinite(qmodel.apply(variables, batches[0])))


class Either(nn.Module):
    """Two layers, one of which runs, by the input's sign."""

    @nn.compact
    def __call__(self, x):
        a, b = nn.Dense(3, name="a"), nn.Dense(3, name="b")
        if self.is_initializing():
            return a(x) + b(x)
        return nn.cond(x[0, 0] > 0, lambda _, x: a(x), lambda _, x: b(x), self, x)


def test_a_branch_has_to_be_taken():
    variables, x = drawn(Either(), X), jnp.abs(X)
    qmodel, found = quantized(Either()).calibrate(variables, [x, -2 * x], calibration="absmax")
    values, top = qmodel.quantizers(found), float(x.max())
    assert float(values["a"]["act_scale"]) == pytest.approx(top, rel=1e-5)
    assert float(values["b"]["act_scale"]) == pytest.approx(2 * top, rel=1e-5)
    assert not qmodel.sites["a"].act_signed
    assert np.any(qmodel.apply(found, x) != Either().apply(variables, x))
    match = r"`batches` must reach every layer that is quantized, site 'b' is in a branch that"
    with pytest.raises(ValueError, match=match):
        quantized(Either()).calibrate(variables, [x], calibration="absmax")
    for operand in ("weight_bits", "act_bits"):  # quantized in part is quantized
        config = cj.QuantConfig(weight_bits=3, act_bits=3, rules=(cj.Rule("b", **{operand: None}),))
        with pytest.raises(ValueError, match=match):
            cj.quantize_model(Either(), config).calibrate(variables, [x])


def test_a_branch_in_full_precision_need_not_be_taken():
    variables, x = drawn(Either(), X), jnp.abs(X)
    rule = cj.Rule("b", weight_bits=None, act_bits=None)
    config = cj.QuantConfig(weight_bits=3, act_bits=3, rules=(rule,))
    for arguments in ({}, {"calibration": "output", "error_feedback": True}):
        qmodel, found = cj.quantize_model(Either(), config).calibrate(variables, [x], **arguments)
        assert set(qmodel.quantizers(found)) == {"a"}
        assert np.any(qmodel.apply(found, x) != Either().apply(variables, x))
        np.testing.assert_array_equal(qmodel.apply(found, -x), Either().apply(variables, -x))


@pytest.mark.parametrize("model", [SetUp(), Twice(), Stack("scan")])
def test_memory_does_not_grow_with_the_batches(model):
    variables = drawn(model, X)
    sizes = []
    for count in (2, 6):
        batches = (normal(5, 4, seed=i) for i in range(count))
        flags = {"at_output": False, "activations": True, "moments": False}
        seen = observe(model, variables, batches, {}, **flags)
        kept = [observer.called_back for observer in seen.observers]
        sizes.append(elements((seen.activations, seen.weights, kept)))
        counted = sum(float(h.counts.sum()) for h in seen.activations.values())
        passed = {SetUp: 5 * (4 + 6), Twice: 2 * 5 * 4, Stack: 3 * 5 * 4}[type(model)]
        assert counted == count * passed
    assert sizes[0] == sizes[1]
