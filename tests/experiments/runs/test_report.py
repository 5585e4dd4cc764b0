"""The table, the record and the plot, from records alone."""

import json

import pytest

from compand_jax.experiments.records import write_json
from compand_jax.experiments.runs.config import CONTROL, FULL_PRECISION, RunConfig, to_json
from compand_jax.experiments.runs.plots import mu_curves, plot_run
from compand_jax.experiments.runs.report import results_table, with_differences, write_reports
from compand_jax.training.metrics_log import append_log, read_log

SITES = ("conv1", "dense")


def result(stage, correct, bits=4, size=4_200, **fields):
    quantized = stage not in (FULL_PRECISION, CONTROL.name)
    return {
        "stage": stage,
        "method": stage.partition("-")[0],
        "weight_bits": bits if quantized else None,
        "act_bits": bits if quantized else None,
        "mu_scope": stage.partition("-")[2] or None,
        "test_accuracy": 100 * correct / 360,
        "correct": correct,
        "total": 360,
        "model_bytes": size,
        "seed": 3,
        "config": to_json(RunConfig(seed=3)),
        "versions": {"python": "3.11.0", "jax": "0.10.2"},
        "devices": "1 x abacus (2 cores)",
        "date": "2026-11-24T12:00:00+00:00",
        **fields,
    }


RESULTS = [
    result(FULL_PRECISION, 354, size=123_456),
    result(CONTROL.name, 357, size=12_345_678),
    result("uniform", 348),
    result("mu_law-per_layer", 357),
    result("mu_law-single", 360, bits=3),
]
TABLE = """\
| method                    | bits W/A |  mu scope | test accuracy | difference | model size |
|---------------------------|---------:|----------:|--------------:|-----------:|-----------:|
| full precision            |    32/32 |         - |       98.33 % |      -0.83 |   123.5 kB |
| full precision, continued |    32/32 |         - |       99.17 % |  reference |   12.35 MB |
| uniform                   |      4/4 |         - |       96.67 % |      -2.50 |     4.2 kB |
| mu-law                    |      4/4 | per layer |       99.17 % |      +0.00 |     4.2 kB |
| mu-law                    |      3/3 |    single |      100.00 % |      +0.83 |     4.2 kB |"""


def rows(stage, n):
    """A log of n rows, as the stage's is."""
    mu = {
        "mu_law-per_layer": lambda step, i: step * (i + 1) / 10,
        "mu_law-single": lambda step, _: step / 10,
        "uniform": lambda *_: 0.0,
    }.get(stage)
    for step in range(1, n + 1):
        row = {"step": step, "epoch": step / n, "loss": 1 / step, "accuracy": 50.0, "seconds": 0.1}
        if mu is not None:
            row["quantizers"] = {
                site: {
                    "weight_mu": mu(step, 2 * i),
                    "weight_scale": 1.0,
                    "act_mu": mu(step, 2 * i + 1),
                    "act_scale": [[1.0, 2.0]],
                }
                for i, site in enumerate(SITES)
            }
        yield row


@pytest.fixture
def run_dir(tmp_path):
    path = tmp_path / "run"
    for found in RESULTS:
        directory = path / found["stage"]
        directory.mkdir(parents=True)
        write_json(directory / "result.json", found)
        for row in rows(found["stage"], 450):
            append_log(directory / "metrics.jsonl", row)
    write_json(path / "config.json", RESULTS[0]["config"])
    (path / "uniform" / "checkpoints").mkdir()
    (path / "uniform" / "checkpoints" / "large").write_bytes(bytes(10**6))
    return path


@pytest.mark.quick
def test_table():
    assert results_table(RESULTS) == TABLE


@pytest.mark.quick
def test_differences_are_to_the_control_in_points():
    found = with_differences(RESULTS)
    assert {one["reference"] for one in found} == {CONTROL.name}
    expected = [-100 * 3 / 360, 0, -2.5, 0, 100 * 3 / 360]
    assert [one["difference"] for one in found] == pytest.approx(expected)
    assert "difference" not in RESULTS[0]


@pytest.mark.quick
def test_differences_without_a_control_are_to_full_precision():
    without = [one for one in RESULTS if one["stage"] != CONTROL.name]
    found = with_differences(without)
    assert {one["reference"] for one in found} == {FULL_PRECISION}
    assert found[-1]["difference"] == pytest.approx(100 * 6 / 360)
    first = results_table(without).splitlines()[2]
    assert "full precision" in first
    assert "reference" in first


def test_reports_of_a_run(run_dir, tmp_path):
    record = tmp_path / "records" / "digits"
    table = write_reports(run_dir, record)
    lines = TABLE.splitlines()  # with the stages in the order of a run
    table_of_run = "\n".join([*lines[:5], lines[6], lines[5]])
    assert table == table_of_run
    ordered = [*RESULTS[:3], RESULTS[4], RESULTS[3]]
    assert json.loads((run_dir / "results.json").read_text()) == with_differences(ordered)
    document = (run_dir / "results.md").read_text()
    assert document.startswith(f"# cnn on digits\n\n{table_of_run}\n\n")
    for fact in ("360 images", "Seed 3", "20 epochs", "8 of each", "jax 0.10.2", "abacus", "2026"):
        assert fact in document
    picture = (run_dir / "plot.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    check_record(run_dir, record)


def check_record(run_dir, record):
    for name in ("results.md", "plot.png"):
        assert (record / name).read_bytes() == (run_dir / name).read_bytes()
    # Where it ran on one machine is nothing to keep: all else is.
    config = json.loads((run_dir / "config.json").read_text())
    kept = {key: value for key, value in config.items() if not key.endswith(("_dir", "_dict"))}
    assert len(kept) == len(config) - 5
    assert json.loads((record / "config.json").read_text()) == kept
    for one in RESULTS:
        stored = json.loads((record / one["stage"] / "result.json").read_text())
        kept = {k: v for k, v in one["config"].items() if not k.endswith(("_dir", "_dict"))}
        assert stored == one | {"config": kept}
        assert {"seed", "config", "versions", "devices", "date"} <= stored.keys()
        log = read_log(record / one["stage"] / "metrics.jsonl")
        assert len(log) == 200
        assert log[-1] == list(rows(one["stage"], 450))[-1]
    files = [path for path in record.rglob("*") if path.is_file()]
    assert not any("large" in path.name for path in files)
    assert sum(path.stat().st_size for path in files) < 500_000


@pytest.mark.quick
def test_curves_of_mu():
    steps = [1, 2, 3]
    assert mu_curves(list(rows("uniform", 3))) == {}
    assert mu_curves(list(rows(CONTROL.name, 3))) == {}
    assert mu_curves(list(rows("mu_law-single", 3))) == {"all": (steps, [0.1, 0.2, 0.3])}
    curves = mu_curves(list(rows("mu_law-per_layer", 3)))
    assert list(curves) == ["conv1 weight", "conv1 act", "dense weight", "dense act"]
    assert curves["dense act"] == (steps, [0.4, 0.8, 1.2])
    separate = [
        {"step": 1, "quantizers": {s: {"weight_mu": 1.0, "act_mu": 2.0} for s in SITES}},
        {"step": 2, "quantizers": {s: {"weight_mu": 1.5, "act_mu": 2.5} for s in SITES}},
    ]
    assert mu_curves(separate) == {
        "all weights": ([1, 2], [1.0, 1.5]),
        "all activations": ([1, 2], [2.0, 2.5]),
    }


@pytest.mark.parametrize(
    "stages", [(FULL_PRECISION,), ("uniform",), (CONTROL.name, "mu_law-single")]
)
def test_plot_of_any_stages(tmp_path, stages):
    path = tmp_path / "plot.png"
    plot_run({stage: list(rows(stage, 5)) for stage in stages}, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_of_a_stage_whose_log_was_deleted(tmp_path):
    path = tmp_path / "plot.png"
    plot_run({FULL_PRECISION: [], "uniform": list(rows("uniform", 5))}, path)
    assert path.read_bytes().startswith(b"\x89PNG")
