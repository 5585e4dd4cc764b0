"""How a trained network is quantized without training, and what it costs in accuracy.

A `Setting` is calibrated from what was seen of a `TrainedNetwork`, and evaluated. Where only
weights are quantized, the network itself is evaluated with levels in place of its kernels: the same
result, and one compilation for all settings.
"""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from compand_jax.core.quantizers import fake_quantize
from compand_jax.experiments.ptq.network import (
    TrainedNetwork,
    count_correct,
    reestimated,
    weight_counts,
)
from compand_jax.layers import parametrization as par
from compand_jax.layers.config import QuantConfig, Rule
from compand_jax.layers.model_size import model_bytes
from compand_jax.linen.quantized_model import QuantizedModel, quantize_model
from compand_jax.training.steps import Model

_VARIED = ("weight_bits", "act_bits", "quantizer", "weight_granularity", "grid", "mu_scope")


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a trained network is quantized: a row of a table.

    Attributes:
      quant: the quantized model's configuration.
      calibration: as `QuantizedModel.calibrate`.
      error_feedback: as `QuantizedModel.calibrate`.
      batch_stats: as `QuantizedModel.calibrate`.
    """

    quant: QuantConfig
    calibration: str = "mse"
    error_feedback: bool = False
    batch_stats: bool = True

    def changed(self, **fields: Any) -> "Setting":
        """Returns the setting with some fields, its own or those of `quant`, changed."""
        own = {name: fields.pop(name) for name in vars(self).keys() & fields.keys()}
        return dataclasses.replace(self, quant=dataclasses.replace(self.quant, **fields), **own)

    def to_row(self) -> dict[str, Any]:
        """Returns the fields as a record has them: those of `quant` that tables vary, the others.

        Raises:
          ValueError: another field of `quant` is not as it is by default.
        """
        quant = dataclasses.asdict(self.quant)
        row = {name: quant[name] for name in _VARIED}
        row |= {name: value for name, value in vars(self).items() if name != "quant"}
        row["rules"] = quant["rules"]
        if Setting.from_row(row) != self:
            raise ValueError(f"`quant` must vary in {', '.join(_VARIED)} and rules alone")
        return row

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Setting":
        """Returns the setting of a record's row, which may have other entries too."""
        rules = tuple(Rule(**rule) for rule in row["rules"])
        quant = QuantConfig(**{name: row[name] for name in _VARIED}, rules=rules)
        return cls(quant, row["calibration"], row["error_feedback"], row["batch_stats"])


def quantize_network(
    network: TrainedNetwork, setting: Setting
) -> tuple[QuantizedModel, dict[str, Any]]:
    """Returns the network calibrated as the setting says, all but its batch-norm statistics."""
    return quantize_model(network.model, setting.quant).calibrate_from(
        network.seen,
        network.variables,
        calibration=setting.calibration,
        error_feedback=setting.error_feedback,
    )


def quantized_params(qmodel: QuantizedModel, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `params` with every quantized kernel replaced by its levels.

    For models whose layers use their kernels as they are stored: the model itself with these
    computes what the quantized model does whose activations are in full precision.
    """
    flat = dict(flatten_dict(variables["params"]))
    for name, found in qmodel.quantizers(variables).items():
        if "weight_scale" in found:
            path, spec = (*par.site_path(name), "kernel"), qmodel.site(name).spec("weight")
            mu, scale = par.entry(found, "weight", spec), found["weight_scale"]
            flat[path] = _levels(flat[path], mu, scale, **spec.arguments)
    return unflatten_dict(flat)


_levels = jax.jit(fake_quantize, static_argnames=("bits", "signed", "grid", "quantizer"))


def with_levels(
    qmodel: QuantizedModel, variables: Mapping[str, Any]
) -> tuple[Model, dict[str, Any]]:
    """Returns a model, and its variables, that computes what the quantized one does.

    With levels in place of its kernels, as `quantized_params`, it quantizes activations alone, or
    nothing where these are in full precision. It is the same for all weights' settings and
    mu scopes, and so compiled once for all of them.
    """
    config, compand = qmodel.config, variables["compand"]
    levels = {**variables, "params": quantized_params(qmodel, variables)}
    del levels["compand"]
    if not config.quantizes_activations:
        return qmodel.model, levels
    exact: dict[str, Any] = {"weight_bits": None, "grid": "midtread"}
    exact_config = {**exact, "weight_granularity": "tensor"}
    rules = tuple(dataclasses.replace(rule, **exact_config) for rule in config.rules)
    own = dataclasses.replace(config, **exact_config, mu_scope="per_layer", rules=rules)
    assert qmodel.sites is not None
    sites = {name: dataclasses.replace(site, **exact, scale_axes=())
             for name, site in qmodel.sites.items()}  # fmt: skip
    own_compand: dict[str, Any] = {}
    for name, operand in par.quantized_operands(compand):
        if operand == "act":
            scale_path = par.scale_path(name, operand)
            par.set_leaf(own_compand, scale_path, par.get_leaf(compand, scale_path))
            shared, mu_path = (par.parameter_path(name, operand, one) for one in (config, own))
            if shared is not None and mu_path is not None:
                par.set_leaf(own_compand, mu_path, par.get_leaf(compand, shared))
    return quantize_model(qmodel.model, own, sites=sites), {**levels, "compand": own_compand}


def evaluate_setting(network: TrainedNetwork, setting: Setting) -> dict[str, Any]:
    """Returns a setting's fields, and what it gives.

    That is: `correct`, `total` and `accuracy` (percent) on the test images, `mean_weight_bits`
    over the quantized weights, `model_bytes`, `weight_sqnr` (dB, of all weights together; None
    where nothing is lost), `calibration_seconds` and `evaluation_seconds`.
    """
    began = time.perf_counter()
    qmodel, calibrated = quantize_network(network, setting)
    model, variables = with_levels(qmodel, calibrated)
    params = variables["params"]
    if setting.batch_stats:
        variables = reestimated(model, variables, network.calibration)
    variables = jax.block_until_ready(variables)
    calibrated_at = time.perf_counter()
    correct, total = count_correct(network, model, variables), len(network.data.test_labels)
    return setting.to_row() | {
        "accuracy": 100 * correct / total,
        "correct": correct,
        "total": total,
        "mean_weight_bits": mean_weight_bits(network, qmodel),
        "model_bytes": model_bytes(calibrated, qmodel.sites),
        "weight_sqnr": sqnr(network.variables["params"], params),
        "calibration_seconds": round(calibrated_at - began, 2),
        "evaluation_seconds": round(time.perf_counter() - calibrated_at, 2),
    }


def mean_weight_bits(network: TrainedNetwork, qmodel: QuantizedModel) -> float:
    """Returns the bits per weight, averaged over the weights that are quantized."""
    counts = weight_counts(network)
    bits = {name: qmodel.site(name).weight_bits for name in counts}
    quantized = {name: count for name, count in bits.items() if count is not None}
    total = sum(counts[name] * count for name, count in quantized.items())
    return total / sum(counts[name] for name in quantized)


def sqnr(exact: Any, quantized: Any) -> float | None:
    """Returns 10 log10(sum x^2 / sum (x - q)^2) in dB over two trees' leaves; None if equal.

    Leaves that are the same in both are no part of it.

    >>> round(sqnr({"a": np.ones(2), "b": np.ones(9)}, {"a": np.full(2, 0.9), "b": np.ones(9)}), 6)
    20.0
    """
    power = noise = 0.0
    for x, q in zip(jax.tree.leaves(exact), jax.tree.leaves(quantized), strict=True):
        x, q = np.asarray(x, np.float64), np.asarray(q, np.float64)
        if np.any(x != q):
            power, noise = power + np.sum(x**2), noise + np.sum((x - q) ** 2)
    return float(10 * np.log10(power / noise)) if noise and power else None
