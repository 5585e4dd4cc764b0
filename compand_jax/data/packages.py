"""What is said where a package is missing that only training, data, plots or export need."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def needed_for(what: str, package: str) -> Iterator[None]:
    """Imports within it fail in one line that names what to install.

    `import compand_jax` needs none of these packages, so each is imported where it is used.

    Args:
      what: is done with the package.
      package: as it is installed, an extra of ours among them.

    Raises:
      ImportError: a module is missing.

    >>> with needed_for("counting", "abacus"):
    ...     import abacus
    Traceback (most recent call last):
    ImportError: counting needs abacus (No module named 'abacus'): pip install 'abacus'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{what} needs {package} ({error}): pip install '{package}'", name=error.name
        ) from error
