"""Which tests run on a machine with a GPU, with which settings, and what `make` does there, tested without a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import conftest

ROOT = Path(__file__).resolve().parents[2]
SIMULATING = set(conftest.SIMULATING)

#: A plugin of pytest. In it, torch sees a GPU, and packages that a machine with a GPU may lack are missing. The plugin
#: writes down what pytest collects, and which warnings are errors.
AS_WITH_A_GPU = """
import json, os, sys, types, warnings
from importlib import metadata

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("platformdirs", "ruff", "mypy", "pre_commit"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

find = metadata.Distribution.from_name

def from_name(name):
    if name == "fastmlp":
        raise metadata.PackageNotFoundError(name)
    return find(name)

sys.meta_path.insert(0, Missing())
metadata.Distribution.from_name = from_name

import torch
torch.cuda.is_available = lambda: True

def names(function, seen):
    # What a function and the functions of its file that it calls refer to.
    if function in seen:
        return set()
    seen.add(function)
    codes, found = [function.__code__], set()
    for code in codes:
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        found |= {*code.co_names, *code.co_freevars}
    for name in set(found):
        called = function.__globals__.get(name)
        if isinstance(called, types.FunctionType) and called.__globals__ is function.__globals__:
            found |= names(called, seen)
    return found

def is_error(category, module):
    try:
        warnings.warn_explicit("of old", category, "file.py", 1, module=module)
    except category:
        return True
    return False

def pytest_collection_finish(session):
    tests = {
        item.nodeid: {
            "markers": sorted({mark.name for mark in item.iter_markers()}),
            "skips": [mark.kwargs.get("reason", "") for mark in item.iter_markers("skip")],
            "lane": getattr(item, "callspec", None) and item.callspec.params.get("lane"),
            "names": sorted(names(item.function, set()) & {"SimulatedGPU", "simulated"}),
        }
        for item in session.items
    }
    errors = [
        f"{category.__name__} {module}"
        for module in ("torch.cuda", "numpy", "triton.compiler", "fastmlp.data", "fastmlp.kernels.tuned", "tests.x")
        for category in (UserWarning, DeprecationWarning, FutureWarning)
        if is_error(category, module)
    ]
    with open(os.environ["COLLECTED"], "w") as file:
        json.dump({"tests": tests, "errors": errors, "cublas": os.environ.get("CUBLAS_WORKSPACE_CONFIG")}, file)
"""


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The collection of all tests in a process that sees a GPU, without an installed fastmlp and without programs."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "as_with_a_gpu.py").write_text(AS_WITH_A_GPU)
    # Without `-S` the editable installation of this environment would serve what the checkout does not.
    paths = [str(folder), *(p for p in sys.path if p.endswith("-packages"))]
    arguments = [
        "-q",
        "--collect-only",
        "-p",
        "as_with_a_gpu",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:platformdirs",
        "tests",
    ]
    code = f"import sys; sys.path[1:1] = {paths!r}; import pytest; sys.exit(pytest.main({arguments!r}))"
    hidden = ("CUBLAS_WORKSPACE_CONFIG", "TRITON_INTERPRET", "PYTEST_ADDOPTS")
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=ROOT,
        env={**{k: v for k, v in os.environ.items() if k not in hidden}, "PATH": "", "COLLECTED": str(folder / "out")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "out").read_text())


@pytest.mark.slow
class TestWithAGPU:
    def test_the_tests_of_the_kernels_are_for_the_gpu(self, collected: dict) -> None:
        chosen = {name: test for name, test in collected["tests"].items() if "gpu" in test["markers"]}
        files = {name.partition("::")[0] for name in chosen}
        fuzz = {p.relative_to(ROOT).as_posix() for p in (ROOT / "tests" / "fuzz").glob("test_*.py")}
        # Plain torch, and numba; test_members.py has the kernels.
        assert files >= fuzz - {"tests/fuzz/test_ensembles.py", "tests/fuzz/test_native.py"}
        # The order of programs is the interpreter's to choose.
        kernels = {p.relative_to(ROOT).as_posix() for p in (ROOT / "tests" / "kernels").glob("test_*.py")}
        elsewhere = ("dependent", "device", "launch", "program_order", "splits")
        assert kernels - files == {f"tests/kernels/test_{name}.py" for name in elsewhere}
        for name, test in chosen.items():
            assert test["lane"] in (None, "gpu"), name
            assert test["skips"] == [], name
            assert not {"interpret", *SIMULATING} & set(test["markers"]), name

    def test_nothing_is_simulated(self, collected: dict) -> None:
        simulating = [test for test in collected["tests"].values() if SIMULATING & set(test["markers"])]
        assert len(simulating) > 500
        assert all(any("there is a GPU" in reason for reason in test["skips"]) for test in simulating)
        others = {name: test["names"] for name, test in collected["tests"].items() if not test["skips"]}
        assert [name for name, used in others.items() if used] == [], "mark what simulates a GPU"

    def test_large_offsets_are_apart(self, collected: dict) -> None:
        large = {name.partition("::")[0] for name, test in collected["tests"].items() if "large" in test["markers"]}
        assert large == {"tests/kernels/test_large_offsets.py"}

    def test_cublas_may_be_deterministic(self, collected: dict) -> None:
        assert collected["cublas"] == ":4096:8"

    def test_only_warnings_of_ours_are_errors(self, collected: dict) -> None:
        assert collected["errors"] == [
            f"UserWarning {module}" for module in ("fastmlp.data", "fastmlp.kernels.tuned", "tests.x")
        ]


@pytest.mark.parametrize(
    ("cores", "free_gib", "workers"), [(16, 79, 16), (64, 79, 16), (4, 79, 4), (16, 7.5, 3), (16, 0.5, 1)]
)
def test_workers_fit_cores_and_memory(monkeypatch, pytestconfig, cores, free_gib, workers):
    monkeypatch.setattr(conftest, "INTERPRETING", False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free_gib * 2**30), 80 << 30))
    monkeypatch.setattr(conftest, "HAS_GPU", True)
    assert conftest.pytest_xdist_auto_num_workers(pytestconfig) == workers
    monkeypatch.setattr(conftest, "HAS_GPU", False)
    assert conftest.pytest_xdist_auto_num_workers(pytestconfig) is None


def test_workflows_run_what_there_is():
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    commands = {
        path.stem: re.findall(r"^ *(?:- )?run: (.+)$", path.read_text(encoding="utf-8"), re.M) for path in files
    }
    assert {"make unit", ".ci/run"} <= set(commands["ci"])
    assert "make test-gpu" in commands["gpu"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    asked = {line.split()[1] for lines in commands.values() for line in lines if line.startswith("make ")}
    assert asked <= set(targets)


#: What make hands to its children: its options, and the variables of its command line.
MAKES_OWN = ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "PYTHON")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
class TestMake:
    @staticmethod
    def make(*arguments: str, **environment: str) -> str:
        command = [shutil.which("make"), "--no-print-directory", "-s", *arguments]
        # These tests may run under make themselves: its variables would override what they ask.
        inherited = {name: value for name, value in os.environ.items() if name not in MAKES_OWN}
        return subprocess.run(
            command, cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True, check=True
        ).stdout

    @pytest.mark.parametrize("names", [("python3",), ("python", "python3")], ids=" ".join)
    def test_python_may_be_called_python3(self, tmp_path, names):
        for name in names:
            (tmp_path / name).write_text("#!/bin/sh\n")
            (tmp_path / name).chmod(0o755)
        assert self.make("-n", "types", PATH=str(tmp_path)) == f"{tmp_path}/{names[0]} -m mypy\n"

    @pytest.mark.parametrize("target", ["unit", "interpret", "compile", "compile-all", "launch", "execute", "test-gpu"])
    def test_only_the_gpus_own_tests_see_it(self, target):
        seen = self.make(target, 'PYTHON=echo "[$$CUDA_VISIBLE_DEVICES]" #', CUDA_VISIBLE_DEVICES="3").split()
        assert set(seen) == {"[3]" if target == "test-gpu" else "[]"}


def test_what_depends_on_the_processor_is_run_as_on_lesser_ones():
    """Every file of tests that reaches into the CPU's products."""
    reach = re.compile(r"fastmlp\.cpu\b|\b(torch_products|cpu_plan|cpu_step)\b")
    paths = [path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")]
    files = {path for path in paths if reach.search((ROOT / path).read_text(encoding="utf-8"))}
    # numpy and numba take the processor as it is, whatever torch is told.
    others = {"tests/step/test_dropout.py", "tests/cpu/test_native.py", "tests/step/test_native_ensembles.py"}
    others |= {
        "tests/step/test_native_options.py",
        "tests/step/test_native_step.py",
        "tests/step/test_native_team.py",
        "tests/support/test_lanes.py",
        "tests/test_package.py",
    }
    assert files - others <= set(conftest.ON_THE_PROCESSOR)
    assert set(conftest.ON_THE_PROCESSOR) <= set(paths)
