"""The documents: links resolve, their Python runs, the notebook runs, and the reference names every public name."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastmlp
from bench.measure.results import FOLDER, load_all
from bench.report import readme
from fastmlp.backend import triton_available
from fastmlp.cli.sweep import command as sweep

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part in ("runs", "build") for part in path.relative_to(ROOT).parts)
)
DOCS, KERNELS = ROOT / "docs", ROOT / "kernels"
NOTEBOOK = DOCS / "backpropagation.ipynb"
#: [text](target) and ![text](target "title").
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)[^)]*\)")
HEADING = re.compile(r"^#+\s+(.*)$", re.MULTILINE)


def prose(path: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """The fragments of a document's headings, as the usual renderers make them."""
    words = (re.sub(r"[^\w\- ]", "", heading.strip().lower()) for heading in HEADING.findall(prose(path)))
    return {word.replace(" ", "-") for word in words}


def broken_links(path: Path) -> list[str]:
    broken = []
    without_code = re.sub(r"`[^`\n]*`|^    .*$", "code", prose(path), flags=re.MULTILINE)
    for link in LINK.findall(without_code):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, fragment = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (fragment and fragment not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_relative_links_resolve(path):
    assert broken_links(path) == []


def test_a_broken_link_is_seen(tmp_path):
    (tmp_path / "b.md").write_text("# Some `code` here\n")
    page = tmp_path / "a.md"
    page.write_text(
        "`no[t](a.link)` [`x`](b.md) [y](b.md#some-code-here) ![z](no.png) [w](b.md#other) [v](https://example.com/no)\n"
    )
    assert broken_links(page) == ["no.png", "b.md#other"]


def test_readme_has_two_commands_and_a_picture():
    text = prose(ROOT / "README.md")
    assert "fastmlp train\n" in text
    assert "make test" in text
    assert re.search(r"!\[[^\]]+\]\([^)]+\.png\)", text)


def python_of(path: Path) -> list[str]:
    """The code that a document fences as ``python``; the tests do not run other code."""
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture
def bundled(monkeypatch):
    """The data are the bundled subset, so that no test downloads."""
    monkeypatch.setattr(fastmlp, "load_fashion_mnist", functools.partial(fastmlp.load_fashion_mnist, source="bundled"))
    torch.manual_seed(0)


@pytest.mark.usefixtures("bundled")
def test_readme_python_runs():
    """The README's Python runs as written."""
    blocks = python_of(ROOT / "README.md")
    assert blocks
    for block in blocks:
        names: dict[str, object] = {}
        exec(compile(block, "README.md", "exec"), names)
        assert 0 < float(names["mean_loss"]) < 2.0  # from ln 10 = 2.3


@pytest.mark.usefixtures("bundled")
@pytest.mark.parametrize(
    "path", [path for path in sorted(DOCS.glob("*.md")) if python_of(path)], ids=lambda path: path.stem
)
def test_python_of_a_page_runs(path, tmp_path, monkeypatch):
    """From top to bottom, in one namespace and in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for block in python_of(path):
        exec(compile(block, path.name, "exec"), names)


def version(package: str) -> tuple[int, ...]:
    """Major and minor number of an installed package."""
    return tuple(map(int, importlib.metadata.version(package).split(".")[:2]))


EXECUTE = """
import json, sys
names = {"__name__": "__main__"}
for cell in json.load(open(sys.argv[1], encoding="utf-8"))["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
"""


def test_the_notebook_runs():
    """In a process of its own, because it asks for Triton's interpreter before it imports triton."""
    if triton_available() and version("triton") < (3, 7) and version("numpy") >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 needs numpy below 2.4")
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # other tests run beside it
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, NOTEBOOK], capture_output=True, text=True, cwd=ROOT, env=one_thread
    )
    assert done.returncode == 0, done.stderr
    assert ("right: three steps on the kernels" in done.stdout) == triton_available()


def test_the_notebook_has_no_outputs():
    """Its outputs are made where it is run, so that a change of the notebook is a change of text."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(cells) <= 25
    assert [cell["id"] for cell in code if cell["outputs"] or cell["execution_count"] is not None] == []


def described() -> set[str]:
    """The names that the pages of the reference describe, as Sphinx reads them."""
    found: set[str] = set()
    for page in sorted((DOCS / "api").glob("*.md")):
        module, automodule = "", ""
        for line in page.read_text(encoding="utf-8").splitlines():
            if directive := re.match(r"\.\. ([\w:]+):: (\S+)", line):
                kind, name = directive.groups()
                automodule = name if kind == "automodule" else ""
                if kind == "currentmodule":
                    module = name
                else:
                    found.add(name if name.startswith("fastmlp") else f"{module}.{name}")
            elif automodule and (members := re.match(r"\s+:members:(.*)", line)):
                names = members[1].split(",") if members[1].strip() else importlib.import_module(automodule).__all__
                found |= {f"{automodule}.{name.strip()}" for name in names}
    return found


def test_the_reference_has_every_public_name():
    assert {f"fastmlp.{name}" for name in fastmlp.__all__} - described() == set()


def test_the_reference_has_no_name_that_is_not_there():
    for name in described():
        pkgutil.resolve_name(name)


def test_every_page_is_in_the_navigation():
    """Sphinx makes the navigation from the lists in docs/index.md."""
    lists = re.findall(r"^```\{toctree\}\n(.*?)^```", (DOCS / "index.md").read_text(encoding="utf-8"), re.M | re.S)
    named = {
        (DOCS / line).resolve() for text in lists for line in text.splitlines() if line and not line.startswith(":")
    }
    pages = {*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb"), *DOCUMENTS} - {DOCS / "index.md"}
    assert named == {page.with_suffix("") for page in pages}


def test_the_page_of_sweep_has_its_options():
    text = (DOCS / "sweep.md").read_text(encoding="utf-8").partition("## How it works")[0]
    flags = {flag for option in sweep.params for flag in (*option.opts, *option.secondary_opts)}
    assert [flag for flag in flags if f"`{flag}" not in text] == []


def kernel_functions(path: Path) -> list[str]:
    """Names of the kernels that a launcher starts: ``@triton.jit`` functions ending in ``_kernel``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.endswith("_kernel")]


@pytest.mark.parametrize(
    "path", [p for p in sorted(KERNELS.glob("*.py")) if p.stem != "__init__"], ids=lambda p: p.stem
)
def test_table_names_every_kernel(path):
    rows = [line for line in prose(KERNELS / "README.md").splitlines() if line.startswith(f"| [`{path.name}`]")]
    assert len(rows) == 1
    assert [k for k in kernel_functions(path) if f"`{k}`" not in rows[0]] == []


@pytest.mark.skipif(not triton_available(), reason="triton is not installed")
def test_table_names_launchers_and_references_that_exist():
    references = set(importlib.import_module("fastmlp.reference").__dict__)
    found = 0
    for line in prose(KERNELS / "README.md").splitlines():
        row = re.match(r"\| \[`(\w+)\.py`\]\([^)]*\) \|(.*)\|$", line)
        cells = row[2].split(" | ") if row else []
        if len(cells) != 5:
            continue
        module = importlib.import_module(f"fastmlp.kernels.{row[1]}")
        for name in re.findall(r"`(\w+)`", cells[1]):
            assert hasattr(module, name), f"{row[1]}.py has no {name}"
        for name in re.findall(r"`(\w+)`", cells[2]):
            assert name in references, f"{name} is no reference function"
        found += 1
    assert found >= 10


def test_speed_figures_are_those_of_the_results():
    """README.md has the text that `fastmlp bench report` writes from the committed JSON."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition(readme.BEGIN)[2].partition(readme.END)[0]
    assert section.strip() == readme.speed_section(load_all(FOLDER)).strip()
