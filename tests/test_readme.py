"""README and pages: code runs, commands parse, links resolve, tables are those of the records."""

import dataclasses
import importlib
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from compand_jax.experiments.commands import report
from compand_jax.experiments.commands.arguments import parse
from compand_jax.experiments.ptq.encoder_record import encoder_document
from compand_jax.experiments.ptq.record import document, results_by_setting
from compand_jax.experiments.ptq.run import PostTrainingConfig
from compand_jax.experiments.ptq.tables import base_setting, tables
from compand_jax.experiments.runs.config import (
    CONTROL,
    FULL_PRECISION,
    METHODS_BY_NAME,
    RunConfig,
)
from compand_jax.experiments.runs.presets import preset
from compand_jax.experiments.study.grid import STUDIES, study_cells
from compand_jax.experiments.study.report import read_records
from compand_jax.experiments.text import to_csv

ROOT = Path(__file__).parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in report.pages(ROOT)}
PAGES |= {name: (ROOT / name).read_text() for name in ["CONTRIBUTING.md"]}
README = PAGES["README.md"]


def code_blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], re.DOTALL | re.MULTILINE)


def prose(page):
    """A page without its code."""
    return re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)


def commands(start):
    blocks = (block for page in PAGES for block in code_blocks(page, "bash"))
    lines = (line for block in blocks for line in block.splitlines())
    return sorted({line for line in lines if start in line})


# What has to hold at the end of a page's code.
CHECKS = {
    "README.md": """
assert logits.shape == (256, 10)
assert set(quantizers) == {"layers_0", "layers_2"}
assert jnp.isfinite(loss)
assert config.at("layers_0").weight_bits == 8 and config.at("layers_2").weight_bits == 3
""",
    "docs/calibration.md": """
kernels = [tree["params"]["layers_0"]["kernel"] for tree in (variables, rounded)]
assert (kernels[0] != kernels[1]).any() and len(jnp.unique(kernels[1][:, 0])) <= 7
assert again == small
""",
    "docs/contractions.md": """
assert y.shape == (32, 3) and table.endswith("weights not quantized: none")
assert sites[:3] == ["layers_0/out", "layers_0/product_0:left", "layers_0/product_0:right"]
assert len(sites) == 6 and qmodel.sites["layers_0/product_1:left"].act_bits is None
assert sorted(found) == ["down", "gate"] and z.shape == (32, 4)
""",
    "docs/families.md": """
assert set(found["layers_0"]) == {"weight_gaps", "weight_scale", "act_gaps", "act_scale"}
assert set(found["layers_2"]) == {"weight_exponent", "weight_scale", "act_exponent", "act_scale"}
uniform = cj.fake_quantize(kernel, 0.0, cj.fit(kernel, bits=4, mu=0.0)[1], bits=4)
errors = [jnp.mean((q - kernel) ** 2) for q in (uniform, companded, by_a_law)]
assert max(errors[1:]) < errors[0] and 1 < a < 20 and jnp.isfinite(slope) and slope != 0
assert len(levels) == 15 and levels[-1] == nf_scale
""",
    "docs/frozen_format.md": """
assert (frozen.apply(x) == logits).all()
assert jnp.abs(jax.jit(qmodel.apply)(variables, x) - logits).max() < 1e-6 * logits.max()
""",
    "docs/learn_mu.md": """
def mu(variables, site="layers_0"):
    return qmodel.quantizers(variables)[site]["weight_mu"]

assert mu(calibrated) == mu(calibrated, "layers_2") == mu(fixed)
assert len({float(found["weight_mu"]) for found in learned.values()}) == 1
assert learned["layers_0"]["weight_mu"] != mu(calibrated)
kernels = [tree["params"]["layers_0"]["kernel"] for tree in (calibrated, fixed)]
assert (kernels[0] != kernels[1]).any()
grads = jax.tree.map(jnp.ones_like, calibrated)
updates, _ = quantizers_alone.update(grads, quantizers_alone.init(calibrated), calibrated)
assert not any(leaf.any() for leaf in jax.tree.leaves(updates["params"]))
assert all(leaf.all() for leaf in jax.tree.leaves(updates["compand"]))
""",
    "docs/rules.md": """
assert [qmodel.sites[name].weight_bits for name in ("stem", "block0", "head")] == [8, 3, 8]
assert own.quantizer == "mu_law" and (own.grid, own.weight_granularity) == ("midrise", "channel")
assert config.at("block1").quantizer == "uniform" and table.startswith("site")
""",
    "docs/transformers.md": """
assert own["weight_scale"].shape == (2, 1, 256) and (by_hand == kernel).all()
assert frozen.arrays["scales"]["layers_0"].dtype == jnp.float16
""",
    "docs/nnx.md": """
assert set(found) == {"conv", "head"} and table.endswith("weights not quantized: none")
assert jnp.isfinite(loss) and (qmodel.conv.kernel[...] != model.conv.kernel[...]).any()
assert jax.tree.structure(grads) == jax.tree.structure(nnx.state(qmodel, wrt))
again.eval()
assert nnx.graphdef(again) == nnx.graphdef(qmodel) and (again(x) == qmodel(x)).all()
assert jnp.abs(nnx.jit(Net.__call__)(qmodel, x) - logits).max() < 1e-6 * jnp.abs(logits).max()
assert (loaded.apply(x) == logits).all() and sizes.startswith("site")
""",
    "docs/quantizers.md": """
assert (values == same).all() and grad_mu != 0
assert len(levels) == 15 and len(thresholds) == 14
assert scales.shape == (1, 32) and largest == jnp.abs(kernel).max()
errors = [jnp.mean((q - kernel) ** 2) for q in (quantized, by_column)]
assert errors[1] < errors[0] and jnp.allclose(error(theta, rho), errors[0], rtol=1e-4)
assert all(jnp.isfinite(gradient) for gradient in gradients)
""",
}


RUN_PAGES = """
import json, sys
for page, code in json.loads(sys.argv[1]).items():
    print("page", page)
    exec(compile(code, page, "exec"), {})
"""


FIRST = ["README.md"]
REST = [page for page in PAGES if page not in FIRST and code_blocks(page, "python")]


@pytest.mark.parametrize(
    "names", [pytest.param(FIRST, marks=pytest.mark.versions), REST], ids=["readme", "pages"]
)
def test_code_runs_as_written(tmp_path, names):
    pages = {page: "".join(code_blocks(page, "python")) for page in names}
    programs = {
        page: f"{code}import jax.numpy as jnp\n{CHECKS[page]}" for page, code in pages.items()
    }
    # In a process of its own: a reader's jax is not as strict as the one of the tests.
    command = [sys.executable, "-W", "error", "-c", RUN_PAGES, json.dumps(programs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    _, *printed = re.split(r"^page (.*)$", done.stdout, flags=re.MULTILINE)
    assert printed[::2] == list(pages)
    for page, text in zip(printed[::2], printed[1::2], strict=True):
        assert "print(" not in pages[page] or "layers_0" in text, page


@pytest.mark.quick
def test_own_model_is_quantized_in_ten_lines():
    lines = [line for line in code_blocks("README.md", "python")[0].splitlines() if line]
    assert len(lines) == 10


@pytest.mark.quick
def test_readme_is_short_and_begins_with_formula_and_picture():
    lines = README.splitlines()
    assert len(lines) <= 220
    assert {"$$", "## Two commands"} < set(lines)
    first_screen = README.partition("## Two commands")[0]
    assert len(re.findall(r"^\$\$$", first_screen, re.MULTILINE)) == 4  # two formulas
    assert re.search(r"!\[[^]]+\]\(results/[^)]+\.png\)", first_screen)
    assert [page for page in PAGES if f"({page})" not in README] == ["README.md"]


def test_ci_runs_the_two_commands():
    two = ["pip install -e . && python scripts/train.py", "pip install -e '.[test]' && pytest"]
    found = [line for block in code_blocks("README.md", "bash") for line in block.splitlines()]
    assert [line for line in found if line.startswith("pip")] == two
    patterns = re.findall(
        r"\$\(grep -E ['\"](.*)['\"] README\.md\)", (ROOT / ".ci/run").read_text()
    )
    found = [
        [line for line in README.splitlines() if re.search(pattern, line)] for pattern in patterns
    ]
    assert found == [[line] for line in two]


def command(name):
    """Returns the module of a script: of the package, or the script itself."""
    by_itself = name in ("compare_dtypes", "ptq_encoder")
    package = "" if by_itself else "compand_jax.experiments.commands."
    return importlib.import_module(f"{package}{name}")


@pytest.mark.parametrize("line", commands("python scripts/"))
def test_commands_parse(line):
    arguments = shlex.split(line, comments=True)
    if arguments[0] == "gcloud":  # the command that every worker is given
        arguments = shlex.split(arguments[-1].partition("=")[2])
    at = next(i for i, text in enumerate(arguments) if text.startswith("scripts/"))
    name, args = Path(arguments[at]).stem, arguments[at + 1 :]
    if name == "train":
        start = args.pop(0) if args else "digits"
        config = parse(RunConfig, args, default=preset(start))
        assert (config != preset(start)) == bool(args)
    elif name == "ptq":
        assert parse(PostTrainingConfig, ["--checkpoint", *args])
    else:
        options = parse(command(name).Args, args)
        if name == "study":
            assert study_cells(options.preset)


SCRIPTS = [path.stem for path in (ROOT / "scripts").glob("*.py")]


def test_options_named_in_a_text_exist():
    others = {"train": RunConfig, "ptq": PostTrainingConfig}
    kinds = [others.get(name) or command(name).Args for name in SCRIPTS]
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    known = {f"--{name.replace('_', '-')}" for name in names} | {"--help"}
    for page in PAGES:
        spans = re.findall(r"`([^`\n]+)`", prose(page))
        ours = " ".join(span for span in spans if not span.startswith("pip "))
        assert set(re.findall(r"--[a-z][a-z-]+", ours)) - known == set(), page


def test_studies_are_named_and_have_a_block():
    for name in STUDIES:
        assert f"| `{name}` |" in PAGES["docs/studies.md"]
        blocks = sum(text.count(f"<!-- results:{name} -->") for text in PAGES.values())
        assert blocks == (name != "smoke")


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


def anchors(text):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.quick
@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_named_exist(page):
    folder = (ROOT / page).parent
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(page))
    for link in links:
        target, _, anchor = link.partition("#")
        path = (folder / target).resolve() if target else ROOT / page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path.read_text()), link
    places = r"(?:scripts|tests|docs|compand_jax|results|notebooks|\.github|\.ci)/[\w./-]*\w/?"
    named = re.findall(rf"(?<![\w./-]){places}", re.sub(r"\]\([^)]*\)", "", PAGES[page]))
    assert [
        name for name in sorted({*named} - {"results/NAME"}) if not (ROOT / name).exists()
    ] == []


@pytest.mark.quick
def test_architecture_has_every_room_and_names_what_there_is():
    text = PAGES["docs/architecture.md"]
    folders = {path.parent.name for path in ROOT.glob("compand_jax/*/__init__.py")}
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == folders
    files = re.findall(r"`(\w+/[\w/]+\.py)`", text.replace("compand_jax/", ""))
    known = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py")]
    assert [f for f in files if not {f, f"compand_jax/{f}"} & set(known)] == []
    code = "\n".join(path.read_text() for path in ROOT.glob("compand_jax/**/*.py"))
    named = re.findall(r"`(?:\w+\.)*(\w+)`\s\((?:in )?`", text)
    assert len(named) > 3
    assert [name for name in named if not re.search(rf"(def|class) {name}\b", code)] == []


@pytest.mark.quick
def test_architecture_states_the_import_contract():
    rooms = dict(re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", PAGES["docs/architecture.md"], re.M))
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = [layer.split(" | ") for layer in contracts["contracts"][0]["layers"]]
    for i, layer in enumerate(layers):
        below = {room for lower in layers[i + 1 :] for room in lower}
        for room in layer:
            stated = set(re.findall(r"`(\w+)`", rooms[room]))
            assert stated <= below, room
    assert set(rooms) == {room for layer in layers for room in layer}


def test_tables_are_those_of_the_records():
    # Without records a block has to be empty, so that no number is ever written by hand.
    for name in ("alexnet-cifar10", "ptq-resnet20-cifar10", "benchmark-cpu"):
        assert sum(text.count(f"<!-- results:{name} -->") for text in PAGES.values()) == 1
    for page, text in report.filled(ROOT).items():
        assert text == page.read_text(), page
    for page, text in PAGES.items():
        outside = re.sub(r"<!-- (\w+):.*?<!-- /\1 -->", "", text, flags=re.DOTALL)
        found = re.search(r"\d\d\.\d+ ?%", outside)
        assert not found, f"an accuracy that is in no record, in {page}"


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("results/*/encoder.json")), ids=lambda path: path.parent.name
)
def test_records_of_encoders_agree(path):
    record = json.loads(path.read_text())
    assert (path.parent / "results.md").read_text() == encoder_document(record)
    assert (path.parent / "rows.csv").read_text() == to_csv(record["rows"])
    assert all(-1 <= row["cosine_p1"] <= row["cosine"] <= 1 for row in record["rows"])


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("results/*/results.json")), ids=lambda path: path.parent.name
)
def test_records_are_complete_and_agree(path):
    results = json.loads(path.read_text())
    if isinstance(results, dict):
        check_post_training(path, results)
        return
    assert [result["stage"] for result in results] == [FULL_PRECISION, *METHODS_BY_NAME]
    control = next(result for result in results if result["stage"] == CONTROL.name)
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
