"""The documents: relative links resolve, the README's Python runs, and the kernels' table names every kernel."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from pathlib import Path

import pytest
import torch

import fastmlp
from bench.measure.results import FOLDER, load_all
from bench.report import readme
from fastmlp.backend import triton_available

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part == "runs" for part in path.relative_to(ROOT).parts)
)
KERNELS = ROOT / "kernels"
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


def test_readme_python_runs(monkeypatch):
    """The README's Python runs as written, except that the data are the bundled subset, so that no test downloads."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert blocks
    monkeypatch.setattr(fastmlp, "load_fashion_mnist", functools.partial(fastmlp.load_fashion_mnist, source="bundled"))
    torch.manual_seed(0)
    for block in blocks:
        names: dict[str, object] = {}
        exec(compile(block, "README.md", "exec"), names)
        assert 0 < float(names["mean_loss"]) < 2.0  # from ln 10 = 2.3


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
