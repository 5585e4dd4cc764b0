"""A study's tables, from its rows alone: results.csv, and what is compared in Markdown.

A difference is to the control of the same network, data set, arrangement, seed and schedule: full
precision, trained on as long. Differences are taken within a seed, then averaged.
"""

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compand_jax.study_records import ROW

Row = Mapping[str, Any]
METHODS = ("uniform", "single", "separate", "per_layer")
"""What is compared: uniform, and the mu scopes."""
MU_KINDS = {
    "learned": "mu learned",
    "fixed_calibrated": "mu as calibrated",
    "fixed_255": "mu = 255",
}
_GROUP = ("network", "dataset", "arrangement")
_INTEGERS = (
    "weight_bits", "act_bits", "seed", "epochs", "first_last_bits", "parent_epochs", "model_bytes",
    "steps",
)  # fmt: skip
_NUMBERS = (
    "accuracy", "full_precision_accuracy", "learning_rate", "calibrated_accuracy",
    "parent_accuracy", "seconds",
)  # fmt: skip


def with_controls(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns the rows, sorted, with `full_precision_accuracy`: that of the control.

    A parent's is the first control's; it is None where there is no control.
    """
    own = {_control_key(row): row["accuracy"] for row in rows if row["stage"] == "control"}
    first: dict[tuple, float] = {}
    for key in sorted(own):
        first.setdefault(key[:4], own[key])
    return [
        {**row, "full_precision_accuracy": first.get(_control_key(row)[:4])
         if row["stage"] == "parent" else own.get(_control_key(row))}
        for row in sorted(rows, key=_order)
    ]  # fmt: skip


def _control_key(row: Row) -> tuple:
    rest = (row["parent_epochs"], row["learning_rate"], row["epochs"], row["seed"])
    return (*(row[name] for name in _GROUP), *rest)


def _order(row: Row) -> tuple:
    stages = ("parent", "control", "cell")
    scope = row["mu_scope"] or "uniform"
    return (
        *(row[name] for name in _GROUP),
        stages.index(row["stage"]),
        -(row["weight_bits"] or 0),
        METHODS.index(scope),
        list(MU_KINDS).index(row["mu"] or "learned"),
        row["learning_rate"],
        row["seed"],
    )


def method_of(row: Row) -> str:
    """Returns which of `METHODS` the row of a cell is."""
    return row["mu_scope"] or row["method"]


def to_csv(rows: Sequence[Row], columns: Sequence[str] = ROW) -> str:
    """Returns the rows as CSV; None is empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Returns the rows that `to_csv` wrote.

    Raises:
      ValueError: if the file has other columns.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if tuple(reader.fieldnames or ()) != ROW:
        raise ValueError(
            f"`results` must hold this version's results.csv, got other columns in {path}: "
            "write it with scripts/report.py"
        )
    return [{name: _typed(name, text) for name, text in row.items()} for row in rows]


def _typed(name: str, text: str) -> Any:
    if text == "":
        return None
    return int(text) if name in _INTEGERS else float(text) if name in _NUMBERS else text


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns, for all seeds of a cell together, means and standard deviations.

    Of `accuracy`, and of `difference` to the control, in points; a standard deviation is None where
    there is one seed.
    """
    names = (*_GROUP, "weight_bits", "method", "mu_scope", "mu")
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["stage"] != "parent":
            rate = row["learning_rate"] if row["stage"] == "control" else None
            groups.setdefault((*(row[name] for name in names), rate), []).append(row)
    return [_summarized(dict(zip(names, key, strict=False)), found)
            for key, found in groups.items()]  # fmt: skip


def _summarized(fields: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    accuracies = [row["accuracy"] for row in rows]
    differences = [
        row["accuracy"] - row["full_precision_accuracy"]
        for row in rows
        if row["full_precision_accuracy"] is not None
    ]
    return fields | {
        "seeds": len(rows),
        "accuracy": statistics.mean(accuracies),
        "accuracy_std": _std(accuracies),
        "difference": statistics.mean(differences) if differences else None,
        "difference_std": _std(differences),
    }


SUMMARY = (
    *_GROUP, "weight_bits", "method", "mu_scope", "mu", "seeds", "accuracy", "accuracy_std",
    "difference", "difference_std",
)  # fmt: skip


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def summary_text(rows: Sequence[Row]) -> str:
    """Returns in Markdown what the rows compare, and how they were made."""
    parts = [_comparison(rows), _NOTE]
    if any(row["mu"] not in (None, "learned") for row in rows):
        parts += ["What learning mu is worth, per layer, at the seeds that all three have:",
                  _mu_table(rows)]  # fmt: skip
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
    cells = [row for row in rows if row["stage"] == "cell" and row["mu"] in (None, "learned")]
    lines = []
    for key, group in _grouped(cells, (*_GROUP, "weight_bits")).items():
        controls = {row["seed"]: row["full_precision_accuracy"] for row in group}
        line = [*key[:3], f"{key[3]}/{key[3]}", _spread(list(controls.values()), "{:.2f} %")]
        for method in METHODS:
            own = [row for row in group if method_of(row) == method]
            line.append(_spread(_differences(own), "{:+.2f}"))
        accuracies = [
            {row["seed"]: row["accuracy"] for row in group if method_of(row) == method}
            for method in ("per_layer", "uniform")
        ]
        both = accuracies[0].keys() & accuracies[1].keys()
        line.append(_spread([accuracies[0][s] - accuracies[1][s] for s in both], "{:+.2f}"))
        lines.append(line)
    return markdown(header, lines)


def _mu_table(rows: Sequence[Row]) -> str:
    cells = [row for row in rows if row["mu_scope"] == "per_layer"]
    fixed = {tuple(row[name] for name in _MU_KEY) for row in cells if row["mu"] != "learned"}
    lines = []
    for key, group in _grouped(cells, _MU_KEY).items():
        if key in fixed:
            found = [_differences([r for r in group if r["mu"] == kind]) for kind in MU_KINDS]
            line = [*key[:3], f"{key[3]}/{key[3]}", *(_spread(each, "{:+.2f}") for each in found)]
            lines.append(line)
    return markdown((*_GROUP, "W/A", *MU_KINDS.values()), lines)


_MU_KEY = (*_GROUP, "weight_bits", "seed")


def _differences(rows: Iterable[Row]) -> list[float | None]:
    return [
        None if row["full_precision_accuracy"] is None
        else row["accuracy"] - row["full_precision_accuracy"] for row in rows
    ]  # fmt: skip


def _grouped(rows: Iterable[Row], names: Sequence[str]) -> dict[tuple, list[Row]]:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def _spread(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = form.format(statistics.mean(known))
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.2f} ({len(known)})"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table; its first three columns are text."""
    rows = [tuple(header), *map(tuple, lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * width + "-:"[i > 2] for i, width in enumerate(widths)]
    shown = [
        " | ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([f"| {shown[0]} |", f"|-{'|-'.join(rule)}|", *(f"| {s} |" for s in shown[1:])])


def _made_with(rows: Sequence[Row]) -> str:
    parts = []
    for (model, dataset), group in _grouped(rows, ("network", "dataset")).items():
        cells = [row for row in group if row["stage"] != "parent"]
        ends = {row["first_last_bits"] for row in cells if row["first_last_bits"]}
        kept = ends - {row["weight_bits"] for row in cells}
        parts.append(
            f"{model} on {dataset}: full precision {_parents(cells)}, then "
            f"{'/'.join(str(n) for n in sorted({row['epochs'] for row in cells}))} epochs"
            + (f", first and last layer at {max(kept)} bits" if kept else "")
            + (", weights of 2 bits on the grid midrise"
               if any(row["weight_grid"] == "midrise" for row in cells) else "")
        )  # fmt: skip
    devices = ", ".join(sorted({row["device"] for row in rows}))
    dates = sorted(row["date"][:10] for row in rows)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return f"{'; '.join(parts)}. {devices}; {when}."


def _parents(rows: Sequence[Row]) -> str:
    """Returns the parents' accuracies, with the seeds that start from each where they differ."""
    found = _grouped(rows, ("arrangement", "parent_accuracy", "parent_epochs"))
    orders = [order for order, _, _ in found]
    texts = []
    for (order, accuracy, epochs), own in found.items():
        how = f"{epochs} epochs" if epochs else "imported"
        if orders.count(order) > 1:
            seeds = sorted({row["seed"] for row in own})
            how += f", for seed{'s' * (len(seeds) > 1)} {' and '.join(map(str, seeds))}"
        texts.append(f"{accuracy:.2f} % ({order}, {how})")
    return ", ".join(texts)
