"""A study's tables, from its rows alone: results.csv, and what is compared in Markdown.

A difference is to the control of the same network, data set, arrangement, seed and schedule: full
precision, trained on as long. Differences are taken within a seed, then averaged.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compand_jax.experiments.runs.levers import OF_ANY_NETWORK
from compand_jax.experiments.study.grid import FIXED_255, FIXED_CALIBRATED, LEARNED
from compand_jax.experiments.text import markdown_table
from compand_jax.layers.config import MU_SCOPES

Row = Mapping[str, Any]
QUANTIZERS = ("uniform", *MU_SCOPES)
"""What is compared: uniform levels, and mu-law ones of every mu scope."""
_MU_TITLES = {
    LEARNED: "mu learned",
    FIXED_CALIBRATED: "mu as calibrated",
    FIXED_255: "mu = 255",
}
_GROUP = ("network", "dataset", "arrangement")


def with_controls(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns the rows, sorted, with `full_precision_accuracy`: that of the control.

    A parent's is the first control's; it is None where there is no control.
    """
    own = {_control_key(row): row["accuracy"] for row in rows if row["stage"] == "control"}
    first: dict[tuple, float] = {}
    for key in sorted(own):
        first.setdefault(key[:5], own[key])
    return [
        {**row, "full_precision_accuracy": first.get(_control_key(row)[:5])
         if row["stage"] == "parent" else own.get(_control_key(row))}
        for row in sorted(rows, key=_order)
    ]  # fmt: skip


_CONTROL_KEY = (
    *_GROUP, "parent_epochs", "parent_accuracy", "learning_rate", "epochs", "seed"
)  # fmt: skip


def _control_key(row: Row) -> tuple:
    own = [name for name in row["levers"].split() if name in OF_ANY_NETWORK]
    return (*(row[name] for name in _CONTROL_KEY), " ".join(own))


def _order(row: Row) -> tuple:
    stages = ("parent", "control", "cell")
    return (
        *(row[name] for name in _GROUP),
        stages.index(row["stage"]),
        -(row["weight_bits"] or 0),
        QUANTIZERS.index(row["mu_scope"] or "uniform"),
        list(_MU_TITLES).index(row["mu"] or LEARNED),
        row["levers"],
        row["learning_rate"],
        row["seed"],
    )


def quantizer_of(row: Row) -> str:
    """Returns which of `QUANTIZERS` the row of a cell is of."""
    return row["mu_scope"] or row["method"]


def grouped(rows: Iterable[Row], *names: str) -> dict[tuple, list[Row]]:
    """Returns the rows by their values in the columns named."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def compared(rows: Iterable[Row]) -> list[Row]:
    """Returns the cells but for those of a fixed mu, which are compared among themselves.

    Of cells with and without levers, they are those without.
    """
    cells = [row for row in rows if row["stage"] == "cell" and row["mu"] in (None, LEARNED)]
    return [row for row in cells if not row["levers"]] or cells


_SUMMED = (*_GROUP, "weight_bits", "method", "mu_scope", "mu", "levers", "learning_rate")
SUMMARY = (*_SUMMED, "seeds", "accuracy", "accuracy_std", "difference", "difference_std")
"""The columns of summary.csv."""


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns, for all seeds of a cell together, means and standard deviations.

    Of `accuracy`, and of `difference` to the control, in points; a standard deviation is None where
    there is one seed.
    """
    groups = grouped((row for row in rows if row["stage"] != "parent"), *_SUMMED)
    return [_summarized(dict(zip(_SUMMED, key, strict=True)), found)
            for key, found in groups.items()]  # fmt: skip


def _summarized(fields: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    accuracies = [row["accuracy"] for row in rows]
    differences = [value for value in _differences(rows) if value is not None]
    return fields | {
        "seeds": len(rows),
        "accuracy": statistics.mean(accuracies),
        "accuracy_std": _std(accuracies),
        "difference": statistics.mean(differences) if differences else None,
        "difference_std": _std(differences),
    }


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def summary_text(rows: Sequence[Row]) -> str:
    """Returns in Markdown what the rows compare, and how they were made."""
    parts = [_comparison(rows), _NOTE]
    if any(row["levers"] for row in rows):
        parts += ["With what else lifts accuracy, each compared as above:", _lever_table(rows)]
    if any(row["mu"] not in (None, LEARNED) for row in rows):
        parts += ["What learning mu is worth, per layer, seed by seed:", _mu_table(rows)]
    return "\n\n".join([*parts, _made_with(rows)])


_NOTE = (
    "Test accuracy of the control (full precision, trained on with the same schedule and seed), "
    "and differences to it in points, of the last column to uniform, seed by seed; mean ± standard "
    "deviation over (so many) seeds, where there are more than one. W/A: bits of weights and "
    "activations."
)


def _comparison(rows: Sequence[Row]) -> str:
    header = (*_GROUP, "W/A", "control", "uniform", "single mu", "separate", "per layer",
              "per layer to uniform")  # fmt: skip
    lines = _compared_lines(compared(rows), "weight_bits")
    return markdown_table([header, *lines], text_columns=len(_GROUP))


def _lever_table(rows: Sequence[Row]) -> str:
    header = (*_GROUP, "levers", "W/A", "control", "uniform", "single mu", "separate", "per layer",
              "per layer to uniform")  # fmt: skip
    cells = [row for row in rows if row["stage"] == "cell" and row["mu"] in (None, LEARNED)]
    lines = _compared_lines(cells, "levers", "weight_bits")
    lines = [[*line[:3], line[3] or "none", *line[4:]] for line in lines]
    return markdown_table([header, *lines], text_columns=len(_GROUP) + 1)


def _compared_lines(cells: Sequence[Row], *names: str) -> list[list[str]]:
    """Returns a line for each network and value of the columns named, of which bits are last."""
    lines = []
    for key, group in grouped(cells, *_GROUP, *names).items():
        controls = {row["seed"]: row["full_precision_accuracy"] for row in group}
        line = [*key[:-1], f"{key[-1]}/{key[-1]}", _spread(list(controls.values()), "{:.2f} %")]
        for quantizer in QUANTIZERS:
            own = [row for row in group if quantizer_of(row) == quantizer]
            line.append(_spread(_differences(own), "{:+.2f}"))
        accuracies = [
            {row["seed"]: row["accuracy"] for row in group if quantizer_of(row) == quantizer}
            for quantizer in ("per_layer", "uniform")
        ]
        both = accuracies[0].keys() & accuracies[1].keys()
        line.append(_spread([accuracies[0][s] - accuracies[1][s] for s in both], "{:+.2f}"))
        lines.append(line)
    return lines


def _mu_table(rows: Sequence[Row]) -> str:
    cells = [row for row in rows if row["mu_scope"] == "per_layer"]
    lines: list[tuple[str, ...]] = [(*_GROUP, "W/A", "seed", *_MU_TITLES.values())]
    for (*key, bits, seed), group in grouped(cells, *_GROUP, "weight_bits", "seed").items():
        if any(row["mu"] != LEARNED for row in group):
            found = [_differences([r for r in group if r["mu"] == kind]) for kind in _MU_TITLES]
            shown = (_spread(each, "{:+.2f}") for each in found)
            lines.append((*key, f"{bits}/{bits}", str(seed), *shown))
    return markdown_table(lines, text_columns=len(_GROUP))


def _differences(rows: Iterable[Row]) -> list[float | None]:
    return [
        None if row["full_precision_accuracy"] is None
        else row["accuracy"] - row["full_precision_accuracy"] for row in rows
    ]  # fmt: skip


def _spread(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = form.format(statistics.mean(known))
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.2f} ({len(known)})"


def _made_with(rows: Sequence[Row]) -> str:
    parts = []
    for (model, dataset), group in grouped(rows, "network", "dataset").items():
        cells = [row for row in group if row["stage"] != "parent"]
        cells = [row for row in cells if not row["levers"]] or cells
        ends = {row["first_last_bits"] for row in cells if row["first_last_bits"]}
        kept = ends - {row["weight_bits"] for row in cells}
        epochs = "/".join(str(n) for n in sorted({row["epochs"] for row in cells}))
        parts.append(
            f"{model} on {dataset}: full precision {_parents(cells)}, then "
            f"{epochs} epoch{'s' * (epochs != '1')} {_rates(cells)}"
            + (f", first and last layer at {max(kept)} bits" if kept else "")
            + (", weights of 2 bits on the grid midrise"
               if any(row["weight_grid"] == "midrise" for row in cells) else "")
        )  # fmt: skip
    devices = ", ".join(sorted({row["device"] for row in rows}))
    dates = sorted(row["date"][:10] for row in rows)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return f"{'; '.join(parts)}. {devices}; {when}."


def _rates(rows: Iterable[Row]) -> str:
    """Returns the peak learning rates, with the bits of each where they differ."""
    found = grouped((row for row in rows if row["stage"] == "cell"), "learning_rate")
    if len(found) == 1:
        return f"at learning rate {next(iter(found))[0]:g}"
    texts = []
    for (rate,), own in found.items():
        bits = sorted({row["weight_bits"] for row in own}, reverse=True)
        texts.append(f"{rate:g} ({' and '.join(map(str, bits))} bits)")
    return f"at learning rates {', '.join(texts)}"


def _parents(rows: Sequence[Row]) -> str:
    """Returns the parents' accuracies, with the seeds that start from each where they differ."""
    found = grouped(rows, "arrangement", "parent_accuracy", "parent_epochs")
    orders = [order for order, _, _ in found]
    texts = []
    for (order, accuracy, epochs), own in found.items():
        how = f"{epochs} epochs" if epochs else "imported"
        if orders.count(order) > 1:
            seeds = sorted({row["seed"] for row in own})
            how += f", for seed{'s' * (len(seeds) > 1)} {' and '.join(map(str, seeds))}"
        texts.append(f"{accuracy:.2f} % ({order}, {how})")
    return ", ".join(texts)
