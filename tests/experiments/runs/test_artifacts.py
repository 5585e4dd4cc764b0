"""A run's quantized network, exported and evaluated by the scripts."""

import re

import pytest

# Fixtures are imported to be found (F401), and named again where they are used (F811).
from scripts_called import call, error_of  # noqa: F401
from tiny_runs import (  # noqa: F401
    TinyNet,
    standard_promotion,
    tiny,
    tiny_config,
    tiny_data,
)

from compand_jax.experiments.commands import evaluate, export
from compand_jax.experiments.runs import export as exports
from compand_jax.experiments.runs import run as experiments
from compand_jax.experiments.runs.config import Method


@pytest.fixture
def finished_run(tiny, tmp_path, monkeypatch):  # noqa: F811
    """A finished run of the tiny network, which the scripts find by its name."""
    monkeypatch.setattr(evaluate, "load_data", lambda *_: tiny_data())
    monkeypatch.setattr(exports, "create_model", lambda num_classes, **_: TinyNet(num_classes))
    methods = Method("uniform"), Method("mu_law", "per_layer")
    config = tiny_config(tmp_path / "run", epochs=1, methods=methods)
    experiments.run(config, progress=False)
    return config.run_dir


def test_export_and_evaluate(call, finished_run):  # noqa: F811
    status, out, _ = call(evaluate, finished_run / "mu_law-per_layer")
    accuracy = out.split(": ")[1]
    status, out, _ = call(export, finished_run, "--compress")
    assert status == 0
    path = finished_run / "mu_law-per_layer" / "mu_law-per_layer.safetensors"
    assert out.splitlines()[0].split()[:3] == ["site", "shape", "bits"]
    assert out.splitlines()[-1] == f"mu_law-per_layer, {path.stat().st_size} bytes: {path}"
    status, out, _ = call(evaluate, path)
    assert (status, out) == (0, f"{path.name}: {accuracy}")

    status, out, _ = call(export, finished_run / "uniform", "--format", "stablehlo")
    assert status == 0
    assert (finished_run / "uniform" / "uniform.stablehlo").is_file()
    folded = finished_run / "folded.safetensors"
    status, out, _ = call(export, finished_run, "--fold-norms", "--output", folded)
    assert status == 0
    difference = r"19 of 19 test images in the same class, logits at most (\S+) apart"
    found = re.search(rf"\n1 of its batch norms folded, against none: {difference}\n", out)
    assert float(found[1]) < 1e-4
    status, out, _ = call(evaluate, path, "--against", folded, "--images", 5)
    assert status == 0
    assert re.fullmatch(rf"{path.name}: .*/5 = .*\n{folded}: 5 of 5 test images in .*\n", out)
    text = error_of(call(evaluate, path, "--images", "0"))
    assert re.fullmatch(r"`images` must be from 1 to \d+, got 0", text)
    text = error_of(call(evaluate, finished_run, "--images", "5"))
    assert text.startswith("`images` goes with a file that export.py wrote, got")
    text = error_of(call(export, finished_run / "full_precision"))
    assert text.startswith("`run_dir` must have a finished quantized stage, got")
    text = error_of(call(export, finished_run, "--output", "x.bin"))
    assert text == "`output` must end in .safetensors, got x.bin: rename it"
    text = error_of(call(export, finished_run, "--compress", "--format", "stablehlo"))
    assert text == "`compress` goes with safetensors, got stablehlo: leave it out"
