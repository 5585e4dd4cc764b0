"""Mistakes of a user's, told apart from bugs."""

import contextlib
from collections.abc import Iterator
from typing import Any


class UserError(Exception):
    """What its user has to change: a script prints it as one line. A bug keeps its traceback.

    It is no ValueError, which tyro would print in a form of its own where a field's is wrong.
    """


@contextlib.contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds within it become a `UserError`, with the same text.

    It goes around a call whose errors of these kinds are about what a user gave, and nothing more.

    >>> with user_errors(OSError):
    ...     open("/no/such/file")
    Traceback (most recent call last):
    compand_jax.experiments.errors.UserError: No such file or directory: '/no/such/file'
    """
    try:
        yield
    except kinds as error:
        # The number that the system puts in front of its messages tells a user nothing.
        text = str(error).removeprefix(f"[Errno {getattr(error, 'errno', None)}] ")
        raise UserError(text) from error


def require(owner: Any, name: str, ok: bool, required: str) -> None:
    """Raises UserError, naming what was required and what was got, unless a field is right.

    Args:
      owner: of the field.
      name: of the field.
      ok: whether it is right.
      required: of it, in words that go on from "must be".
    """
    if not ok:
        raise UserError(f"`{name}` must be {required}, got {getattr(owner, name)!r}: change it")
