"""The official CIFAR binary archives: where they are, what is in them, and how to check them.

Layout: https://www.cs.toronto.edu/~kriz/cifar.html, section "Binary version".
"""

import gzip
import hashlib
import http.client
import posixpath
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

import numpy as np

from compand_jax.data.packages import needed_for

with needed_for("CIFAR", "tqdm"):
    from tqdm import tqdm

SIDE = 32
PIXEL_BYTES = 3 * SIDE * SIDE
_CHUNK = 1 << 20
_TIMEOUT_S = 60.0
_DAMAGED = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError)


@dataclass(frozen=True)
class RecordFile:
    """One member of the archive: its name, the split it belongs to, its number of records."""

    name: str
    split: str
    records: int


@dataclass(frozen=True)
class LabelColumn:
    """One label byte of a record: its key, its number of classes, the member that names them."""

    key: str
    num_classes: int
    names_file: str


@dataclass(frozen=True)
class ArchiveSpec:
    """What an archive must be: `md5` is the official file's, `labels` are in byte order."""

    name: str
    url: str
    md5: str
    root: str
    files: tuple[RecordFile, ...]
    labels: tuple[LabelColumn, ...]

    @property
    def record_bytes(self) -> int:
        """Bytes of one record: its labels, then the red, green and blue plane."""
        return len(self.labels) + PIXEL_BYTES

    @property
    def total_bytes(self) -> int:
        """Bytes of all records."""
        return self.record_bytes * sum(file.records for file in self.files)


@dataclass(frozen=True)
class Archive:
    """A checked archive's content.

    Attributes:
      records: per split, uint8 [n, label bytes + 3072], in the archive's order.
      class_names: per label key, the names of its classes.
    """

    records: Mapping[str, np.ndarray]
    class_names: Mapping[str, list[str]]


# The md5 sums are those on https://www.cs.toronto.edu/~kriz/cifar.html.
SPECS: Mapping[str, ArchiveSpec] = MappingProxyType(
    {
        "cifar10": ArchiveSpec(
            name="cifar10",
            url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            md5="c32a1d4ab5d03f1284b67883e8d87530",
            root="cifar-10-batches-bin",
            files=(
                *(RecordFile(f"data_batch_{i}.bin", "train", 10_000) for i in range(1, 6)),
                RecordFile("test_batch.bin", "test", 10_000),
            ),
            labels=(LabelColumn("label", 10, "batches.meta.txt"),),
        ),
        "cifar100": ArchiveSpec(
            name="cifar100",
            url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            md5="03b5dce01913d631647c71ecec9e9cb8",
            root="cifar-100-binary",
            files=(
                RecordFile("train.bin", "train", 50_000),
                RecordFile("test.bin", "test", 10_000),
            ),
            labels=(
                LabelColumn("coarse_label", 20, "coarse_label_names.txt"),
                LabelColumn("label", 100, "fine_label_names.txt"),
            ),
        ),
    }
)


def archive_spec(name: str) -> ArchiveSpec:
    """Returns the description of the archive called `name`.

    Raises:
      ValueError: if there is no such archive.
    """
    if name not in SPECS:
        raise ValueError(f"`name` must be one of {', '.join(SPECS)}, got {name!r}: choose one")
    return SPECS[name]


def download_archive(spec: ArchiveSpec, folder: Path) -> Path:
    """Downloads the official archive into `folder` and verifies its checksum.

    Args:
      spec: which archive.
      folder: an existing directory for the file.

    Returns:
      The file's path.

    Raises:
      OSError: if the address cannot be read, or the file cannot be written.
      ValueError: if the file has another checksum than the official one.
    """
    path = folder / posixpath.basename(spec.url)
    digest = hashlib.md5(usedforsecurity=False)
    by_hand = "download it by other means and pass it as `archive`"
    try:
        # A write error is not the address's, so only reading is inside this handler.
        response = urllib.request.urlopen(spec.url, timeout=_TIMEOUT_S)
        total = int(response.headers.get("Content-Length") or 0) or None
        with (
            response,
            path.open("wb") as file,
            tqdm(desc=path.name, total=total, unit="B", unit_scale=True) as bar,
        ):
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as err:
        reason = getattr(err, "reason", None) or err
        raise OSError(f"{spec.url} could not be downloaded: {reason}; {by_hand}") from err
    if digest.hexdigest() != spec.md5:
        raise ValueError(
            f"{spec.url} must have the md5 checksum {spec.md5}, got {digest.hexdigest()} "
            f"({path.stat().st_size} bytes): try again, or {by_hand}"
        )
    return path


def read_archive(spec: ArchiveSpec, path: Path) -> Archive:
    """Reads an archive and checks it by structure, so that a rebuilt one is welcome too.

    Checked are the compression's own checksum, the names, sizes and kinds of the members, the
    range of every label, and the number of class names.

    Args:
      spec: what the archive must be.
      path: a gzip-compressed tar file, of any name.

    Returns:
      The records and class names.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the archive is damaged, or another than `spec` describes.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"`archive` must be the file {posixpath.basename(spec.url)}, got {str(path)!r}, "
            "which is no file: correct the path, or leave it out to download the archive"
        )
    sizes = {file.name: file.records * spec.record_bytes for file in spec.files}
    sizes |= {column.names_file: None for column in spec.labels}
    members = _read_members(spec, path, sizes)
    if missing := [name for name in sizes if name not in members]:
        _refuse(spec, path, f"{spec.root}/{missing[0]} is not in it")
    records: dict[str, list[np.ndarray]] = {}
    for file in spec.files:
        rows = np.frombuffer(members[file.name], np.uint8).reshape(-1, spec.record_bytes)
        _check_labels(spec, path, file, rows)
        records.setdefault(file.split, []).append(rows)
    return Archive(
        records={split: np.concatenate(parts) for split, parts in records.items()},
        class_names={
            column.key: _class_names(spec, path, column, members[column.names_file])
            for column in spec.labels
        },
    )


def _read_members(
    spec: ArchiveSpec, path: Path, sizes: Mapping[str, int | None]
) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    try:
        with (
            gzip.open(path) as stream,
            tqdm(
                desc=f"reading {path.name}", total=spec.total_bytes, unit="B", unit_scale=True
            ) as bar,
            tarfile.open(fileobj=stream, mode="r|") as tar,
        ):
            for member in tar:
                folder, _, name = posixpath.normpath(member.name).partition("/")
                if folder != spec.root:
                    _refuse(spec, path, f"it has the member {member.name!r}")
                if name in sizes:
                    _check_member(spec, path, member, sizes[name], name in members)
                    members[name] = _content(tar, member)
                    bar.update(member.size)
            # Only the end of the stream has gzip's checksum, and tar stops before it.
            while stream.read(_CHUNK):
                pass
    except _DAMAGED as error:
        _refuse(spec, path, f"it is truncated or damaged ({error})")
    return members


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    content = b"" if file is None else file.read()
    if len(content) != member.size:
        raise EOFError(f"{member.name} ends early")
    return content


def _check_labels(spec: ArchiveSpec, path: Path, file: RecordFile, rows: np.ndarray) -> None:
    for i, column in enumerate(spec.labels):
        if rows[:, i].max(initial=0) >= column.num_classes:
            problem = f"{file.name} has the {column.key} {rows[:, i].max()}"
            _refuse(spec, path, f"{problem}, and the largest is {column.num_classes - 1}")


def _check_member(
    spec: ArchiveSpec, path: Path, member: tarfile.TarInfo, size: int | None, seen: bool
) -> None:
    if seen:
        _refuse(spec, path, f"it has {member.name!r} twice")
    if not member.isfile():
        _refuse(spec, path, f"its {member.name!r} is no regular file")
    if size is None and member.size > _CHUNK:
        _refuse(spec, path, f"{member.name!r} has {member.size} bytes, too many for class names")
    if size is not None and member.size != size:
        _refuse(spec, path, f"{member.name!r} has {member.size} bytes, and must have {size}")


def _class_names(spec: ArchiveSpec, path: Path, column: LabelColumn, content: bytes) -> list[str]:
    names = content.decode("utf-8", errors="replace").split()
    if len(set(names)) != column.num_classes or len(names) != column.num_classes:
        problem = f"{column.names_file} names {len(set(names))} classes"
        _refuse(spec, path, f"{problem}, and must name {column.num_classes}")
    return names


def _refuse(spec: ArchiveSpec, path: Path, problem: str) -> NoReturn:
    raise ValueError(
        f"`archive` must be the {spec.name} binary archive, got {str(path)!r}: {problem}; "
        f"get it from {spec.url}"
    )
