"""Writes the tables of recorded runs into the README, between their markers."""

import dataclasses
import json
import re
import sys
from pathlib import Path

from command_line import parse, run_script

from compand_jax.experiments.benchmark.report import benchmark_text
from compand_jax.experiments.ptq.record import document
from compand_jax.experiments.runs.report import results_table
from compand_jax.experiments.study.report import study_block

_BENCHMARK = re.compile(
    r"(<!-- (?P<name>benchmark-\w+) -->\n).*?(<!-- /benchmark -->)", re.DOTALL
)
_BLOCK = re.compile(r"(<!-- results:(?P<name>[\w-]+) -->\n).*?(<!-- /results -->)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Args:
    """Writes the tables of recorded runs into the README, between their markers."""

    readme: Path = Path("README.md")
    """File with lines `<!-- results:NAME -->` and `<!-- /results -->`, or `<!-- benchmark-NAME -->`
    and `<!-- /benchmark -->`; what is between them is replaced."""
    results: Path = Path("results")
    """Directory of the records: NAME/results.json and NAME/results.md of a run, or
    NAME/results.csv and NAME/report.md of a study."""
    check: bool = False
    """Change nothing; fail if there was something to change."""


def main(args: list[str]) -> None:
    """Updates or checks the README."""
    options = parse(Args, args)
    old = options.readme.read_text()
    new = fill(old, options.results)
    if options.check and new != old:
        raise ValueError(
            f"`readme` must have the tables of {options.results}, got others in {options.readme}: "
            "run scripts/update_readme.py"
        )
    if new != old:
        options.readme.write_text(new)
    print(f"{options.readme} is {'unchanged' if new == old else 'updated'}")


def fill(text: str, results: Path) -> str:
    """Returns the text with each block's table; empty where there are no records.

    Raises:
      ValueError: a record has no block, or more than one, or does not agree with itself.
    """
    names = [match["name"] for match in _BLOCK.finditer(text)]
    for path in sorted([*results.glob("*/results.json"), *results.glob("*/results.csv")]):
        name, count = path.parent.name, names.count(path.parent.name)
        if count != 1:
            raise ValueError(
                f"`readme` must have one block for each record, got {count} for {path}: write the "
                f"lines <!-- results:{name} --> and <!-- /results -->"
            )
    text = _BENCHMARK.sub(
        lambda match: match[1] + benchmark_block(results / match["name"]) + match[3], text
    )
    return _BLOCK.sub(lambda match: match[1] + block(results / match["name"]) + match[3], text)


def benchmark_block(record: Path) -> str:
    """Returns the text for a benchmark's record; empty where there is none."""
    path = record / "benchmark.json"
    if not path.is_file():
        return ""
    text = benchmark_text(json.loads(path.read_text()))
    place = record.as_posix()
    return f"\n{text}\n\nRecord and curves: [{place}]({place}).\n\n"


def block(record: Path) -> str:
    """Returns the text for one record, without headings, and where it is.

    What follows a second heading is left to the record.

    Raises:
      ValueError: the record does not agree with itself.
    """
    if not (record / "results.json").is_file():
        return study_block(record) if (record / "results.csv").is_file() else ""
    results = json.loads((record / "results.json").read_text())
    # A list is of a training run; an object, of post-training quantization.
    table = results_table(results) if isinstance(results, list) else document(results)
    text = (record / "results.md").read_text()
    heading, _, body = text.partition("\n## ")[0].partition("\n")
    if not heading.startswith("# ") or table not in text:
        raise ValueError(
            f"`results` must have the same table in results.md and results.json, got others in "
            f"{record}: record the run again"
        )
    place = record.as_posix()
    return f"\n{body.strip()}\n\nRecords and curves: [{place}]({place}).\n\n"


if __name__ == "__main__":
    sys.exit(run_script(main))
