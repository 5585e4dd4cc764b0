"""The record of a benchmark as text and as a plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compand_jax.data.packages import needed_for
from compand_jax.experiments.text import markdown_table

with needed_for("a picture", "matplotlib"):
    from matplotlib.figure import Figure

CURVES = {
    "bits": "bits of weights and activations",
    "batch": "images a step",
    "width": "width, in 16 features",
    "depth": "depth of VGG",
}


def benchmark_text(record: Mapping[str, Any]) -> str:
    """Returns a record's tables in Markdown, with what they were measured on."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    parts = []
    if record["steps"]:
        parts.append(markdown_table([_STEP_HEADER, *map(_step_row, record["steps"])]))
    parts.append(
        "Ratios are to full precision, of the same network and repetition: the median of "
        f"{record['config']['repetitions']} repetitions in turns, with the lowest and highest."
    )
    if record.get("copies"):
        rows = [_copy_row(row) for row in record["copies"]]
        parts.append(markdown_table([_COPY_HEADER, *rows]))
    if record.get("frozen"):
        parts.append(markdown_table([_FROZEN_HEADER, *map(_frozen_row, record["frozen"])]))
        parts.append(
            "An evaluation from packed codes. Peak memory: all weights as they lie on the device, "
            "and the compiled function's temporary memory."
        )
    if record.get("fit"):
        row = record["fit"]
        parts.append(
            f"An epoch of {row['network']}, {row['batch']} images a step, through `fit`, in "
            f"mu-law W4A4: {row['fit_images_per_second']:.0f} images a second, "
            f"{row['share']:.2f} of its bare step's {row['bare_images_per_second']:.0f}."
        )
    for name, rows in record.get("curves", {}).items():
        parts.append(markdown_table([(CURVES[name], *_CURVE_HEADER), *map(_curve_row, rows)]))
    parts.append(f"{versions}; {record['devices']}; {record['date']}.")
    return "\n\n".join(parts)


_STEP_HEADER = (
    "network, batch",
    "method",
    "step (ms)",
    "ratio",
    "spread",
    "temporary memory",
    "compile time",
    "images a second",
)
_COPY_HEADER = ("`fake_quantize`", "ns a value", "of a copy's time", "spread", "GB a second")
_FROZEN_HEADER = (
    "network, batch",
    "weights",
    "evaluation (ms)",
    "ratio",
    "spread",
    "weights (MB)",
    "peak memory (MB)",
    "images a second",
)
_CURVE_HEADER = ("full precision (ms)", "mu-law (ms)", "ratio", "compile time (s)", "mu-law (s)")


def _step_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['network']}, {row['batch']}",
        row["method"],
        f"{1e3 * row['step_seconds']:.1f}",
        f"{row['ratio']:.2f}",
        f"{row['lowest']:.2f} to {row['highest']:.2f}",
        f"{row['temp_ratio']:.2f}",
        f"{row['compile_ratio']:.2f} ({row['compile_seconds']:.1f} s)",
        f"{row['images_per_second']:.0f}",
    )


def _copy_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["quantizer"],
        f"{row['nanoseconds']:.3f}",
        f"{row['ratio']:.2f}",
        f"{row['lowest']:.2f} to {row['highest']:.2f}",
        f"{row['gigabytes_per_second']:.1f}",
    )


def _frozen_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['network']}, {row['batch']}",
        row["method"],
        f"{1e3 * row['seconds']:.1f}",
        f"{row['ratio']:.2f}",
        f"{row['lowest']:.2f} to {row['highest']:.2f}",
        f"{1e-6 * row['stored_bytes']:.2f}",
        f"{1e-6 * row['peak_bytes']:.1f}",
        f"{row['images_per_second']:.0f}",
    )


def _curve_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    timed = "ratio" in row
    return (
        f"{row['at']:g}",
        f"{1e3 * row['full_step_seconds']:.1f}" if timed else "-",
        f"{1e3 * row['mu_law_step_seconds']:.1f}" if timed else "-",
        f"{row['ratio']:.2f}" if timed else "-",
        f"{row['full_compile_seconds']:.1f}",
        f"{row['mu_law_compile_seconds']:.1f}",
    )


def plot_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path) -> None:
    """Draws time against bits, batch and width, and compile time against depth.

    Args:
      curves: a record's, by the name in `CURVES`.
      path: of the picture to write; its suffix gives the format.
    """
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axis, (name, rows) in zip(figure.subplots(2, 2).flatten(), curves.items(), strict=False):
        what = "compile" if name == "depth" else "step"
        for key, label, style in (("full", "full precision", "o--"), ("mu_law", "mu-law", "o-")):
            values = [row[f"{key}_{what}_seconds"] for row in rows]
            axis.plot([row["at"] for row in rows], values, style, label=label)
        axis.set(xlabel=CURVES[name], ylabel=f"{what} time (s)", ylim=(0, None))
        axis.legend()
    figure.savefig(path, dpi=100)
