"""The preparation of CIFAR for tensorflow-datasets, and what is read from it."""

import functools
import json
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

import archives
import numpy as np
import pytest
import tensorflow_datasets as tfds

from compand_jax.data import cifar, cifar_archive
from compand_jax.data import images as data

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_data.py"


@pytest.fixture
def specs(monkeypatch):
    """Lets the archives be small."""
    monkeypatch.setattr(cifar_archive, "SPECS", archives.small_specs())
    return cifar_archive.SPECS


@pytest.fixture
def make(tmp_path, specs):
    del specs
    return functools.partial(archives.write_archive, tmp_path)


def rows_of(images, *labels):
    """The records that make these images and labels, sorted."""
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    rows = np.column_stack([*(np.asarray(label).astype(np.uint8) for label in labels), planes])
    return sorted(row.tobytes() for row in rows)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_prepared_data_equals_the_archive_bit_for_bit(name, make, specs, tmp_path):
    path = data.prepare_cifar(name, make(name), tmp_path)
    assert path == tmp_path / name / cifar.VERSION
    loaded = data.load_data(name, tmp_path)
    assert loaded.num_classes == {"cifar10": 10, "cifar100": 100}[name]
    expected = archives.contents(specs[name])
    for split in ("train", "test"):
        files = [expected[f.name] for f in specs[name].files if f.split == split]
        size = specs[name].record_bytes
        rows = sorted(f[i : i + size] for f in files for i in range(0, len(f), size))
        # Read by the library's own public function, as any user of it would.
        source = tfds.data_source(name, split=split, data_dir=tmp_path, download=False)
        examples = list(source)
        images = np.stack([e["image"] for e in examples])
        labels = np.array([e["label"] for e in examples])
        coarse = [[e["coarse_label"] for e in examples]] if name == "cifar100" else []
        assert rows_of(images, *coarse, labels) == rows
        np.testing.assert_array_equal(images, getattr(loaded, f"{split}_images"))
        np.testing.assert_array_equal(labels, getattr(loaded, f"{split}_labels"))
    names = source.dataset_info.features["label"].names
    assert names == [f"label_{i}" for i in range(loaded.num_classes)]
    assert "tensorflow" not in sys.modules


def test_preparation_is_deterministic_and_done_once(make, tmp_path):
    archive = make()
    first = data.prepare_cifar("cifar10", archive, tmp_path / "a")
    second = data.prepare_cifar("cifar10", archive, tmp_path / "b")
    files = sorted(p.name for p in first.iterdir())
    assert files == sorted(p.name for p in second.iterdir())
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes()
    # Only the data set is there, and an existing one is left as it is.
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["cifar10"]
    assert data.prepare_cifar("cifar10", tmp_path / "no archive", tmp_path / "a") == first


def test_two_preparations_at_once(make, tmp_path, monkeypatch):
    archive, write = make(), cifar._write

    def overtaken(spec, content, build):
        write(spec, content, build)
        if not cifar.is_prepared("cifar10", tmp_path):
            shutil.copytree(build / "cifar10", tmp_path / "cifar10")

    monkeypatch.setattr(cifar, "_write", overtaken)
    assert data.prepare_cifar("cifar10", archive, tmp_path).is_dir()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cifar10", archive.name]


def test_directory_that_cannot_be_written_to(make, tmp_path):
    archive = make()
    message = "`data_dir` must be a directory that can be written to, got '.*' .*: choose another"
    for folder in (archive, archive / "below"):
        with pytest.raises(OSError, match=message):
            data.prepare_cifar("cifar10", archive, folder)
    assert archives.nothing_left(tmp_path, archive)


def test_disk_too_small(make, tmp_path, monkeypatch):
    archive = make()
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"`data_dir` must have .* MB of free space, got 0 MB in"):
        data.prepare_cifar("cifar10", archive, tmp_path / "a" / "b")
    assert archives.nothing_left(tmp_path, archive)


@pytest.mark.parametrize("error", [RuntimeError("No space left"), OSError(28, "No space left")])
def test_disk_full_while_writing(error, make, tmp_path, monkeypatch):
    archive = make()

    def fail(self, **kwargs):
        (Path(self.data_dir).parent / "half-made").mkdir(parents=True)
        raise error

    monkeypatch.setattr(cifar._CifarBuilder, "download_and_prepare", fail)
    message = "`data_dir` must be where .* MB can be written, got '.*': .*No space left; free some"
    with pytest.raises(OSError, match=message):
        data.prepare_cifar("cifar10", archive, tmp_path / "a" / "b")
    assert archives.nothing_left(tmp_path, archive)


def test_interrupted(make, tmp_path, monkeypatch):
    archive = make()

    def fail(self, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cifar._CifarBuilder, "download_and_prepare", fail)
    with pytest.raises(KeyboardInterrupt):
        data.prepare_cifar("cifar10", archive, tmp_path / "data")
    assert archives.nothing_left(tmp_path, archive)


def shard(folder):
    return next(folder.glob("*train.array_record*"))


def truncate(folder):
    path = shard(folder)
    path.write_bytes(path.read_bytes()[:-100])


def change_bytes(folder):
    path = shard(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :: 7] = bytes(len(content[len(content) // 2 :: 7]))
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        change_bytes,
        lambda folder: shard(folder).unlink(),
        lambda folder: shard(folder).write_bytes(b""),
        lambda folder: (folder / "dataset_info.json").unlink(),
        lambda folder: (folder / "dataset_info.json").write_text("{"),
        lambda folder: (folder / "features.json").write_text("{}"),
        lambda folder: [path.unlink() for path in folder.iterdir()],
    ],
)
def test_damaged_data_set(damage, make, tmp_path):
    damage(data.prepare_cifar("cifar10", make(), tmp_path))
    message = (
        "`data_dir` must hold cifar10 as it was prepared, got a damaged one in '.*cifar10' "
        r"\(.+\): delete that folder and run `compand prepare_data cifar10 --data-dir"
    )
    with pytest.raises(ValueError, match=message) as error:
        data.load_data("cifar10", tmp_path)
    assert "\n" not in str(error.value)


def test_a_data_set_that_may_not_be_read_is_not_called_damaged(make, tmp_path, monkeypatch):
    data.prepare_cifar("cifar10", make(), tmp_path)

    def fail(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(tfds, "builder_from_directory", fail)
    with pytest.raises(PermissionError, match=r"Permission denied: '.*cifar10"):
        data.load_data("cifar10", tmp_path)


def test_damaged_data_set_is_not_prepared_over(make, tmp_path):
    archive = make()
    truncate(data.prepare_cifar("cifar10", archive, tmp_path))
    with pytest.raises(ValueError, match="got a damaged one in"):
        data.prepare_cifar("cifar10", archive, tmp_path)


def test_prepared_data_set_with_an_empty_split(make, tmp_path):
    info = data.prepare_cifar("cifar10", make(), tmp_path) / "dataset_info.json"
    content = json.loads(info.read_text())
    [split] = [split for split in content["splits"] if split["name"] == "test"]
    split["shardLengths"] = ["0"]
    info.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"got a damaged one in .* \(its split 'test' is empty\)"):
        data.load_data("cifar10", tmp_path)


def test_nothing_is_left_in_the_systems_temporary_directory(make, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    data.prepare_cifar("cifar10", make(), tmp_path)
    data.load_data("cifar10", tmp_path)
    assert not list((tmp_path / "tmp").iterdir())


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the script; returns its exit status, and the last lines of stdout and stderr."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return call


def test_script(run, make, tmp_path):
    archive = make()
    args = ("cifar10", "--archive", archive, "--data-dir", tmp_path / "data")
    code, out, _ = run(*args)
    assert (code, out) == (0, f"cifar10 is prepared in {tmp_path}/data/cifar10/{cifar.VERSION}\n")
    code, out, _ = run(*args)
    assert code == 0
    assert out.endswith("is already prepared in " + str(tmp_path / "data") + ": nothing to do\n")


def test_script_reports_an_error_in_one_line(run, make, tmp_path):
    archive = make(change=lambda members: members.pop("data_batch_3.bin"))
    code, out, err = run("cifar10", "--archive", archive, "--data-dir", tmp_path / "data")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: `archive` must be the cifar10 binary archive")
    assert archives.nothing_left(tmp_path, archive)
    code, _, err = run("cifar10", "--archive", make(), "--data-dir", archive)
    assert code == 2
    assert err.splitlines()[-1].startswith("error: `data_dir` must be a directory that can be")


@pytest.mark.quick
def test_script_with_bad_arguments(run):
    code, _, err = run("mnist")
    assert code == 2
    assert "cifar10" in err
