"""What a post-training quantization run looks at, and its record as text.

A `Table` says both: its settings are what is run, and where a result stands in the text.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compand_jax.calibration.fit import CALIBRATIONS
from compand_jax.experiments.ptq.bit_allocation import at_bits
from compand_jax.experiments.ptq.settings import Setting
from compand_jax.experiments.text import markdown_table, size_text
from compand_jax.layers.config import MU_SCOPES, QuantConfig

Results = Mapping[Setting, Mapping[str, Any]]

_QUANTIZERS = {"uniform": {"quantizer": "uniform"}, "mu-law": {"quantizer": "mu_law"}}
_GRANULARITIES = {
    "per tensor": {"weight_granularity": "tensor"},
    "per channel": {"weight_granularity": "channel"},
}
_FEW_BITS = (3, 4)  # where calibrations differ, and are still of use


@dataclasses.dataclass(frozen=True)
class Table:
    """Accuracies of settings: each of some rows with each of some columns' fields set.

    Attributes:
      title: heading.
      caption: what it shows.
      header: of the rows' labels.
      rows: labels, and what else is set.
      columns: by label, the fields that it sets.
    """

    title: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], Setting], ...]
    columns: Mapping[str, Mapping[str, Any]]

    def settings(self) -> list[Setting]:
        """Returns all settings of the table, row by row."""
        return [setting for _, row in self.rows for setting in self._of(row)]

    def _of(self, row: Setting) -> list[Setting]:
        settings = [row.changed(**fields) for fields in self.columns.values()]
        # One mu for everything is one for all weights, where activations have none.
        return [
            one.changed(mu_scope="separate")
            if one.quant.mu_scope == "single" and one.quant.act_bits is None
            else one
            for one in settings
        ]

    def to_markdown(self, results: Results) -> str:
        """Returns heading, table in percent, and caption; what has no result yet is "-"."""
        rows: list[tuple[str, ...]] = [(*self.header, *self.columns)]
        for labels, setting in self.rows:
            own = [results.get(one) for one in self._of(setting)]
            cells = [f"{found['accuracy']:.2f} %" if found else "-" for found in own]
            rows.append((*labels, *cells))
        return f"**{self.title}**\n\n{markdown_table(rows)}\n\n{self.caption}"


def base_setting(calibration: str, error_feedback: bool, batch_stats: bool) -> Setting:
    """Returns the setting that the tables vary."""
    quant = QuantConfig(weight_bits=4, act_bits=None, weight_granularity="channel")
    return Setting(quant, calibration, error_feedback, batch_stats)


def tables(base: Setting, bits: Sequence[int]) -> list[Table]:
    """Returns the tables over these bits per weight, in the order they are shown and run."""
    few = [count for count in _FEW_BITS if count in bits]
    found = [_main(base, bits)]
    if few:
        found += [_calibrations(base, few), _scopes(base, few)]
    if feedback := [count for count in (2, *_FEW_BITS) if count in bits]:
        found.append(_feedback(base, feedback))
    if few:
        found.append(_batch_stats(base, few))
    return found


def _main(base: Setting, bits: Sequence[int]) -> Table:
    rows = []
    for with_acts in (False, True):
        for count in bits:
            act_bits = count if with_acts else None
            for grid in ("midtread", "midrise") if count == 2 else ("midtread",):
                fields = {"weight_bits": count, "act_bits": act_bits, "grid": grid}
                setting = base.changed(**fields)
                rows.append(((_bits(setting), grid), setting))
    columns = {
        f"{quantizer}, {granularity}": {**fields, **own}
        for granularity, own in _GRANULARITIES.items()
        for quantizer, fields in _QUANTIZERS.items()
    }
    return Table(
        "Bits",
        f"One scale per weight tensor or per output channel, a mu for each tensor; "
        f"{described(base)}. The grid is the weights'; activations are midtread.",
        ("bits W/A", "grid"),
        tuple(rows),
        columns,
    )


def _calibrations(base: Setting, bits: Sequence[int]) -> Table:
    settings = [at_bits(base, count) for count in bits]
    settings += [one.changed(act_bits=one.quant.weight_bits) for one in settings[-1:]]
    return Table(
        "Calibrations",
        f"One scale per channel; {described(base, calibration=False)}.",
        ("bits W/A", "quantizer"),
        _by_quantizer(settings),
        {name: {"calibration": name} for name in CALIBRATIONS},
    )


def _scopes(base: Setting, bits: Sequence[int]) -> Table:
    settings = [at_bits(base, count).changed(act_bits=act_bits)
                for count in bits for act_bits in (None, count)]  # fmt: skip
    return Table(
        "mu scopes",
        f"mu-law, one scale per channel; {described(base)}. A mu of its own for each tensor, one "
        "for all weights and one for all activations, or one for everything; for weights alone "
        "the last two are the same.",
        ("bits W/A",),
        tuple(((_bits(setting),), setting) for setting in settings),
        {name.replace("_", " "): {"mu_scope": name} for name in MU_SCOPES[::-1]},
    )


def _feedback(base: Setting, bits: Sequence[int]) -> Table:
    return Table(
        "Error feedback",
        "Weights alone, one scale per channel, batch-norm statistics "
        f"{'re-estimated' if base.batch_stats else 'as they were'}, midrise at 2 bits. With "
        "feedback, the weights that are rounded later make up for the error of those before.",
        ("bits W/A", "quantizer"),
        _by_quantizer([at_bits(base, count) for count in bits]),
        {
            f"{name}{', feedback' if feedback else ''}": {
                "calibration": name,
                "error_feedback": feedback,
            }
            for name, feedback in (("mse", False), ("mse", True), ("output", True))
        },
    )


def _batch_stats(base: Setting, bits: Sequence[int]) -> Table:
    rows = [
        ((_bits(setting), label), setting.changed(**fields))
        for setting in (at_bits(base, count) for count in bits)
        for label, fields in _GRANULARITIES.items()
    ]
    columns = {
        f"{quantizer}{', re-estimated' if batch_stats else ''}": {
            **fields,
            "batch_stats": batch_stats,
        }
        for batch_stats in (False, True)
        for quantizer, fields in _QUANTIZERS.items()
    }
    return Table(
        "Batch-norm statistics",
        f"Weights alone; {described(base, batch_stats=False)}. Statistics as they were, or "
        "re-estimated under quantization from the calibration images.",
        ("bits W/A", "scale"),
        tuple(rows),
        columns,
    )


def _by_quantizer(settings: Iterable[Setting]) -> tuple[tuple[tuple[str, ...], Setting], ...]:
    return tuple(
        ((_bits(setting), label), setting.changed(**fields))
        for setting in settings
        for label, fields in _QUANTIZERS.items()
    )


def _bits(setting: Setting) -> str:
    return f"{setting.quant.weight_bits}/{setting.quant.act_bits or 32}"


def described(base: Setting, *, calibration: bool = True, batch_stats: bool = True) -> str:
    """Returns a setting's calibration, error feedback and statistics in words."""
    parts = [f"calibration {base.calibration}"] if calibration else []
    parts.append(f"{'with' if base.error_feedback else 'without'} error feedback")
    if batch_stats:
        kept = "re-estimated" if base.batch_stats else "as they were"
        parts.append(f"batch-norm statistics {kept}")
    return ", ".join(parts)


def lead_text(results: Results) -> str:
    """Returns a sentence on mu-law against uniform, over the pairs of results alike otherwise."""
    points = [
        100 * (found["correct"] - results[twin]["correct"]) / found["total"]
        for setting, found in results.items()
        if setting.quant.quantizer == "mu_law"
        and (twin := setting.changed(quantizer="uniform")) in results
    ]
    if not points:
        return ""
    ahead, behind = sum(p > 0 for p in points), sum(p < 0 for p in points)
    return (
        f"Of {len(points)} pairs that differ in nothing else, mu-law is ahead of uniform in "
        f"{ahead} and behind in {behind}, by {min(points):+.2f} to {max(points):+.2f} points."
    )


def full_precision_text(found: Mapping[str, Any]) -> str:
    """Returns a sentence on the network as it is."""
    p = found["accuracy"] / 100
    error = 100 * math.sqrt(p * (1 - p) / found["total"])
    again = 100 * found["reestimated_correct"] / found["total"]
    return (
        f"Full precision: {found['accuracy']:.2f} % of {found['total']} test images (standard "
        f"error {error:.2f} points), {again:.2f} % with batch-norm statistics re-estimated; "
        f"{size_text(found['model_bytes'])}."
    )


def sensitivity_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table of what quantizing one site at a time costs, as Markdown."""
    header = ("site", "weights", "bits", "grid", "test accuracy", "SQNR", "divergence")
    return markdown_table(
        [
            header,
            *(
                (
                    row["site"],
                    str(row["weights"]),
                    str(row["weight_bits"]),
                    row["grid"],
                    f"{row['accuracy']:.2f} %",
                    "-" if row["weight_sqnr"] is None else f"{row['weight_sqnr']:.1f} dB",
                    f"{row['divergence']:.2g}",
                )
                for row in rows
            ),
        ]
    )


def budget_text(found: Mapping[str, Any]) -> str:
    """Returns whether bits chosen by site beat as many for every site."""
    mixed, fixed = found["mixed"], found["fixed"]
    points = 100 * (mixed["correct"] - fixed["correct"]) / mixed["total"]
    return (
        f"Bits chosen by site, {mixed['mean_weight_bits']:.3f} per weight on average (budget "
        f"{found['budget']:g}), {'beat' if points > 0 else 'do not beat'} {fixed['weight_bits']} "
        f"bits for every site: {mixed['accuracy']:.2f} % against {fixed['accuracy']:.2f} %, "
        f"{points:+.2f} points. Predicted divergence: {found['mixed_divergence']:.2g} against "
        f"{found['fixed_divergence']:.2g} nats."
    )


def site_bits_table(found: Mapping[str, Any]) -> str:
    """Returns a table of the bits that were chosen, as Markdown."""
    names = ("site", "weights", "weight_bits")
    rows = [tuple(str(row[name]) for name in names) for row in found["sites"]]
    return markdown_table([("site", "weights", "bits"), *rows])
