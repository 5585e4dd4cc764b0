"""What is declared about the package: its dependencies and their bounds, its version."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import compand_jax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def name_of(requirement):
    """Returns a requirement's name, as the registry compares names."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def imported(folder):
    """Returns the top-level names that a folder's files import, those within functions included."""
    names = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    own = {"compand_jax"} | {path.stem for path in (ROOT / folder).glob("*.py")}
    return names - own - set(sys.stdlib_module_names)


@pytest.mark.parametrize("folder", ["compand_jax", "scripts", "examples", "tests"])
def test_what_is_imported_is_declared(folder):
    declared = {name_of(requirement) for requirement in PROJECT["dependencies"]}
    own = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    own |= {path.name for path in (ROOT / "examples").iterdir()}
    if folder in ("scripts", "examples"):
        extras = PROJECT["optional-dependencies"]
        declared |= {name_of(requirement) for requirement in extras["encoder"]}
    if folder == "compand_jax":  # benchmark, export and training say what is missing
        extras = PROJECT["optional-dependencies"]
        optional = extras["bench"] + extras["onnx"] + extras["tensorboard"]
        declared |= {name_of(requirement) for requirement in optional}
        declared.add("jax2onnx")  # installed without its dependencies, see docs/frozen_format.md
    if folder == "tests":
        declared |= {
            name_of(requirement) for requirement in PROJECT["optional-dependencies"]["test"]
        }
    distributions = importlib.metadata.packages_distributions()
    missing = [
        name
        for name in sorted(imported(folder) - own)
        if not declared & {name_of(found) for found in distributions.get(name, [name])}
    ]
    assert missing == []


def test_every_dependency_has_a_lower_bound():
    # .ci/run installs these very versions.
    for requirement in PROJECT["dependencies"]:
        assert re.fullmatch(r"[\w-]+>=[\d.]+(,<\d+)?", requirement), requirement


def test_version_is_the_same_everywhere():
    version = PROJECT["version"]
    assert importlib.metadata.version("compand-jax") == version
    assert compand_jax.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    released = re.findall(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == version


# All that `import compand_jax` may need; each brings along what it needs itself.
LIGHT = {"jax", "flax", "optax", "numpy", "jaxtyping", "safetensors"}
BLOCKED = """
import importlib, json, sys

blocked = set(json.loads(sys.argv[1]))

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import compand_jax
from compand_jax.data.images import load_data

said = {}
for name in json.loads(sys.argv[2]):
    try:
        load_data("digits") if name == "digits" else importlib.import_module(name)
    except ImportError as error:
        said[name] = str(error)
print(json.dumps(said))
"""


def in_a_fresh_process(code, *arguments):
    command = [sys.executable, "-c", code, *map(json.dumps, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_import_needs_few_packages_and_the_others_name_themselves():
    others = {name_of(requirement) for requirement in PROJECT["dependencies"]} - LIGHT
    blocked = [
        name
        for name, found in importlib.metadata.packages_distributions().items()
        if others & {name_of(distribution) for distribution in found}
    ]
    assert {"orbax", "tensorflow_datasets", "sklearn", "matplotlib", "tqdm", "scipy"} <= {*blocked}
    needing = {
        "compand_jax.data.cifar": ("CIFAR", "tqdm", "tqdm"),
        "compand_jax.training.checkpoints": ("checkpoints", "orbax", "orbax-checkpoint"),
        "digits": ("the digits", "sklearn", "scikit-learn"),
        "compand_jax.experiments.ptq.plots": ("a picture", "matplotlib", "matplotlib"),
        "compand_jax.experiments.benchmark.report": ("a picture", "matplotlib", "matplotlib"),
    }
    said = in_a_fresh_process(BLOCKED, blocked, list(needing))
    assert said == {
        name: f"{what} needs {package} (No module named {module!r}): pip install {package!r}"
        for name, (what, module, package) in needing.items()
    }


def test_import_is_quick():
    code = (
        "import flax.linen, optax, time; began = time.process_time(); "
        "import compand_jax; print(time.process_time() - began)"
    )
    # The quickest of a few: what else runs on the machine is not to count.
    assert min(in_a_fresh_process(code) for _ in range(3)) < 0.3


def test_address_is_the_same_everywhere():
    address = PROJECT["urls"]["Repository"]
    assert f"\nrepository-code: {address}\n" in (ROOT / "CITATION.cff").read_text()
    for name in ("Documentation", "Changelog"):
        url, _, path = PROJECT["urls"][name].partition("/main/")
        assert url.rpartition("/")[0] == address
        assert (ROOT / path).exists()
    own = re.compile(r"https://github\.com/compand[\w-]*/\w+")
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*"), *ROOT.glob("notebooks/*.ipynb")]
    files += ROOT.glob(".github/*/*.yml")
    found = [url for path in files for url in own.findall(path.read_text())]
    assert found
    assert set(found) == {address}


def test_a_commit_is_checked_as_ci_checks_it():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    entries = re.findall(r"^ +entry: (.*)$", hooks, re.MULTILINE)
    ours = {entry.partition(" --")[0] for entry in entries}
    ci = (ROOT / ".ci/run").read_text()
    checks = re.findall(r'^check ".*" "((?:ruff|lint-imports|pyright)[^"]*)"$', ci, re.MULTILINE)
    assert ours == {re.sub(r" (--check )?\.$", "", check) for check in checks}
