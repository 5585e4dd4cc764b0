"""Makes the tensorflow-datasets data set of CIFAR-10 or CIFAR-100 from its binary archive."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from compand_jax.data.cifar import is_prepared
from compand_jax.data.images import prepare_cifar
from compand_jax.experiments.commands.arguments import parse
from compand_jax.experiments.errors import user_errors


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


def main(args: list[str]) -> None:
    """Makes the data set unless it is there."""
    options = parse(Args, args, description=__doc__)
    if is_prepared(options.name, options.data_dir):
        print(f"{options.name} is already prepared in {options.data_dir}: nothing to do")
        return
    with user_errors(OSError, ValueError):  # of the archive, or of a disk that is full
        path = prepare_cifar(options.name, options.archive, options.data_dir)
    print(f"{options.name} is prepared in {path}")
