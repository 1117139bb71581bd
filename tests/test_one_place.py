"""One place for each concept: no table by activation, optimizer or loss outside the files that CONTRIBUTING names.

A new activation or optimizer would otherwise need an entry in tables that nobody finds. The tables are read from the
sources. A table is a dict display, or the items of a tuple, list, set or match statement, with two names of one kind.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from fastmlp import functional
from fastmlp.activations import ACTIVATIONS
from fastmlp.base.losses import LOSSES, STEP_LOSSES
from fastmlp.step.cpu_losses import FUNCTIONS
from fastmlp.step.optimizers import OPTIMIZERS
from tests.support.torchs import TORCH_ACTIVATIONS, TORCH_OPTIMIZERS
from tests.test_layout import ROOT, sources

#: By kind, the names (without words that mean something else too) and the files that may have tables of these names.
KINDS = {
    "activation": (
        set(ACTIVATIONS) - {"identity", "step"},
        {"activations.py", "reference/linear.py", "kernels/activations.py"},
    ),
    "optimizer": (set(OPTIMIZERS), {"step/optimizers.py"}),
    "loss": (
        {*LOSSES, *STEP_LOSSES} - {"cross_entropy", "softmax_squared_error"},
        {"base/losses.py", "reference/losses.py"},
    ),
}
#: The catalogues of the four documents have names of their own for what they show.
DOCUMENTS = "recipes/"


def strings(nodes: list[ast.expr | None]) -> set[str]:
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def tables(source: str, names: set[str]) -> Iterator[int]:
    """The lines of tables with two or more of the names."""
    tree = ast.parse(source)
    exported = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            found = strings(node.keys)
        elif isinstance(node, (ast.Tuple, ast.List, ast.Set)) and node not in exported:
            # A list of pairs that begin with a name is a table too.
            found = strings([e.elts[0] if isinstance(e, ast.Tuple) and e.elts else e for e in node.elts])
        elif isinstance(node, ast.Match):
            patterns = [pattern for case in node.cases for pattern in ast.walk(case.pattern)]
            found = strings([pattern.value for pattern in patterns if isinstance(pattern, ast.MatchValue)])
        else:
            continue
        if len(found & names) > 1:
            yield node.lineno


@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_where_contributing_says(kind):
    names, files = KINDS[kind]
    found = {name: list(tables(source, names)) for name, source in sources().items() if not name.startswith(DOCUMENTS)}
    assert {name: lines for name, lines in found.items() if lines and name not in files} == {}


@pytest.mark.parametrize(("title", "most"), [("an activation", 6), ("an optimizer", 5), ("a loss", 8)])
def test_contributing_names_the_files(title, most):
    """CONTRIBUTING names at most ``most`` files, among them every file with a table."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition(f"## To add {title}\n")[2].partition("\n## ")[0]
    assert 0 < sum(line[:1].isdigit() for line in section.splitlines()) <= most
    for file in KINDS[title.split()[1]][1]:
        assert file in section


def test_the_tests_know_every_one():
    assert set(TORCH_ACTIVATIONS) == set(ACTIVATIONS)
    assert set(TORCH_OPTIMIZERS) == set(OPTIMIZERS)


def test_every_loss_has_its_functions():
    assert {loss.function for loss in LOSSES.values()} == set(functional.__all__) - {"linear_act", "mlp", "softmax"}
    assert set(FUNCTIONS) == set(STEP_LOSSES.values())


@pytest.mark.parametrize(
    "source",
    [
        'x = {"tanh": 1, "relu": 2}',
        'y = f in ("tanh", "relu")',
        'z = [("tanh", 1), ("relu", 2)]',
        'match f:\n    case "tanh":\n        pass\n    case "relu" | "gelu":\n        pass',
    ],
)
def test_the_test_sees_a_table(source):
    assert list(tables(source, {"tanh", "relu"})) == [1]
