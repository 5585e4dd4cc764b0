"""What the scripts share: every error is one line on stderr, and exit status 2."""

import contextlib
import dataclasses
import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from compand_jax.layers.config import INHERIT, Rule

Config = TypeVar("Config")


class CommandLineError(Exception):
    """Arguments that cannot be parsed."""  # no ValueError: tyro would replace its text


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
    options: dict[str, Any] = {} if default is None else {"default": default}
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_rule_as_json)
    try:
        with contextlib.redirect_stderr(stderr), registry:
            return tyro.cli(kind, args=list(args), description=description, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
    raise CommandLineError(one_line(stderr.getvalue()))


def _rule_as_json(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Returns how a `Rule` is given: as a JSON object of its fields."""
    if info.type is not Rule:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=lambda texts: _rule(texts[0]),
        is_instance=lambda value: isinstance(value, Rule),
        str_from_instance=lambda rule: [_shown(rule)],
    )


def _rule(text: str) -> Rule:
    names = [field.name for field in dataclasses.fields(Rule)]
    try:
        fields = json.loads(text)
    except ValueError:
        fields = None
    if not isinstance(fields, dict) or not {"pattern"} <= fields.keys() <= set(names):
        raise CommandLineError(
            "`--quant.rules` must be JSON objects with pattern and any of "
            f"{', '.join(names[1:])}, got {text}: see --help"
        )
    try:
        return Rule(**fields)
    except (ValueError, TypeError) as error:
        raise CommandLineError(f"`--quant.rules`, {text}: {error}") from error


def _shown(rule: Rule) -> str:
    fields = dataclasses.asdict(rule).items()
    return json.dumps({name: value for name, value in fields if value != INHERIT})


def one_line(box: str) -> str:
    r"""Returns what tyro says within its box, without its advice.

    >>> one_line("╭─ Error ─╮\n│ Wrong  │\n│ thing. │\n│ ────── │\n│ Advice │\n╰────────╯")
    'Wrong thing: see --help'
    """
    lines = [line.strip("│ ").strip() for line in box.splitlines() if line.startswith("│")]
    parts = re.split(r"[─-]{5,}", " ".join(lines) or box)
    if not lines and len(parts) > 1:  # without a box, which not every terminal can show
        parts = parts[1:]
    text = " ".join(parts[0].split())
    # A dataclass's own error names its field, and says what to do.
    own, found = re.subn(r"^Error parsing [A-Za-z_]+: (?=`)", "", text)
    if found:
        return own
    text = re.sub(r"^Error parsing (--\S+): ", r"`\1`: ", text)
    wrong_type = r": no type matching (\S+) could .*? \['(.*?)'\]\..*"
    text = re.sub(wrong_type, r" must be \1, got '\2'", text)
    return f"{text.rstrip('.') or 'wrong arguments'}: see --help"


def run_script(main: Callable[[list[str]], None]) -> int:
    """Runs `main` on the command line's arguments, and returns the exit status: 0, or 2."""
    try:
        main(sys.argv[1:])
    except (CommandLineError, ValueError, TypeError, OSError, FloatingPointError) as error:
        # The number that the system puts in front of its messages tells a user nothing.
        text = re.sub(r"\[Errno \d+\] ", "", str(error))
        print("error:", " ".join(text.split()), file=sys.stderr)
        return 2
    return 0
