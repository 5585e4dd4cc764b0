"""Makes a study's report, and keeps the tables of all pages those of the records.

It is `compand report`: see --help.
"""

import sys

from compand_jax.experiments.commands.arguments import run_script
from compand_jax.experiments.commands.report import main

if __name__ == "__main__":
    sys.exit(run_script(main))
