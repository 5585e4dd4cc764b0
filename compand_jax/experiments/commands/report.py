"""Makes a study's report, and keeps the tables of all pages those of the records.

Usage: report.py DIR, DIR being the --out of compand study, makes tables and pictures in DIR and
copies them, with the small records that they are made of, to results/PRESET. It can be called while
a study runs, and of a kept study (results/NAME) as well. Then it fills the blocks of README.md and
docs/*.md from results/, which report.py without DIR does alone. Two kinds of blocks are filled:
<!-- results:NAME --> to <!-- /results --> with what the record results/NAME says, and
<!-- table:NAME --> to <!-- /table --> with its first table and the paragraph below that.
"""

import collections
import dataclasses
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import tyro

from compand_jax.experiments.benchmark.report import benchmark_text
from compand_jax.experiments.commands.arguments import parse
from compand_jax.experiments.errors import UserError
from compand_jax.experiments.ptq.encoder_record import FILE, encoder_document
from compand_jax.experiments.ptq.record import document
from compand_jax.experiments.records import read_json
from compand_jax.experiments.runs.report import results_table
from compand_jax.experiments.study.report import (
    keep_report,
    preset_of,
    study_block,
    write_report,
)

_BLOCK = re.compile(
    r"(<!-- (?P<kind>results|table):(?P<name>[\w-]+) -->\n).*?(<!-- /(?P=kind) -->)", re.DOTALL
)
_RECORDS = "results.json", "results.csv", "benchmark.json", FILE


@dataclasses.dataclass(frozen=True)
class Args:
    """Makes a study's report, and keeps the tables of all pages those of the records."""

    directory: Annotated[Path | None, tyro.conf.Positional] = None
    """The study's; left out, only the pages are updated."""
    keep: bool = True
    """Copy the study's report and records to results/PRESET, if a page has a block for them, and
    update the pages."""
    check: bool = False
    """Write nothing; fail if a page has other tables than the records. Without a study."""
    root: Path = Path(".")
    """Directory of README.md, docs/ and results/."""

    def __post_init__(self):
        if self.check and self.directory is not None:
            raise UserError(
                f"`check` must go without a study, got {self.directory}: leave one of them out"
            )


def main(args: list[str]) -> None:
    """Writes the report, and updates or checks the pages."""
    options = parse(Args, args, description=__doc__)
    if options.directory is None:
        _update(options.root, check=options.check)
        return
    preset = preset_of(options.directory)
    has_block = options.keep and f"results:{preset}" in _blocks(pages(options.root))
    for path in write_report(options.directory):
        print(f"wrote {path}")
    if options.keep and not has_block:
        print(f"not kept: no page of {options.root} has a block results:{preset}")
    elif options.keep:
        kept = options.root / "results" / preset
        keep_report(options.directory, kept)
        print(f"kept in {kept}")
        _update(options.root)


def pages(root: Path) -> list[Path]:
    """Returns the README and the pages of docs/.

    Raises:
      UserError: if there is no README.
    """
    readme = root / "README.md"
    if not readme.is_file():
        raise UserError(
            f"`root` must hold README.md, got {root}: give the project's directory, or, with a "
            "study, --no-keep"
        )
    return [readme, *sorted((root / "docs").glob("*.md"))]


def _update(root: Path, *, check: bool = False) -> None:
    for page, new in filled(root).items():
        if new == page.read_text():
            continue
        if check:
            raise UserError(
                f"`root` must have the tables of its records, got others in {page}: run "
                "compand report"
            )
        page.write_text(new)
        print(f"updated {page}")
    print(f"all pages of {root} have the tables of the records")


def filled(root: Path) -> dict[Path, str]:
    """Returns the text that each page is to have: its blocks filled, empty without a record.

    Raises:
      UserError: if there is no README, or a record has no block, more than one, or does not agree
        with itself.
    """
    found, results = pages(root), root / "results"
    counts = _blocks(found)
    for path in sorted(path for name in _RECORDS for path in results.glob(f"*/{name}")):
        name = f"results:{path.parent.name}"
        if counts[name] != 1:
            raise UserError(
                f"`root` must have one block for each record, got {counts[name]} for {path}: write "
                f"the lines <!-- {name} --> and <!-- /results --> in one page of docs/"
            )

    def block(match: re.Match, page: Path) -> str:
        record = results / match["name"]
        text = record_text(record, Path(os.path.relpath(record, page.parent)).as_posix())
        if text and match["kind"] == "table":
            text = first_table(text)
        return match[1] + (f"\n{text}\n\n" if text else "") + match[4]

    return {
        page: _BLOCK.sub(lambda match, page=page: block(match, page), page.read_text())
        for page in found
    }


def _blocks(found: Iterable[Path]) -> collections.Counter[str]:
    """Returns how often each block is in the pages, by "KIND:NAME"."""
    texts = (page.read_text() for page in found)
    return collections.Counter(
        f"{match['kind']}:{match['name']}" for text in texts for match in _BLOCK.finditer(text)
    )


def record_text(record: Path, link: str) -> str:
    """Returns what a record says, in Markdown without headings; empty where there is no record.

    What follows a second heading is left to the record itself.

    Args:
      record: its directory.
      link: where the directory is, from the page that the text is for.

    Raises:
      UserError: if the record does not agree with itself.
    """
    if (record / "results.csv").is_file():
        return study_block(record, link)
    if (path := record / "benchmark.json").is_file():
        text = benchmark_text(read_json(path))
    elif (path := record / FILE).is_file():
        text = encoder_document(read_json(path)).partition("\n")[2].strip()
    elif (path := record / "results.json").is_file():
        text = _run_text(record, read_json(path))
    else:
        return ""
    return f"{text}\n\nRecord and curves: [results/{record.name}]({link})."


def _run_text(record: Path, results: list | dict) -> str:
    # A list is of a training run; an object, of post-training quantization.
    table = results_table(results) if isinstance(results, list) else document(results)
    text = (record / "results.md").read_text()
    heading, _, body = text.partition("\n## ")[0].partition("\n")
    if not heading.startswith("# ") or table not in text:
        raise UserError(
            f"`results` must have the same table in results.md and results.json, got others in "
            f"{record}: record the run again"
        )
    return body.strip()


def first_table(text: str) -> str:
    """Returns the first table of a Markdown text, and the paragraph below it."""
    paragraphs = text.split("\n\n")
    start = next(i for i, paragraph in enumerate(paragraphs) if paragraph.startswith("|"))
    return "\n\n".join(paragraphs[start : start + 2])
