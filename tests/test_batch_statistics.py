"""Statistics of batch norms, estimated anew after calibration."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from small_models import NormedNet, SetUp, assert_same, drawn, normal, weights_by_hand

import compand_jax as cj

X = normal(5, 4)
BATCHES = (X, normal(5, 4, seed=1), 2 * normal(3, 4, seed=2))  # the last one is smaller


def quantized(model, **config):
    config = {"weight_bits": 3, "act_bits": 3, **config}
    return cj.quantize_model(model, cj.QuantConfig(**config))


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_batch_statistics_are_the_mean_over_the_batches(scale):
    batches = [scale * (x + 1) for x in BATCHES]
    qmodel = quantized(NormedNet(), act_bits=None)
    before = drawn(NormedNet(), X)
    variables = {**before, "batch_stats": jax.tree.map(lambda s: s + 0.5, before["batch_stats"])}
    after, found = qmodel.calibrate(
        variables, iter(batches), calibration="absmax", batch_stats=True, train=False
    )
    kernel = weights_by_hand(found)["first"]["kernel"]  # under quantization
    outputs = [np.float64(x @ kernel + found["params"]["first"]["bias"][None]) for x in batches]
    statistics = found["batch_stats"]["norm"]
    np.testing.assert_allclose(statistics["mean"], np.mean([y.mean(0) for y in outputs], 0), 1e-5)
    np.testing.assert_allclose(statistics["var"], np.mean([y.var(0) for y in outputs], 0), 1e-4)
    assert_same(found["params"], variables["params"], 0)
    assert np.all(np.isfinite(after.apply(found, X)))
    _, kept = qmodel.calibrate(variables, batches, calibration="absmax", train=False)
    assert_same(kept["batch_stats"], variables["batch_stats"], 0)


class OtherStatistics(nn.Module):
    """A batch norm that runs twice, a remat one, and statistics that are no batch norm's."""

    @nn.compact
    def __call__(self, x, train=False):
        norm = nn.BatchNorm(use_running_average=not train, use_bias=False, name="norm")
        x = norm(norm(x) + 3)
        x = nn.remat(nn.BatchNorm)(use_running_average=not train, name="remat")(x)
        return nn.SpectralNorm(nn.Dense(3))(x, update_stats=train)


def test_all_statistics_but_batch_norms_are_left_alone():
    model = OtherStatistics()
    qmodel, before = quantized(model, weight_bits=None, act_bits=8), drawn(model, X)
    _, found = qmodel.calibrate(
        before, BATCHES, calibration="absmax", batch_stats=True, train=False
    )
    spectral = [name for name in before["batch_stats"] if "Spectral" in name]
    for name in spectral:
        assert_same(found["batch_stats"][name], before["batch_stats"][name], 1e-6)
    assert spectral
    means = []
    for x in np.float64(BATCHES[0]), np.float64(BATCHES[1]), np.float64(BATCHES[2]):
        y = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) + 3
        means.append((x.mean(0) + y.mean(0)) / 2)  # over both calls
    np.testing.assert_allclose(found["batch_stats"]["norm"]["mean"], np.mean(means, 0), atol=1e-4)
    np.testing.assert_allclose(found["batch_stats"]["remat"]["mean"], 0, atol=1e-5)


@pytest.mark.quick
def test_without_batch_norms_there_is_nothing_to_estimate():
    qmodel, variables = quantized(SetUp()), drawn(SetUp(), X)
    _, found = qmodel.calibrate(variables, [X], calibration="absmax", batch_stats=True)
    assert set(found) == {"params", "compand"}
