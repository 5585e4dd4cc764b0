"""Quantizes a trained network without training: tables, its layers' sensitivity, bits in a budget.

Usage: ptq.py CHECKPOINT [--field value ...]. Without --families, --sensitivity and --budget,
the tables: bits, quantizers, calibrations, mu scopes, error feedback and batch-norm re-estimation.
"""

import tyro

from compand_jax.experiments.commands.arguments import parse
from compand_jax.experiments.errors import user_errors
from compand_jax.experiments.ptq.run import PostTrainingConfig, run


def main(args: list[str]) -> None:
    """Runs one part, prints what its record says, and where that is."""
    kind = tyro.conf.PositionalRequiredArgs[PostTrainingConfig]
    config = parse(kind, args, description=__doc__)
    with user_errors(OSError):  # of a disk that is full
        text, directory = run(config)
    print(f"\n{text}\nIn {directory}: results.json, results.md, CSV tables and pictures")
