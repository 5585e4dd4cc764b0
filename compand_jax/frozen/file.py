"""A safetensors file of arrays with a JSON description, sealed by a checksum, read without trust.

The file is one of safetensors (github.com/huggingface/safetensors): 8 bytes with the length of a
JSON header, little-endian, the header, the arrays' bytes. The header's `__metadata__` holds
`format`, `version`, `description` (JSON in a string) and `sha256`: of the whole file, in which
these 64 digits stand as zeros.

Whatever a file holds, reading it ends in ValueError or OSError, or in what was described: memory
is bounded by the file's own size, never by what it claims.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

FORMAT = "compand_jax.frozen"
VERSION = 2
MAX_HEADER = 8 * 2**20
"""Bytes that a header may have: some ten thousand arrays."""

_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I32": 4, "U32": 4, "F16": 2, "F32": 4}
_ZEROS = b"0" * 64
_SEAL = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_CHUNK = 2**20


def write_sealed(
    path: str | Path,
    description: dict[str, Any],
    arrays: dict[str, Any],
    check: Callable[[Path], Any] = lambda path: None,
) -> None:
    """Writes arrays and their description so that the file is complete, or as it was before.

    Args:
      path: Of the file.
      description: What JSON can hold.
      arrays: By name; of bool, uint8, int32, uint32, float16 or float32.
      check: Called with the path of the written file before it takes its place; what it raises
        leaves things as they were.

    Raises:
      OSError: The file cannot be written.
      ValueError: The description is no JSON, or the header would be longer than is read.
    """
    try:
        text = json.dumps(description, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"`info` must be what JSON can hold: {error}") from error
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "description": text,
        "sha256": _ZEROS.decode(),
    }
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    data = safetensors.numpy.save(contiguous, metadata)
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER:
        raise ValueError(
            f"`path` must hold at most {MAX_HEADER} bytes of names and shapes, got {length}: "
            "freeze a model with fewer arrays"
        )
    start = 8 + _find_seal(path, data[8 : 8 + length])
    digest = hashlib.sha256(data).hexdigest().encode()
    partial = Path(f"{path}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data[:start] + digest)
            file.write(memoryview(data)[start + 64 :])
        check(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_sealed(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the description and the arrays of a file.

    Raises:
      OSError: The file cannot be read.
      ValueError: It is not one that `write_sealed` wrote, to the last bit.
    """
    if Path(path).is_fifo():  # opening it would wait for a writer
        raise wrong_file(path, "no end: it is a pipe")
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
            raise wrong_file(path, f"a header of {length} bytes in a file of {size}")
        header = file.read(length)
        data = file.read(size - 8 - length)
    start = _find_seal(path, header)
    digest = hashlib.sha256(prefix + header[:start] + _ZEROS + header[start + 64 :])
    digest.update(data)
    if digest.hexdigest().encode() != header[start : start + 64]:
        raise wrong_file(path, "a checksum that is not the file's: it is damaged or cut short")
    entries = read_json(path, header)
    metadata = entries.pop("__metadata__", None)
    description = _check_metadata(path, metadata)
    _check_layout(path, entries, len(data))
    try:
        arrays = safetensors.numpy.load(prefix + header + data)
    except SafetensorError as error:
        raise wrong_file(path, str(error)) from error
    return description, arrays


def wrong_file(path: str | Path, found: str) -> ValueError:
    """Returns the error that says what was found where a frozen model should be."""
    return ValueError(
        f"`path` must be a frozen model's file, got {path} with {' '.join(found.split())[:300]}: "
        "write it again with save"
    )


def read_json(path: str | Path, text: bytes | str) -> dict[str, Any]:
    """Returns a JSON object without duplicate keys; ValueError if it is none."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise wrong_file(path, "a name twice in its JSON")
        return found

    try:
        found = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise wrong_file(path, f"no JSON ({error})") from error
    if not isinstance(found, dict):
        raise wrong_file(path, "JSON that is no object")
    return found


def _find_seal(path: str | Path, header: bytes) -> int:
    found = [match.start(1) for match in _SEAL.finditer(header)]
    if len(found) != 1:
        raise wrong_file(path, "no checksum")
    return found[0]


def _check_metadata(path: str | Path, metadata: Any) -> dict[str, Any]:
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise wrong_file(path, f"no metadata of the format {FORMAT}")
    if metadata.get("version") != str(VERSION):
        raise ValueError(
            f"`path` must be of version {VERSION} of the format, got {path} of version "
            f"{str(metadata.get('version'))[:20]!r}: read it with the release that wrote it"
        )
    if not isinstance(metadata.get("description"), str):
        raise wrong_file(path, "no description")
    return read_json(path, metadata["description"])


def _check_layout(path: str | Path, entries: dict[str, Any], size: int) -> None:
    """Raises ValueError unless the arrays are of known types and fill the data, one by one."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: _start(path, item[1])):
        start, stop = entry["data_offsets"]
        count = math.prod(entry["shape"])
        if start != end or stop - start != count * _ITEM_BYTES[entry["dtype"]]:
            raise wrong_file(path, f"the array {name!r} in other bytes than its own")
        end = stop
    if end != size:
        raise wrong_file(path, f"{size} bytes of data, of which {end} are described")


def _start(path: str | Path, entry: Any) -> int:
    """Returns where an array's bytes start; ValueError if it is not described as one."""
    well_formed = (
        isinstance(entry, dict)
        and entry.keys() == {"dtype", "shape", "data_offsets"}
        and isinstance(entry["dtype"], str)
        and entry["dtype"] in _ITEM_BYTES
        and is_shape(entry["shape"])
        and is_shape(entry["data_offsets"])
        and len(entry["data_offsets"]) == 2
    )
    if not well_formed:
        raise wrong_file(path, f"an array described as {str(entry)[:80]}")
    return entry["data_offsets"][0]


def is_shape(value: Any) -> bool:
    """Returns whether a value from JSON is a list of at most 32 integers from 0 to 2^48."""
    return (
        isinstance(value, list)
        and len(value) <= 32
        and all(type(n) is int and 0 <= n <= 2**48 for n in value)
    )
