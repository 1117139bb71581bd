"""``pytest bench``: the same problems and contenders under pytest-benchmark, one group per problem.

Each test first compares its contender with float64; a wrong result fails the test, and nothing is timed. With
``--benchmark-disable``, the smoke test, every contender is built, judged and called once. The contenders run one after
the other here. ``python -m bench`` lets them take turns, so its numbers are the ones to quote.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from bench.measure import machine
from bench.measure.runner import prepare
from bench.presets import Case
from bench.problems import Problem
from bench.rivals import rivals_for
from bench.rivals.protocol import Rival

#: The fixture ``contest``.
Contest = Callable[[Problem, Rival], None]

#: Contenders that take minutes to compile; the smoke test has the default mode in their place.
LONG = ("compile_max_autotune", "compile_reduce_overhead", "whole_max_autotune")

#: Warnings of other packages, which would be errors under this project's settings, and pytest-benchmark's about skipped
#: tests and about pytest-xdist, under which it disables itself.
FOREIGN: tuple[str, ...] = (
    "ignore:::torch",
    "ignore:::jax",
    "ignore:::sklearn",
    "ignore:::numpy",
    "ignore:::scipy",
    "ignore:::triton",
)
FOREIGN += ("ignore::pytest_benchmark.logger.PytestBenchmarkWarning",)


def pytest_configure() -> None:
    # pytest would print thousands of lines of torch.compile's trace with a failing test.
    logging.getLogger("torch.__trace").propagate = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    smoke = config.getoption("benchmark_disable")
    long = pytest.mark.skip(reason="minutes of compilation, left out of the smoke test")
    once = pytest.mark.skip(reason="seconds of compilation, which are spent once in the smoke test")
    compiled = set()
    for item in items:
        if item.path.is_relative_to(machine.ROOT / "bench"):
            for foreign in FOREIGN:
                item.add_marker(pytest.mark.filterwarnings(foreign))
            rival = item.callspec.params.get("rival") if isinstance(item, pytest.Function) else None
            name = getattr(rival, "name", "")
            if smoke and name in LONG:
                item.add_marker(long)
            elif smoke and name in ("compile_default", "whole_default", "vmap_compiled"):
                what = item.nodeid.partition("[")[0] if name == "compile_default" else name
                if what in compiled:
                    item.add_marker(once)
                compiled.add(what)


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    """One thread per core, noted in every result."""
    machine.pin_threads()


@pytest.fixture(scope="session")
def about() -> dict[str, Any]:
    """The machine, for ``extra_info``."""
    found = machine.describe(device())
    keys = ("name", "processor", "threads", "cores", "thread_settings", "versions", "commit", "changed_files", "clocks")
    return {key: found[key] for key in keys if key in found}


def device() -> str:
    """The GPU if there is one."""
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def matches(problems: Sequence[Problem]) -> pytest.MarkDecorator:
    """Parametrize a test by ``problem`` and every contender of the problem."""
    params = [
        pytest.param(problem, rival, id=f"{problem.name}-{rival.name}")
        for problem in problems
        for rival in rivals_for(problem)
    ]
    return pytest.mark.parametrize(("problem", "rival"), params)


@pytest.fixture
def contest(benchmark: Any, about: dict[str, Any]) -> Contest:
    """Judge a contender, then time it."""

    def run(problem: Problem, rival: Rival) -> None:
        entry, built = prepare(rival, Case(problem))
        if entry["status"] == "unavailable":
            pytest.skip(f"{rival.label}: {entry['reason']}")
        assert built is not None, f"{rival.label}: {entry['status']}: {entry['reason']}"
        benchmark.group = f"{problem.kind}: {problem.name}"
        benchmark.extra_info |= {
            **about,
            "rival": rival.name,
            "problem": problem.describe(),
            "batch": problem.rows,
            "dtype": problem.dtype,
            "flops": problem.flops,
            "bytes": problem.bytes,
            "setup_s": entry["setup_s"],
            "error": entry["error"],
            "allowed": entry["allowed"],
        }

        def call() -> None:
            built()
            built.finish()

        benchmark(call)

    return run
