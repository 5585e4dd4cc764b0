"""Files of records are whole or as they were; what a record was made with."""

import json
import re

import pytest
from tiny_runs import snapshot

from compand_jax.experiments import records
from compand_jax.experiments.errors import UserError, require, user_errors
from compand_jax.experiments.records import (
    provenance,
    read_json,
    source_digest,
    write_json,
    write_text,
)

pytestmark = pytest.mark.quick


def test_files_are_whole_or_as_before(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("inf")})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "half")
    assert snapshot(tmp_path) == {"result.json": b'{\n "a": 1\n}\n'}


def test_writers_of_one_file_do_not_fail_each_other(tmp_path, monkeypatch):
    path, replaces = tmp_path / "study.json", records.os.replace

    def after_another(source, target):
        monkeypatch.setattr(records.os, "replace", replaces)
        write_json(path, {"a": 1})
        replaces(source, target)

    monkeypatch.setattr(records.os, "replace", after_another)
    write_json(path, {"a": 2})
    assert snapshot(tmp_path) == {"study.json": b'{\n "a": 2\n}\n'}


def test_provenance_names_versions_hardware_and_date():
    found = provenance()
    assert {"python", "jax", "flax", "optax", "compand-jax"} <= found["versions"].keys()
    assert found["devices"].startswith("8 x ")
    assert "cores" in found["devices"]
    assert found["date"].endswith("+00:00")
    json.dumps(found)


def test_the_source_is_named_by_a_digest_of_its_files(tmp_path, monkeypatch):
    assert provenance()["source"] == source_digest()
    assert re.fullmatch("[0-9a-f]{16}", source_digest())
    (tmp_path / "a").mkdir()
    digests = []
    for name, text in (("a/b.py", "x"), ("a/b.py", "y"), ("a/c.py", ""), ("a/no.txt", "z")):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(records, "_PACKAGE", tmp_path)
        digests.append(source_digest.__wrapped__())
    assert len(set(digests)) == 3
    assert digests[2] == digests[3]  # of .py files alone


def test_damaged_json_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match="`path` must be a JSON file, got .*a.json .*: restore it"):
        read_json(tmp_path / "a.json")


def test_errors_of_some_kinds_are_the_users():
    with pytest.raises(UserError, match="^gone$"), user_errors(OSError, ValueError):
        raise FileNotFoundError("gone")
    with pytest.raises(UserError, match="^No space left on device$"), user_errors(OSError):
        raise OSError(28, "No space left on device")
    with pytest.raises(KeyError), user_errors(OSError, ValueError):
        raise KeyError("a bug")


def test_a_wrong_field_is_named():
    class Options:
        size = 3

    require(Options, "size", True, "2")
    with pytest.raises(UserError, match="^`size` must be 2, got 3: change it$"):
        require(Options, "size", False, "2")
