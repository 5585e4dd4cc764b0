"""Recorded runs of post-training quantization: what is run, resumed, refused and written."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from tiny_runs import (  # noqa: F401
    TinyNet,
    quantized_to,
    snapshot,
    standard_promotion,
    tiny_data,
    tiny_variables,
)

from compand_jax.calibration.fit import CALIBRATIONS
from compand_jax.experiments.errors import UserError
from compand_jax.experiments.ptq import run as post_training_run
from compand_jax.experiments.ptq.bit_allocation import at_bits
from compand_jax.experiments.ptq.checkpoint import Checkpoint
from compand_jax.experiments.ptq.record import document, results_by_setting
from compand_jax.experiments.ptq.run import PostTrainingConfig, run
from compand_jax.experiments.ptq.tables import base_setting, lead_text, tables

BASE = base_setting("mse", error_feedback=False, batch_stats=True)


@pytest.fixture
def config(tmp_path, monkeypatch):
    checkpoint = Checkpoint("tiny", TinyNet(), tiny_variables(), tiny_data(), 1, True)
    monkeypatch.setattr(post_training_run, "load_checkpoint", lambda *_, **__: checkpoint)
    return PostTrainingConfig(
        tmp_path / "net.npz", bits=(3,), calibration="absmax", images=40, out=tmp_path / "out"
    )


@pytest.fixture
def evaluated(monkeypatch):
    """Stands in for the evaluation, which other tests look at; lists the settings it was given."""
    given = []

    def evaluate(network, setting):
        given.append(setting)
        correct = 3 * setting.quant.weight_bits - (setting.quant.quantizer == "uniform")
        return setting.to_row() | {
            "accuracy": 100 * correct / 30, "correct": correct, "total": 30,
            "mean_weight_bits": float(setting.quant.weight_bits), "model_bytes": 100,
            "weight_sqnr": None, "calibration_seconds": 1.0, "evaluation_seconds": 2.0,
        }  # fmt: skip

    monkeypatch.setattr(post_training_run, "evaluate_setting", evaluate)
    return given


def read(config):
    return json.loads((config.out / "results.json").read_text())


@pytest.mark.quick
def test_tables_cover_what_is_promised():
    found = tables(BASE, range(2, 9))
    main, rest = found[0].settings(), [one for table in found[1:] for one in table.settings()]
    wanted = {
        BASE.changed(weight_bits=bits, act_bits=act_bits, grid=grid,
                            quantizer=quantizer, weight_granularity=granularity)
        for bits in range(2, 9)
        for act_bits in (None, bits)
        for grid in (("midtread", "midrise") if bits == 2 else ("midtread",))
        for quantizer in ("uniform", "mu_law")
        for granularity in ("tensor", "channel")
    }  # fmt: skip
    assert set(main) == wanted
    assert len(main) == 64
    for bits in (3, 4):
        at = at_bits(BASE, bits)
        for name in CALIBRATIONS:
            assert at.changed(calibration=name) in rest
        for scope in ("per_layer", "separate", "single"):
            assert at.changed(act_bits=bits, mu_scope=scope) in rest
        assert at.changed(batch_stats=False, weight_granularity="tensor") in rest
    for bits in (2, 3, 4):
        for quantizer in ("uniform", "mu_law"):
            one = at_bits(BASE, bits).changed(quantizer=quantizer)
            assert one in rest
            assert one.changed(error_feedback=True) in rest
    # One mu for all weights and one for everything are not run twice where they are the same.
    assert not any(
        one.quant.mu_scope == "single" and one.quant.act_bits is None for one in main + rest
    )
    assert [table.title for table in tables(BASE, [7])] == ["Bits"]


def test_run_writes_every_row_once_and_goes_on_after_a_stop(config, evaluated, monkeypatch):
    whole = post_training_run.evaluate_setting
    config = dataclasses.replace(config, workers=1)

    def stopped(network, setting):
        if len(evaluated) == 5:
            raise KeyboardInterrupt
        return whole(network, setting)

    monkeypatch.setattr(post_training_run, "evaluate_setting", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(config, progress=False)
    assert results_by_setting(read(config)["rows"]).keys() == set(evaluated[:5])
    first = list(evaluated)
    monkeypatch.setattr(post_training_run, "evaluate_setting", whole)
    text, directory = run(config, progress=False)
    base = base_setting("absmax", error_feedback=False, batch_stats=True)
    wanted = dict.fromkeys(one for table in tables(base, (3,)) for one in table.settings())
    assert len(evaluated) == len(set(evaluated)) == len(wanted)  # none of them twice
    assert list(results_by_setting(read(config)["rows"])) == list(wanted)
    assert evaluated[:5] == first
    before = snapshot(directory)
    monkeypatch.setattr(post_training_run, "evaluate_setting", None)
    monkeypatch.setattr(post_training_run, "observe_network", None)
    assert run(config, progress=False) == (text, directory)
    assert snapshot(directory) == before
    assert text == (directory / "results.md").read_text() == document(read(config))
    with (directory / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["correct"]) for row in rows] == [row["correct"] for row in read(config)["rows"]]
    assert rows[0].keys() == read(config)["rows"][0].keys() - {"rules"}
    assert (directory / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_text_has_the_results(config, evaluated):
    text, _ = run(dataclasses.replace(config, bits=(2, 8)), progress=False)
    lines = text.splitlines()
    assert lines[0] == "# Quantized without training: tiny on tiny"
    found = [line for line in lines if line.startswith("| 8/")]
    assert found == [
        "| 8/32     | midtread |             76.67 % |            80.00 % |              76.67 % |"
        "             80.00 % |",
        "| 8/8      | midtread |             76.67 % |            80.00 % |              76.67 % |"
        "             80.00 % |",
    ]
    assert [line.split("|")[1:3] for line in lines if line.startswith("| 2/32 ")][:2] == [
        [" 2/32     ", " midtread "], [" 2/32     ", "  midrise "]]  # fmt: skip
    full = json.loads((config.out / "results.json").read_text())["full_precision"]
    assert f"Full precision: {full['accuracy']:.2f} % of 19 test images" in text
    assert "40 training images for calibration, augmented as in training; seed 0" in text
    # 12 in the main table, which is of absmax, and mse and two with error feedback at 2 bits.
    assert "Of 15 pairs that differ in nothing else, mu-law is ahead of uniform in 15" in text


@pytest.mark.quick
def test_lead_is_told_as_it_is():
    def row(correct):
        return {"correct": correct, "total": 200}

    uniform = quantized_to(3, quantizer="uniform")
    results = {quantized_to(3): row(100), uniform: row(101), quantized_to(4): row(7),
               quantized_to(5): row(9), uniform.changed(weight_bits=5): row(9)}  # fmt: skip
    assert lead_text(results) == (
        "Of 2 pairs that differ in nothing else, mu-law is ahead of uniform in 0 and behind in 1, "
        "by -0.50 to +0.00 points."
    )
    assert lead_text({quantized_to(3): row(1)}) == ""


def test_sensitivity_and_budget_share_a_record(config, monkeypatch):
    monkeypatch.setattr(post_training_run, "BITS", (3, 4))
    text, directory = run(dataclasses.replace(config, sensitivity=True), progress=False)
    record = read(config)
    assert [(row["site"], row["weight_bits"]) for row in record["sensitivity"]] == [
        ("conv", 3), ("dense", 3)]  # fmt: skip
    assert record["sites"] == {"conv": 36, "dense": 192}
    assert all(row["divergence"] > 0 for row in record["divergences"])
    assert "## One site at a time" in text
    assert (directory / "sensitivity.png").is_file()
    kept = record["divergences"]
    # A budget needs them at all bits; those that are there are not measured again.
    text, _ = run(dataclasses.replace(config, budget=3.5, bits=None), progress=False)
    record = read(config)
    assert len(record["divergences"]) == 2 * 2
    assert [row for row in record["divergences"] if row["weight_bits"] == 3] == kept
    (found,) = record["budgets"]
    bits = {row["site"]: row["weight_bits"] for row in found["sites"]}
    mean = (36 * bits["conv"] + 192 * bits["dense"]) / 228
    assert found["mixed"]["mean_weight_bits"] == pytest.approx(mean)
    assert mean <= 3.5
    assert found["fixed"]["mean_weight_bits"] == 3
    losses = {(row["site"], row["weight_bits"]): row["divergence"] for row in record["divergences"]}
    assert found["mixed_divergence"] == pytest.approx(sum(losses[one] for one in bits.items()))
    beat = found["mixed"]["correct"] > found["fixed"]["correct"]
    assert (" do not beat 3 bits for every site" in text) == (not beat)
    assert (" beat 3 bits for every site" in text.replace("do not beat", "")) == beat
    assert "## Bits in a budget of 3.5" in text
    before = snapshot(directory)
    monkeypatch.setattr(post_training_run, "observe_network", None)
    again = run(dataclasses.replace(config, budget=3.5, bits=None), progress=False)
    assert again == (text, directory)
    assert snapshot(directory) == before
    files = {"results.json", "results.md", "sensitivity.csv", "sensitivity.png", "budget.png"}
    assert set(before) == files


def test_record_of_another_configuration_or_other_files(config, evaluated, tmp_path):
    run(config, progress=False)
    before = snapshot(config.out)
    for fields, message in (
        ({"seed": 1}, "seed is 0 there, 1 here: choose another directory or the same values"),
        ({"images": 39, "test_images": 7}, "images is 40 there, 39 here; test_images is 19 there"),
        ({"calibration": "mse"}, "calibration is 'absmax' there, 'mse' here"),
    ):
        with pytest.raises(UserError, match=f"`out` must be of this configuration.*{message}"):
            run(dataclasses.replace(config, **fields), progress=False)
    assert snapshot(config.out) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(UserError, match="`out` must be new, empty or a record's directory, got"):
        run(dataclasses.replace(config, out=tmp_path / "other"), progress=False)
    with pytest.raises(UserError, match="`out` must be a directory that can be written, got"):
        run(dataclasses.replace(config, out=tmp_path / "other" / "file"), progress=False)


def damage(record, way):
    if way == "a list":
        return "[]"
    if way == "cut off":
        return json.dumps(record)[:-100]
    if way == "no object":
        return json.dumps(record | {"config": [1]})
    if way == "another setting":
        record["rows"][0]["weight_bits"] = "three"
    elif way == "another site":
        record["divergences"] = [{"site": "none", "weight_bits": 3, "divergence": 0.1}]
    elif way == "a result gone":
        del record["rows"][-1]["correct"]
    else:
        del record[way]
    return json.dumps(record)


WAYS = (
    "a list", "cut off", "no object", "another setting", "another site", "a result gone",
    "rows", "seconds", "budgets", "full_precision", "versions",
)  # fmt: skip


def test_a_damaged_record_is_left_as_it_is(config, evaluated, monkeypatch):
    run(config, progress=False)
    whole = read(config)
    monkeypatch.setattr(post_training_run, "load_checkpoint", None)  # it is not come to
    for way in WAYS:
        text = damage(json.loads(json.dumps(whole)), way)
        (config.out / "results.json").write_text(text)
        before = snapshot(config.out)
        with pytest.raises(UserError, match="`out` must hold a record of compand ptq, got"):
            run(config, progress=False)
        assert snapshot(config.out) == before, way


def test_nan_and_too_many_images_are_errors_before_anything_is_made(config, monkeypatch):
    with pytest.raises(UserError, match="`images` must be from 1 to the 64 training images, got"):
        run(dataclasses.replace(config, images=65), progress=False)
    variables = tiny_variables()
    variables["params"]["dense"]["kernel"] *= np.nan
    checkpoint = Checkpoint("tiny", TinyNet(), variables, tiny_data(), 1, True)
    monkeypatch.setattr(post_training_run, "load_checkpoint", lambda *_, **__: checkpoint)
    with pytest.raises(UserError, match="got NaN or infinity in params/dense/kernel"):
        run(config, progress=False)
    assert not config.out.exists()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images": 0}, "`images` must be an integer of at least 1, got 0"),
        ({"test_images": 0}, "`test_images` must be an integer of at least 1, got 0"),
        ({"seed": -1}, r"`seed` must be an integer from 0 to 2\*\*32 - 1, got -1"),
        ({"seed": 2**40}, r"`seed` must be an integer from 0 to 2\*\*32 - 1, got 1099511627776"),
        ({"workers": 0}, "`workers` must be an integer of at least 1, got 0"),
        ({"bits": ()}, r"`bits` must be one or more of 2, 3, 4, 5, 6, 7, 8, got \(\)"),
        ({"bits": (1, 4)}, "`bits` must be one or more of 2, 3, 4, 5, 6, 7, 8, got"),
        ({"budget": 1.9}, "`budget` must be from 2 to 8 bits per weight, got 1.9"),
        ({"budget": float("nan")}, "`budget` must be from 2 to 8 bits per weight, got nan"),
        ({"budget": 4.0, "sensitivity": True}, "`budget` must be left out with `sensitivity`"),
        ({"calibration": "best"}, "`calibration` must be one of mse, absmax, .*, got 'best'"),
        ({"model": "lenet"}, "`model` must be one of cnn, .*, got 'lenet'"),
        ({"dataset": "mnist"}, "`dataset` must be one of digits, .*, got 'mnist'"),
    ],
)
def test_wrong_fields(tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        PostTrainingConfig(tmp_path, **fields)


@pytest.mark.quick
def test_bits_that_have_swallowed_the_checkpoint(tmp_path):
    with pytest.raises(UserError, match="`checkpoint` must be .* not exist: give it before --bit"):
        PostTrainingConfig(tmp_path / "3", bits=())
