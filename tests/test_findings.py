"""What README and pages say in words of the records, sentence by sentence."""

import functools
import json
import math
import statistics
from pathlib import Path

import pytest

from compand_jax.experiments.study.grid import study_cells
from compand_jax.experiments.study.report import read_records

ROOT = Path(__file__).parents[1]
STUDIES_SHOWN = "laptop", "literature", "vgg19-short"


@functools.cache
def cells(study):
    """The rows of a study's fine-tunings, by method, bits, mu and seed, in one arrangement."""
    rows = [record["row"] for record in read_records(ROOT / "results" / study)]
    return {
        (row["mu_scope"] or row["method"], row["weight_bits"], row["mu"], row["seed"]): row
        for row in rows
        if row["stage"] == "cell" and row["arrangement"] == "conv_norm_act"
    }


def leads(study, bits, column="accuracy"):
    """By how many points a mu per layer is ahead of uniform levels, seed by seed."""
    found = cells(study)
    seeds = sorted(key[3] for key in found if key[:3] == ("per_layer", bits, "learned"))
    return [
        found["per_layer", bits, "learned", seed][column]
        - found["uniform", bits, None, seed][column]
        for seed in seeds
    ]


def standard_error(study):
    share = next(iter(cells(study).values()))["full_precision_accuracy"] / 100
    return 100 * math.sqrt(share * (1 - share) / 10_000)


def losses(study, bits):
    """Points below the control, of every cell with a mu that is learned."""
    return [
        row["full_precision_accuracy"] - row["accuracy"]
        for (_, at, mu, _), row in cells(study).items()
        if at == bits and mu == "learned"
    ]


def learned_mus(study, operand, bits=None, site=None):
    """The mu of each or of one site whose bits are the row's, of cells with a mu per layer."""
    return [
        found[f"{operand}_mu"]
        for record in read_records(ROOT / "results" / study)
        if (row := record["row"])["mu_scope"] == "per_layer" and row["mu"] == "learned"
        if bits in (None, row["weight_bits"])
        for name, found in record["quantizers"].items()
        if site in (None, name) and f"{operand}_mu" in found
        if record["sites"][name][f"{operand}_bits"] == row[f"{operand}_bits"]
    ]


@functools.cache
def post_training():
    return json.loads((ROOT / "results/ptq-resnet20-cifar10/results.json").read_text())["rows"]


def both(**fields):
    """Uniform and mu-law rows of the settings that have these fields, in pairs."""
    rows = [row for row in post_training() if fields.items() <= row.items()]
    pairs = {}
    for row in rows:
        names = (
            *("weight_bits", "act_bits", "weight_granularity", "grid", "calibration"),
            *("error_feedback", "batch_stats"),
        )
        if row["mu_scope"] == "per_layer" and not row["rules"]:
            pairs.setdefault(tuple(row[name] for name in names), {})[row["quantizer"]] = row
    return [(pair["uniform"], pair["mu_law"]) for pair in pairs.values() if len(pair) == 2]


def accuracy_leads(**fields):
    return [mu_law["accuracy"] - uniform["accuracy"] for uniform, mu_law in both(**fields)]


BARE = {"weight_granularity": "tensor", "batch_stats": False, "error_feedback": False}
DAMAGING = {"weight_bits": 3, "act_bits": None, "weight_granularity": "channel"}
DAMAGING |= {"batch_stats": False, "calibration": "mse"}


def epochs(study, model):
    return {
        (cell.parent.epochs, cell.config.finetune_epochs)
        for cell in study_cells(study)
        if cell.config.model == model
    }


FINDINGS = {
    ("README.md", "is ahead of uniform levels with a learned scale by tenths of a point"): lambda: (
        all(0.1 < statistics.mean(leads("laptop", bits)) < 1 for bits in (4, 3, 2))
    ),
    ("docs/results.md", "0.3 to 0.5 points on 10,000 images"): lambda: all(
        0.25 < standard_error(study) < 0.5 for study in STUDIES_SHOWN
    ),
    ("docs/results.md", "in each of three seeds at 4 and at 2 bits, and most at 2"): lambda: (
        len(leads("laptop", 4)) == len(leads("laptop", 2)) == 3
        and min(leads("laptop", 4) + leads("laptop", 2)) > 0
        and statistics.mean(leads("laptop", 2))
        > max(statistics.mean(leads("laptop", bits)) for bits in (3, 4))
    ),
    ("docs/results.md", "at 3 bits it is ahead in two seeds and behind in one"): lambda: (
        [lead > 0 for lead in sorted(leads("laptop", 3))] == [False, True, True]
    ),
    ("docs/results.md", "by less than the standard error at 4 and 3 bits and by a tenth"): lambda: (
        all(0 < leads("literature", bits)[0] < standard_error("literature") for bits in (4, 3))
        and round(leads("literature", 2)[0] - standard_error("literature"), 1) == 0.1
    ),
    ("docs/results.md", "trains, it is ahead by less than the standard error"): lambda: (
        0 < leads("vgg19-short", 4)[0] < standard_error("vgg19-short")
    ),
    ("docs/results.md", "At 8 bits there is nothing to gain before training"): lambda: all(
        abs(lead) < standard_error("literature") for lead in accuracy_leads(weight_bits=8)
    ),
    ("docs/results.md", "Right after calibration its lead is largest"): lambda: all(
        statistics.mean(leads(study, bits, "calibrated_accuracy"))
        > statistics.mean(leads(study, bits))
        for study, each in (("laptop", (4, 3, 2)), ("literature", (4, 3, 2)), ("vgg19-short", (4,)))
        for bits in each
    ),
    ("docs/results.md", "At 4 bits AlexNet stays within a point of full precision"): lambda: (
        0 < min(losses("laptop", 4)) <= max(losses("laptop", 4)) < 1
    ),
    ("docs/results.md", "`single` and `separate` have one seed"): lambda: (
        {key[3] for key in cells("laptop") if key[0] in ("single", "separate")} == {0}
    ),
    ("docs/results.md", "up to eleven for sparse activations (fifteen in VGG19)"): lambda: (
        round(max(learned_mus("laptop", "act") + learned_mus("literature", "act"))) == 11
        and round(max(learned_mus("vgg19-short", "act"))) == 15
    ),
    ("docs/results.md", "up to seven for weights, and less the fewer the bits"): lambda: (
        round(max(mu for study in STUDIES_SHOWN for mu in learned_mus(study, "weight"))) == 7
        and all(
            statistics.mean(learned_mus(study, operand, bits))
            > statistics.mean(learned_mus(study, operand, bits - 1))
            for study in ("laptop", "literature")
            for operand in ("weight", "act")
            for bits in (4, 3)
        )
    ),
    ("docs/results.md", "have a few tenths at any bits"): lambda: all(
        0.25 < mu < 0.55 for mu in learned_mus("laptop", "act", site="conv1")
    ),
    ("docs/results.md", "255 costs points"): lambda: all(
        cells("laptop")["per_layer", bits, "learned", 0]["accuracy"]
        - cells("laptop")["per_layer", bits, "fixed_255", 0]["accuracy"]
        > 1
        for bits in (4, 2)
    ),
    ("docs/calibration.md", "in about a hundred ways"): lambda: 90 < len(post_training()) < 120,
    ("docs/calibration.md", "Most where nothing else is done"): lambda: (
        max(accuracy_leads(**BARE)) == max(accuracy_leads())
    ),
    ("docs/calibration.md", "mu-law has the smaller error and the lower accuracy"): lambda: all(
        mu_law["weight_sqnr"] > uniform["weight_sqnr"] and mu_law["accuracy"] < uniform["accuracy"]
        for uniform, mu_law in both(**DAMAGING)
    ),
    ("docs/studies.md", "408 fine-tunings, of 10 epochs from parents of 60 (AlexNet)"): lambda: (
        len(study_cells("paper")) == 408
        and epochs("paper", "alexnet-bn") == {(60, 10)}
        and epochs("paper", "vgg19") == {(20, 2)}
    ),
}


@pytest.mark.parametrize(("page", "words"), FINDINGS)
def test_what_is_said_is_in_the_records(page, words):
    assert words in " ".join((ROOT / page).read_text().split()), "said otherwise now: change both"
    assert FINDINGS[page, words]()


def test_the_comparisons_find_rows():
    assert len(both(**DAMAGING)) == 1
    assert len(both(**BARE)) > 1
    assert len(accuracy_leads(weight_bits=8)) > 2
