"""scripts/train.py killed with SIGKILL at bad moments, and started again with the same command."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import SCRIPTS, rows_without_time, tree_bytes

from compand_jax.data.images import load_data
from compand_jax.experiments.runs.config import FULL_PRECISION
from compand_jax.experiments.runs.directory import finished_stages, read_config, read_results
from compand_jax.experiments.runs.stages import finished
from compand_jax.training.metrics_log import read_log

METHOD = "mu_law-separate"
COMMAND = (
    f"--methods {METHOD} --epochs 2 --finetune-epochs 2 --warmup-epochs 0 --batch-size 128 "
    "--steps-per-call 1 --calibration-batches 1 --calibration absmax --calibration-mu 5"
).split()  # eleven steps an epoch

# Each kills the process itself, so that the moment is certain.
HALF_A_ROW = """
from compand_jax.training import fit as training
whole = training.append_log
def append_log(path, row):
    if row["step"] == 15:
        open(path, "a").write('{"step": 15, "epo')
        os.kill(os.getpid(), signal.SIGKILL)
    whole(path, row)
training.append_log = append_log
"""
WITHIN_A_CHECKPOINT = """
from orbax.checkpoint import CheckpointManager
save = CheckpointManager.save
def killed(self, step, *args, **kwargs):
    save(self, step, *args, **kwargs)
    if "mu_law" in str(self.directory):
        os.kill(os.getpid(), signal.SIGKILL)
CheckpointManager.save = killed
"""
BEFORE_THE_RESULT = """
from compand_jax.experiments.runs import run as experiments
def write_json(path, value):
    os.kill(os.getpid(), signal.SIGKILL)
experiments.write_json = write_json
"""


def environment():
    one_device = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    return one_device | {"JAX_PLATFORMS": "cpu"}


def start(run_dir, prelude=""):
    arguments = [str(SCRIPTS / "train.py"), *COMMAND, "--run-dir", str(run_dir)]
    code = f"import os, runpy, signal, sys\nsys.path.insert(0, {str(SCRIPTS)!r})\n{prelude}\n"
    code += f"sys.argv = {arguments}\nrunpy.run_path({arguments[0]!r}, run_name='__main__')\n"
    command = [sys.executable, "-c", code] if prelude else [sys.executable, *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )


def end(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its directory, and what it printed."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    code, out, err = end(start(run_dir))
    assert code == 0, err
    return run_dir, out


def test_killed_runs_resume_to_the_same_bits(whole, tmp_path):
    run_dir = tmp_path / "run"
    quantized = run_dir / METHOD
    assert end(start(run_dir, HALF_A_ROW))[0] == -signal.SIGKILL
    assert [path.name for path in (run_dir / FULL_PRECISION / "checkpoints").iterdir()] == ["11"]
    assert (run_dir / FULL_PRECISION / "metrics.jsonl").read_text().endswith('{"step": 15, "epo')

    assert end(start(run_dir, WITHIN_A_CHECKPOINT))[0] == -signal.SIGKILL
    assert finished_stages(run_dir) == [FULL_PRECISION]
    assert len(read_log(quantized / "metrics.jsonl")) == 11
    check_stage(whole[0], run_dir, FULL_PRECISION)

    assert end(start(run_dir, BEFORE_THE_RESULT))[0] == -signal.SIGKILL
    assert finished_stages(run_dir) == [FULL_PRECISION]
    assert (quantized / "checkpoints" / "22").is_dir()

    code, out, err = end(start(run_dir))
    assert code == 0, err
    assert out.replace(str(run_dir), "") == whole[1].replace(str(whole[0]), "")
    check_stage(whole[0], run_dir, METHOD)


def check_stage(whole, run_dir, name):
    """The last state is equal in its bytes, the log and the result but for time."""
    data = load_data("digits")
    states = [finished(read_config(path), data, name)[1] for path in (whole, run_dir)]
    assert int(states[0].step) == 22
    assert tree_bytes(states[0]) == tree_bytes(states[1])
    logs = [rows_without_time(read_log(path / name / "metrics.jsonl")) for path in (whole, run_dir)]
    assert [row["step"] for row in logs[0]] == list(range(1, 23))
    assert logs[0] == logs[1]
    results = [
        {key: value for key, value in result.items() if key not in ("seconds", "date", "config")}
        for path in (whole, run_dir)
        for result in read_results(path)
        if result["stage"] == name
    ]
    assert results[0] == results[1]


def test_evaluate_prints_what_was_logged(whole):
    run_dir, table = whole
    command = [sys.executable, str(SCRIPTS / "evaluate.py"), str(run_dir)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) == 2
    for line, result in zip(lines, read_results(run_dir), strict=True):
        accuracy = f"{result['test_accuracy']:.2f}"
        assert line == f"{result['stage']}: {result['correct']}/360 = {accuracy}%"
        assert f"{accuracy} %" in table
    assert json.loads((Path(run_dir) / "results.json").read_text())[0]["correct"] > 36
