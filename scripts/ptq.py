"""Quantizes a trained network without training: tables, its layers' sensitivity, bits in a budget.

It is `compand ptq`: see --help.
"""

import sys

from compand_jax.experiments.commands.arguments import run_script
from compand_jax.experiments.commands.ptq import main

if __name__ == "__main__":
    sys.exit(run_script(main))
