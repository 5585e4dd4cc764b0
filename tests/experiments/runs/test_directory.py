"""A run's directory: opened for the same configuration only, and left alone otherwise."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from tiny_runs import replace, snapshot, tiny_config

from compand_jax import QuantConfig
from compand_jax.experiments import records
from compand_jax.experiments.errors import UserError
from compand_jax.experiments.records import write_json
from compand_jax.experiments.runs.config import FULL_PRECISION, METHODS, Method, to_json
from compand_jax.experiments.runs.directory import (
    find_stages,
    finished_stages,
    open_run_dir,
    read_config,
    read_results,
)

pytestmark = pytest.mark.quick

UNIFORM, PER_LAYER = Method("uniform"), Method("mu_law", "per_layer")
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def config(tmp_path):
    return tiny_config(tmp_path / "runs" / "run")


def test_opens_anew_and_again(config):
    open_run_dir(config, 1)
    assert read_config(config.run_dir) == config
    before = snapshot(config.run_dir)
    open_run_dir(config, 1)
    assert snapshot(config.run_dir) == before


def test_is_found_where_it_was_moved_to(config, tmp_path):
    open_run_dir(config, 1)
    shutil.move(config.run_dir, tmp_path / "moved")
    assert read_config(tmp_path / "moved") == replace(config, run_dir=tmp_path / "moved")


def test_another_configuration_is_refused_and_nothing_overwritten(config):
    open_run_dir(config, 1)
    before = snapshot(config.run_dir)
    message = (
        "`run_dir` must be of this configuration, got .*run where batch_size is 16 there, 32 here; "
        "epochs is 2 there, 3 here; seed is 0 there, 7 here: choose another directory or the same"
    )
    with pytest.raises(UserError, match=message):
        open_run_dir(replace(config, seed=7, epochs=3, batch_size=32), 1)
    assert snapshot(config.run_dir) == before


def test_fields_of_the_fine_tuning_may_change_until_it_begins(config):
    open_run_dir(config, 1)
    three = replace(config, quant=QuantConfig(weight_bits=3), mu_learning_rate=0.1)
    open_run_dir(three, 1)
    assert read_config(config.run_dir) == three
    (config.run_dir / "uniform").mkdir()
    with pytest.raises(
        UserError, match="mu_learning_rate is 0.1 there, 0.003 here; quant.weight_bits is 3"
    ):
        open_run_dir(config, 1)
    assert read_config(config.run_dir) == three


def test_methods_add_up(config):
    open_run_dir(replace(config, methods=(UNIFORM, Method("mu_law", "single"))), 1)
    (config.run_dir / "uniform").mkdir()
    open_run_dir(replace(config, methods=(PER_LAYER,)), 1)
    assert read_config(config.run_dir).methods == (UNIFORM, PER_LAYER)


def test_directory_with_other_files(config):
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "thesis.tex").write_text("mine")
    before = snapshot(config.run_dir)
    with pytest.raises(UserError, match="`run_dir` must be new, empty or a run's directory, got"):
        open_run_dir(config, 1)
    assert snapshot(config.run_dir) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "`path` must be a JSON file, got .*config.json .*: restore it, or delete it"),
        ('{"quant": 4}', "this version's configuration, got .*config.json with none: choose"),
        ('{"seed": 0, "future": 1}', "this version's configuration, .* the unknown fields future"),
        ("[]", "`run_dir` must hold this version's configuration"),
    ],
)
def test_configuration_that_cannot_be_read(config, text, message):
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.json").write_text(text)
    for use in (lambda: open_run_dir(config, 1), lambda: read_config(config.run_dir)):
        with pytest.raises(UserError, match=message):
            use()
    assert snapshot(config.run_dir) == {"config.json": text.encode()}


def test_no_run(tmp_path):
    with pytest.raises(UserError, match="`run_dir` must be a run's directory, .* got"):
        read_config(tmp_path)
    assert finished_stages(tmp_path) == []


def test_path_below_a_file(config, tmp_path):
    (tmp_path / "runs").write_text("kept")
    with pytest.raises(UserError, match="`run_dir` must be a directory that can be written, got"):
        open_run_dir(config, 1)
    assert snapshot(tmp_path) == {"runs": b"kept"}


def test_directory_without_permission(config, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(records.tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match=r"`run_dir` .* got .*run \(Permission denied\): choose"):
        open_run_dir(config, 1)
    assert not list(tmp_path.iterdir())


def test_record_directory_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(
        UserError, match="`record_dir` must be a directory that can be written, got"
    ):
        open_run_dir(replace(config, record_dir=tmp_path / "file" / "below"), 1)
    assert snapshot(tmp_path) == {"file": b"kept"}
    assert not config.run_dir.exists()


def test_full_disk_before_the_run(config, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100e6, 99e6, 1e6))
    message = r"`run_dir` must have 2.5 MB free for its checkpoints, got .*run with 1.0 MB: choose"
    with pytest.raises(UserError, match=message):
        open_run_dir(config, 2_500_000)
    assert not list(tmp_path.iterdir())
    config.run_dir.mkdir(parents=True)
    with pytest.raises(UserError, match=message):
        open_run_dir(config, 2_500_000)
    assert list(config.run_dir.parent.iterdir()) == [config.run_dir]  # was there before
    open_run_dir(config, 1_000_000)


def test_results_come_in_the_order_of_the_stages(tmp_path):
    names = [method.name for method in METHODS]
    for name in (names[3], FULL_PRECISION, names[0]):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "result.json", {"stage": name})
    (tmp_path / names[1]).mkdir()  # not finished
    expected = [FULL_PRECISION, names[0], names[3]]
    assert finished_stages(tmp_path) == expected
    assert [result["stage"] for result in read_results(tmp_path)] == expected


def test_configuration_is_written_as_json(config):
    open_run_dir(config, 1)
    stored = json.loads(Path(config.run_dir / "config.json").read_text())
    assert stored == json.loads(json.dumps(to_json(config)))


def test_a_stage_is_found_by_its_directory_or_its_runs(config, monkeypatch):
    open_run_dir(config, 1)
    run_dir = config.run_dir
    for name in (FULL_PRECISION, "uniform"):
        (run_dir / name).mkdir()
        write_json(run_dir / name / "result.json", {})
    (run_dir / "mu_law-single").mkdir()  # not finished
    assert find_stages(run_dir) == (run_dir, [FULL_PRECISION, "uniform"])
    assert find_stages(run_dir / "uniform") == (run_dir, ["uniform"])
    assert find_stages(run_dir / "mu_law-single") == (run_dir, [])
    monkeypatch.chdir(run_dir)
    assert find_stages(Path("uniform")) == (run_dir, ["uniform"])
    assert find_stages(run_dir.parent) == (run_dir.parent, [])


def test_configuration_with_a_wrong_field(config):
    open_run_dir(config, 1)
    stored = json.loads((config.run_dir / "config.json").read_text())
    for field, value in {"methods": ["x"], "epochs": -1}.items():
        write_json(config.run_dir / "config.json", stored | {field: value})
        with pytest.raises(UserError, match=f"`{field}` must be .*, got"):
            read_config(config.run_dir)
