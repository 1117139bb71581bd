"""Plant a bug in a copy of the kernels, and run a lane's own tests to learn whether they see the bug.

The copy is a separate folder, in which text is replaced. It takes the place of ``fastmlp.kernels`` in a separate
process; the checkout is never written to. The process is forked from a server that has loaded torch and Triton already,
so a mutant costs little more than its tests. A mutant that crashes or hangs harms nothing.
"""

from __future__ import annotations

import difflib
import importlib.util
import multiprocessing
import os
import shutil
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

__all__ = ["KERNELS", "Mutant", "Outcome", "check", "plant"]

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels"
TIME_LIMIT = 300  # seconds


@dataclass(frozen=True)
class Mutant:
    """One planted bug and the tests that must find it.

    Attributes:
        kernel: the file in kernels/, without its suffix.
        bug: the kind of the bug.
        old, new: a text and its replacement, or several; each old text must be in the file exactly once.
        tests: a test file and a -k expression that selects its tests, which run up to the first failure.
        lane: "interpret" or "execute".
    """

    kernel: str
    bug: str
    old: str | tuple[str, ...]
    new: str | tuple[str, ...]
    tests: tuple[str, str]
    lane: str = "interpret"

    @property
    def name(self) -> str:
        """The name of the test."""
        return f"{self.kernel}: {self.bug}"

    @property
    def edits(self) -> list[tuple[str, str]]:
        """(old, new), one pair per edit."""
        old, new = ((t,) if isinstance(t, str) else t for t in (self.old, self.new))
        return list(zip(old, new, strict=True))


@dataclass(frozen=True)
class Outcome:
    """How the tests ended.

    Attributes:
        exit_code: pytest's, or a negative signal number, or None if the time limit was reached.
        ran: how many tests ran to the end.
        failure: the first failing test and its error, or "".
        error: the names of the failure's exception class and of its bases.
    """

    exit_code: int | None
    ran: int = 0
    failure: str = ""
    error: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Tests ran, and none failed."""
        return self.exit_code == pytest.ExitCode.OK and self.ran > 0

    @property
    def caught(self) -> bool:
        """A check saw wrong values or a forbidden access; an error in the mutant (a name, a type) is no catch."""
        if self.exit_code != pytest.ExitCode.TESTS_FAILED:
            return self.exit_code is not None and self.exit_code < 0
        out_of_bounds = "InterpreterError" in self.error and "IndexError(" in self.failure
        return out_of_bounds or "AssertionError" in self.error or "SimError" in self.error


def plant(mutant: Mutant | None, folder: Path) -> Path:
    """Copy the kernels into ``folder`` and make the edits; None copies only.

    Raises:
        ValueError: a text is not in the file exactly once; the message has the lines most like it.
    """
    copy = folder / "kernels"
    shutil.copytree(KERNELS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    if mutant is None:
        return copy
    path = copy / f"{mutant.kernel}.py"
    source = path.read_text()
    for old, new in mutant.edits:
        found = source.count(old)
        if found != 1:
            first = old.strip().splitlines()[0].strip()
            like = difflib.get_close_matches(first, [line.strip() for line in source.splitlines()], 3, 0.5)
            raise ValueError(
                f"{mutant.name}: expected a text once in kernels/{mutant.kernel}.py, found it {found} times:\n{old}\n"
                f"Change the mutant with the kernel. Lines like its first: {like}"
            )
        source = source.replace(old, new)
    path.write_text(source)
    return copy


def check(folder: Path, tests: tuple[str, str]) -> Outcome:
    """Run ``tests`` (file, -k expression), in a process whose fastmlp.kernels is the copy in ``folder``."""
    context = multiprocessing.get_context("forkserver")
    # Tests load these modules, and none of them loads the kernels. Triton's interpreter loads gluon when it runs, and
    # the first optimizer of torch.optim loads torch's compiler, which takes longer than most mutants' tests.
    loaded = ["fastmlp", "triton", "triton.experimental.gluon", "pytest", "numpy.testing", "torch._dynamo"]
    context.set_forkserver_preload(loaded)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(str(folder), *tests, sender))
    process.start()
    sender.close()
    try:
        result = receiver.recv() if receiver.poll(TIME_LIMIT) else None
    except EOFError:  # the process ended without a message
        process.join()
        return Outcome(process.exitcode if process.exitcode != 0 else None)
    finally:
        receiver.close()
        process.join(0 if process.is_alive() else None)
        if process.is_alive():
            process.kill()
            process.join()
    return Outcome(None) if result is None else Outcome(*result)


def _run(folder: str, path: str, keyword: str, sender: Connection) -> None:
    """In the child: replace the package, run pytest without output, send the outcome."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    os.chdir(ROOT)
    recorder = _Recorder()
    # Plugins and tracebacks that these tests do not need would cost every mutant more than its tests.
    unneeded = ("cacheprovider", "xdist", "benchmark", "hypothesispytest", "tests.fuzz.plugin", "unraisableexception")
    options = ["-x", "-q", "--tb=no", "--rootdir", str(ROOT), *(f"-pno:{name}" for name in unneeded), "-k", keyword]
    # Without its own temporary folder, pytest removes those of earlier runs, and so do the processes beside it.
    options.append(f"--basetemp={Path(folder).parent / 'temporary'}")
    try:
        _replace_kernels(Path(folder))
        code = int(pytest.main([path, *options], plugins=[recorder]))
    except Exception as error:
        code, recorder.failure = int(pytest.ExitCode.INTERNAL_ERROR), repr(error)
    sender.send((code, recorder.ran, recorder.failure, recorder.error))


def _replace_kernels(folder: Path) -> None:
    import fastmlp

    spec = importlib.util.spec_from_file_location(
        "fastmlp.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    assert "fastmlp.kernels" not in sys.modules, "importing fastmlp has imported the kernels"
    module = importlib.util.module_from_spec(spec)
    sys.modules["fastmlp.kernels"] = module
    spec.loader.exec_module(module)
    fastmlp.kernels = module  # type: ignore[attr-defined]


class _Recorder:
    """A pytest plugin that remembers the first failure."""

    def __init__(self) -> None:
        self.ran = 0
        self.failure = ""
        self.error: tuple[str, ...] = ()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        outcome = yield
        report = outcome.get_result()
        if report.when == "call" and not report.skipped:
            self.ran += 1
        if report.failed and not self.failure:
            assert call.excinfo is not None
            self.failure = f"{item.nodeid}: {call.excinfo.exconly()}"
            self.error = tuple(c.__name__ for c in type(call.excinfo.value).__mro__)
