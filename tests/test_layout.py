"""The layout of fastmlp/ and kernels/: a file imports from its own folder and from rows above, and never in a circle.

The imports are read from the sources, including imports inside functions and under TYPE_CHECKING. A row is a line of
`ROWS`. A room is a folder of fastmlp/, or a file that lies directly in fastmlp/. Files of one row that lie directly in
fastmlp/ share a room. Only cli/bench.py imports from outside of the package: it takes the command `fastmlp bench` from
a checkout's bench/.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ROWS = (
    ("activations",),
    ("base", "backend"),
    ("reference", "kernels", "cpu"),
    ("ops",),
    ("autograd",),
    ("functional", "losses", "library", "online"),
    ("nn",),
    ("step",),
    ("train", "data"),
    ("__init__",),
    ("recipes",),
    ("cli",),
    ("__main__",),
)
ROW = {room: number for number, rooms in enumerate(ROWS) for room in rooms}


def sources() -> dict[str, str]:
    """Every file of the package by its path in an installation."""
    found = {}
    for folder, prefix in (("fastmlp", ""), ("kernels", "kernels/")):
        for path in (ROOT / folder).rglob("*.py"):
            name = prefix + path.relative_to(ROOT / folder).as_posix()
            found[name] = path.read_text(encoding="utf-8")
    return found


def room_of(name: str) -> str:
    """The folder of a file, or the file itself where it lies directly in fastmlp/."""
    return name.partition("/")[0].removesuffix(".py")


def found_file(parts: list[str], names: Iterable[str]) -> str | None:
    """The file of a module of fastmlp, given by its dotted name's parts; None where the name is no module."""
    stem = "/".join(parts[1:])
    candidates = (f"{stem}.py", f"{stem}/__init__.py") if stem else ("__init__.py",)
    return next((c for c in candidates if c in names), None)


def imported(name: str, files: Mapping[str, str]) -> dict[str, int]:
    """The files of fastmlp that a file imports, with the line."""
    package = ["fastmlp", *name.split("/")[:-1]]
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(files[name])):
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            # An imported name is a submodule if a file has the name, unless the package uses the name otherwise.
            modules = [
                [*base, alias.name] if found_file([*base, alias.name], files) and base != KERNELS else base
                for alias in node.names
            ]
        else:
            continue
        for parts in modules:
            if parts and parts[0] == "fastmlp" and (file := found_file(parts, files)):
                found.setdefault(file, node.lineno)
    return found


KERNELS = ["fastmlp", "kernels"]


def allowed(name: str, other: str) -> bool:
    """Whether a file may import another."""
    room, target = room_of(name), room_of(other)
    directly = "/" not in name and "/" not in other
    return room == target or ROW[target] < ROW[room] or (directly and ROW[target] == ROW[room])


def wrong_imports(files: Mapping[str, str]) -> list[str]:
    """The imports from a row below, or from another room of the same row."""
    return [
        f"{name}:{line} imports {other}"
        for name in sorted(files)
        for other, line in imported(name, files).items()
        if not allowed(name, other)
    ]


def circle(files: Mapping[str, str]) -> list[str]:
    """The files of one circle of imports; empty where there is none."""
    edges = {name: list(imported(name, files)) for name in files}
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in edges[name]:
            if found := visit(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(files) if (found := visit(name, []))), [])


def test_every_room_has_a_row():
    rooms = {room_of(name) for name in sources()}
    assert rooms == set(ROW)


def test_imports_go_up():
    assert wrong_imports(sources()) == []


def test_imports_go_in_no_circle():
    assert circle(sources()) == []


def test_kernels_know_nothing_of_fastmlp():
    """But for two files that know nothing of it either: the user's cache folder, and what tells tensors apart."""
    files = sources()
    outside = {
        (name, other)
        for name in files
        if name.startswith("kernels/")
        for other in imported(name, files)
        if not other.startswith("kernels/")
    }
    assert {other for _, other in outside} == {"base/atomic.py", "base/signature.py"}


def test_only_the_command_bench_reaches_into_bench():
    def reaches(node: ast.AST) -> bool:
        if isinstance(node, ast.Constant):
            return isinstance(node.value, str) and node.value.startswith("bench.")
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        return any(name.partition(".")[0] == "bench" for name in names)

    found = {name for name, text in sources().items() if any(map(reaches, ast.walk(ast.parse(text))))}
    assert found == {"cli/bench.py"}


def past_the_door(files: Mapping[str, str]) -> list[str]:
    """The imports from cpu/, except imports of the names in its __init__."""
    return [
        f"{name}:{line} imports {other}"
        for name in sorted(files)
        for other, line in imported(name, files).items()
        if other.startswith("cpu/") and other != "cpu/__init__.py" and not name.startswith("cpu/")
    ]


def test_cpu_has_one_door():
    assert past_the_door(sources()) == []


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("from .. import cpu", False),
        ("from ..cpu import linear", False),
        ("from ..cpu import products", True),
        ("from ..cpu.products import linear", True),
        ("def f():\n    from ..cpu.products import linear", True),
    ],
)
def test_the_test_sees_who_passes_the_door(source, wrong):
    files = dict.fromkeys(("__init__.py", "cpu/__init__.py", "cpu/products.py"), "")
    assert bool(past_the_door({**files, "ops/choose.py": source})) == wrong


def test_every_folder_with_code_is_a_package():
    """setup.py finds packages; a folder without __init__.py would be missing in the wheel."""
    folders = {path.parent for folder in ("fastmlp", "kernels") for path in (ROOT / folder).rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("from ..activations import ACTIVATIONS", False),
        ("from . import products", False),
        ("from ..ops import on", True),
        ("def f():\n    from ..ops import choose", True),
        ("import fastmlp.ops.choose", True),
        ("def f():\n    from .. import __version__", True),
        ("from ..reference import mlp", True),
    ],
)
def test_the_test_sees_what_is_wrong(source, wrong):
    files = dict.fromkeys(
        (
            "__init__.py",
            "activations.py",
            "cpu/products.py",
            "ops/__init__.py",
            "ops/choose.py",
            "reference/__init__.py",
        ),
        "",
    )
    assert bool(wrong_imports({**files, "cpu/cache.py": source})) == wrong


def test_the_test_sees_a_circle():
    files = {"ops/a.py": "from . import b", "ops/b.py": "def f():\n    from .a import g", "ops/__init__.py": ""}
    assert circle(files) == ["ops/a.py", "ops/b.py", "ops/a.py"]
