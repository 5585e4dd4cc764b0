"""Every family of levels side by side, quantized without training: table, text and picture."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compand_jax.core.families.registry import family_of
from compand_jax.core.spec import check_spec
from compand_jax.data.packages import needed_for
from compand_jax.experiments.ptq.bit_allocation import at_bits
from compand_jax.experiments.ptq.settings import Setting
from compand_jax.experiments.ptq.tables import Results, Table, described

with needed_for("a picture", "matplotlib"):
    from matplotlib.figure import Figure

FAMILIES = ("uniform", "mu_law", "power", "normal_float", "apot", "piecewise", "free")
BITS = (2, 3, 4)
_GRANULARITIES = ("tensor", "channel")
_WIDTH, _HEIGHT = 12.0, 4.2


def families_table(base: Setting, bits: Sequence[int]) -> Table:
    """Returns the table of all families, weights alone, at these bits."""
    rows = []
    for count in bits:
        for family in FAMILIES:
            setting = at_bits(base, count)
            if setting.quant.grid not in family_of(family).grids:
                setting = setting.changed(grid="midtread")
            quant = setting.changed(quantizer=family).quant
            labels = f"{count}/32", family, quant.grid, str(learned(count, family, quant.grid))
            rows.append((labels, setting.changed(quantizer=family)))
    return Table(
        "Families of levels",
        f"Weights alone; {described(base)}. Learned: the parameters of a tensor's levels, beside "
        "its scales. At 2 bits the grid is midrise, but for apot, whose levels have a zero.",
        ("bits W/A", "quantizer", "grid", "learned"),
        tuple(rows),
        {f"per {name}": {"weight_granularity": name} for name in _GRANULARITIES},
    )


def learned(bits: int, quantizer: str, grid: str) -> int:
    """Returns how many parameters a tensor's levels have, beside its scales.

    >>> [learned(4, name, "midtread") for name in ("uniform", "mu_law", "piecewise", "free")]
    [0, 1, 16, 7]
    """
    spec = check_spec(bits, True, grid, quantizer)
    return 0 if spec.family.parameter is None else math.prod(spec.family.shape(spec))


def families_text(results: Results) -> str:
    """Returns which family is the best at each bits and granularity, and where mu-law stands."""
    groups: dict[tuple[int, str], dict[str, Mapping[str, Any]]] = {}
    for setting, found in results.items():
        key = setting.quant.weight_bits or 32, str(setting.quant.weight_granularity)
        groups.setdefault(key, {})[setting.quant.quantizer] = found
    lines = []
    for (bits, granularity), own in sorted(groups.items()):
        if "mu_law" not in own or len(own) < 2:
            continue
        ordered = sorted(own, key=lambda name: -own[name]["correct"])
        best, place = ordered[0], ordered.index("mu_law") + 1
        behind = 100 * (own["mu_law"]["correct"] - own[best]["correct"]) / own[best]["total"]
        what = "mu-law is the best" if place == 1 else (
            f"{best} is the best, mu-law number {place} of {len(ordered)}, {behind:+.2f} points"
        )  # fmt: skip
        lines.append(f"- {bits} bits, per {granularity}: {what}.")
    return "\n".join(lines)


def plot_families(
    rows: Sequence[Mapping[str, Any]], full_precision: float, path: str | Path
) -> None:
    """Draws test accuracy against the number of learned parameters of a tensor's levels.

    Args:
      rows: results of settings.
      full_precision: its test accuracy, in percent.
      path: of the picture to write; its suffix gives the format.
    """
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    all_bits = sorted({row["weight_bits"] for row in rows})
    axes = figure.subplots(1, len(all_bits), squeeze=False)[0]
    for axis, bits in zip(axes, all_bits, strict=True):
        axis.axhline(full_precision, color="0.5", lw=1, label="full precision")
        for row in (row for row in rows if row["weight_bits"] == bits):
            quantizer, per_channel = row["quantizer"], row["weight_granularity"] == "channel"
            color = f"C{FAMILIES.index(quantizer)}" if quantizer in FAMILIES else "k"
            label = quantizer if per_channel else None
            face = color if per_channel else "none"
            count = learned(bits, quantizer, row["grid"])
            axis.plot(count, row["accuracy"], "o", color=color, mfc=face, label=label)
        title = f"{bits} bits (filled: per channel)"
        axis.set(title=title, xlabel="learned parameters of a tensor's levels", xscale="symlog")
        axis.set_ylabel("test accuracy (%)")
    axes[-1].legend(fontsize="small")
    figure.savefig(path, dpi=100)
