"""Bits by site: exact within the budget, from losses of one site at a time."""

import itertools

import jax
import numpy as np
import pytest
from tiny_runs import (  # noqa: F401
    TinyNet,
    quantized_to,
    standard_promotion,
    tiny_data,
    tiny_variables,
)

from compand_jax.data.calibration_images import choose_calibration_images
from compand_jax.experiments.errors import UserError
from compand_jax.experiments.ptq.bit_allocation import (
    SiteLosses,
    allocate_bits,
    at_bits,
    mixed_bits,
    quantized_site,
)
from compand_jax.experiments.ptq.network import count_correct, observe_network


def brute_force(losses, counts, budget):
    """The least summed loss over all combinations within the budget."""
    sites, best = list(losses), np.inf
    total = sum(counts.values())
    for bits in itertools.product(*(losses[site] for site in sites)):
        if sum(counts[s] * b for s, b in zip(sites, bits, strict=True)) <= budget * total:
            best = min(best, sum(losses[s][b] for s, b in zip(sites, bits, strict=True)))
    return best


@pytest.mark.quick
@pytest.mark.parametrize("seed", range(20))
def test_allocation_is_the_best_within_the_budget(seed):
    rng = np.random.default_rng(seed)
    sites = [f"site{i}" for i in range(rng.integers(1, 6))]
    choices = sorted(rng.choice(np.arange(2, 9), rng.integers(2, 5), replace=False).tolist())
    # Sizes and losses as different as those of real layers; some losses rise with the bits.
    counts = {site: int(10 ** rng.uniform(0, 7)) for site in sites}
    losses = {
        site: {b: float(10 ** rng.uniform(-6, 0) * 4.0**-b * rng.uniform(0.5, 2)) for b in choices}
        for site in sites
    }
    budget = float(rng.uniform(choices[0], choices[-1]))
    chosen = allocate_bits(losses, counts, budget)
    assert list(chosen) == sites
    assert sum(counts[s] * chosen[s] for s in sites) <= budget * sum(counts.values())
    found = sum(losses[site][chosen[site]] for site in sites)
    assert found == pytest.approx(brute_force(losses, counts, budget), rel=1e-6)


@pytest.mark.quick
def test_budget_that_is_met_exactly_is_within_it():
    losses = {"a": {2: 1.0, 4: 0.0}, "b": {2: 1.0, 4: 0.0}}
    assert allocate_bits(losses, {"a": 3, "b": 3}, 4.0) == {"a": 4, "b": 4}
    assert set(allocate_bits(losses, {"a": 3, "b": 3}, 3.999).values()) == {2, 4}
    zeros = {site: dict.fromkeys((2, 4), 0.0) for site in losses}
    assert allocate_bits(zeros, {"a": 3, "b": 3}, 2.0) == {"a": 2, "b": 2}


@pytest.mark.quick
@pytest.mark.parametrize("budget", [1.9, float("nan")])
def test_budget_below_the_fewest_bits(budget):
    with pytest.raises(UserError, match=f"`budget` must be at least 2 bits per .*, got {budget}"):
        allocate_bits({"a": {2: 1.0, 3: 0.5}}, {"a": 7}, budget)


@pytest.mark.quick
def test_settings_of_bits_by_site():
    mixed = mixed_bits(at_bits(quantized_to(8), 4), {"block.1": 2, "dense": 6})
    config = mixed.quant
    assert (config.at("block.1").weight_bits, config.at("block.1").grid) == (2, "midrise")
    assert (config.at("dense").weight_bits, config.at("dense").grid) == (6, "midtread")
    assert config.at("blocks1").weight_bits == 4  # a name is no pattern
    assert at_bits(quantized_to(8), 2).quant.grid == "midrise"


@pytest.fixture(scope="module")
def losses():
    data = tiny_data()
    calibration = choose_calibration_images(data, 40, pad=0, flip=False, seed=0)
    network = observe_network(TinyNet(), tiny_variables(), data, calibration)
    return SiteLosses(network, batch_stats=False)


@pytest.fixture(scope="module")
def levels(losses):
    return {b: losses.quantized(quantized_to(b, calibration="absmax")) for b in (3, 8)}


def test_one_site_is_touched(losses, levels):
    params = losses.network.variables["params"]
    for site, other in (("conv", "dense"), ("dense", "conv")):
        changed = quantized_site(params, levels[3], site)
        assert changed[site]["kernel"] is levels[3][site]["kernel"]
        assert np.any(np.asarray(changed[site]["kernel"] != params[site]["kernel"]))
        rest = [leaf for name in (other, "norm") for leaf in jax.tree.leaves(changed[name])]
        assert all(a is b for a, b in zip(
            rest, [leaf for name in (other, "norm") for leaf in jax.tree.leaves(params[name])],
            strict=True))  # fmt: skip


def softmax(logits):
    logits = np.asarray(logits, np.float64)
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def test_divergence_is_the_mean_over_images(losses, levels):
    network = losses.network
    (images,) = network.calibration
    exact = softmax(network.model.apply(network.variables, images))
    for site in ("conv", "dense"):
        params = quantized_site(network.variables["params"], levels[3], site)
        found = softmax(network.model.apply({**network.variables, "params": params}, images))
        wanted = np.mean(np.sum(exact * np.log(exact / found), -1))
        own = losses.divergence(levels[3], site)
        assert own == pytest.approx(wanted, rel=1e-3)
        assert losses.divergence(levels[8], site) < own / 10


def test_divergence_is_of_quantization_alone(losses, levels):
    with_stats = SiteLosses(losses.network, batch_stats=True)
    for one in (losses, with_stats):
        assert one.divergence(losses.network.variables["params"], "conv") == pytest.approx(0)
    assert with_stats.divergence(levels[3], "conv") != losses.divergence(levels[3], "conv")


def test_accuracy_with_one_site_quantized(losses, levels):
    network = losses.network
    found = losses.accuracy(levels[3], "dense")
    params = quantized_site(network.variables["params"], levels[3], "dense")
    correct = count_correct(network, network.model, {**network.variables, "params": params})
    assert (found["correct"], found["total"]) == (correct, 19)
    kernel = np.float64(network.variables["params"]["dense"]["kernel"])
    noise = np.sum((kernel - np.float64(levels[3]["dense"]["kernel"])) ** 2)
    assert found["weight_sqnr"] == pytest.approx(10 * np.log10(np.sum(kernel**2) / noise))
