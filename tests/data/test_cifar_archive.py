"""What is read from an archive or refused, and the download of one."""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import http.server
import tarfile
import threading

import archives
import pytest

from compand_jax.data import cifar_archive
from compand_jax.data import images as data


@pytest.fixture
def specs(monkeypatch):
    """Lets the archives be small."""
    monkeypatch.setattr(cifar_archive, "SPECS", archives.small_specs())
    return cifar_archive.SPECS


@pytest.fixture
def make(tmp_path, specs):
    del specs
    return functools.partial(archives.write_archive, tmp_path)


@pytest.mark.quick
def test_official_sizes():
    for name, label_bytes in (("cifar10", 1), ("cifar100", 2)):
        spec = cifar_archive.SPECS[name]
        assert spec.total_bytes == 60_000 * (label_bytes + 3072)
        assert sum(f.records for f in spec.files if f.split == "train") == 50_000
        assert spec.url.startswith("https://www.cs.toronto.edu/~kriz/")
    assert {f.name: f.records for f in cifar_archive.SPECS["cifar10"].files} == {
        **{f"data_batch_{i}.bin": 10_000 for i in (1, 2, 3, 4, 5)},
        "test_batch.bin": 10_000,
    }


def test_a_harmless_difference_is_accepted(make, tmp_path):
    readme = tarfile.TarInfo("cifar-10-batches-bin/readme.html")
    folder = tarfile.TarInfo("cifar-10-batches-bin")
    folder.type = tarfile.DIRTYPE
    archive = make(root="./cifar-10-batches-bin", extra=[readme, folder])
    data.prepare_cifar("cifar10", archive, tmp_path)


def rename_member(members):
    members["data_batch_9.bin"] = members.pop("data_batch_3.bin")


def shorten_member(members):
    members["data_batch_3.bin"] = members["data_batch_3.bin"][:-1]


def wrong_label(members):
    members["test_batch.bin"] = b"\x0a" + members["test_batch.bin"][1:]


def drop_class(members):
    members["batches.meta.txt"] = b"label_0\nlabel_1\n"


def repeat_class(members):
    members["batches.meta.txt"] = b"label_0\n" * 10


def long_names(members):
    members["batches.meta.txt"] = b"x" * (2 << 20)


def special_member(kind):
    info = tarfile.TarInfo("cifar-10-batches-bin/batches.meta.txt")
    info.type = kind
    info.linkname = "/etc/passwd"
    return info


@pytest.mark.quick
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"change": rename_member}, "cifar-10-batches-bin/data_batch_3.bin is not in it"),
        ({"change": shorten_member}, "'.*data_batch_3.bin' has 36875 bytes, and must have 36876"),
        ({"change": wrong_label}, "test_batch.bin has the label 10, and the largest is 9"),
        ({"change": drop_class}, "batches.meta.txt names 2 classes, and must name 10"),
        ({"change": repeat_class}, "batches.meta.txt names 1 classes, and must name 10"),
        ({"change": long_names}, "'.*meta.txt' has 2097152 bytes, too many for class names"),
        ({"root": "cifar-100-binary"}, "it has the member 'cifar-100-binary/batches.meta.txt'"),
        ({"root": "../cifar-10-batches-bin"}, "it has the member '../cifar-10-batches-bin/"),
        ({"extra": [special_member(tarfile.REGTYPE)]}, "it has '.*batches.meta.txt' twice"),
        (
            {"change": lambda m: m.pop("batches.meta.txt"), "extra": [special_member(b"2")]},
            "its '.*batches.meta.txt' is no regular file",
        ),
    ],
)
def test_foreign_archive_is_refused(changes, problem, make, tmp_path):
    archive = make(**changes)
    message = f"`archive` must be the cifar10 binary archive, got '.*': {problem}.*; get it from"
    with pytest.raises(ValueError, match=message) as error:
        data.prepare_cifar("cifar10", archive, tmp_path / "new" / "data")
    assert "\n" not in str(error.value)
    assert archives.nothing_left(tmp_path, archive)


def test_archive_of_the_other_data_set_is_refused(make, tmp_path):
    archive = make("cifar100").rename(tmp_path / "cifar-10-binary.tar.gz")
    with pytest.raises(ValueError, match=r"must be the cifar10 binary archive, .*cifar-100-bin"):
        data.prepare_cifar("cifar10", archive, tmp_path / "data")
    assert archives.nothing_left(tmp_path, archive)


@pytest.mark.parametrize("keep", [0, 1, 10, 500, 0.3, 0.9, 0.999, -8, -4, -1])
def test_truncated_archive_is_refused(keep, make, tmp_path):
    archive = make()
    content = archive.read_bytes()
    archive.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(
        ValueError, match=r"must be the cifar10 binary archive, got '.*': (it|cifar)"
    ):
        data.prepare_cifar("cifar10", archive, tmp_path / "data")
    assert archives.nothing_left(tmp_path, archive)


@pytest.mark.parametrize("at", [0, 0.2, 0.5, 0.8, -6])
def test_changed_byte_is_refused(at, make, tmp_path):
    archive = make()
    content = bytearray(archive.read_bytes())
    content[int(at * len(content)) if isinstance(at, float) else at] ^= 0x55
    archive.write_bytes(content)
    with pytest.raises(ValueError, match="`archive` must be the cifar10 binary archive, got"):
        data.prepare_cifar("cifar10", archive, tmp_path / "data")
    assert archives.nothing_left(tmp_path, archive)


@pytest.mark.quick
@pytest.mark.parametrize(
    "content", [b"not compressed", gzip.compress(b"not a tar" * 1000)], ids=["plain", "packed"]
)
def test_other_file_is_refused(content, specs, tmp_path):
    archive = tmp_path / "cifar-10-binary.tar.gz"
    archive.write_bytes(content)
    with pytest.raises(ValueError, match="it is truncated or damaged"):
        data.prepare_cifar("cifar10", archive, tmp_path / "data")
    assert archives.nothing_left(tmp_path, archive)


@pytest.mark.quick
@pytest.mark.parametrize("path", [".", "missing.tar.gz"])
def test_no_archive(path, tmp_path):
    message = "`archive` must be the file cifar-10-binary.tar.gz, got '.*', which is no file"
    with pytest.raises(FileNotFoundError, match=message):
        data.prepare_cifar("cifar10", tmp_path / path, tmp_path / "data")
    assert not list(tmp_path.iterdir())


@contextlib.contextmanager
def served(folder):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            del args

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_download(make, specs, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "served"
    folder.mkdir()
    archive = make().rename(folder / "cifar-10-binary.tar.gz")
    with served(folder) as address:
        specs["cifar10"] = dataclasses.replace(
            specs["cifar10"],
            url=f"{address}/{archive.name}",
            md5=hashlib.md5(archive.read_bytes()).hexdigest(),
        )
        data.prepare_cifar("cifar10", data_dir=tmp_path / "data")
        assert len(data.load_data("cifar10", tmp_path / "data").train_images) == 5 * archives.TRAIN
        assert [p.name for p in (tmp_path / "data").iterdir()] == ["cifar10"]

        archive.unlink()
        message = "could not be downloaded: .*not found; download it by other means and pass it as"
        with pytest.raises(OSError, match=message):
            data.prepare_cifar("cifar10", data_dir=tmp_path / "other")
    with pytest.raises(OSError, match=r"could not be downloaded: .*refused; download it by"):
        data.prepare_cifar("cifar10", data_dir=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_download_with_another_checksum(make, specs, tmp_path):
    archive = make()
    specs["cifar10"] = dataclasses.replace(specs["cifar10"], url=archive.as_uri())
    message = r"must have the md5 checksum c32a\w+, got \w+ \(\d+ bytes\): try again, or download"
    with pytest.raises(ValueError, match=message):
        data.prepare_cifar("cifar10", data_dir=tmp_path / "data")
    assert archives.nothing_left(tmp_path, archive)
