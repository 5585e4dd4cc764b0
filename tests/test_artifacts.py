"""A run's quantized network, exported and evaluated by the scripts."""

import evaluate
import export
import pytest

# Fixtures are imported to be found (F401), and named again where they are used (F811).
from test_command_line import call, error_of  # noqa: F401
from tiny_runs import (  # noqa: F401
    TinyNet,
    standard_promotion,
    tiny,
    tiny_config,
    tiny_data,
)

from compand_jax import artifacts, experiments


@pytest.fixture
def finished_run(tiny, tmp_path, monkeypatch):  # noqa: F811
    """A finished run of the tiny network, which the scripts find by its name."""
    for module in (evaluate, export):
        monkeypatch.setattr(module, "load_data", lambda *_: tiny_data())
    monkeypatch.setattr(artifacts, "create_model", lambda num_classes, **_: TinyNet(num_classes))
    config = tiny_config(tmp_path / "run", epochs=1, methods=("uniform", "mu_law-per_layer"))
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
    text = error_of(call(export, finished_run / "full_precision"))
    assert text.startswith("`run_dir` must have a finished quantized stage, got")
    text = error_of(call(export, finished_run, "--output", "x.bin"))
    assert text == "`output` must end in .safetensors, got x.bin: rename it"
    text = error_of(call(export, finished_run, "--compress", "--format", "stablehlo"))
    assert text == "`compress` goes with safetensors, got stablehlo: leave it out"
