"""The benchmark's measurements on something small, its record as text, and its errors."""

import itertools
import json
import sys
from pathlib import Path

import compare_dtypes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compand_jax.experiments.benchmark import measure as benchmark
from compand_jax.experiments.benchmark.measure import FULL, METHODS, MU_LAW, QWIX
from compand_jax.experiments.benchmark.report import CURVES, benchmark_text, plot_curves
from compand_jax.experiments.commands import benchmark as script
from compand_jax.experiments.commands import report
from compand_jax.experiments.errors import UserError

STEP = {
    "network": "net",
    "batch": 8,
    "method": MU_LAW,
    "step_seconds": 0.25,
    "images_per_second": 32.0,
    "ratio": 1.25,
    "lowest": 1.0,
    "highest": 1.5,
    "temp_bytes": 10,
    "temp_ratio": 1.05,
    "compile_seconds": 3.0,
    "compile_ratio": 1.5,
}
POINT = {
    "at": 2,
    "full_step_seconds": 0.5,
    "mu_law_step_seconds": 0.75,
    "ratio": 1.5,
    "full_compile_seconds": 3.0,
    "mu_law_compile_seconds": 4.0,
}
COMPILED = {name: value for name, value in POINT.items() if "step" not in name and name != "ratio"}
RECORD = {
    "config": {"repetitions": 7},
    "steps": [STEP],
    "copies": [
        {
            "quantizer": "4 bits",
            "nanoseconds": 0.5,
            "gigabytes_per_second": 16.0,
            "ratio": 1.25,
            "lowest": 1.0,
            "highest": 1.5,
        }
    ],
    "frozen": [
        {
            "network": "net",
            "batch": 8,
            "method": "frozen mu-law W4",
            "seconds": 0.25,
            "images_per_second": 32.0,
            "ratio": 1.25,
            "lowest": 1.0,
            "highest": 1.5,
            "stored_bytes": 10_110_000,
            "temp_bytes": 19_240_000,
            "peak_bytes": 29_380_000,
        }
    ],
    "fit": {
        "network": "net",
        "batch": 8,
        "steps_per_call": 4,
        "bare_images_per_second": 100.0,
        "fit_images_per_second": 97.0,
        "share": 0.97,
    },
    "curves": {name: [COMPILED if name == "depth" else POINT] for name in CURVES},
    "versions": {"jax": "9.9"},
    "devices": "1 x chip",
    "date": "today",
}


def test_methods_in_turns_and_their_ratios(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: float(next(clock)))
    order = []
    calls = {name: lambda name=name: order.append(name) or jnp.zeros(()) for name in "ab"}
    seconds = benchmark.time_in_turns(calls, 3)
    assert order == list("abababab")  # one turn to warm up
    assert seconds == {"a": [1.0] * 3, "b": [1.0] * 3}


def test_rows_of_a_small_network():
    advanced = []
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes types
        rows = benchmark.compare_methods(
            "plain-1", 2, [FULL, MU_LAW], 1, advance=lambda: advanced.append(1)
        )
    assert [row["method"] for row in rows] == [FULL, MU_LAW]
    assert rows[0]["ratio"] == rows[0]["temp_ratio"] == rows[0]["compile_ratio"] == 1
    assert rows[1]["temp_bytes"] > 0
    assert rows[1]["step_seconds"] > 0
    assert rows[1]["images_per_second"] == 2 / rows[1]["step_seconds"]
    assert len(advanced) == 2 + 2 * 2
    assert set(rows[1]) == set(STEP)


def test_rows_of_a_frozen_network(monkeypatch):
    monkeypatch.delitem(benchmark.FROZEN, "frozen mu-law W4A4")  # to compile less
    advanced = []
    with jax.numpy_dtype_promotion("standard"):
        rows = benchmark.compare_frozen("plain-4", 2, 1, advance=lambda: advanced.append(1))
    assert [row["method"] for row in rows] == [FULL, "frozen mu-law W4"]
    assert len(advanced) == 2 + 2 * 2
    assert set(rows[1]) == set(RECORD["frozen"][0])
    assert rows[0]["ratio"] == 1
    for row in rows[1:]:
        assert row["stored_bytes"] < rows[0]["stored_bytes"] / 6.5
        assert row["peak_bytes"] == row["stored_bytes"] + row["temp_bytes"]


def test_rows_of_the_quantizers():
    rows = benchmark.compare_with_copy(1000, 2)
    assert [row["quantizer"] for row in rows][:2] == ["copy", "4 bits"]
    assert rows[0]["ratio"] == 1
    assert set(rows[0]) == set(RECORD["copies"][0])


def test_quantized_methods_learn_mu_and_scale():
    for method, config in METHODS.items():
        if method != QWIX:
            problem = benchmark.make_problem("plain-1", 2, method)
            assert ("compand" in problem.state.params) == (config is not None)


@pytest.mark.quick
def test_text_has_every_part():
    text = benchmark_text(RECORD)
    lines = [" ".join(line.split()) for line in text.splitlines()]  # columns are aligned
    for row in (
        "| net, 8 | mu-law W4A4 | 250.0 | 1.25 | 1.00 to 1.50 | 1.05 | 1.50 (3.0 s) | 32 |",
        "| 4 bits | 0.500 | 1.25 | 1.00 to 1.50 | 16.0 |",
        "| net, 8 | frozen mu-law W4 | 250.0 | 1.25 | 1.00 to 1.50 | 10.11 | 29.4 | 32 |",
        "| 2 | 500.0 | 750.0 | 1.50 | 3.0 | 4.0 |",
        "| 2 | - | - | - | 3.0 | 4.0 |",
        "jax 9.9; 1 x chip; today.",
    ):
        assert row in lines
    assert "97 images a second, 0.97 of its bare step's 100" in text
    assert benchmark_text(RECORD | {"copies": [], "frozen": [], "fit": None, "curves": {}}) != text


def test_plot(tmp_path):
    plot_curves(RECORD["curves"], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.quick
def test_block_of_a_page(tmp_path):
    place, page = tmp_path / "results" / "benchmark-cpu", tmp_path / "README.md"
    place.mkdir(parents=True)
    block = "<!-- results:benchmark-cpu -->\n{}<!-- /results -->\n"
    page.write_text(block.format("stale\n"))
    assert report.filled(tmp_path)[page] == block.format("")
    (place / "benchmark.json").write_text(json.dumps(RECORD))
    assert benchmark_text(RECORD) in report.filled(tmp_path)[page]
    page.write_text("no block\n")
    with pytest.raises(UserError, match="`root` must have one block for each record, got 0 for"):
        report.filled(tmp_path)


def test_script_measures_and_records(tmp_path, monkeypatch, capsys):
    for name, value in (
        ("compare_methods", [STEP]),
        ("compare_with_copy", RECORD["copies"]),
        ("compare_frozen", RECORD["frozen"]),
        ("compare_fit", RECORD["fit"]),
        ("cost_curve", [POINT]),
    ):
        monkeypatch.setattr(script, name, lambda *args, value=value: value)
    script.main(["--quick", "--methods", MU_LAW, "--record-dir", str(tmp_path / "record")])
    record = json.loads((tmp_path / "record" / "benchmark.json").read_text())
    assert record["config"]["methods"] == [FULL, MU_LAW]
    assert record["versions"].keys() >= {"jax", "qwix", "aqtp"}
    text = benchmark_text(record)
    assert text in (tmp_path / "record" / "benchmark.md").read_text()
    assert text in capsys.readouterr().out
    assert (tmp_path / "record" / "curves.png").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"methods": ("int3",)}, r"`methods` must be of full precision.* got \('int3',\)"),
        ({"parts": ("all",)}, r"`parts` must be of steps.* got \('all',\)"),
        ({"repetitions": 0}, "`repetitions` must be at least 1, got 0"),
        ({"networks": ("alexnet",)}, r"`networks` must be NETWORK:BATCH, .* got \('alexnet',\)"),
        ({"networks": ("lenet:8",)}, "`name` must be one of"),
    ],
)
def test_wrong_arguments(fields, message):
    with pytest.raises(UserError, match=message):
        script.Args(**fields)


def test_without_qwix(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(UserError, match=r"`methods` must be installed, got qwix int8"):
        script.main(["--record-dir", str(tmp_path / "record")])
    assert not (tmp_path / "record").exists()


def test_dtypes_of_finished_runs(monkeypatch, tmp_path, capsys):
    ran = []
    monkeypatch.setattr(compare_dtypes, "run", lambda config: ran.append(config))
    stages = "full_precision", "mu_law-per_layer"
    monkeypatch.setattr(
        compare_dtypes,
        "read_results",
        lambda directory: [{"stage": s, "test_accuracy": 90.0 + len(ran)} for s in stages],
    )
    with pytest.raises(UserError, match="`seeds` must be at least 2, got 1"):
        compare_dtypes.main(["--seeds", "1"])
    compare_dtypes.main(["--seeds", "2", "--record-dir", str(tmp_path)])
    assert [(config.dtype, config.seed) for config in ran] == [
        ("float32", 0),
        ("float32", 1),
        ("bfloat16", 0),
        ("bfloat16", 1),
    ]
    found = json.loads(Path(tmp_path, "dtypes.json").read_text())["test_accuracy"]
    assert found["mu_law-per_layer"] == {"float32": [91.0, 92.0], "bfloat16": [93.0, 94.0]}
    spread = np.std([91, 92], ddof=1)
    row = f"| full_precision | 91.50 % ± {spread:.2f} | 93.50 % ± {spread:.2f} |"
    assert row in [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
