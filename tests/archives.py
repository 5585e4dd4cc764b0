"""Small CIFAR archives for the tests."""

import dataclasses
import io
import tarfile

import numpy as np

from compand_jax.data import cifar_archive

TRAIN, TEST = 12, 5


def small(spec):
    """The same archive with a few records per file."""
    files = tuple(
        dataclasses.replace(f, records=TRAIN if f.split == "train" else TEST) for f in spec.files
    )
    return dataclasses.replace(spec, files=files)


def small_specs():
    return {name: small(spec) for name, spec in cifar_archive.SPECS.items()}


def contents(spec):
    """A valid archive's members, in order: name without folder -> bytes."""
    rng = np.random.default_rng(0)
    members = {}
    for column in spec.labels:
        names = [f"{column.key}_{i}" for i in range(column.num_classes)]
        members[column.names_file] = ("\n".join(names) + "\n\n").encode()
    for file in spec.files:
        pixels = rng.integers(0, 256, (file.records, cifar_archive.PIXEL_BYTES), np.uint8)
        labels = [rng.integers(0, c.num_classes, file.records, np.uint8) for c in spec.labels]
        members[file.name] = np.column_stack([*labels, pixels]).tobytes()
    return members


def write_archive(folder, name="cifar10", *, change=None, root=None, extra=()):
    """Writes a valid archive, changed as asked, and returns its path."""
    spec = cifar_archive.SPECS[name]
    members = contents(spec)
    if change:
        change(members)
    path = folder / f"{name}.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for member, content in members.items():
            info = tarfile.TarInfo(f"{root or spec.root}/{member}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in extra:
            tar.addfile(info)
    return path


def nothing_left(folder, archive):
    """Whether the archive is alone, as it was before."""
    return sorted(folder.iterdir()) == [archive]
