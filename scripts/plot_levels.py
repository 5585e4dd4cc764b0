"""Draws the levels of a uniform and of a mu-law quantizer over a bell-shaped histogram."""

import dataclasses
import sys
from pathlib import Path

import matplotlib
import numpy as np
from command_line import parse, run_script
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from compand_jax import codebook, mu_law_compress

_CURVE, _LEVEL, _BARS = "#1f2933", "#c8102e", "#b8d0e8"
_TICKS = (-1, -0.5, 0, 0.5, 1)
_SCALE, _SIGMA = 1.0, 0.27  # the clip, and the bell's width


@dataclasses.dataclass(frozen=True)
class Args:
    """Draws the levels of a uniform and of a mu-law quantizer over a bell-shaped histogram."""

    path: Path = Path("docs/levels.png")
    """File of the picture; its ending gives its type."""
    bits: int = 4
    """Bits per value, 2 to 8; the grid is midtread, signed."""
    mu: float = 5.0
    """mu of the right half, 0 to 255; the left half has mu = 0."""


def main(args: list[str]) -> None:
    """Writes the picture."""
    options = parse(Args, args)
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = draw(options.bits, (0.0, options.mu))
        figure.savefig(options.path, dpi=150)
    print(f"wrote {options.path}")


def draw(bits: int, mus: tuple[float, float]) -> Figure:
    """Returns the picture: a column per mu, the curve above the histogram."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(3, 2))
    for column, mu in enumerate(mus):
        levels, thresholds = map(np.asarray, codebook(mu, _SCALE, bits=bits))
        name = "uniform" if mu == 0 else "mu-law"
        axes[0, column].set_title(f"{name}, mu = {mu:g}, {bits} bits")
        _curve(axes[0, column], mu, levels)
        _histogram(axes[1, column], levels, thresholds)
    axes[0, 0].set_ylabel("compressed, F(x / c)")
    axes[1, 0].set_ylabel("values")
    handles = [*axes[0, 0].get_lines()[:1], *axes[1, 0].collections]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _curve(axes: Axes, mu: float, levels: np.ndarray) -> None:
    x = np.linspace(-1, 1, 801, dtype=np.float32)
    codes = np.linspace(-1, 1, len(levels))  # the levels are evenly spaced once compressed
    axes.plot(x, np.asarray(mu_law_compress(x, mu)), color=_CURVE, label="curve F")
    axes.hlines(codes, -1, levels, color=_LEVEL, lw=0.6, alpha=0.6)
    axes.vlines(levels, -1, codes, color=_LEVEL, lw=0.6, alpha=0.6)
    axes.plot(levels, codes, "o", ms=3.5, color=_LEVEL, clip_on=False)
    axes.set(xlim=(-1, 1), ylim=(-1, 1), xticks=_TICKS, yticks=_TICKS)


def _histogram(axes: Axes, levels: np.ndarray, thresholds: np.ndarray) -> None:
    values = np.random.default_rng(0).normal(0, _SIGMA, 100_000)
    counts, edges = np.histogram(values, bins=100, range=(-1, 1))
    axes.stairs(counts, edges, fill=True, color=_BARS)
    top = 1.15 * counts.max()
    axes.vlines(levels, 0, top, color=_LEVEL, lw=1.0, label="level", clip_on=False)
    axes.vlines(thresholds, 0, top, color="0.5", lw=0.7, ls=(0, (3, 3)), label="threshold")
    axes.set(ylim=(0, top), yticks=[], xlabel="value x, in units of the clip c")


if __name__ == "__main__":
    sys.exit(run_script(main))
