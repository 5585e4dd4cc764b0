"""Trains the digits default in float32 and in bfloat16 over several seeds, and records both.

Companding is in float32 in either. A run that is finished is not repeated: give the same command.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from compand_jax.experiments.commands.arguments import parse, run_script
from compand_jax.experiments.errors import UserError
from compand_jax.experiments.records import make_writable, provenance, write_json, write_text
from compand_jax.experiments.runs.config import FULL_PRECISION, Method, RunConfig
from compand_jax.experiments.runs.directory import read_results
from compand_jax.experiments.runs.run import run
from compand_jax.experiments.text import markdown_table

_DTYPES = ("float32", "bfloat16")
_METHOD = Method("mu_law", "per_layer")


@dataclasses.dataclass(frozen=True)
class Args:
    """Trains the digits default in float32 and in bfloat16 over several seeds."""

    seeds: int = 5
    """Seeds, from 0."""
    epochs: int = RunConfig.epochs
    """Full-precision training, in epochs."""
    finetune_epochs: int = RunConfig.finetune_epochs
    """Fine-tuning in mu-law, an own mu per layer, in epochs."""
    run_dir: Path = Path("runs/dtypes-digits")
    """Directory of the runs."""
    record_dir: Path = Path("results/dtypes-digits")
    """Directory of the record, dtypes.json and dtypes.md."""


def main(args: list[str]) -> None:
    """Trains, prints and records."""
    options = parse(Args, args, description=__doc__)
    if options.seeds < 2:
        raise UserError(f"`seeds` must be at least 2, got {options.seeds}: a spread needs more")
    make_writable({"record_dir": (options.record_dir, 0)})
    accuracies: dict[str, dict[str, list[float]]] = {FULL_PRECISION: {}, _METHOD.name: {}}
    for dtype in _DTYPES:
        for seed in range(options.seeds):
            directory = options.run_dir / f"{dtype}-{seed}"
            run(
                RunConfig(
                    dtype=dtype,
                    seed=seed,
                    epochs=options.epochs,
                    finetune_epochs=options.finetune_epochs,
                    methods=(_METHOD,),
                    run_dir=directory,
                )
            )
            for result in read_results(directory):
                found = accuracies[result["stage"]].setdefault(dtype, [])
                found.append(result["test_accuracy"])
    text = table(accuracies)
    config = {"seeds": options.seeds, "epochs": options.epochs}
    config["finetune_epochs"] = options.finetune_epochs
    record = {"config": config, "test_accuracy": accuracies, **provenance()}
    write_json(options.record_dir / "dtypes.json", record)
    write_text(options.record_dir / "dtypes.md", f"# Digits by dtype\n\n{text}\n")
    print(f"\n{text}\n\n{json.dumps(record['versions'])}\nIn {options.record_dir}")


def table(accuracies: dict[str, dict[str, list[float]]]) -> str:
    """Returns mean and standard deviation over the seeds, a row a stage, a column a dtype."""
    rows: list[tuple[str, ...]] = [("stage", *_DTYPES)]
    for stage, found in accuracies.items():
        cells = [f"{np.mean(x):.2f} % ± {np.std(x, ddof=1):.2f}" for x in found.values()]
        rows.append((stage, *cells))
    return markdown_table(rows)


if __name__ == "__main__":
    sys.exit(run_script(main))
