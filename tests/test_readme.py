"""The README: its code runs, its commands are right, its tables are those of the records."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import command_line
import pytest
import study
import update_readme

from compand_jax.experiments.ptq.record import document, results_by_setting
from compand_jax.experiments.ptq.tables import base_setting, tables
from compand_jax.experiments.runs.config import CONTROL, FULL_PRECISION, METHODS, RunConfig, preset
from compand_jax.experiments.runs.report import results_table
from compand_jax.experiments.study.grid import STUDIES, study_cells
from compand_jax.experiments.study.report import read_records
from compand_jax.experiments.study.run import shard

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def code_blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def commands():
    return [line for block in code_blocks("bash") for line in block.splitlines()]


CHECKS = """
assert logits.shape == (256, 10)
assert set(quantizers) == {"layers_0", "layers_2"}
assert jnp.isfinite(loss)
assert (values == same).all() and grad_mu != 0
kernels = [tree["params"]["layers_0"]["kernel"] for tree in (variables, rounded)]
assert (kernels[0] != kernels[1]).any() and len(jnp.unique(kernels[1][:, 0])) <= 7
"""


@pytest.mark.quick
def test_code_runs_as_written(tmp_path):
    # In a process of its own: a reader's jax is not as strict as the one of the tests.
    command = [sys.executable, "-W", "error", "-c", "".join([*code_blocks("python"), CHECKS])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.safetensors").is_file()
    assert "layers_0" in done.stdout


@pytest.mark.quick
def test_own_model_is_quantized_in_ten_lines():
    lines = [line for line in code_blocks("python")[0].splitlines() if line]
    assert len(lines) == 10


def test_ci_runs_the_two_commands():
    two = ["pip install -e . && python scripts/train.py", "pip install -e '.[test]' && pytest"]
    assert [line for line in commands() if line.startswith("pip")] == two
    patterns = re.findall(
        r"\$\(grep -E ['\"](.*)['\"] README\.md\)", (ROOT / ".ci/run").read_text()
    )
    found = [
        [line for line in README.splitlines() if re.search(pattern, line)] for pattern in patterns
    ]
    assert found == [[line] for line in two]


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python scripts/train")])
def test_training_commands_parse(command):
    name, *args = shlex.split(command)[2:]
    config = command_line.parse(RunConfig, args, default=preset(name))
    assert (config != preset(name)) == bool(args)


@pytest.mark.parametrize("command", [c for c in commands() if "scripts/study.py" in c])
def test_study_commands_parse(command):
    args = shlex.split(command.replace("$SLURM_ARRAY_TASK_ID", "7"))
    options = command_line.parse(study.Args, args[args.index("scripts/study.py") + 1 :])
    cells = study_cells(options.preset)
    assert 0 < len(shard(cells, options.shard)) <= len(cells)


def test_studies_are_named_and_have_a_block():
    for name in STUDIES:
        assert f"| `{name}` |" in README
        assert README.count(f"<!-- results:{name} -->") == (name != "smoke")


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("results/*/results.csv")), ids=lambda path: path.parent.name
)
def test_records_of_studies_are_complete_and_small(path):
    rows = {record["row"]["name"]: record["row"] for record in read_records(path.parent)}
    cells = {cell.name: cell for cell in study_cells(path.parent.name)}
    if path.parent.name == "literature":
        checkpoint = Path("resnet20.npz")
        cells |= {c.name: c for c in study_cells("literature", checkpoint=checkpoint)}
    for name, row in rows.items():
        assert row["device"]
        assert 0 < row["accuracy"] <= 100
        if row["stage"] == "parent":
            assert name in {cell.parent_name for cell in cells.values()}
        else:
            assert row["full_precision_accuracy"] is not None, "no control"
            assert (row["network"], row["seed"]) == (
                cells[name].config.model,
                cells[name].config.seed,
            )
    files = [file for file in path.parent.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".json", ".csv", ".md", ".png"}
    assert sum(file.stat().st_size for file in files) < 20e6
    assert not any(str(Path.home()) in file.read_text() for file in path.parent.rglob("*.json"))


def test_files_named_exist():
    targets = re.findall(r"\]\((?!https?:|#)([^)]+)\)", README)
    targets += re.findall(r"\bscripts/\w+\.py\b", README)
    assert len(targets) > 5
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_tables_are_those_of_the_records(monkeypatch):
    # Without records a block has to be empty, so that no number is ever written by hand.
    monkeypatch.chdir(ROOT)
    for name in ("alexnet-cifar10", "ptq-resnet20-cifar10"):
        assert README.count(f"<!-- results:{name} -->") == 1
    assert update_readme.fill(README, Path("results")) == README
    outside = re.sub(r"<!-- results:.*?<!-- /results -->", "", README, flags=re.DOTALL)
    assert not re.search(r"\d\d\.\d+ ?%", outside), "an accuracy that is in no record"


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("results/*/results.json")), ids=lambda path: path.parent.name
)
def test_records_are_complete_and_agree(path):
    results = json.loads(path.read_text())
    if isinstance(results, dict):
        check_post_training(path, results)
        return
    assert [result["stage"] for result in results] == [FULL_PRECISION, *METHODS]
    control = next(result for result in results if result["stage"] == CONTROL)
    for result in results:
        config = result["config"]
        assert path.parent.name.startswith(f"{config['model']}-{config['dataset']}")
        own = json.loads((path.parent / result["stage"] / "result.json").read_text())
        own.pop("difference", None)  # of no one stage: checked below
        assert {name: result[name] for name in own} == own
        assert result["test_accuracy"] == 100 * result["correct"] / result["total"]
        points = 100 * (result["correct"] - control["correct"]) / result["total"]
        assert result["difference"] == pytest.approx(points, abs=1e-9)


def check_post_training(path, record):
    assert path.parent.name == f"ptq-{record['config']['model']}-{record['config']['dataset']}"
    assert (path.parent / "results.md").read_text() == document(record)
    names = ("calibration", "error_feedback", "batch_stats")
    base = base_setting(*(record["config"][name] for name in names))
    wanted = [setting for table in tables(base, range(2, 9)) for setting in table.settings()]
    assert set(results_by_setting(record["rows"])) == set(wanted)
    rows = [*record["rows"], *record["sensitivity"], record["full_precision"]]
    for row in rows + [found[name] for found in record["budgets"] for name in ("mixed", "fixed")]:
        assert row["accuracy"] == 100 * row["correct"] / row["total"]
        assert row["total"] == record["config"]["test_images"]
    assert {"versions", "devices", "date"} <= record.keys()


RESULTS = [
    {
        "stage": FULL_PRECISION,
        "weight_bits": None,
        "act_bits": None,
        "mu_scope": None,
        "test_accuracy": 50.0,
        "correct": 5,
        "total": 10,
        "model_bytes": 1000,
    }
]
BLOCK = "<!-- results:a-b -->\n{}<!-- /results -->\n"


def record(root, results=RESULTS):
    directory = root / "results" / "a-b"
    directory.mkdir(parents=True)
    (directory / "results.json").write_text(json.dumps(results))
    (directory / "results.md").write_text(f"# a on b\n\n{results_table(results)}\n\nMore.\n")
    return directory


def test_update_fills_the_block_and_only_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    record(tmp_path)
    Path("README.md").write_text("before\n" + BLOCK.format("stale\n") + "after\n")
    with pytest.raises(ValueError, match=r"`readme` must have the tables .* got others"):
        update_readme.main(["--check"])
    update_readme.main([])
    text = Path("README.md").read_text()
    assert text.startswith("before\n<!-- results:a-b -->\n\n| method")
    assert text.endswith("[results/a-b](results/a-b).\n\n<!-- /results -->\nafter\n")
    assert results_table(RESULTS) in text
    update_readme.main(["--check"])
    assert capsys.readouterr().out.endswith("README.md is unchanged\n")


def test_record_of_post_training_fills_its_block_up_to_the_details(tmp_path):
    record = {
        "config": {"model": "b", "dataset": "c", "images": 7, "seed": 0, "batch_stats": True},
        "rows": [], "divergences": [{"site": "conv", "weight_bits": 3, "divergence": 0.25}],
        "sensitivity": [{"site": "conv", "weights": 9, "weight_bits": 3, "grid": "midtread",
                         "accuracy": 12.5, "weight_sqnr": None}],
        "budgets": [], "seconds": {}, "workers": 2, "versions": {"jax": "1"}, "devices": "abacus",
        "date": "2026",
    }  # fmt: skip
    directory = tmp_path / "results" / "a-b"
    directory.mkdir(parents=True)
    (directory / "results.json").write_text(json.dumps(record))
    (directory / "results.md").write_text(document(record))
    text = update_readme.fill(BLOCK.format("stale"), tmp_path / "results")
    assert "7 training images for calibration" in text
    assert "12.50 %" in document(record)
    assert "12.50 %" not in text
    (directory / "results.md").write_text(document(record).replace("12.50 %", "99.00 %"))
    with pytest.raises(ValueError, match="`results` must have the same table"):
        update_readme.fill(BLOCK.format(""), tmp_path / "results")


def test_block_without_record_is_empty(tmp_path):
    text = update_readme.fill(BLOCK.format("| 99.99 % |\n"), tmp_path / "results")
    assert text == BLOCK.format("")


@pytest.mark.parametrize("count", [0, 2])
def test_record_needs_one_block(tmp_path, count):
    record(tmp_path)
    with pytest.raises(ValueError, match=rf"`readme` must have one block .* got {count}"):
        update_readme.fill(BLOCK.format("") * count, tmp_path / "results")


def test_record_that_contradicts_itself_is_refused(tmp_path):
    directory = record(tmp_path)
    (directory / "results.json").write_text(json.dumps([RESULTS[0] | {"test_accuracy": 60.0}]))
    with pytest.raises(ValueError, match="`results` must have the same table"):
        update_readme.fill(BLOCK.format(""), tmp_path / "results")
