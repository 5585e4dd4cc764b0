"""Writes a study's tables and pictures, keeps its small records, and updates the README.

Usage: report.py DIR, DIR being the --out of scripts/study.py. All comes from the records in DIR, so
it can be called while a study runs, and of a kept study (results/NAME) as well.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro
import update_readme
from command_line import parse, run_script

from compand_jax.experiments.study.report import keep_report, preset_of, write_report


@dataclasses.dataclass(frozen=True)
class Args:
    """Writes a study's tables and pictures, keeps its small records, and updates the README."""

    directory: Annotated[Path, tyro.conf.Positional]
    """The study's."""
    keep: bool = True
    """Keep report and records in RESULTS/PRESET, and update the README from there, if it has a
    block for them."""
    results: Path = Path("results")
    """Directory of what is kept."""
    readme: Path = Path("README.md")
    """File whose block <!-- results:PRESET --> is updated."""


def main(args: list[str]) -> None:
    """Writes the report."""
    options = parse(Args, args, description=__doc__)
    preset = preset_of(options.directory)
    if options.keep and not options.readme.is_file():
        raise FileNotFoundError(
            f"`readme` must be a file, got {options.readme}: correct it, or give --no-keep"
        )
    for path in write_report(options.directory):
        print(f"wrote {path}")
    if options.keep and f"<!-- results:{preset} -->" not in options.readme.read_text():
        print(f"not kept: {options.readme} has no block results:{preset}")
    elif options.keep:
        kept = options.results / preset
        keep_report(options.directory, kept)
        print(f"kept in {kept}")
        update_readme.main(["--readme", str(options.readme), "--results", str(options.results)])


if __name__ == "__main__":
    sys.exit(run_script(main))
