"""Pictures of a post-training quantization run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compand_jax.data.packages import needed_for

with needed_for("a picture", "matplotlib"):
    from matplotlib.figure import Figure

_WIDTH = 12.0
_ROW_HEIGHT = 4.2
_COLORS = {"uniform": "C0", "mu_law": "C3"}
_LABELS = {"uniform": "uniform", "mu_law": "mu-law"}
_LINES = {"tensor": "--", "channel": "-"}


def plot_bits(rows: Sequence[Mapping[str, Any]], full_precision: float, path: str | Path) -> None:
    """Draws test accuracy against bits per weight, weights only and with activations.

    Args:
      rows: results of settings; lines are those of a midtread grid, and single points midrise.
      full_precision: its test accuracy, in percent.
      path: of the picture to write; its suffix gives the format.
    """
    figure = Figure(figsize=(_WIDTH, _ROW_HEIGHT), layout="constrained")
    for axis, with_acts in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        axis.axhline(full_precision, color="0.5", lw=1, label="full precision")
        own = [row for row in rows if (row["act_bits"] is not None) == with_acts]
        for granularity, line in _LINES.items():
            for quantizer, color in _COLORS.items():
                found = [row for row in own if row["quantizer"] == quantizer
                         and row["weight_granularity"] == granularity]  # fmt: skip
                label = f"{_LABELS[quantizer]}, per {granularity}"
                _plot_line(axis, found, color, line, label)
        title = "weights and activations" if with_acts else "weights only"
        bits = sorted({row["weight_bits"] for row in rows})
        axis.set(title=title, xlabel="bits", ylabel="test accuracy (%)", xticks=bits)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=100)


def _plot_line(axis, rows: Sequence[Mapping], color: str, line: str, label: str) -> None:
    for grid in ("midtread", "midrise"):
        found = sorted((row["weight_bits"], row["accuracy"]) for row in rows if row["grid"] == grid)
        if not found:
            continue
        bits, accuracies = zip(*found, strict=True)
        face = color if line == "-" else "none"
        if grid == "midtread":
            axis.plot(bits, accuracies, line, color=color, mfc=face, marker="o", ms=5, label=label)
        else:
            axis.plot(bits, accuracies, "D", color=color, mfc=face, label=f"{label}, midrise")


def plot_sensitivity(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draws accuracy, SQNR and divergence with one site quantized, over the sites.

    Args:
      rows: results of sites, as `sensitivity_table` takes them.
      path: of the picture to write.
    """
    panels = {
        "accuracy": "test accuracy (%)",
        "weight_sqnr": "weight SQNR (dB)",
        "divergence": "divergence (nats)",
    }
    sites = list(dict.fromkeys(row["site"] for row in rows))
    figure = Figure(figsize=(_WIDTH, 2.6 * len(panels) + 1), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True)
    for axis, (name, label) in zip(axes, panels.items(), strict=True):
        for bits in sorted({row["weight_bits"] for row in rows}):
            found = {row["site"]: row[name] for row in rows if row["weight_bits"] == bits}
            # None, where nothing is lost, is left out.
            values = [np.nan if found.get(site) is None else found[site] for site in sites]
            axis.plot(range(len(sites)), values, "o-", ms=4, lw=1, label=f"{bits} bits")
        axis.set(ylabel=label)
        axis.grid(alpha=0.3)
    axes[-1].set_yscale("log")
    axes[-1].set_xticks(range(len(sites)), sites, rotation=90)
    axes[0].legend(fontsize="small")
    axes[0].set_title("one site quantized at a time, all else in full precision")
    figure.savefig(path, dpi=100)


def plot_budget(found: Mapping[str, Any], path: str | Path) -> None:
    """Draws the bits chosen for each site.

    Args:
      found: a result, as `budget_text` takes it.
      path: of the picture to write.
    """
    sites = [row["site"] for row in found["sites"]]
    figure = Figure(figsize=(_WIDTH, _ROW_HEIGHT), layout="constrained")
    axis = figure.subplots()
    axis.bar(range(len(sites)), [row["weight_bits"] for row in found["sites"]], color="C3")
    axis.axhline(found["budget"], color="0.5", lw=1, label="budget, average over weights")
    axis.set(ylabel="bits per weight")
    axis.set_xticks(range(len(sites)), sites, rotation=90)
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=100)
