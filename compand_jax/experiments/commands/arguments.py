"""What commands share: arguments, and mistakes of a user's in one line, with exit status 2."""

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec, PrimitiveTypeInfo

from compand_jax.experiments.errors import UserError, user_errors
from compand_jax.experiments.runs.config import METHODS_BY_NAME, Method
from compand_jax.layers.config import INHERIT, Rule

Config = TypeVar("Config")


def parse(
    kind: type[Config],
    args: Sequence[str],
    *,
    default: Config | None = None,
    description: str | None = None,
) -> Config:
    """Returns the dataclass that the arguments give.

    `--help` prints and exits, and so does what is wrong with them, with exit status 2. A
    description names scripts; where `compand` runs the command, it has the names of commands.
    """
    program = sys.argv[0] if sys.argv[0].startswith("compand ") else None
    if program and description:
        description = of_commands(description)
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_from_text)
    options: dict[str, Any] = {} if default is None else {"default": default}
    with registry:
        return tyro.cli(kind, args=list(args), prog=program, description=description, **options)


def of_commands(text: str) -> str:
    """Returns a text with the names of commands in the place of the scripts'.

    >>> of_commands("Usage: study.py PRESET")
    'Usage: compand study PRESET'
    """
    return re.sub(r"\b(\w+)\.py\b", r"compand \1", text)


def _from_text(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Returns how a `Rule`, a JSON object of its fields, and a `Method`, its name, are given."""
    if info.type is Rule:
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="JSON",
            instance_from_str=lambda texts: _rule(texts[0]),
            is_instance=lambda value: isinstance(value, Rule),
            str_from_instance=lambda rule: [_shown(rule)],
        )
    if info.type is Method:
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="METHOD",
            instance_from_str=lambda texts: METHODS_BY_NAME[texts[0]],
            is_instance=lambda value: isinstance(value, Method),
            str_from_instance=lambda method: [method.name],
            choices=tuple(METHODS_BY_NAME),
        )
    return None


def _rule(text: str) -> Rule:
    names = [field.name for field in dataclasses.fields(Rule)]
    try:
        fields = json.loads(text)
    except ValueError:
        fields = None
    if not isinstance(fields, dict) or not {"pattern"} <= fields.keys() <= set(names):
        raise UserError(
            "`--quant.rules` must be JSON objects with pattern and any of "
            f"{', '.join(names[1:])}, got {text}: see --help"
        )
    with user_errors(ValueError, TypeError):
        return Rule(**fields)


def _shown(rule: Rule) -> str:
    fields = dataclasses.asdict(rule).items()
    return json.dumps({name: value for name, value in fields if value != INHERIT})


def run_script(main: Callable[[list[str]], None]) -> int:
    """Runs `main` on the command line's arguments, and returns the exit status: 0, or 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0
