"""What a run leaves for a reader: a table, its numbers as JSON, a plot, and copies to keep."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compand_jax.experiments.records import write_json, write_text
from compand_jax.experiments.runs.config import CONTROL, FULL_PRECISION, PATH_FIELDS
from compand_jax.experiments.runs.directory import finished_stages, read_results
from compand_jax.experiments.runs.plots import plot_run
from compand_jax.experiments.text import markdown_table, size_text, thin
from compand_jax.training.metrics_log import read_log

_HEADER = ("method", "bits W/A", "mu scope", "test accuracy", "difference", "model size")
_LABELS = {
    FULL_PRECISION: "full precision",
    CONTROL.name: "full precision, continued",
    "mu_law": "mu-law",
}
_MOST_ROWS = 200


def write_reports(run_dir: str | Path, record_dir: str | Path | None = None) -> str:
    """Writes results.json, results.md and plot.png into a run's directory; returns the table.

    Args:
      run_dir: of a run with at least one finished stage.
      record_dir: where config.json, these three, and every finished stage's result.json and
        metrics.jsonl (thinned to at most 200 rows) are copied to; None for no copy.

    Raises:
      UserError: if a result is damaged.
      OSError: if a directory cannot be written.
    """
    run_dir = Path(run_dir)
    results = read_results(run_dir)
    table = results_table(results)
    write_json(run_dir / "results.json", with_differences(results))
    write_text(run_dir / "results.md", _document(results, table))
    logs = {result["stage"]: read_log(run_dir / result["stage"] / "metrics.jsonl")
            for result in results}  # fmt: skip
    plot_run(logs, run_dir / "plot.png")
    if record_dir is not None:
        _record(run_dir, Path(record_dir))
    return table


def with_differences(results: Sequence[dict]) -> list[dict]:
    """Returns results with `difference`, in points, and `reference`, what they are compared to.

    The reference is the control, full precision trained on with the same budget, or else full
    precision as the fine-tunings started from it.
    """
    by_name = {result["stage"]: result for result in results}
    reference = by_name.get(CONTROL.name, by_name.get(FULL_PRECISION))
    if reference is None:
        return [dict(result) for result in results]
    # Of images, so that equal counts give 0 and no rounding error shows.
    return [
        result
        | {
            "reference": reference["stage"],
            "difference": 100 * (result["correct"] - reference["correct"]) / result["total"],
        }
        for result in results
    ]


def results_table(results: Sequence[dict]) -> str:
    """Returns a Markdown table of results: a row a stage."""
    return markdown_table([_HEADER, *map(_row, with_differences(results))])


def _row(result: dict) -> tuple[str, ...]:
    bits = (result["weight_bits"], result["act_bits"])
    is_reference = result["stage"] == result.get("reference")
    return (
        str(_LABELS.get(result["method"], result["method"])),
        "/".join("32" if count is None else str(count) for count in bits),
        (result["mu_scope"] or "-").replace("_", " "),
        f"{result['test_accuracy']:.2f} %",
        "reference" if is_reference else _points(result.get("difference")),
        size_text(result["model_bytes"]),
    )


def _points(difference: float | None) -> str:
    return "-" if difference is None else f"{difference:+.2f}"


def _document(results: Sequence[dict], table: str) -> str:
    last = results[-1]
    config, versions = last["config"], last["versions"]
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"# {config['model']} on {config['dataset']}\n\n{table}\n\n"
        f"Test accuracy on {last['total']} images. Differences in points to full precision, "
        "continued (the control: the same further training, not quantized), or to full precision "
        "where there is no control. Model size: weights packed at their bits, all else float32, "
        "every mu and scale included.\n\n"
        f"Seed {last['seed']}; {config['epochs']} epochs in full precision, then "
        f"{config['finetune_epochs']} of each method. {listed}; {last['devices']}; "
        f"{last['date']}. The whole configuration is in config.json.\n"
    )


def _record(run_dir: Path, record_dir: Path) -> None:
    record_dir.mkdir(parents=True, exist_ok=True)
    for name in ("results.md", "plot.png"):
        shutil.copyfile(run_dir / name, record_dir / name)
    for name in ("config.json", "results.json"):
        _record_json(run_dir / name, record_dir / name)
    for stage in finished_stages(run_dir):
        (record_dir / stage).mkdir(exist_ok=True)
        _record_json(run_dir / stage / "result.json", record_dir / stage / "result.json")
        rows = thin(read_log(run_dir / stage / "metrics.jsonl"), _MOST_ROWS)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_text(record_dir / stage / "metrics.jsonl", text)


def _record_json(source: Path, target: Path) -> None:
    """Copies a JSON file without the directories of the machine that it was written on."""

    def keep(value: Any) -> Any:
        if isinstance(value, list):
            return [keep(item) for item in value]
        if not isinstance(value, dict):
            return value
        return {key: keep(item) for key, item in value.items() if key not in PATH_FIELDS}

    write_json(target, keep(json.loads(source.read_text())))
