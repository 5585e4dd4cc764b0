"""A study's tables and report, from made-up records: against numbers worked out by hand."""

import csv
import io
import json
import re
from pathlib import Path

import pytest

from compand_jax.experiments.commands import report
from compand_jax.experiments.errors import UserError
from compand_jax.experiments.records import write_json
from compand_jax.experiments.study.records import ROW
from compand_jax.experiments.study.report import (
    _texts,
    keep_report,
    read_records,
    study_block,
    write_report,
)
from compand_jax.experiments.study.tables import summary, summary_text, with_controls
from compand_jax.experiments.text import to_csv

SITES = {
    site: {"weight_bits": 2, "act_bits": 2, "grid": "midrise", "act_signed": site == "conv1"}
    for site in ("conv1", "dense")
}
FULL = {"method": "full_precision", "stage": "control"}


def row(name, accuracy, **fields):
    defaults = {
        "network": "cnn",
        "dataset": "digits",
        "method": "uniform",
        "weight_bits": 2,
        "act_bits": 2,
        "arrangement": "conv_norm_act",
        "seed": 0,
        "epochs": 1,
        "accuracy": accuracy,
        "device": "1 x CPU",
        "stage": "cell",
        "learning_rate": 0.1,
        "parent_accuracy": 75.0,
        "parent_epochs": 2,
        "first_last_bits": 2,
        "weight_grid": "midrise",
        "levers": "",
        "model_bytes": 10,
        "steps": 4,
        "seconds": 1.5,
        "date": "2026-01-02T03:04:05+00:00",
        "name": name,
    }
    if fields.get("method") == "full_precision":
        empty = ("weight_bits", "act_bits", "first_last_bits", "weight_grid")
        defaults |= dict.fromkeys(empty)
    return dict.fromkeys(ROW) | defaults | fields


def mu_law(name, accuracy, mu="learned", **fields):
    return row(name, accuracy, method="mu_law", mu_scope="per_layer", mu=mu, **fields)


ROWS = [
    row("parent", 75.0, method="full_precision", stage="parent", epochs=2, learning_rate=0.5),
    row("control-0", 80.0, **FULL),
    row("control-1", 82.0, seed=1, **FULL),
    row("uniform-0", 70.0),
    row("uniform-1", 74.0, seed=1),
    mu_law("mu-0", 79.5),
    mu_law("mu-1", 83.5, seed=1),
    mu_law("calibrated-0", 79.0, mu="fixed_calibrated"),
    mu_law("fixed-0", 60.25, mu="fixed_255"),
    # Of another schedule, and so without a control.
    row("other", 50.0, weight_bits=3, act_bits=3, learning_rate=0.2),
]


def record(fields):
    found = {"row": fields, "versions": {"jax": "1.2.3"}}
    quantizers = {
        site: {"weight_mu": 1.0, "weight_scale": 0.5, "act_mu": 3.25, "act_scale": 2.0}
        for site in SITES
    }
    curve = [
        {"step": step, "loss": 1.0, "accuracy": 50.0, "quantizers": quantizers} for step in (2, 4)
    ]
    if fields["stage"] == "cell":
        counts = {site: {"weight": [1, 5, 1] * 20, "act": [9, 5, 1] * 20} for site in SITES}
        found |= {"sites": SITES, "quantizers": quantizers, "histograms": counts, "curve": curve}
    return found


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "out"
    (path / "records").mkdir(parents=True)
    write_json(path / "study.json", {"preset": "smoke"})
    for fields in reversed(ROWS):
        write_json(path / "records" / f"{fields['name']}.json", record(fields))
    return path


@pytest.mark.quick
def test_a_cell_is_compared_to_the_control_of_its_own_seed_and_schedule():
    found = {each["name"]: each["full_precision_accuracy"] for each in with_controls(ROWS)}
    assert found == {
        "parent": 80.0, "control-0": 80.0, "control-1": 82.0, "uniform-0": 80.0, "uniform-1": 82.0,
        "mu-0": 80.0, "mu-1": 82.0, "calibrated-0": 80.0, "fixed-0": 80.0, "other": None,
    }  # fmt: skip


@pytest.mark.quick
def test_means_over_seeds_of_differences_within_a_seed():
    found = {(each["method"], each["mu"], each["weight_bits"]): each
             for each in summary(with_controls(ROWS))}  # fmt: skip
    uniform = found["uniform", None, 2]
    assert (uniform["seeds"], uniform["accuracy"], uniform["difference"]) == (2, 72.0, -9.0)
    # Of 70 and 74; of -10 and -8.
    assert uniform["accuracy_std"] == pytest.approx(8**0.5)
    assert uniform["difference_std"] == pytest.approx(2**0.5)
    assert found["mu_law", "learned", 2]["difference"] == 0.5
    assert found["mu_law", "fixed_255", 2]["difference_std"] is None
    assert found["uniform", None, 3]["difference"] is None


@pytest.mark.quick
def test_text_says_what_was_compared():
    text = summary_text(with_controls(ROWS))
    cells = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    assert ["", "cnn", "digits", "conv_norm_act", "2/2", "81.00 % ± 1.41 (2)", "-9.00 ± 1.41 (2)",
            "-", "-", "+0.50 ± 1.41 (2)", "+9.50 ± 0.00 (2)", ""] in cells  # fmt: skip
    assert ["", "cnn", "digits", "conv_norm_act", "3/3", *"------", ""] in cells
    # mu learned, as calibrated and 255, at the one seed that has them.
    mus = [line for line in cells if line[4:6] == ["2/2", "0"]]
    group = ["", "cnn", "digits", "conv_norm_act", "2/2", "0"]
    assert mus == [[*group, "-0.50", "-1.00", "-19.75", ""]]
    assert (
        "full precision 75.00 % (conv_norm_act, 2 epochs), then 1 epoch at learning rates "
        "0.2 (3 bits), 0.1 (2 bits), weights"
    ) in text
    assert "then 1 epoch at learning rate 0.1, weights" in summary_text(with_controls(ROWS[:-1]))
    assert text.endswith("1 x CPU; 2026-01-02.")
    ends = [each | {"first_last_bits": 8} for each in ROWS if each["stage"] == "cell"]
    assert "first and last layer at 8 bits" in summary_text(with_controls(ends))
    assert "first and last layer" not in text
    imported = [each | {"parent_epochs": 0} for each in ROWS]
    text = summary_text(with_controls(imported))
    assert "full precision 75.00 % (conv_norm_act, imported), then" in text


@pytest.mark.quick
def test_text_says_which_seeds_start_from_which_parent():
    rows = [each | {"parent_accuracy": 76.0} if each["seed"] == 1 else each for each in ROWS]
    expected = (
        "full precision 75.00 % (conv_norm_act, 2 epochs, for seed 0), "
        "76.00 % (conv_norm_act, 2 epochs, for seeds 1 and 2), then"
    )
    more = [each | {"seed": 2} for each in rows if each["seed"] == 1]
    assert expected in summary_text(with_controls([*rows, *more]))


@pytest.mark.quick
def test_levers_are_compared_to_the_control_that_has_what_is_not_about_quantization():
    rows = with_controls(
        [
            *ROWS,
            row("distilled", 81.0, levers="distill", **FULL),
            row("uniform-both", 72.0, levers="distill standardize"),
            mu_law("mu-standardize", 79.75, levers="standardize"),
        ]
    )
    found = {each["name"]: each["full_precision_accuracy"] for each in rows}
    assert found["uniform-both"] == 81.0
    assert found["mu-standardize"] == found["uniform-0"] == 80.0
    text, comparison = (
        re.sub(" +", " ", summary_text(each)) for each in (rows, with_controls(ROWS))
    )
    assert "| distill standardize | 2/2 | 81.00 % | -9.00 | - | - | - | - |" in text
    assert "| standardize | 2/2 | 80.00 % | - | - | - | -0.25 | - |" in text
    assert "| none | 2/2 | 81.00 % ± 1.41 (2) | -9.00 ± 1.41 (2) |" in text
    # What has none is compared as if there were no others.
    assert text.split("\n\n")[0] == comparison.split("\n\n")[0]


@pytest.mark.quick
def test_records_from_before_there_were_levers_have_none(directory):
    path = directory / "records" / "uniform-0.json"
    old = record({name: value for name, value in ROWS[3].items() if name != "levers"})
    write_json(path, old)
    found = {each["row"]["name"]: each["row"] for each in read_records(directory)}
    assert found["uniform-0"] | {"full_precision_accuracy": None} == ROWS[3]


@pytest.mark.quick
def test_a_control_of_another_parent_is_none():
    rows = [each | {"parent_accuracy": 76.0} if each["name"] == "uniform-1" else each
            for each in ROWS]  # fmt: skip
    found = {each["name"]: each["full_precision_accuracy"] for each in with_controls(rows)}
    assert (found["uniform-1"], found["mu-1"]) == (None, 82.0)


@pytest.mark.quick
def test_csv():
    found = list(csv.DictReader(io.StringIO(to_csv(with_controls(ROWS)))))
    assert [each["name"] for each in found][:3] == ["parent", "control-0", "control-1"]
    assert (found[0]["method"], found[0]["weight_bits"], found[0]["accuracy"]) == (
        "full_precision", "", "75.0")  # fmt: skip


def test_range_of_mu_is_of_the_layers_at_those_bits(directory):
    path = directory / "records" / "mu-0.json"
    changed = json.loads(path.read_text())
    changed["sites"]["conv1"] = SITES["conv1"] | {"weight_bits": 8}
    changed["quantizers"]["conv1"] = {"weight_mu": 9.0, "act_mu": 5.0}
    write_json(path, changed)
    text = _texts(directory, read_records(directory))["report.md"]
    assert "|  1.00 to 1.00 |      3.25 to 5.00 |" in text


def test_report_is_made_of_the_records_alone(directory):
    files = write_report(directory)
    assert {path.name for path in files} == {
        "results.csv", "summary.csv", "report.md", "accuracy.png", "differences.png",
        "mu-cnn-digits.png", "levels-cnn-digits-w2a2.png",
    }  # fmt: skip
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in files if path.suffix == ".png")
    with (directory / "results.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    rows = [each["row"] for each in read_records(directory)]
    assert found == [
        {name: "" if value is None else str(value) for name, value in row.items()} for row in rows
    ]
    text = (directory / "report.md").read_text()
    assert text.startswith("# The study smoke\n\n| network")
    assert "| dense |    1.00 |        3.25 |" in text
    assert "|  1.00 to 1.00 |      3.25 to 3.25 |" in text
    assert text.endswith("Made with jax 1.2.3.\n")
    (directory / "failures").mkdir()
    write_json(directory / "failures" / "x.json", {"name": "x", "error": "ValueError: no"})
    write_report(directory)
    assert "## Failed\n\n- x: ValueError: no\n" in (directory / "report.md").read_text()


def test_kept_records_fill_the_readme_and_only_agreeing_ones(directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block = "<!-- results:smoke -->\nstale\n<!-- /results -->\n"
    Path("README.md").write_text(f"before\n{block}after\n")
    report.main([str(directory)])
    text = Path("README.md").read_text()
    assert text.startswith("before\n<!-- results:smoke -->\n\n| network")
    assert text.endswith("(results/smoke/report.md).\n\n<!-- /results -->\nafter\n")
    assert "(results/smoke/accuracy.png)" in text
    assert not list(Path("results").rglob("checkpoints"))
    # The report of what is kept is the same.
    kept = Path("results/smoke")
    again = {path.name: path.read_bytes() for path in write_report(kept) if path.suffix != ".png"}
    assert again == {name: (directory / name).read_bytes() for name in again}
    report.main(["--check"])

    (kept / "report.md").write_text("# The study smoke\n")
    with pytest.raises(UserError, match="`results` must have the report.md of its records, got"):
        study_block(kept, "results/smoke")
    write_report(kept)
    path = kept / "summary.csv"
    path.write_text(path.read_text().replace("-9.0", "-8.0"))
    with pytest.raises(UserError, match="`results` must have the summary.csv of its records, got"):
        study_block(kept, "results/smoke")
    write_report(kept)
    path = kept / "records" / "mu-0.json"
    changed = json.loads(path.read_text())
    changed["row"]["accuracy"] = 79.9
    write_json(path, changed)
    with pytest.raises(UserError, match="`results` must have the results.csv of its records, got"):
        report.main(["--check"])
    write_report(kept)
    with pytest.raises(UserError, match="`root` must have the tables of its records, got others"):
        report.main(["--check"])
    report.main([])
    report.main(["--check"])


def test_a_new_report_replaces_what_was_kept(directory, tmp_path):
    kept = tmp_path / "results" / "smoke"
    keep_report(directory, kept)
    (directory / "records" / "uniform-1.json").unlink()
    keep_report(directory, kept)
    assert not (kept / "records" / "uniform-1.json").exists()
    assert study_block(kept, "results/smoke")
    keep_report(kept, kept)
    assert study_block(kept, "results/smoke")
    assert [path.name for path in kept.parent.iterdir()] == ["smoke"]


def test_of_a_failure_the_error_is_kept_without_its_traceback(directory, tmp_path):
    kept = tmp_path / "results" / "smoke"
    (directory / "failures").mkdir()
    failure = {"name": "x", "error": "ValueError: no", "date": "2026-01-02", "traceback": ["/home"]}
    write_json(directory / "failures" / "x.json", failure)
    keep_report(directory, kept)
    found = json.loads((kept / "failures" / "x.json").read_text())
    assert found == {"name": "x", "error": "ValueError: no", "date": "2026-01-02"}
    assert study_block(kept, "results/smoke")


def test_a_study_without_a_block_is_not_kept(directory, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"`root` must hold README.md, got \.: give"):
        report.main([str(directory)])
    Path("README.md").write_text("no block\n")
    report.main([str(directory)])
    assert "not kept: no page of . has a block results:smoke" in capsys.readouterr().out
    assert (directory / "report.md").is_file()
    assert not Path("results").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"row": {}}', '{"row": {"name": "uniform-0"}}'])
def test_damaged_records_are_named(directory, text):
    path = directory / "records" / "uniform-0.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"must .*, got .*records/uniform-0\.json .*delete it"):
        read_records(directory)


def test_no_study_and_no_finished_cell(tmp_path):
    with pytest.raises(UserError, match="`directory` must be a study's, with study.json"):
        report.main([str(tmp_path)])
    for wrong in ({"preset": ""}, [], {"preset": ["smoke"]}):
        write_json(tmp_path / "study.json", wrong)
        with pytest.raises(UserError, match=r"`preset` must be one of paper, .*study\.json: rest"):
            report.main([str(tmp_path)])
    write_json(tmp_path / "study.json", {"preset": "smoke"})
    with pytest.raises(UserError, match="`directory` must be a study's, with a finish"):
        report.main([str(tmp_path), "--no-keep"])
