"""What a record is made of: JSON that is whole or as it was before, and what it was made with."""

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from compand_jax.experiments.errors import UserError

_PACKAGE = Path(__file__).parents[1]
_PACKAGES = ("compand-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def read_json(path: str | Path) -> Any:
    """Returns what a JSON file holds.

    Raises:
      UserError: if it is damaged; the file is named.
    """
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise UserError(
            f"`path` must be a JSON file, got {path} ({error}): restore it, or delete it"
        ) from error


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON so that the file is either complete or as it was before."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Writes a text so that the file is either complete or as it was before.

    Of processes that write the same file, on one machine or several, the last one prevails.
    """
    partial = Path(f"{path}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def provenance(packages: Sequence[str] = ()) -> dict:
    """Returns what a result was made with: versions, source, devices, and the date in UTC.

    Args:
      packages: distributions to name besides this project's own dependencies.
    """
    devices = jax.devices()
    kind = devices[0].device_kind
    return {
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in (*_PACKAGES, *packages)},
        "source": source_digest(),
        "devices": f"{len(devices)} x {_cpu_model() if kind == 'cpu' else kind}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


@functools.cache
def source_digest() -> str:
    """Returns 16 hexadecimal digits of this package's source, as it was at the first call.

    They are the first ones of the SHA-256 of its .py files, with their paths, in order.
    """
    total = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        text = path.read_bytes()
        total.update(f"{path.relative_to(_PACKAGE).as_posix()} {len(text)}\n".encode() + text)
    return total.hexdigest()[:16]


def make_writable(directories: Mapping[str, tuple[Path, int]]) -> None:
    """Makes directories.

    Args:
      directories: by the name of the argument that gives each, its path and the bytes that have to
        be free there.

    Raises:
      UserError: if one cannot be written or is full; nothing is made then.
    """
    paths = [path for path, _ in directories.values() for path in (path, *path.parents)]
    made = sorted({path for path in paths if not path.exists()}, reverse=True)
    try:
        for name, (directory, needed) in directories.items():
            _try_to_write(name, directory, needed)
    except UserError:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _try_to_write(name: str, directory: Path, needed: int) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(1 << 16))
            file.flush()
    except OSError as error:
        raise UserError(
            f"`{name}` must be a directory that can be written, got {directory} "
            f"({error.strerror or error}): choose another, or free some space"
        ) from error
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(
            f"`{name}` must have {needed / 1e6:.1f} MB free for its checkpoints, got {directory} "
            f"with {free / 1e6:.1f} MB: choose another, or free some space"
        )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # imported from where it lies
        return "not installed"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
        return f"{', '.join(sorted(names))} ({os.cpu_count()} cores)"
    except (OSError, IndexError):
        return f"{platform.processor() or platform.machine()} ({os.cpu_count()} cores)"
