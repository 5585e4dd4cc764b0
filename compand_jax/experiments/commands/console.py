"""The command `compand`, which pip installs: each of the commands by its name."""

import importlib
import sys

from compand_jax.experiments.commands.arguments import run_script
from compand_jax.experiments.errors import UserError

# What each says of itself; none is imported before it is asked for.
COMMANDS = {
    "train": "Trains a network in full precision, then fine-tunes it quantized by each method.",
    "ptq": "Quantizes a trained network without training: tables, its layers' sensitivity, bits in "
    "a budget.",
    "study": "Compares quantizers over bits, mu scopes, arrangements, networks, data and seeds.",
    "report": "Makes a study's report, and keeps the tables of all pages those of the records.",
    "export": "Writes the quantized network of a finished run to a file that runs elsewhere.",
    "evaluate": "Prints the test accuracy of a run's finished stages, or of a file that compand "
    "export wrote.",
    "prepare_data": "Makes the tensorflow-datasets data set of CIFAR-10 or CIFAR-100 from its "
    "binary archive.",
    "benchmark": "Measures what quantization costs, and records it: step time, memory, compile "
    "time, curves.",
}


def main() -> int:
    """Runs the command that comes first in the arguments; returns the exit status: 0, or 2."""
    return run_script(_run)


def _run(args: list[str]) -> None:
    name = args[0] if args else "--help"
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name.ljust(width)}  {what}" for name, what in COMMANDS.items()]
        print("usage: compand COMMAND [-h] ...\n", *lines, sep="\n")
        print("\nEach explains itself: compand COMMAND --help")
        return
    if name not in COMMANDS:
        raise UserError(f"`command` must be one of {', '.join(COMMANDS)}, got {name!r}: choose one")
    sys.argv[0] = f"compand {name}"
    importlib.import_module(f"compand_jax.experiments.commands.{name}").main(args[1:])
