"""Statistics of batch norms, estimated anew after calibration."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import (
    NormedNet,
    SetUp,
    assert_same,
    drawn,
    normal,
    weights_by_hand,
)

import compand_jax as cj

X = normal(5, 4)
BATCHES = (X, normal(5, 4, seed=1), 2 * normal(3, 4, seed=2))  # the last one is smaller


def quantized(model, **config):
    config = {"weight_bits": 3, "act_bits": 3, **config}
    return cj.quantize_model(model, cj.QuantConfig(**config))


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_batch_statistics_are_the_mean_over_the_examples_of_what_each_batch_has(scale):
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
    sizes = [5, 5, 3]
    mean = np.average([y.mean(0) for y in outputs], 0, sizes)
    np.testing.assert_allclose(statistics["mean"], mean, 1e-5)
    var = np.average([y.var(0) for y in outputs], 0, sizes)
    np.testing.assert_allclose(statistics["var"], var, 1e-4)
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
    mean = np.average(means, 0, [5, 5, 3])
    np.testing.assert_allclose(found["batch_stats"]["norm"]["mean"], mean, atol=1e-4)
    np.testing.assert_allclose(found["batch_stats"]["remat"]["mean"], 0, atol=1e-5)


@pytest.mark.quick
def test_without_batch_norms_there_is_nothing_to_estimate():
    qmodel, variables = quantized(SetUp()), drawn(SetUp(), X)
    _, found = qmodel.calibrate(variables, [X], calibration="absmax", batch_stats=True)
    assert set(found) == {"params", "compand"}


class Body(nn.Module):
    """A scan's body with a batch norm."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, use_bias=False, name="norm")(x)
        return jnp.tanh(nn.Dense(4, name="dense")(x)), None


class Scanned(nn.Module):
    """A stack whose layers have statistics of their own, or add to the same ones."""

    own: bool

    @nn.compact
    def __call__(self, x):
        axes = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
        if not self.own:
            axes = {"variable_broadcast": "params", "variable_carry": "batch_stats",
                    "split_rngs": {"params": False}}  # fmt: skip
        return nn.scan(Body, length=3, **axes)(name="stack")(x)[0]


@pytest.mark.parametrize("own", [True, False])
def test_a_scanned_batch_norm(own):
    rng = np.random.default_rng(3)
    layers = (3,) if own else ()

    def draw(*shape):
        return np.float32(rng.uniform(0.5, 1.5, (*layers, *shape)))

    params = {"dense": {"kernel": draw(4, 4), "bias": draw(4)}, "norm": {"scale": draw(4)}}
    stats = {"norm": {"mean": draw(4), "var": draw(4)}}
    variables = {"params": {"stack": params}, "batch_stats": {"stack": stats}}
    qmodel = quantized(Scanned(own), weight_bits=None, act_bits=None)
    _, found = qmodel.calibrate(variables, BATCHES, calibration="absmax", batch_stats=True)
    means = np.zeros((3, 3, 4))  # batch, layer, feature
    for batch, x in enumerate(np.float64(x) for x in BATCHES):
        for layer in range(3):
            scale, kernel, bias = (
                leaf[layer] if own else leaf
                for leaf in (params["norm"]["scale"], *params["dense"].values())
            )
            means[batch, layer] = x.mean(0)
            x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * scale
            x = np.tanh(x @ kernel + bias)
    expected = np.average(means, 0, [5, 5, 3])
    statistics = found["batch_stats"]["stack"]["norm"]
    assert set(statistics) == {"mean", "var"}
    expected = expected if own else expected.mean(0)
    np.testing.assert_allclose(statistics["mean"], expected, rtol=1e-4, atol=1e-5)


class EvalNorm(nn.BatchNorm):
    """A batch norm that is told nothing."""

    @nn.compact
    def __call__(self, x):
        return super().__call__(x, use_running_average=True)


class Called(nn.Module):
    """A batch norm that is called in one of many ways."""

    how: str

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(6, name="first")(x)
        if self.how == "subclass":
            return EvalNorm(name="norm")(x)
        if self.how == "positional":
            return nn.BatchNorm(name="norm")(x, not train)
        if self.how == "keyword":
            return nn.BatchNorm(name="norm")(x=x, use_running_average=not train)
        return nn.BatchNorm(use_running_average=not train, name="norm")(x)


@pytest.mark.parametrize(
    ("how", "train"),
    [("subclass", False), ("positional", False), ("keyword", True), ("field", True)],
)
def test_however_a_batch_norm_is_called(how, train):
    qmodel, variables = quantized(Called(how), act_bits=None), drawn(Called("field"), X)
    _, found = qmodel.calibrate(
        variables, BATCHES, calibration="absmax", batch_stats=True, train=train
    )
    kernel = weights_by_hand(found)["first"]["kernel"]
    outputs = [np.float64(x @ kernel + found["params"]["first"]["bias"][None]) for x in BATCHES]
    mean = np.average([y.mean(0) for y in outputs], 0, [5, 5, 3])
    np.testing.assert_allclose(found["batch_stats"]["norm"]["mean"], mean, rtol=1e-4, atol=1e-5)


def test_statistics_that_are_not_finite():
    qmodel, variables = quantized(NormedNet()), drawn(NormedNet(), X)
    batches = [np.float32(1e30) * X]  # whose variance is infinite
    match = r"`batches` must give finite statistics, got NaN or infinity in norm/var: leave out"
    with pytest.raises(ValueError, match=match):
        qmodel.calibrate(variables, batches, calibration="absmax", batch_stats=True)
