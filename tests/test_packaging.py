"""What is declared about the package: its dependencies and their bounds, its version."""

import ast
import importlib.metadata
import re
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


@pytest.mark.parametrize("folder", ["compand_jax", "scripts", "tests"])
def test_what_is_imported_is_declared(folder):
    declared = {name_of(requirement) for requirement in PROJECT["dependencies"]}
    own = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    if folder == "compand_jax":  # the benchmark and the export say what is missing
        extras = PROJECT["optional-dependencies"]
        declared |= {name_of(requirement) for requirement in extras["bench"] + extras["onnx"]}
        declared.add("jax2onnx")  # installed without its dependencies, see the README
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
