"""Trains a network in full precision, then fine-tunes it quantized by each method.

It is `compand train`: see --help.
"""

import sys

from compand_jax.experiments.commands.arguments import run_script
from compand_jax.experiments.commands.train import main

if __name__ == "__main__":
    sys.exit(run_script(main))
