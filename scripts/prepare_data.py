"""Makes the tensorflow-datasets data set of CIFAR-10 or CIFAR-100 from its binary archive."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from compand_jax.cifar import is_prepared
from compand_jax.data import prepare_cifar


@dataclasses.dataclass(frozen=True)
class Args:
    """Makes a data set for training from the official binary archive."""

    name: Annotated[Literal["cifar10", "cifar100"], tyro.conf.Positional]
    """Which data set."""
    archive: Path | None = None
    """Path of the archive (cifar-10-binary.tar.gz); left out, the official one is downloaded and
    its checksum verified (about 170 MB)."""
    data_dir: Path = Path("data")
    """Directory of the prepared data sets (about 150 MB each)."""


def main() -> int:
    """Returns the exit status: 0, or 2 after an error."""
    args = tyro.cli(Args, description=__doc__)
    try:
        if is_prepared(args.name, args.data_dir):
            print(f"{args.name} is already prepared in {args.data_dir}: nothing to do")
            return 0
        path = prepare_cifar(args.name, args.archive, args.data_dir)
    except (ValueError, OSError) as error:
        # The number that the system puts in front of its messages tells a user nothing.
        text = str(error.strerror or error) if isinstance(error, OSError) else str(error)
        print("error:", " ".join(text.split()), file=sys.stderr)
        return 2
    print(f"{args.name} is prepared in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
