"""Writes the quantized network of a finished run to a file that runs elsewhere.

It is `compand export`: see --help.
"""

import sys

from compand_jax.experiments.commands.arguments import run_script
from compand_jax.experiments.commands.export import main

if __name__ == "__main__":
    sys.exit(run_script(main))
