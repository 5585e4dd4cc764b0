"""Trains a network in full precision, then fine-tunes it quantized by each method.

Usage: train.py [PRESET] [--field value ...]; without a preset, digits. Exceptions for single
layers are JSON: --quant.rules '{"pattern": "conv1|dense", "weight_bits": 8, "act_bits": null}'.
"""

from compand_jax.experiments.commands.arguments import parse
from compand_jax.experiments.runs.config import RunConfig
from compand_jax.experiments.runs.presets import PRESETS, preset
from compand_jax.experiments.runs.run import run
from compand_jax.training.distributed import initialize, is_main


def main(args: list[str]) -> None:
    """Runs the preset that comes first in the arguments, with the fields that follow."""
    name = args.pop(0) if args and not args[0].startswith("-") else "digits"
    description = f"{__doc__}\nPresets: {', '.join(PRESETS)}. Defaults below are those of {name}."
    config = parse(RunConfig, args, default=preset(name), description=description)
    if config.distributed:
        initialize()
    table = run(config)
    if is_main():
        print(f"\n{table}\n\nIn {config.run_dir}: results.md, plot.png, metrics and checkpoints")
