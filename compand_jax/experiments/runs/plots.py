"""A run's curves: loss, accuracy and mu over the steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from compand_jax.experiments.runs.config import FULL_PRECISION

_WIDTH = 12.0
_ROW_HEIGHT = 3.4


def plot_run(logs: Mapping[str, Sequence[dict]], path: str | Path) -> None:
    """Draws training loss and accuracy of every stage, and every mu of those that have one.

    Args:
      logs: by stage, the rows of its metrics.jsonl.
      path: of the picture to write; its suffix gives the format.
    """
    logs = {stage: rows for stage, rows in logs.items() if rows}
    curves = {stage: mu_curves(rows) for stage, rows in logs.items()}
    with_mu = [stage for stage, found in curves.items() if found]
    finetuned = {stage: rows for stage, rows in logs.items() if stage != FULL_PRECISION}
    parent = {stage: rows for stage, rows in logs.items() if stage == FULL_PRECISION}
    groups = [group for group in (parent, finetuned) if group]
    rows = max(1, len(groups) + -(-len(with_mu) // 2))
    figure = Figure(figsize=(_WIDTH, _ROW_HEIGHT * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False)
    for group, (loss, accuracy) in zip(groups, axes, strict=False):
        _plot_metric(loss, group, "loss", "training loss (nats)")
        _plot_metric(accuracy, group, "accuracy", "training accuracy (%)")
    free = axes[len(groups) :].flatten()
    for stage, axis in zip(with_mu, free, strict=False):
        _plot_mu(axis, stage, curves[stage])
    for axis in free[len(with_mu) :]:
        axis.set_axis_off()
    figure.savefig(path, dpi=100)


def mu_curves(rows: Sequence[dict]) -> dict[str, tuple[list[int], list[float]]]:
    """Returns the steps and the mu of every curve to draw, by its label.

    Those that coincide, as where sites share a mu, are one curve; uniform sites have none.
    """
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for site, values in row.get("quantizers", {}).items():
            for name in ("weight_mu", "act_mu"):
                if name in values:
                    curve = found.setdefault(f"{site} {name.removesuffix('_mu')}", ([], []))
                    curve[0].append(row["step"])
                    curve[1].append(values[name])
    members: dict[tuple, list[str]] = {}
    for label, (_, values) in found.items():
        if any(values):
            members.setdefault(tuple(values), []).append(label)
    return {_shared_label(labels): found[labels[0]] for labels in members.values()}


def _shared_label(labels: list[str]) -> str:
    if len(labels) == 1:
        return labels[0]
    kinds = {label.rpartition(" ")[2] for label in labels}
    return (
        "all"
        if len(kinds) > 1
        else {"weight": "all weights", "act": "all activations"}[kinds.pop()]
    )


def _plot_metric(axis, logs: Mapping[str, Sequence[dict]], name: str, label: str) -> None:
    for stage, rows in logs.items():
        values = np.array([row[name] for row in rows])
        width = max(1, len(values) // 50)
        # A mean over a fiftieth of the stage: a call's own value is noise.
        smooth = np.convolve(values, np.ones(width) / width, "valid")
        axis.plot([row["step"] for row in rows][width - 1 :], smooth, label=stage)
    axis.set(xlabel="step", ylabel=label)
    axis.legend(fontsize="small")


def _plot_mu(axis, stage: str, curves: Mapping[str, tuple[list[int], list[float]]]) -> None:
    for label, (steps, values) in curves.items():
        dashed = label.endswith(("act", "activations"))
        axis.plot(steps, values, "--" if dashed else "-", label=label)
    axis.set(xlabel="step", ylabel="mu", title=stage)
    axis.legend(fontsize="x-small", ncols=2)
