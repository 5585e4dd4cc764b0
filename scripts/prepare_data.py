"""Makes the tensorflow-datasets data set of CIFAR-10 or CIFAR-100 from its binary archive.

It is `compand prepare_data`: see --help.
"""

import sys

from compand_jax.experiments.commands.arguments import run_script
from compand_jax.experiments.commands.prepare_data import main

if __name__ == "__main__":
    sys.exit(run_script(main))
