"""Measures what quantization costs, and records it: step time, memory, compile time, curves.

It is `compand benchmark`: see --help.
"""

import sys

from compand_jax.experiments.commands.arguments import run_script
from compand_jax.experiments.commands.benchmark import main

if __name__ == "__main__":
    sys.exit(run_script(main))
