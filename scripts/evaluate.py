"""Prints the test accuracy of a run's finished stages, or of a file that export.py wrote.

It is `compand evaluate`: see --help.
"""

import sys

from compand_jax.experiments.commands.arguments import run_script
from compand_jax.experiments.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(run_script(main))
