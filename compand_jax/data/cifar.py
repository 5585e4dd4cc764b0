"""CIFAR as tensorflow-datasets data sets: made and read without TensorFlow."""

import contextlib
import errno
import io
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from compand_jax.data.cifar_archive import (
    SIDE,
    Archive,
    ArchiveSpec,
    archive_spec,
    download_archive,
    read_archive,
)
from compand_jax.data.packages import needed_for

with needed_for("CIFAR", "tensorflow-datasets"):
    import tensorflow_datasets as tfds
with needed_for("CIFAR", "pillow"):
    from PIL import Image
with needed_for("CIFAR", "tqdm"):
    from tqdm import tqdm

# The version of tensorflow-datasets' own builder, whose features and order these are.
VERSION = "3.0.2"
SPLITS = ("train", "test")
_FORMAT = "array_record"
_BATCH = 1000


class _CifarInfo(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Does nothing: there is no bucket, and the library leaves a temporary directory here."""


class _CifarBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The library's own CIFAR builder needs TensorFlow; this one yields PNG bytes and does not."""

    VERSION = tfds.core.Version(VERSION)

    def __init__(self, spec: ArchiveSpec, archive: Archive, data_dir: Path):
        # One class for both data sets; the library has it as a constant of the class.
        self.name = spec.name  # pyright: ignore[reportAttributeAccessIssue]
        self._spec = spec
        self._archive = archive
        super().__init__(data_dir=data_dir, file_format=_FORMAT)

    def _info(self) -> tfds.core.DatasetInfo:
        features: dict[str, Any] = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(SIDE, SIDE, 3), encoding_format="png"),
        }
        for key, names in self._archive.class_names.items():
            features[key] = tfds.features.ClassLabel(names=names)
        return _CifarInfo(
            builder=self,
            description=f"{self.name}: 32 x 32 colour images, from the official binary archive.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in self._archive.records}

    def _generate_examples(self, split):
        # The key decides the shuffled order, so it is the same in every preparation.
        keys = [column.key for column in self._spec.labels]
        for index, record in enumerate(self._archive.records[split]):
            labels, planes = record[: len(keys)], record[len(keys) :]
            png = io.BytesIO()
            pixels = planes.reshape(3, SIDE, SIDE).transpose(1, 2, 0)
            # Level 1 is within 2 % of the smallest file, at a tenth of the time.
            Image.fromarray(np.ascontiguousarray(pixels)).save(png, "PNG", compress_level=1)
            png.seek(0)
            example = dict(zip(keys, labels.tolist(), strict=True))
            yield index, example | {"id": f"{split}_{index:05d}", "image": png}


def prepare(name: str, archive: Path | None, data_dir: Path) -> Path:
    """Implements `compand_jax.data.images.prepare_cifar`."""
    spec = archive_spec(name)
    target = data_dir / name / VERSION
    if is_prepared(name, data_dir):
        return target
    content = None if archive is None else read_archive(spec, archive)
    with _build_directory(spec, data_dir) as build:
        if content is None:
            content = read_archive(spec, download_archive(spec, build))
        _write(spec, content, build)
        target.parent.mkdir(exist_ok=True)
        try:
            os.rename(build / name / VERSION, target)
        except OSError:
            # Another process may have prepared the same data set meanwhile.
            if not is_prepared(name, data_dir):
                raise
    return target


def is_prepared(name: str, data_dir: str | Path) -> bool:
    """Returns whether the data set `name` is in `data_dir`.

    Raises:
      ValueError: if the name is unknown, or the data set is there, but damaged.
    """
    spec = archive_spec(name)
    if not (Path(data_dir) / name / VERSION).exists():
        return False
    _open(spec, Path(data_dir))
    return True


def read_prepared(
    name: str, data_dir: str | Path
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], int]:
    """Returns images uint8 [n, 32, 32, 3] and labels int32 [n] per split, and the class count.

    Raises:
      FileNotFoundError: if the data set is not prepared in `data_dir`.
      ValueError: if it is damaged.
    """
    spec, data_dir = archive_spec(name), Path(data_dir)
    if not (data_dir / name / VERSION).exists():
        raise FileNotFoundError(
            f"`data_dir` must hold {name}, got {str(data_dir)!r}, in which {name} is not "
            f"prepared: run `{_command(name, data_dir)}`"
        )
    sources, num_classes = _open(spec, data_dir)
    with _damage(spec, data_dir):
        return {split: _read_split(source, split) for split, source in sources.items()}, num_classes


def _read_split(source: Any, split: str) -> tuple[np.ndarray, np.ndarray]:
    images = np.empty((len(source), SIDE, SIDE, 3), np.uint8)
    labels = np.empty(len(source), np.int32)
    with tqdm(desc=f"reading {split}", total=len(source), unit="image", leave=False) as bar:
        for start in range(0, len(source), _BATCH):
            batch = range(start, min(start + _BATCH, len(source)))
            # Many records at a time are read ten times as fast as one at a time.
            for i, example in zip(batch, source.__getitems__(list(batch)), strict=True):
                images[i] = np.asarray(Image.open(io.BytesIO(example["image"]), formats=("PNG",)))
                labels[i] = example["label"]
            bar.update(len(batch))
    return images, labels


def _open(spec: ArchiveSpec, data_dir: Path) -> tuple[dict[str, Any], int]:
    with _damage(spec, data_dir):
        builder: Any = tfds.builder_from_directory(data_dir / spec.name / VERSION)
        sources = {}
        for split in SPLITS:
            if not builder.info.splits[split].num_examples:
                raise ValueError(f"its split {split!r} is empty")
            # Decoded by Pillow here: the library advises OpenCV at every use otherwise.
            decoders = {"image": tfds.decode.SkipDecoding()}
            source = builder.as_data_source(split, decoders=decoders)
            # The index is at a file's end, so this finds truncated and missing files at once.
            source[len(source) - 1]
            sources[split] = source
        return sources, builder.info.features["label"].num_classes


@contextlib.contextmanager
def _damage(spec: ArchiveSpec, data_dir: Path) -> Iterator[None]:
    try:
        yield
    except (PermissionError, MemoryError):  # No reason to delete anything.
        raise
    except Exception as error:  # The libraries raise anything, from KeyError to RuntimeError.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"`data_dir` must hold {spec.name} as it was prepared, got a damaged one in "
            f"{str(data_dir / spec.name)!r} ({reason:.200}): delete that folder and run "
            f"`{_command(spec.name, data_dir)}`"
        ) from error


def _write(spec: ArchiveSpec, archive: Archive, build: Path) -> None:
    builder = _CifarBuilder(spec, archive, build)
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    # What the library prints names the temporary directory; its progress bars are on stderr.
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_config=config)
    except (OSError, RuntimeError) as error:  # The array_record writer raises RuntimeError.
        raise OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"`data_dir` must be where {spec.total_bytes / 1e6:.0f} MB can be written, got "
            f"{str(build.parent)!r}: {error}; free some space or choose another",
        ) from error


@contextlib.contextmanager
def _build_directory(spec: ArchiveSpec, data_dir: Path) -> Iterator[Path]:
    """Yields a directory beside the target, deleted at the end with all that is in it."""
    made = [path for path in (data_dir, *data_dir.parents) if not path.exists()]
    try:
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            build = tempfile.TemporaryDirectory(dir=data_dir, prefix=f".{spec.name}-")
        except OSError as error:
            raise OSError(
                error.errno,
                f"`data_dir` must be a directory that can be written to, got {str(data_dir)!r} "
                f"({error.strerror}): choose another or change its permissions",
            ) from error
        with build:
            # Twice the records: a compressed download, and the compressed result.
            needed, free = 2 * spec.total_bytes, shutil.disk_usage(data_dir).free
            if free < needed:
                raise OSError(
                    errno.ENOSPC,
                    f"`data_dir` must have {needed / 1e6:.0f} MB of free space, got "
                    f"{free / 1e6:.0f} MB in {str(data_dir)!r}: free some or choose another",
                )
            yield Path(build.name)
    except BaseException:
        for path in (data_dir / spec.name, *made):
            with contextlib.suppress(OSError):  # Not empty, so not ours.
                path.rmdir()
        raise


def _command(name: str, data_dir: str | Path) -> str:
    return f"compand prepare_data {name} --data-dir {shlex.quote(str(data_dir))}"
