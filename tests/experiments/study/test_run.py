"""A study's cells: each run once, from one parent, whatever stops or fails; and shared out."""

import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

# Fixtures are imported to be found (F401), and named again where they are used (F811).
from tiny_runs import (
    snapshot,
    standard_promotion,  # noqa: F401
    tiny,  # noqa: F401
    tiny_config,
    tiny_data,
    use_tiny,
)

from compand_jax.experiments.errors import UserError
from compand_jax.experiments.runs import run as experiments
from compand_jax.experiments.runs.config import CONTROL, FULL_PRECISION
from compand_jax.experiments.runs.directory import read_config
from compand_jax.experiments.runs.stages import finished
from compand_jax.experiments.study import listing
from compand_jax.experiments.study import run as study
from compand_jax.experiments.study.grid import FIXED_255, PER_LAYER, grid, study_cells
from compand_jax.experiments.study.listing import list_cells
from compand_jax.experiments.study.records import ROW, histogram_edges
from compand_jax.experiments.study.run import Study, run_study
from compand_jax.training import fit as training

PARENT = tiny_config(Path(), steps_per_call=1)
CELLS = [
    *grid(PARENT, bits=(2,), methods=(CONTROL, PER_LAYER)),
    *grid(PARENT, bits=(2,), methods=(CONTROL,), seeds=(1,)),
    *grid(PARENT, bits=(2,), methods=(PER_LAYER,), mu=FIXED_255),
]
NAMES = [
    f"cnn-digits-conv_norm_act-{what}"
    for what in (
        "control-lr0.02-seed0",
        "w2a2-mu_law-per_layer-seed0",
        "control-lr0.02-seed1",
        "w2a2-mu_law-per_layer-fixed_255-seed0",
    )
]
PARENT_NAME = "cnn-digits-conv_norm_act"


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Reads the tiny data where other data was read, and keeps what is compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "clear_caches", lambda: None)
        study._load.cache_clear()
        yield
        study._load.cache_clear()


@pytest.fixture
def trained(monkeypatch):
    """The stages that are begun, by directory."""
    begun = Counter()
    whole = experiments.fit

    def fit(state, *args, **kwargs):
        begun[str(kwargs["log"].parent.relative_to(kwargs["log"].parents[3]))] += 1
        return whole(state, *args, **kwargs)

    monkeypatch.setattr(experiments, "fit", fit)
    return begun


def at(path, **fields):
    return Study("smoke", path, fields.pop("parents", path / "parents"), **fields)


@pytest.fixture(scope="module")
def done(tmp_path_factory, quick):
    """A finished study."""
    path = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        use_tiny(patch)
        assert run_study(at(path), CELLS, progress=False) == []
    return path


def record(path, name):
    return json.loads((path / "records" / f"{name}.json").read_text())


def test_every_cell_is_a_run_of_its_own_from_the_one_parent(done, tiny):  # noqa: F811
    assert [cell.name for cell in CELLS] == NAMES
    assert {path.stem for path in (done / "records").iterdir()} == {*NAMES, PARENT_NAME}
    assert not any((done / "failures").iterdir())
    parent = read_config(done / "parents" / PARENT_NAME)
    end = finished(parent, tiny_data(), FULL_PRECISION)[1]
    kernels, orders = set(), []
    for name, cell in zip(NAMES, CELLS, strict=True):
        config = read_config(done / "cells" / name)
        assert config.methods == (cell.method,)
        assert not (config.run_dir / FULL_PRECISION).exists()
        row = record(done, name)["row"]
        assert tuple(row) == ROW
        assert row["parent_accuracy"] == record(done, PARENT_NAME)["row"]["accuracy"]
        state = finished(config, tiny_data(), cell.method.name)[1]
        assert int(state.step) == row["steps"] == 4  # one epoch of four steps
        kernels.add(np.asarray(state.params["params"]["conv"]["kernel"]).tobytes())
        orders.append(np.asarray(jax.random.key_data(state.key)).tobytes())
        assert np.any(np.asarray(end.variables["params"]["conv"]["kernel"]))
    # The seed changes the fine-tuning, of all methods alike.
    assert len(kernels) == len(NAMES)
    assert orders[0] == orders[1] == orders[3] != orders[2]


def test_row_of_a_cell(done):
    row = record(done, NAMES[1])["row"]
    fields = {
        "network": "cnn",
        "dataset": "digits",
        "method": "mu_law",
        "weight_bits": 2,
        "act_bits": 2,
        "mu_scope": "per_layer",
        "arrangement": "conv_norm_act",
        "seed": 0,
        "epochs": 1,
        "stage": "cell",
        "mu": "learned",
        "first_last_bits": 2,
        "weight_grid": "midrise",
        "learning_rate": 0.02,
        "parent_epochs": 2,
    }
    assert {name: row[name] for name in fields} == fields
    control = record(done, NAMES[0])["row"]
    assert (control["method"], control["stage"]) == (FULL_PRECISION, "control")
    assert [control[name] for name in ("weight_bits", "mu_scope", "mu")] == [None] * 3
    parent = record(done, PARENT_NAME)["row"]
    assert (parent["method"], parent["stage"], parent["epochs"]) == (FULL_PRECISION, "parent", 2)


def test_a_fixed_mu_stays_and_a_learned_one_moves(done):
    fixed, learned = record(done, NAMES[3]), record(done, NAMES[1])
    mus = [found[name] for row in fixed["curve"] for found in row["quantizers"].values()
           for name in found]  # fmt: skip
    assert len(mus) == 4 * 4
    assert mus == pytest.approx([255] * 16, rel=1e-4)
    first, last = (row["quantizers"]["dense"]["weight_mu"] for row in
                   (learned["curve"][0], learned["curve"][-1]))  # fmt: skip
    assert first != last


def test_histograms_are_of_what_is_quantized(done, tiny):  # noqa: F811
    found = record(done, NAMES[1])
    config = read_config(done / "cells" / NAMES[1])
    state = finished(config, tiny_data(), PER_LAYER.name)[1]
    data = tiny_data()
    kernel = np.asarray(state.params["params"]["conv"]["kernel"], np.float64).ravel()
    scale = found["quantizers"]["conv"]["weight_scale"]
    edges = histogram_edges(scale, signed=True)
    assert edges[[0, -1]] == pytest.approx([-1.25 * scale, 1.25 * scale])
    index = np.clip(np.searchsorted(edges, kernel, side="right") - 1, 0, 59)
    assert found["histograms"]["conv"]["weight"] == np.bincount(index, minlength=60).tolist()
    # The first layer's activations are the images; the second's have no sign.
    images = (data.test_images / 255 - np.array(data.mean)) / np.array(data.std)
    counts = np.array(found["histograms"]["conv"]["act"])
    assert counts.sum() == images.size
    assert found["sites"]["dense"]["act_signed"] is False
    assert sum(found["histograms"]["dense"]["act"]) == 19 * 4 * 4 * 4


def test_a_finished_study_is_not_run_again(done, tiny, trained):  # noqa: F811
    before = snapshot(done)
    assert run_study(at(done), CELLS, progress=False) == []
    assert snapshot(done) == before
    assert trained == {}


def test_a_stopped_cell_goes_on_where_it_was(done, tmp_path, tiny, trained, monkeypatch):  # noqa: F811
    shutil.copytree(done / "parents", tmp_path / "parents")
    whole = training.append_log
    cells = [replace_config(CELLS[0], finetune_epochs=2)]

    def killed(path, row):
        if row["step"] == 6:
            raise KeyboardInterrupt
        whole(path, row)

    monkeypatch.setattr(training, "append_log", killed)
    with pytest.raises(KeyboardInterrupt):
        run_study(at(tmp_path), cells, progress=False)
    assert not (tmp_path / "records" / f"{NAMES[0]}.json").exists()
    checkpoints = tmp_path / "cells" / NAMES[0] / CONTROL.name / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["4"]
    monkeypatch.setattr(training, "append_log", whole)
    assert run_study(at(tmp_path), cells, progress=False) == []
    steps = [row["step"] for row in record(tmp_path, NAMES[0])["curve"]]
    assert steps == list(range(1, 9))
    assert trained == {f"cells/{NAMES[0]}/{CONTROL.name}": 2}  # and no parent


def replace_config(cell, **fields):
    return replace(cell, config=replace(cell.config, **fields))


def test_a_failed_cell_is_recorded_and_the_rest_goes_on(done, tmp_path, tiny):  # noqa: F811
    shutil.copytree(done / "parents", tmp_path / "parents")
    wrong = replace_config(CELLS[2], finetune_learning_rate=1e30)
    failed = run_study(at(tmp_path), [wrong, CELLS[0]], progress=False)
    assert failed == [wrong.name]
    failure = json.loads((tmp_path / "failures" / f"{wrong.name}.json").read_text())
    assert failure["error"].startswith("UserError: `finetune_learning_rate` must keep")
    assert failure["date"]
    assert at(tmp_path).is_finished(CELLS[0])
    # Tried again, it is finished, and no failure any more.
    again = replace(CELLS[2], config=replace(CELLS[2].config, seed=5))
    at(tmp_path).failure_path(again).write_text("{}")
    assert run_study(at(tmp_path), [again, CELLS[0]], progress=False) == []
    assert [path.stem for path in (tmp_path / "failures").iterdir()] == [wrong.name]


def test_a_failed_parent_fails_its_cells_and_is_tried_once(tmp_path, tiny, trained):  # noqa: F811
    wrong = [replace(cell, parent=replace(PARENT, learning_rate=1e30)) for cell in CELLS[:2]]
    assert run_study(at(tmp_path), wrong, progress=False) == NAMES[:2]
    assert trained == {f"parents/{PARENT_NAME}/{FULL_PRECISION}": 1}
    assert len(list((tmp_path / "failures").iterdir())) == 2


def test_parents_elsewhere_are_taken_as_they_are(done, tmp_path, tiny, trained):  # noqa: F811
    (tmp_path / "parents").mkdir()
    (tmp_path / "parents" / PARENT_NAME).symlink_to(done / "parents" / PARENT_NAME)
    before = snapshot(done)
    there = at(tmp_path / "study", parents=tmp_path / "parents", discard_checkpoints=True)
    assert run_study(there, CELLS[:1], progress=False) == []
    assert snapshot(done) == before
    assert list(trained) == [f"cells/{NAMES[0]}/{CONTROL.name}"]
    assert record(tmp_path / "study", PARENT_NAME) == record(done, PARENT_NAME)
    assert not list((tmp_path / "study").rglob("checkpoints"))


def test_another_configuration_is_refused_before_any_training(done, tiny, trained):  # noqa: F811
    other = replace(CELLS[0], parent=replace(PARENT, epochs=5))
    with pytest.raises(UserError, match="got .*parents/.* where epochs is 2 there, 5 here"):
        run_study(at(done), [other], progress=False)
    with pytest.raises(UserError, match="got .*cells/.* where finetune_epochs is 1 there, 2 here"):
        run_study(at(done), [replace_config(CELLS[0], finetune_epochs=2)], progress=False)
    with pytest.raises(UserError, match="`out` must be a directory of the study paper, got .* of"):
        run_study(replace(at(done), preset="paper"), CELLS, progress=False)
    assert trained == {}


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


def test_a_cell_that_another_process_is_at_is_left_to_it(done, tmp_path, tiny, trained):  # noqa: F811
    shutil.copytree(done, tmp_path / "study")
    here = at(tmp_path / "study")
    two = [CELLS[0], CELLS[2]]
    for cell in two:
        here.record_path(cell.name).unlink()
    command = [sys.executable, "-c", HOLD, str(here.directory / "locks" / NAMES[0])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            assert run_study(here, two, progress=False) == []
            assert [here.is_finished(cell) for cell in two] == [False, True]
        finally:
            process.send_signal(signal.SIGKILL)
    # A kill leaves no claim behind.
    assert run_study(here, two, progress=False) == []
    assert here.is_finished(CELLS[0])


@pytest.mark.quick
def test_cells_whose_parent_another_process_trains_come_last(tmp_path, monkeypatch):
    fields = {"block_order": "norm_act_conv"}
    second = replace(CELLS[0], parent=replace(PARENT, **fields),
                     config=replace(CELLS[0].config, **fields))  # fmt: skip
    here, order = at(tmp_path), []
    here.parents_dir.mkdir()
    other = study._claim(here.lock_path(CELLS[0], of_parent=True), wait=False)

    def train_stages(config, data, progress):
        order.append(config.run_dir.name)
        if config.run_dir.name == second.name:
            other.close()
        if config.parent_dir is None:
            (config.run_dir / FULL_PRECISION).mkdir(parents=True)
            (config.run_dir / FULL_PRECISION / "result.json").touch()

    record = {"row": {"accuracy": 1.0}}
    for name, function in {
        "train_stages": train_stages,
        "_data": lambda config: None,
        "parent_record": lambda *args: record,
        "cell_record": lambda *args: record,
    }.items():
        monkeypatch.setattr(study, name, function)
    assert run_study(here, [CELLS[0], second], progress=False) == []
    assert order == [second.parent_name, second.name, PARENT_NAME, CELLS[0].name]


def test_missing_data_end_a_study_before_any_training(tmp_path, trained):
    study._load.cache_clear()
    cells = study_cells("laptop")
    with pytest.raises(UserError, match="`data_dir` must hold cifar10, got"):
        run_study(at(tmp_path / "out", data_dir=tmp_path), cells, progress=False)
    study._load.cache_clear()
    assert not (tmp_path / "out").exists()
    assert trained == {}


def test_listed_times_come_from_finished_trainings(done, tmp_path, monkeypatch):
    times = {name: record(done, name)["row"] for name in (*NAMES, PARENT_NAME)}
    # The steps are those of the digits, whose name the tiny data goes by.
    some = tmp_path / "study"
    shutil.copytree(done, some)
    at(some).record_path(NAMES[1]).unlink()
    text = list_cells(at(some), CELLS)
    lines = {line.partition(":")[0]: line for line in text.splitlines()}
    assert lines[NAMES[0]].endswith(": finished")
    assert lines[f"parents/{PARENT_NAME}"].endswith(": finished")
    each = times[NAMES[3]]["seconds"] / 4  # the other one of a quantized network
    assert f": {1437 // 16} steps of {each:.3f} s" in lines[NAMES[1]]
    assert text.splitlines()[-1].startswith("4 cells of 1 parents; what is left, and its")
    # Times of another machine are none of this one.
    monkeypatch.setattr(listing, "provenance", lambda: {"devices": "1 x abacus"})
    text = list_cells(at(some), CELLS)
    assert f"{NAMES[1]}: {1437 // 16} steps" in text.splitlines()
    assert text.splitlines()[-1] == "4 cells of 1 parents"


@pytest.mark.quick
def test_steps_alone_are_listed_where_no_time_is_known(tmp_path):
    lines = list_cells(at(tmp_path), CELLS[:1]).splitlines()
    assert lines[0] == f"parents/{PARENT_NAME}: {2 * (1437 // 16)} steps"  # two epochs
    assert lines[1:] == [f"{NAMES[0]}: {1437 // 16} steps", "1 cells of 1 parents"]
    assert not any(tmp_path.iterdir())


def test_a_parent_that_no_cell_needs_is_not_to_be_trained(done, tmp_path):
    shutil.copytree(done / "records", tmp_path / "records")
    text = list_cells(at(tmp_path), CELLS)
    assert all(line.endswith(": finished") for line in text.splitlines()[:-1])


@pytest.mark.quick
def test_a_directory_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "_data", lambda config: None)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="`out` must be a directory that can be written, got"):
        run_study(at(tmp_path / "file" / "below"), CELLS, progress=False)
