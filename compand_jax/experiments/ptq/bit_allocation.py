"""Which sites can do with few bits: their sensitivities, and bits for each within a budget.

The loss that quantizing site i to b bits is predicted to cost is the mean Kullback-Leibler
divergence of the quantized network's softmax q from the full-precision network's p on images x_j,
with that site alone quantized; no labels are needed:

    Omega_i(b) = 1/N sum_j KL(p(x_j) || q_{i,b}(x_j))    in nats

Losses are taken to add up over sites. The bits b_i, one of a few for each site, are then those of

    minimize sum_i Omega_i(b_i)   where   sum_i n_i b_i <= B sum_i n_i,   n_i weights of site i

a multiple-choice knapsack, which is solved exactly.

Source: Cai et al., "ZeroQ: a novel zero shot quantization framework", CVPR 2020, arXiv 2001.00281,
section 3.2, for the measure and its additivity; Yao et al., "HAWQ-V3: dyadic neural network
quantization", ICML 2021, arXiv 2011.10680, for the integer program.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from compand_jax.data.packages import needed_for
from compand_jax.experiments.errors import UserError
from compand_jax.experiments.ptq.network import (
    TrainedNetwork,
    count_correct,
    log_probabilities,
    reestimated,
)
from compand_jax.experiments.ptq.settings import Setting, quantize_network, quantized_params, sqnr
from compand_jax.layers import parametrization as par
from compand_jax.layers.config import Rule

with needed_for("a budget of bits", "scipy"):
    from scipy.optimize import Bounds, LinearConstraint, milp

# Images that a divergence is measured on: it is a mean, and known well enough from so many.
_MOST_IMAGES = 1024
# Of the largest loss: losses that matter are then far above the solver's tolerance, 1e-6.
_COST_SCALE = 1e4


def quantized_site(params: Mapping, quantized: Mapping, site: str) -> dict[str, Any]:
    """Returns `params` with the kernel of one site from `quantized`."""
    flat, path = dict(flatten_dict(params)), (*par.site_path(site), "kernel")
    flat[path] = flatten_dict(quantized)[path]
    return unflatten_dict(flat)


class SiteLosses:
    """Measures of a network with the weights of one site quantized.

    Args:
      network: the network.
      batch_stats: whether batch-norm statistics are re-estimated; in the full-precision network
        that a divergence is from as well, so that it is 0 where nothing is quantized.

    All methods may be called from several threads.
    """

    def __init__(self, network: TrainedNetwork, *, batch_stats: bool) -> None:
        self.network, self._batch_stats = network, batch_stats
        self._batches = network.calibration.first(_MOST_IMAGES)
        exact = dict(network.variables)
        if batch_stats:
            exact = reestimated(network.model, exact, self._batches)
        self._exact = log_probabilities(network.model, exact, self._batches)

    def quantized(self, setting: Setting) -> dict[str, Any]:
        """Returns `params` with all kernels quantized, for the other methods to take one from."""
        return quantized_params(*quantize_network(self.network, setting))

    def divergence(self, quantized: Mapping, site: str) -> float:
        """Returns Omega of a site, in nats.

        Args:
          quantized: `params` as `quantized` returns them.
          site: whose kernel is taken from them.
        """
        variables = self._variables(quantized, site, self._batches)
        found = log_probabilities(self.network.model, variables, self._batches)
        pairs = zip(found, self._exact, strict=True)
        return float(np.mean(np.concatenate([np.asarray(_divergences(q, p)) for q, p in pairs])))

    def accuracy(self, quantized: Mapping, site: str) -> dict[str, Any]:
        """Returns `correct`, `total`, `accuracy` (percent) and `weight_sqnr` (dB) of a site.

        Args:
          quantized: as `divergence`.
          site: as `divergence`.
        """
        network = self.network
        variables = self._variables(quantized, site, network.calibration)
        total = len(network.data.test_labels)
        correct = count_correct(network, network.model, variables)
        return {
            "correct": correct,
            "total": total,
            "accuracy": 100 * correct / total,
            "weight_sqnr": sqnr(network.variables["params"], variables["params"]),
        }

    def _variables(self, quantized: Mapping, site: str, batches: Iterable) -> dict:
        variables = dict(self.network.variables)
        variables["params"] = quantized_site(variables["params"], quantized, site)
        if not self._batch_stats:
            return variables
        return reestimated(self.network.model, variables, batches)


@jax.jit
def _divergences(log_q: Array, log_p: Array) -> Array:
    return optax.losses.kl_divergence_with_log_targets(log_q, log_p)


def allocate_bits(
    losses: Mapping[str, Mapping[int, float]], counts: Mapping[str, int], budget: float
) -> dict[str, int]:
    """Returns the bits of each site: of the least summed loss within the budget.

    Args:
      losses: by site and bits, what quantizing the site to these bits costs, at least 0.
      counts: by site, its number of weights.
      budget: bits per weight, on average over all weights, at most.

    Raises:
      UserError: the budget is below what the fewest bits of every site take.

    >>> losses = {"a": {2: 0.5, 4: 0.1}, "b": {2: 0.9, 4: 0.2}}
    >>> allocate_bits(losses, {"a": 10, "b": 10}, 3.0)
    {'a': 2, 'b': 4}
    """
    choices = [(site, bits) for site, by_bits in losses.items() for bits in by_bits]
    total = sum(counts[site] for site in losses)
    least = sum(counts[site] * min(by_bits) for site, by_bits in losses.items()) / total
    if not budget >= least:
        raise UserError(
            f"`budget` must be at least {least:g} bits per weight, what the fewest bits of every "
            f"site take, got {budget}: raise it"
        )
    cost = np.array([losses[site][bits] for site, bits in choices], np.float64)
    one_each = np.array([[float(own == site) for own, _ in choices] for site in losses])
    # In whole units: the solver's tolerances are absolute.
    unit = math.gcd(*(counts[site] for site in losses))
    size = np.array([counts[site] // unit * bits for site, bits in choices], np.float64)
    most = math.floor(budget * (total // unit))
    result = milp(
        _COST_SCALE * cost / (cost.max() or 1),
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(size, -np.inf, most)],
        options={"mip_rel_gap": 0},
    )
    assert result.success, result.message  # it is feasible, and finite
    taken = result.x > 0.5
    assert size[taken].sum() <= most
    return {choices[i][0]: choices[i][1] for i in np.flatnonzero(taken)}


def at_bits(setting: Setting, bits: int) -> Setting:
    """Returns the setting with so many bits per weight: midtread, but midrise at 2 bits.

    mu has nothing to move among three levels; the midrise grid has a fourth.
    """
    return setting.changed(weight_bits=bits, grid=_grid(bits))


def mixed_bits(setting: Setting, bits: Mapping[str, int]) -> Setting:
    """Returns the setting with bits of its own for each site, on grids as `at_bits` gives them."""
    rules = [Rule(re.escape(site), weight_bits=n, grid=_grid(n)) for site, n in bits.items()]
    return setting.changed(rules=tuple(rules))


def _grid(bits: int) -> str:
    return "midrise" if bits == 2 else "midtread"
