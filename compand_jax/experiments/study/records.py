"""The small record of a finished training, from which a study's report is made.

A record is JSON: `row`, a line of results.csv; what was quantized how (`sites`), mu and scales at
the end (`quantizers`), loss, accuracy and mu over the steps (`curve`), and histograms of what is
quantized.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from compand_jax.data.images import ImageData, normalize
from compand_jax.experiments.errors import UserError
from compand_jax.experiments.records import read_json
from compand_jax.experiments.runs.config import CONTROL, FULL_PRECISION, RunConfig
from compand_jax.experiments.runs.directory import read_config
from compand_jax.experiments.runs.levers import quant_of
from compand_jax.experiments.runs.stages import finished
from compand_jax.experiments.study.grid import Cell
from compand_jax.experiments.text import thin
from compand_jax.layers.summary import site_weight
from compand_jax.linen.quantized_model import QuantizedModel
from compand_jax.models import FIRST_AND_LAST
from compand_jax.training.metrics_log import read_log

ROW = (
    "network", "dataset", "method", "weight_bits", "act_bits", "mu_scope", "arrangement", "seed",
    "epochs", "accuracy", "full_precision_accuracy", "device", "stage", "mu", "first_last_bits",
    "weight_grid", "levers", "learning_rate", "calibrated_accuracy", "parent_accuracy",
    "parent_epochs", "model_bytes", "steps", "seconds", "date", "name",
)  # fmt: skip
"""The columns of results.csv; `stage` is parent, control or cell, `levers` names by spaces."""

_CURVE_ROWS = 40
_BINS = 60
_RANGE = 1.25  # of the clip
_HISTOGRAM_IMAGES = 256


def read_record(path: Path) -> dict[str, Any]:
    """Returns a record.

    Raises:
      UserError: if it is damaged, another training's or another version's.
    """
    record = read_json(path)
    row = record.get("row") if isinstance(record, dict) else None
    if isinstance(row, dict):  # what was recorded before there were levers has none
        row = record["row"] = {"levers": ""} | row
    if not isinstance(row, dict) or set(row) != set(ROW) or row["name"] != path.stem:
        raise UserError(
            f"`directory` must hold this version's records, got {path} with another row: delete "
            "it, and run the study again"
        )
    return record


def parent_record(name: str, run_dir: Path) -> dict[str, Any]:
    """Returns the record of a finished full-precision parent."""
    result = read_json(run_dir / FULL_PRECISION / "result.json")
    row = _row(name, read_config(run_dir), result)
    row |= {
        "method": FULL_PRECISION,
        "stage": "parent",
        "learning_rate": result["config"]["learning_rate"],
        "parent_accuracy": row["accuracy"],
        "parent_epochs": row["epochs"],
    }
    return {"row": row, "curve": _curve(run_dir / FULL_PRECISION)} | _made_with(result)


def cell_record(cell: Cell, run_dir: Path, parent_dir: Path, data: ImageData) -> dict[str, Any]:
    """Returns the record of a finished cell.

    Args:
      cell: the cell.
      run_dir: its directory.
      parent_dir: its parent's.
      data: its data set, for the histograms of activations.
    """
    config = read_config(run_dir)
    stage_dir = run_dir / cell.method.name
    result = read_json(stage_dir / "result.json")
    parent = read_json(parent_dir / FULL_PRECISION / "result.json")
    control = cell.method == CONTROL
    quant = None if control else quant_of(config, cell.method)
    row = _row(cell.name, config, result)
    row |= {
        "method": FULL_PRECISION if control else cell.method.quantizer,
        "stage": "control" if control else "cell",
        "mu": cell.mu,
        "first_last_bits": quant and quant.at(FIRST_AND_LAST[0]).weight_bits,
        "weight_grid": quant and quant.grid,
        "levers": " ".join(cell.levers),
        "learning_rate": config.finetune_learning_rate,
        "parent_accuracy": parent["test_accuracy"],
        "parent_epochs": config.epochs,
    }
    record = {"row": row, "curve": _curve(stage_dir)} | _made_with(result)
    if control:
        return record
    stage, state = finished(config, data, cell.method.name)
    assert stage.quantized is not None
    images = normalize(data.test_images[:_HISTOGRAM_IMAGES], data.mean, data.std)
    return record | {
        "sites": result["sites"],
        "quantizers": result["quantizers"],
        "histograms": histograms(stage.quantized, state.variables, images),
    }


def histograms(
    qmodel: QuantizedModel, variables: Mapping[str, Any], images: jax.Array
) -> dict[str, dict[str, list[int]]]:
    """Returns, by site, counts of its weights and of its activations, before they are quantized.

    The bins are equal parts of what lies within 1.25 times the clip, from 0 where there is no
    sign; the first and the last hold what is beyond as well. Activations are those that reach the
    layer in the quantized model. A scale per channel is taken at its largest.
    """
    assert qmodel.sites is not None
    found = jax.device_get(jax.jit(lambda v, x: _activations(qmodel, v, x))(variables, images))
    counts: dict[str, dict[str, list[int]]] = {}
    for name, quantizers in jax.device_get(qmodel.quantizers(variables)).items():
        values = {"weight": site_weight(variables["params"], name), "act": found.get(name)}
        if qmodel.sites[name].weight_standardization:  # its levels are around its mean
            values["weight"] = values["weight"] - np.mean(values["weight"])
        for operand, signed in (("weight", True), ("act", qmodel.sites[name].act_signed)):
            if f"{operand}_scale" in quantizers and values[operand] is not None:
                edges = histogram_edges(float(np.max(quantizers[f"{operand}_scale"])), signed)
                clipped = np.clip(np.asarray(values[operand]), edges[0], edges[-1])
                counted = np.histogram(clipped, edges)[0].tolist()
                counts.setdefault(name, {})[operand] = counted
    return counts


def histogram_edges(scale: float, signed: bool) -> np.ndarray:
    """Returns the edges of the bins of a record's histogram, in the units of what is clipped."""
    return np.linspace(-_RANGE if signed else 0, _RANGE, _BINS + 1) * scale


def _activations(qmodel: QuantizedModel, variables: Mapping, images: jax.Array) -> dict:
    """Returns the input of every site's layer."""
    seen: dict[str, jax.Array] = {}

    def record(next_fun, args, kwargs, context):
        name = "/".join(context.module.path)
        if context.method_name == "__call__" and name in (qmodel.sites or {}):
            seen[name] = jnp.asarray(args[0])
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        qmodel.apply(variables, images, train=False)
    return seen


def _row(name: str, config: RunConfig, result: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what is in the row of any record; `full_precision_accuracy` is the report's."""
    row: dict[str, Any] = dict.fromkeys(ROW)
    return row | {
        "network": config.model,
        "dataset": config.dataset,
        "weight_bits": result["weight_bits"],
        "act_bits": result["act_bits"],
        "mu_scope": result["mu_scope"],
        "arrangement": config.block_order,
        "seed": config.seed,
        "epochs": result.get("epochs", config.epochs),
        "accuracy": result["test_accuracy"],
        "device": result["devices"],
        "calibrated_accuracy": result.get("calibrated_accuracy"),
        "model_bytes": result["model_bytes"],
        "steps": result["steps"],
        "seconds": result["seconds"],
        "date": result["date"],
        "levers": "",
        "name": name,
    }


def _made_with(result: Mapping[str, Any]) -> dict[str, Any]:
    """Returns versions and source of a result; those before the source was recorded have none."""
    return {"versions": result["versions"], "source": result.get("source")}


def _curve(stage_dir: Path) -> list[dict]:
    rows = thin(read_log(stage_dir / "metrics.jsonl"), _CURVE_ROWS)
    return [_rounded({key: row[key] for key in _CURVE if key in row}) for row in rows]


_CURVE = ("step", "epoch", "loss", "accuracy", "quantizers")


def _rounded(value: Any) -> Any:
    """Returns the value without scales, with five significant digits: what a curve shows."""
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items() if "scale" not in key}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
