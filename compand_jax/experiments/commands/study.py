"""Compares quantizers over bits, mu scopes, arrangements, networks, data and seeds.

Usage: study.py PRESET --out DIR. Every cell of the preset's grid is a training of its own. The same
command started again goes on where it was: a finished cell is not run again, one that was
stopped goes on at its last checkpoint, one that failed is tried again. Several processes may be
given the same command: each takes cells that no other one is at.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from compand_jax.experiments.commands.arguments import parse
from compand_jax.experiments.errors import UserError, user_errors
from compand_jax.experiments.study.grid import STUDIES, study_cells
from compand_jax.experiments.study.listing import list_cells
from compand_jax.experiments.study.run import Study, run_study


@dataclasses.dataclass(frozen=True)
class Args:
    """Compares quantizers over bits, mu scopes, arrangements, networks, data and seeds."""

    preset: Annotated[str, tyro.conf.Positional]
    """Which study: paper, literature, laptop, levers, smoke or
    vgg19-short."""
    out: Path
    """Directory of the study: parents, cells, records."""
    dry_run: bool = False
    """List the cells and their steps, and their time where a finished one shows it; train none."""
    parents: Path | None = None
    """Directory of the full-precision parents, as another study left them; finished ones are taken
    as they are. Left out, DIR/parents."""
    checkpoint: Path | None = None
    """PyTorch's ResNet-20 (an .npz file of its state dict) that the preset literature starts from;
    left out, it trains one."""
    networks: tuple[str, ...] = ()
    """Only the cells of these networks."""
    discard_checkpoints: bool = False
    """Delete a cell's checkpoints once it is recorded."""
    tensorboard: bool = False
    """Whether each training's metrics, and histograms of its weights, are written for TensorBoard
    too, into a directory of that name beside its log; needs the extra `tensorboard`."""
    data_dir: Path = Path("data")
    """Directory of the prepared data sets."""


def main(args: list[str]) -> None:
    """Runs or lists the cells."""
    lines = "\n".join(f"  {name}: {what}" for name, what in STUDIES.items())
    options = parse(Args, args, description=f"{__doc__}\nPresets:\n{lines}")
    checkpoint = None if options.checkpoint is None else options.checkpoint.absolute()
    if checkpoint is not None and not checkpoint.is_file():
        raise UserError(f"`checkpoint` must be a file, got {checkpoint}: correct it")
    if options.parents is not None and not options.parents.is_dir():
        raise UserError(
            f"`parents` must be a directory that another study left, got {options.parents}: "
            "correct it, or leave it out to train parents"
        )
    cells = study_cells(options.preset, checkpoint=checkpoint, networks=options.networks)
    parents = options.parents or options.out / "parents"
    study = Study(
        options.preset,
        options.out,
        parents,
        options.data_dir,
        options.discard_checkpoints,
        options.tensorboard,
    )
    if options.dry_run:
        print(list_cells(study, cells))
        return
    with user_errors(OSError):  # of a disk that is full
        failed = run_study(study, cells)
    if failed:
        raise UserError(
            f"`preset` must run whole, got {len(failed)} failed cells, {failed[0]} first: see "
            f"{options.out / 'failures'}, and give the same command again"
        )
    left = sum(not study.is_finished(cell) for cell in cells)
    print(f"In {options.out}: {len(cells) - left} of {len(cells)} cells finished"
          f"{', others at work on the rest' if left else ''}; now compand report")  # fmt: skip
