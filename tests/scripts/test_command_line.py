"""The scripts' arguments: their help, and one line for every error."""

import dataclasses
import errno
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

# Fixtures are imported to be found (F401), and named again where they are used (F811).
from scripts_called import call, error_of, refusal_of  # noqa: F401
from tiny_runs import SCRIPTS, snapshot, standard_promotion, tiny, tiny_config  # noqa: F401

from compand_jax import QuantConfig, Rule
from compand_jax.experiments.commands import console, evaluate, study, train
from compand_jax.experiments.commands.arguments import of_commands
from compand_jax.experiments.runs import run as experiments
from compand_jax.experiments.runs import stages
from compand_jax.experiments.runs.config import Method, RunConfig, to_json
from compand_jax.experiments.runs.presets import PRESETS

PROJECT = tomllib.loads((SCRIPTS.parent / "pyproject.toml").read_text())["project"]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--quant.weight-bits 0", "`weight_bits` must be an integer from 1 to 8, got 0"),
        ("--quant.weight-bits 9", "`weight_bits` must be an integer from 1 to 8, got 9"),
        ("--quant.weight-bits 2.5", "parsing --quant.weight-bits: .* int() with base 10: '2.5'"),
        ("--quant.act-bits 0", "`act_bits` must be an integer from 1 to 8, got 0"),
        ("--quant.act-bits 2.5", "Error parsing --quant.act-bits: .* int() with base 10: '2.5'"),
        ("--quant.weight-bits 1", "`weight_bits` must be at least 2 for a signed midtread grid"),
        ("--quant.mu-scope all", "`mu_scope` must be one of single, separate, per_layer, got"),
        ("--quant.grid mid", "`grid` must be one of midtread, midrise, got 'mid'"),
        ("--quant.quantizer x", "`quantizer` must be one of mu_law, uniform, power, "),
        ("--quant.mu-init -1", "`mu_init` must be from 0 to 255, got -1.0"),
        ("--quant.mu-init nan", "`mu_init` must be from 0 to 255, got nan"),
        ("--quant.rules nojson", "`--quant.rules` must be JSON objects with pattern and any of"),
        ('--quant.rules {"patern":"x"}', "`--quant.rules` must be JSON objects with pattern"),
        ('--quant.rules {"pattern":"("}', "`pattern` must be a regular expression, got '('"),
        ('--quant.rules {"pattern":"a","weight_bits":12}', "`weight_bits` must be an integer"),
        ("--dataset mnist", "`dataset` must be one of digits, cifar10, cifar100, got 'mnist'"),
        ("--model lenet", "`model` must be one of cnn, alexnet, .*, got 'lenet': change it"),
        ("--methods mu_law", "invalid choice 'mu_law' for argument '--methods'. Expected one of"),
        ("--methods uniform uniform", "`methods` must be different ones of .*, got (Method("),
        ("lenet-cifar10", "`preset` must be one of digits, alexnet-cifar10, .*, got 'lenet-ci"),
        ("--epochs x", "Error parsing --epochs: invalid literal for int() with base 10: 'x'"),
        ("--epochs", "Missing value for argument '--epochs'"),
        ("--epocs 3", "Unrecognized options: --epocs"),
        ("digits more", "Unrecognized options: more"),
        ("--learning-rate nan", "`learning_rate` must be a finite number of at least 0, got nan"),
        ("--batch-size 1440", "`batch_size` must be at most the 1437 images of the training split"),
        ("--batch-size 60", "`batch_size` must be a multiple of the 8 devices, got 60: choose"),
        (
            "resnet20-cifar10 --data-dir {tmp}/data",
            "`data_dir` must hold cifar10, got .*data', in which cifar10 is not prepared: run",
        ),
    ],
)
def test_errors_of_train(call, tmp_path, arguments, message):  # noqa: F811
    given = arguments.replace("{tmp}", str(tmp_path)).split(" ")
    text = refusal_of(call(train, *given, "--run-dir", tmp_path / "run"))
    pattern = re.escape(message).replace(re.escape(".*"), ".*")
    assert re.search(pattern, text), text
    assert not list(tmp_path.iterdir())


@pytest.mark.quick
def test_errors_of_evaluate(call, tmp_path):  # noqa: F811
    text = error_of(call(evaluate, tmp_path))
    wanted = f"`run_dir` must be a run's directory, with config.json in it, got {tmp_path}"
    assert text.startswith(wanted)
    (tmp_path / "config.json").write_text(json.dumps(to_json(RunConfig())))
    text = error_of(call(evaluate, tmp_path))
    assert text.startswith(
        f"`run_dir` must have a finished stage, got {tmp_path} with none: finish"
    )
    assert "A run's directory" in refusal_of(call(evaluate))
    (tmp_path / "config.json").write_text("{")
    assert "must be a JSON file, got" in error_of(call(evaluate, tmp_path))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("tiny", "`preset` must be one of paper, literature, laptop, levers, smoke, vgg"),
        ("literature --checkpoint none.npz", "`checkpoint` must be a file, got"),
        ("smoke --parents none", "`parents` must be a directory that another study left, got none"),
        ("smoke --networks vgg19", "`networks` must be of cnn, got vgg19: correct it"),
        ("", "--out"),
    ],
)
def test_errors_of_study(call, tmp_path, arguments, message):  # noqa: F811
    given = [*arguments.split(), "--out", tmp_path / "out"] if arguments else ["smoke"]
    assert message in refusal_of(call(study, *given))
    assert not list(tmp_path.iterdir())


@pytest.mark.quick
def test_failed_cells_are_an_error_at_the_end(call, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr(study, "run_study", lambda *_: ["first", "second"])
    assert error_of(call(study, "smoke", "--out", tmp_path)).startswith(
        "`preset` must run whole, got 2 failed cells, first first: see "
    )
    monkeypatch.setattr(study, "run_study", lambda *_: [])
    status, out, _ = call(study, "smoke", "--out", tmp_path)
    assert status == 0
    assert "0 of 3 cells finished, others at work on the rest; now compand report" in out


def test_exit_status_of_the_process(tmp_path):
    script, run_dir = str(SCRIPTS / "train.py"), str(tmp_path / "run")
    command = [sys.executable, script, "--quant.weight-bits", "9", "--run-dir", run_dir]
    process = subprocess.run(command, capture_output=True, text=True)
    assert "`weight_bits` must be an integer from 1 to 8, got 9" in refusal_of(
        (process.returncode, process.stdout, process.stderr)
    )
    process = subprocess.run([*command[:2], "lenet"], capture_output=True, text=True)
    assert error_of((process.returncode, process.stdout, process.stderr)).startswith(
        "`preset` must be one of digits, "
    )


@pytest.mark.quick
def test_a_bug_keeps_its_traceback(call, monkeypatch, tmp_path):  # noqa: F811
    def broken(*_, **__):
        raise ValueError("a bug")

    monkeypatch.setattr(train, "run", broken)
    with pytest.raises(ValueError, match="a bug"):
        call(train, "--run-dir", tmp_path / "run")


SCRIPTS_WITH_HELP = "train", "evaluate", "prepare_data", "ptq", "export", "study", "report"


HELP = """
import runpy, sys
for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, path
"""


def test_help_of_every_script():
    # Most of the time is the imports: one process for all of them. .ci/run starts each by itself.
    paths = [str(SCRIPTS / f"{script}.py") for script in SCRIPTS_WITH_HELP]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPTS), *sys.path])}
    command = [sys.executable, "-c", HELP, *paths]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert all(f"usage: {path} " in process.stdout for path in paths)


@pytest.mark.quick
def test_compand_runs_each_command(monkeypatch, capsys, tmp_path):
    def run(*given):
        monkeypatch.setattr(sys, "argv", ["bin/compand", *map(str, given)])
        try:
            return console.main(), *capsys.readouterr()
        except SystemExit as stop:
            return stop.code, *capsys.readouterr()

    status, out, err = run("--help")
    assert (status, err) == (0, "")
    assert run() == (status, out, err)
    modules = {path.stem for path in Path(console.__file__).parent.glob("*.py")}
    assert set(console.COMMANDS) == modules - {"__init__", "arguments", "console"}
    for name, what in console.COMMANDS.items():
        module = importlib.import_module(f"compand_jax.experiments.commands.{name}")
        assert of_commands(module.__doc__.partition("\n")[0]) == what
        assert what in out
    assert error_of(run("quantize")).startswith("`command` must be one of train, ptq, study, ")
    status, out, err = run("study", "--help")
    assert (status, err) == (0, "")
    assert out.startswith("usage: compand study [-h]")
    assert "Usage: compand study PRESET --out DIR" in " ".join(out.split())
    status, out, err = run("study", "smoke", "--out", tmp_path, "--dry-run")
    assert (status, err) == (0, "")
    assert "mu_law" in out
    found = PROJECT["scripts"]["compand"].split(":")
    assert getattr(importlib.import_module(found[0]), found[1]) is console.main


# What the help of a field has to say of its unit or its choices.
UNITS = {
    "distributed": "processes",
    "dataset": "cifar100",
    "model": "resnet56",
    "block-order": "norm_act_conv",
    "dtype": "bfloat16",
    "seed": "from 0",
    "epochs": "in epochs",
    "state-dict": "npz",
    "mean": "in [0, 1], per channel",
    "std": "deviation",
    "parent-dir": "directory",
    "finetune-epochs": "in epochs",
    "methods": "mu_law-per_layer",
    "batch-size": "Images",
    "learning-rate": "SGD",
    "finetune-learning-rate": "of the weights",
    "mu-learning-rate": "log(1 + mu)",
    "scale-learning-rate": "log(scale)",
    "weight-decay": "per unit of weight",
    "warmup-epochs": "in epochs",
    "pad": "in pixels",
    "flip": "mirrored",
    "calibration": "absmax",
    "calibration-batches": "batches",
    "calibration-mu": "0 to 255",
    "first-last-bits": "1 to 8",
    "quantizer-optimizer": "sgd",
    "transition-rate": "0 to 1",
    "preceding-bits": "Bits",
    "distillation-weight": "0 to 1",
    "distillation-temperature": "above 0",
    "batch-stats-batches": "batches",
    "steps-per-call": "steps",
    "checkpoint-every": "in epochs",
    "tensorboard": "TensorBoard",
    "data-dir": "Directory",
    "run-dir": "Directory",
    "record-dir": "Directory",
    "quant.weight-bits": "Bits per weight, 1 to 8",
    "quant.act-bits": "Bits per activation, 1 to 8",
    "quant.mu-scope": "separate",
    "quant.quantizer": "uniform",
    "quant.weight-granularity": "channel",
    "quant.scale-dtype": "float16",
    "quant.grid": "midrise",
    "quant.act-site": "output",
    "quant.act-signed": "None lets calibration decide",
    "quant.scale-gradient": "lsq",
    "quant.mu-gradient": "lsq",
    "quant.weight-standardization": "standard deviation",
    "quant.mu-init": "0 to 255",
    "quant.contractions": "Flax's own layers",
    "quant.rules": "JSON",
}


def plain(value):
    if isinstance(value, tuple):
        return " ".join(getattr(each, "name", str(each)) for each in value)
    return str(value)


def wanted_defaults(config):
    for prefix, part in (("", config), ("quant.", config.quant)):
        for field in dataclasses.fields(part):
            if field.name != "quant":
                name = prefix + field.name.replace("_", "-")
                yield name, plain(getattr(part, field.name))


@pytest.mark.parametrize("name", ["digits", "vgg19-cifar100"])
def test_help_names_every_field_its_unit_and_its_default(name):
    wide = os.environ | {"COLUMNS": "90", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(SCRIPTS / "train.py"), name, "--help"]
    out = subprocess.run(command, capture_output=True, env=wide, check=True).stdout.decode()
    text = " ".join(" ".join(line.strip("│ ") for line in out.splitlines()).split())
    text = re.sub(
        r"[─╭╮╰╯]+|, --(quant\.)?no-(flip|distributed|tensorboard|weight-standardization)",
        " ",
        text,
    )
    entries = dict(re.findall(r" --((?:quant\.)?[a-z_-]+)(?=[ ,])(.*?)(?= --|$)", text))
    defaults = dict(wanted_defaults(PRESETS[name]))
    assert entries.keys() >= defaults.keys() == UNITS.keys()
    for field in defaults:
        entry = entries[field]
        assert UNITS[field] in entry, field
        assert f"(default: {defaults[field]})" in entry, field
    assert all(preset in out for preset in PRESETS)


@pytest.mark.quick
def test_fields_are_overridden(call, monkeypatch):  # noqa: F811
    seen = []
    monkeypatch.setattr(train, "run", lambda config: seen.append(config) or "table")
    status, out, _ = call(
        train,
        *("alexnet-cifar10", "--epochs", "5", "--quant.weight-bits", "3", "--no-flip"),
        *("--methods", "uniform", "mu_law-single", "--quant.act-bits", "None"),
        *("--quant.rules", '{"pattern": "conv1", "act_bits": null}', '{"pattern": "dense"}'),
        *("--quant.act-signed", "False", "--record-dir", "kept"),
    )
    rules = (Rule("conv1", act_bits=None), Rule("dense"))
    quant = QuantConfig(weight_bits=3, act_bits=None, act_signed=False, rules=rules)
    assert seen[0] == dataclasses.replace(
        PRESETS["alexnet-cifar10"],
        epochs=5,
        flip=False,
        methods=(Method("uniform"), Method("mu_law", "single")),
        quant=quant,
        record_dir=seen[0].record_dir,
    )
    assert str(seen[0].record_dir) == "kept"
    assert status == 0
    assert out.startswith("\ntable\n\nIn runs/alexnet-cifar10: ")
    assert call(train)[0] == 0
    assert seen[1] == RunConfig()


@pytest.fixture
def tiny_run(tiny, tmp_path):  # noqa: F811
    """A tiny run's arguments, full precision alone."""
    config = tiny_config(tmp_path / "run", methods=())
    fields = ("epochs", "finetune_epochs", "batch_size", "warmup_epochs", "steps_per_call")
    given = [f"--{name.replace('_', '-')}={getattr(config, name)}" for name in fields]
    return config, [*given, "--run-dir", config.run_dir]


def test_train_and_evaluate(call, tiny_run):  # noqa: F811
    config, given = tiny_run
    status, out, err = call(train, *given, "--methods", "uniform")
    assert status == 0
    assert "full_precision: 100%" in err
    assert "uniform: 100%" in err
    assert out.splitlines()[1].startswith("| method ")
    status, out, err = call(evaluate, config.run_dir)
    results = json.loads((config.run_dir / "results.json").read_text())
    lines = [
        f"{result['stage']}: {result['correct']}/19 = {result['test_accuracy']:.2f}%"
        for result in results
    ]
    assert (status, out.splitlines(), err) == (0, lines, "")
    assert call(evaluate, config.run_dir / "uniform")[1].splitlines() == lines[1:]


def test_divergence_is_one_line(call, tiny_run):  # noqa: F811
    config, given = tiny_run
    status, out, err = call(train, *given, "--learning-rate", "1e38")
    last = err.replace("\r", "\n").splitlines()[-1]
    assert (status, out) == (2, "")
    assert re.fullmatch(
        r"error: `learning_rate` must keep the training finite, got a NaN or infinite .* "
        r"\(there is no checkpoint\): lower it",
        last,
    )
    assert "Traceback" not in err
    assert not (config.run_dir / "full_precision" / "result.json").exists()


@pytest.mark.quick
def test_system_errors_name_the_argument(call, tiny_run, monkeypatch):  # noqa: F811
    config, given = tiny_run

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(experiments, "fit", full)
    text = error_of(call(train, *given))
    assert text == (
        f"`run_dir` must stay writable, got {config.run_dir} (No space left on device): free some "
        "space and give the same command again, which goes on where this stopped"
    )
    assert set(snapshot(config.run_dir)) == {"config.json"}
    assert stages.Checkpoints(config.run_dir).steps() == []
