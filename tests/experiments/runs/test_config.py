"""What a run is: its presets, its checks, its JSON."""

import dataclasses
import json
from pathlib import Path

import pytest

from compand_jax import QuantConfig, Rule
from compand_jax.experiments.errors import UserError
from compand_jax.experiments.runs.config import (
    FREE_FIELDS,
    METHODS,
    METHODS_BY_NAME,
    Method,
    RunConfig,
    differences,
    from_json,
    to_json,
    unknown_fields,
)
from compand_jax.experiments.runs.presets import PRESETS, preset

pytestmark = pytest.mark.quick

RULES = (Rule("conv1|dense", weight_bits=8, act_bits=None), Rule("norm.*", grid="midrise"))


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name):
    config = preset(name)
    quant = QuantConfig(weight_bits=None, act_bits=3, act_signed=False, rules=RULES)
    fields = {"state_dict": Path("a.npz"), "parent_dir": Path("parent"), "epochs": 0}
    fields |= {"mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0), "calibration_mu": 255.0}
    fields |= {"quant": quant, "record_dir": Path("kept")}
    for changed in (config, dataclasses.replace(config, **fields)):
        stored = json.loads(json.dumps(to_json(changed)))
        assert from_json(stored) == changed
        assert differences(stored, changed) == []
        assert unknown_fields(stored) == []


def test_presets_are_the_promised_ones():
    models = ("alexnet", "vgg19", "resnet20")
    names = [f"{model}-{data}" for data in ("cifar10", "cifar100") for model in models]
    assert list(PRESETS) == ["digits", *names]
    assert len({config.run_dir for config in PRESETS.values()}) == len(PRESETS)
    for name in names:
        config = PRESETS[name]
        assert (config.model, config.dataset) == tuple(name.split("-"))
        assert (config.pad, config.flip) == (4, True)
        assert config.methods == METHODS
        assert config.finetune_learning_rate < config.learning_rate
        assert config.quant == QuantConfig(weight_bits=4, act_bits=4)
    assert PRESETS["digits"] == RunConfig()
    assert (RunConfig().pad, RunConfig().flip) == (0, False)  # a mirrored digit is none


def test_unknown_preset():
    with pytest.raises(UserError, match="`preset` must be one of digits, .*, got 'x': choose one"):
        preset("x")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "mnist"}, "`dataset` must be one of digits, cifar10, cifar100, got 'mnist'"),
        ({"model": "lenet"}, "`model` must be one of cnn, .*resnet56, got 'lenet': change it"),
        ({"block_order": "act"}, "`block_order` must be one of conv_norm_act, .*, got 'act'"),
        ({"dtype": "int8"}, "`dtype` must be one of float32, bfloat16, float16, got 'int8'"),
        ({"calibration": "max"}, "`calibration` must be one of mse, absmax, .*, output, got 'max'"),
        ({"methods": (Method("x"),)}, "`methods` must be different ones of .*quantizer='x'"),
        ({"methods": (Method("uniform"),) * 2}, "`methods` must be different ones of"),
        ({"seed": -1}, "`seed` must be an integer of at least 0, got -1"),
        ({"epochs": -1}, "`epochs` must be an integer of at least 0, got -1"),
        ({"epochs": 0}, "`epochs` must be an integer of at least 1, or 0 with `state_dict` or `p"),
        ({"finetune_epochs": 0}, "`finetune_epochs` must be an integer of at least 1, got 0"),
        ({"calibration_mu": 256.0}, "`calibration_mu` must be None or a number from 0 to 255, got"),
        ({"mean": (0.5,)}, "`std` must be given where `mean` is, and only there, got None: change"),
        ({"std": (0.5,)}, r"`std` must be given where `mean` is, and only there, got \(0.5,\)"),
        ({"batch_size": True}, "`batch_size` must be an integer of at least 1, got True"),
        ({"pad": -4}, "`pad` must be an integer of at least 0, got -4"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be a finite number .*, got nan"),
        ({"mu_learning_rate": -1.0}, "`mu_learning_rate` must be .* of at least 0, got -1.0"),
        ({"weight_decay": float("inf")}, "`weight_decay` must be a finite number .*, got inf"),
        ({"warmup_epochs": -1.0}, "`warmup_epochs` must be a finite number of at least 0"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(UserError, match=message):
        RunConfig(**fields)


def test_differences_are_what_can_change_a_result():
    config = RunConfig()
    for field in FREE_FIELDS:
        assert field in to_json(config)
    free = dataclasses.replace(
        config,
        methods=(Method("uniform"),),
        run_dir=Path("x"),
        steps_per_call=7,
        checkpoint_every=3,
    )
    assert differences(to_json(free), config) == []
    quant = QuantConfig(weight_bits=3)
    other = dataclasses.replace(config, seed=1, epochs=30, quant=quant)
    rows = differences(to_json(other), config)
    assert rows == [
        "epochs is 30 there, 20 here",
        "quant.weight_bits is 3 there, 4 here",
        "seed is 1 there, 0 here",
    ]
    assert differences(to_json(other), config, finetune=False) == [rows[0], rows[2]]
    # What an older version did not know has its default.
    assert differences({"quant": {}}, config) == []
    assert unknown_fields({"seed": 0, "x": 1, "quant": {"y": 2}}) == ["quant.y", "x"]


def test_methods_go_by_the_names_of_their_directories():
    assert list(METHODS_BY_NAME) == [
        "full_precision_continued", "uniform", "mu_law-single", "mu_law-separate",
        "mu_law-per_layer",
    ]  # fmt: skip
    assert to_json(RunConfig())["methods"] == list(METHODS_BY_NAME)
    assert from_json({"methods": ["mu_law-separate"]}).methods == (Method("mu_law", "separate"),)
    with pytest.raises(UserError, match="`methods` must be of full_precision_.*, got \\['x'\\]"):
        from_json({"methods": ["x"]})


def test_configurations_of_recorded_runs_are_read():
    for path in Path(__file__).parents[3].glob("results/*/config.json"):
        stored = json.loads(path.read_text())
        assert unknown_fields(stored) == []
        again = to_json(from_json(stored))
        assert {name: again[name] for name in stored if name != "quant"} == {
            name: stored[name] for name in stored if name != "quant"
        }
        assert stored["quant"].items() <= again["quant"].items()
