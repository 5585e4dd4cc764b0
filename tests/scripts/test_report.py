"""The blocks of README and pages: filled from the records, and only from those that agree."""

import json
from pathlib import Path

import pytest

from compand_jax.experiments.commands import report
from compand_jax.experiments.errors import UserError
from compand_jax.experiments.ptq.record import document
from compand_jax.experiments.runs.config import FULL_PRECISION
from compand_jax.experiments.runs.report import results_table

RESULTS = [
    {
        "stage": FULL_PRECISION,
        "method": FULL_PRECISION,
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


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A project with a README without blocks, and this process in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("# Nothing here\n")
    return tmp_path


def record(root, results=RESULTS):
    directory = root / "results" / "a-b"
    directory.mkdir(parents=True)
    (directory / "results.json").write_text(json.dumps(results))
    (directory / "results.md").write_text(f"# a on b\n\n{results_table(results)}\n\nMore.\n")
    return directory


def test_update_fills_the_block_and_only_it(root, capsys):
    record(root)
    page = root / "docs" / "page.md"
    page.write_text("before\n" + BLOCK.format("stale\n") + "after\n")
    with pytest.raises(UserError, match=r"`root` must have the tables .* got others in docs/page"):
        report.main(["--check"])
    assert "stale" in page.read_text()
    report.main([])
    text = page.read_text()
    assert text.startswith("before\n<!-- results:a-b -->\n\n| method")
    assert text.endswith("[results/a-b](../results/a-b).\n\n<!-- /results -->\nafter\n")
    assert results_table(RESULTS) in text
    assert (root / "README.md").read_text() == "# Nothing here\n"
    assert "updated docs/page.md\nall pages of . have" in capsys.readouterr().out
    report.main(["--check"])
    report.main(["--root", str(root)])
    assert "updated" not in capsys.readouterr().out
    assert page.read_text() == text


def test_a_table_is_the_first_of_the_record_and_what_is_below_it(root):
    record(root)
    (root / "docs" / "page.md").write_text(BLOCK.format(""))
    (root / "README.md").write_text("<!-- table:a-b -->\nstale\n<!-- /table -->\nafter\n")
    report.main([])
    expected = (
        f"<!-- table:a-b -->\n\n{results_table(RESULTS)}\n\nMore.\n\n<!-- /table -->\nafter\n"
    )
    assert (root / "README.md").read_text() == expected
    report.main(["--check"])
    (root / "README.md").write_text(expected.replace("50.00", "51.00"))
    with pytest.raises(UserError, match=r"`root` must have the tables .* got others in README.md"):
        report.main(["--check"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("| a |\n|---|", "| a |\n|---|"),
        ("Said first.\n\n| a |\n\nNote.\n\n| b |\n\nMore.", "| a |\n\nNote."),
    ],
)
def test_first_table(text, expected):
    assert report.first_table(text) == expected


def test_record_of_post_training_fills_its_block_up_to_the_details(root):
    record = {
        "config": {"model": "b", "dataset": "c", "images": 7, "seed": 0, "batch_stats": True},
        "rows": [], "divergences": [{"site": "conv", "weight_bits": 3, "divergence": 0.25}],
        "sensitivity": [{"site": "conv", "weights": 9, "weight_bits": 3, "grid": "midtread",
                         "accuracy": 12.5, "weight_sqnr": None}],
        "budgets": [], "seconds": {}, "workers": 2, "versions": {"jax": "1"}, "devices": "abacus",
        "date": "2026",
    }  # fmt: skip
    directory = root / "results" / "a-b"
    directory.mkdir(parents=True)
    (directory / "results.json").write_text(json.dumps(record))
    (directory / "results.md").write_text(document(record))
    text = report.record_text(directory, "results/a-b")
    assert "7 training images for calibration" in text
    assert "12.50 %" in document(record)
    assert "12.50 %" not in text
    (directory / "results.md").write_text(document(record).replace("12.50 %", "99.00 %"))
    with pytest.raises(UserError, match="`results` must have the same table"):
        report.record_text(directory, "results/a-b")


@pytest.mark.parametrize("kind", ["results", "table"])
def test_block_without_record_is_empty(root, kind):
    block = f"<!-- {kind}:a-b -->\n{{}}<!-- /{kind} -->\n"
    (root / "README.md").write_text(block.format("| 99.99 % |\n"))
    report.main([])
    assert (root / "README.md").read_text() == block.format("")


@pytest.mark.parametrize(("here", "there"), [(0, 0), (2, 0), (1, 1)])
def test_record_needs_one_block(root, here, there):
    record(root)
    (root / "README.md").write_text(BLOCK.format("") * here)
    (root / "docs" / "page.md").write_text(BLOCK.format("") * there)
    with pytest.raises(UserError, match=rf"`root` must have one block .* got {here + there} for"):
        report.main([])


def test_record_that_contradicts_itself_is_refused(root):
    directory = record(root)
    (directory / "results.json").write_text(json.dumps([RESULTS[0] | {"test_accuracy": 60.0}]))
    (root / "README.md").write_text(BLOCK.format(""))
    with pytest.raises(UserError, match="`results` must have the same table"):
        report.main([])


def test_wrong_arguments(tmp_path):
    with pytest.raises(UserError, match=r"`root` must hold README.md, got .*: give the pr"):
        report.main(["--root", str(tmp_path)])
    with pytest.raises(UserError, match="`check` must go without a study, got runs/x: leave one"):
        report.Args(Path("runs/x"), check=True)
