"""What the site has beside the pages of docs/: the README, the public names, figures, mathematics.

Links that leave docs/ lead to the figures of results/, which are copied, or to the repository.
"""

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
START, NAMES = "index.md", "api.md"
# Of each room of compand_jax, what its public names are for.
ROOMS = {
    "linen": "Linen models",
    "nnx": "NNX models",
    "layers": "Configuration and training",
    "core": "The quantizers as functions",
    "calibration": "mu and scale of an array",
    "frozen": "Frozen models",
    "models": "PyTorch checkpoints",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the start page, the page of public names, and the figures."""
    readme = (ROOT / "README.md").read_text()
    files.append(File.generated(config, START, content=readme))
    files.append(File.generated(config, NAMES, content=_names()))
    for figure in sorted(ROOT.glob("results/*/*.png")):
        uri = figure.relative_to(ROOT).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Turns links, which are right in the repository, into those of the site."""
    folder = "" if page.file.src_uri == START else "docs"
    blob = f"{config.repo_url}/blob/main"

    def link(match: re.Match) -> str:
        path, anchor = match.groups()
        target = posixpath.normpath(posixpath.join(folder, path))
        inside = target.removeprefix("docs/")
        known = target.startswith("docs/") or files.get_file_from_path(target) is not None
        if target == "README.md":
            known, inside = True, START
        return f"]({inside if known else f'{blob}/{target}'}{anchor or ''})"

    return re.sub(r"\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)", link, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Sets formulas as MathML, which browsers show by themselves."""

    def inline(match: re.Match) -> str:
        return convert(_unescaped(match[1]))

    def display(match: re.Match) -> str:
        return f'<div class="formula">{convert(_unescaped(match[1]), display="block")}</div>'

    html = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', inline, html, flags=re.DOTALL)
    return re.sub(
        r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', display, html, flags=re.DOTALL
    )


def _unescaped(text: str) -> str:
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&").strip()


def _names() -> str:
    """Returns a page with the docstring of everything that `compand_jax` exports."""
    parts = ["# Public names", "As `import compand_jax as cj` has them."]
    found = list(_exports("compand_jax")) + list(_exports("compand_jax.nnx"))
    for room, title in ROOMS.items():
        names = [name for module, name in found if module.split(".")[1] == room]
        functions_first = sorted(names, key=lambda name: name.split(".")[-1][0].isupper())
        parts += [f"## {title}", *map(_entry, functions_first)]
    return "\n\n".join(parts)


def _entry(name: str) -> str:
    heading = name.replace("compand_jax", "cj", 1)
    return f"::: {name}\n    options: {{ heading: {heading}, toc_label: {heading} }}"


def _exports(package: str) -> Iterator[tuple[str, str]]:
    """Yields the module and the public path of what a package imports from its own modules."""
    tree = ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("compand_jax."):
            for alias in node.names:
                yield node.module, f"{package}.{alias.asname or alias.name}"


class Docstrings(griffe.Extension):
    """Readies docstrings for Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Fences doctests, which are no quotations, and gives "Returns" its type."""
        if obj.docstring is None:
            return
        text = _fenced(obj.docstring.value)
        if isinstance(obj, griffe.Function):
            # Up to a colon the text would be taken for the type.
            text = re.sub(r"(^Returns:\n +)", rf"\g<1>{obj.returns}: ", text, flags=re.MULTILINE)
        obj.docstring.value = text


def _fenced(text: str) -> str:
    paragraphs = [
        f"```pycon\n{paragraph}\n```" if paragraph.lstrip().startswith(">>>") else paragraph
        for paragraph in re.split(r"\n\s*\n", text)
    ]
    return "\n\n".join(paragraphs)
