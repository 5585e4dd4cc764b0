"""A study's pictures, from its records alone."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from compand_jax.core.codebooks import codebook
from compand_jax.experiments.runs.plots import mu_curves
from compand_jax.experiments.study.records import histogram_edges
from compand_jax.experiments.study.tables import QUANTIZERS, Row, compared, grouped, quantizer_of

_LABELS = {
    "uniform": "uniform",
    "single": "mu-law, single mu",
    "separate": "mu-law, separate",
    "per_layer": "mu-law, per layer",
}
_COLORS = dict(zip(QUANTIZERS, ("#7b8794", "#2f7ed8", "#e08e0b", "#c8102e"), strict=True))
_DPI = 90


def plot_accuracy(rows: Sequence[Row], path: Path) -> None:
    """Draws test accuracy against bits: a panel a network, data set and arrangement.

    Lines are means over seeds, bars reach from the worst to the best seed, and the dashed line is
    the control.
    """
    cells = compared(rows)
    groups = grouped(cells, "network", "dataset", "arrangement")
    figure, axes = _panels(len(groups), width=5.0, height=3.6)
    for axis, (key, group) in zip(axes, groups.items(), strict=True):
        _accuracy_panel(axis, group)
        axis.set(title=" ".join(key), xlabel="bits of weights and activations",
                 ylabel="test accuracy (%)")  # fmt: skip
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=_DPI)


def _accuracy_panel(axis: Axes, cells: Sequence[Row]) -> None:
    bits = sorted({row["weight_bits"] for row in cells})
    for i, quantizer in enumerate(QUANTIZERS):
        shift = 0.04 * (i - 1.5)  # so that the bars can be told apart
        own = [row for row in cells if quantizer_of(row) == quantizer]
        values = {
            bits + shift: [row["accuracy"] for row in group]
            for (bits,), group in grouped(own, "weight_bits").items()
        }
        seeds = len({row["seed"] for row in own})
        label = f"{_LABELS[quantizer]} ({seeds} seed{'s' * (seeds != 1)})"
        _errorbar(axis, values, color=_COLORS[quantizer], label=label, marker="o")
    controls = {
        bits: sorted({(row["seed"], row["full_precision_accuracy"]) for row in group})
        for (bits,), group in grouped(cells, "weight_bits").items()
        if all(row["full_precision_accuracy"] is not None for row in group)
    }
    values = {bits: [accuracy for _, accuracy in found] for bits, found in controls.items()}
    _errorbar(axis, values, color="k", ls="--", label="full precision, continued")
    axis.set(xticks=bits, xlim=(bits[0] - 0.5, bits[-1] + 0.5))


def _errorbar(axis: Axes, values: Mapping[Any, Sequence[float]], **style: Any) -> None:
    if values:
        means = np.array([statistics.mean(found) for found in values.values()])
        low = means - [min(found) for found in values.values()]
        high = [max(found) for found in values.values()] - means
        axis.errorbar(list(values), means, [low, high], ms=4, capsize=3, **style)


def plot_differences(rows: Sequence[Row], path: Path) -> None:
    """Draws differences to the control by quantizer: a panel a network, data set and bits.

    A bar is the mean over seeds, with the seeds as points; the arrangements stand side by side.
    """
    cells = [row for row in compared(rows) if row["full_precision_accuracy"] is not None]
    groups = grouped(cells, "network", "dataset", "weight_bits")
    figure, axes = _panels(len(groups), width=4.2, height=3.4)
    for axis, (key, group) in zip(axes, groups.items(), strict=True):
        orders = sorted({row["arrangement"] for row in group})
        for i, order in enumerate(orders):
            for j, quantizer in enumerate(QUANTIZERS):
                values = [
                    row["accuracy"] - row["full_precision_accuracy"]
                    for row in group
                    if row["arrangement"] == order and quantizer_of(row) == quantizer
                ]
                x = j + 0.38 * (i - (len(orders) - 1) / 2)
                if values:
                    axis.bar(x, statistics.mean(values), 0.34, color=_COLORS[quantizer],
                             alpha=1 - 0.5 * i, hatch="//" * i)  # fmt: skip
                    axis.plot([x] * len(values), values, "k.", ms=4)
        axis.axhline(0, color="k", lw=0.8)
        names = [quantizer.replace("_", " ") for quantizer in QUANTIZERS]
        axis.set_xticks(range(len(names)), names, fontsize=8)
        title = f"{key[0]} {key[1]}, {key[2]} bits" + (
            "" if len(orders) == 1 else f"\n{orders[0]} | {orders[1]} (hatched)"
        )
        axis.set_title(title, fontsize="medium")
        axis.set_ylabel("points to the control")
    figure.savefig(path, dpi=_DPI)


def plot_mu(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws mu over the steps, and per layer at the end: a row of panels a record."""
    figure = Figure(figsize=(11, 3.2 * len(records)), layout="constrained")
    axes = figure.subplots(len(records), 2, squeeze=False)
    for (over_steps, at_end), record in zip(axes, records, strict=True):
        for label, (steps, values) in mu_curves(record["curve"]).items():
            over_steps.plot(steps, values, "--" if label.endswith(("act", "activations")) else "-",
                            label=label)  # fmt: skip
        over_steps.set(xlabel="step", ylabel="mu", title=title_of(record["row"]))
        sites = list(record["quantizers"])
        for operand, marker in (("weight", "o"), ("act", "s")):
            values = [record["quantizers"][site].get(f"{operand}_mu", np.nan) for site in sites]
            at_end.plot(range(len(sites)), values, marker, ms=4, label=_OPERANDS[operand])
        at_end.set_xticks(range(len(sites)), sites, rotation=90, fontsize="x-small")
        at_end.set(ylabel="mu at the end", ylim=(0, None))
        at_end.legend(fontsize="small")
        if len(sites) <= 8:
            over_steps.legend(fontsize="x-small", ncols=2)
    figure.savefig(path, dpi=_DPI)


_OPERANDS = {"weight": "weights", "act": "activations"}


def plot_levels(record: Mapping[str, Any], path: Path) -> None:
    """Draws every site's histograms of weights and activations, the learned levels over them."""
    sites = list(record["histograms"])
    figure = Figure(figsize=(11, 1.7 * len(sites)), layout="constrained")
    figure.suptitle(title_of(record["row"]))
    for row, site in zip(figure.subplots(len(sites), 2, squeeze=False), sites, strict=True):
        for axis, operand in zip(row, _OPERANDS, strict=True):
            if operand in record["histograms"][site]:
                _levels_panel(axis, record, site, operand)
            else:
                axis.set_axis_off()
    figure.savefig(path, dpi=_DPI)


def _levels_panel(axis: Axes, record: Mapping[str, Any], site: str, operand: str) -> None:
    found, static = record["quantizers"][site], record["sites"][site]
    mu, scale = found[f"{operand}_mu"], float(np.max(found[f"{operand}_scale"]))
    signed = operand == "weight" or static["act_signed"]
    counts = np.array(record["histograms"][site][operand])
    # The outer bins hold all that is beyond them, or what a relu made zero.
    counts = np.minimum(counts / max(1, counts[1:-1].max()), 1.05)
    axis.stairs(counts, histogram_edges(scale, signed), fill=True, color="#b8d0e8")
    grid = static["grid"] if operand == "weight" else "midtread"
    levels = codebook(mu, scale, bits=static[f"{operand}_bits"], signed=signed, grid=grid)[0]
    axis.vlines(np.asarray(levels), 0, 1.05, color=_COLORS["per_layer"], lw=0.9)
    axis.set(yticks=[], ylim=(0, 1.05))
    axis.set_title(f"{site}, {_OPERANDS[operand]}: mu = {mu:.2f}", fontsize="small")
    axis.tick_params(labelsize="small")


def title_of(row: Row) -> str:
    """Returns what a record is of."""
    bits = f"W{row['weight_bits']}A{row['act_bits']}"
    return f"{row['network']} {row['dataset']}, {row['arrangement']}, {bits}, {quantizer_of(row)}"


def _panels(count: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(count, 4)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]
