"""Compares quantizers over bits, mu scopes, arrangements, networks, data and seeds.

It is `compand study`: see --help.
"""

import sys

from compand_jax.experiments.commands.arguments import run_script
from compand_jax.experiments.commands.study import main

if __name__ == "__main__":
    sys.exit(run_script(main))
