"""What the scripts share: every error is one line on stderr, and exit status 2."""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

Config = TypeVar("Config")


class CommandLineError(ValueError):
    """Arguments that cannot be parsed."""


def parse(
    kind: type[Config],
    args: Sequence[str],
    *,
    default: Config | None = None,
    description: str | None = None,
) -> Config:
    """Returns the dataclass that the arguments give; `--help` prints and exits.

    Raises:
      CommandLineError: in one line, if they give none.
    """
    stderr = io.StringIO()
    options = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(kind, args=list(args), description=description, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
    raise CommandLineError(one_line(stderr.getvalue()))


def one_line(box: str) -> str:
    r"""Returns what tyro says within its box, without its advice.

    >>> one_line("╭─ Error ─╮\n│ Wrong  │\n│ thing. │\n│ ────── │\n│ Advice │\n╰────────╯")
    'Wrong thing.'
    """
    lines = [line.strip("│ ").strip() for line in box.splitlines() if line.startswith("│")]
    text = " ".join(lines).split("───")[0]
    text = re.sub(r"^Error parsing [A-Za-z_]+: ", "", " ".join(text.split()))
    return text or " ".join(box.split()) or "the arguments cannot be parsed: see --help"


def run_script(main: Callable[[list[str]], None]) -> int:
    """Runs `main` on the command line's arguments, and returns the exit status: 0, or 2."""
    try:
        main(sys.argv[1:])
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        # The number that the system puts in front of its messages tells a user nothing.
        text = (error.strerror if isinstance(error, OSError) else None) or str(error)
        print("error:", " ".join(text.split()), file=sys.stderr)
        return 2
    return 0
