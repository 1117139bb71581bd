"""Profiles, seed and count of the fuzzer. README.md beside this file says how to run the fuzzer.

This is a pytest plugin instead of a conftest, because under pytest-xdist the process that collects nothing must draw
the seed and write the summary.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# max_examples is a percentage here; tests.fuzz.cases.fuzz multiplies it by the share of each test.
settings.register_profile(
    "ci",
    max_examples=100,
    deadline=None,
    database=None,
    derandomize=False,
    print_blob=True,
    # The fixture ``lane`` keeps no state from one case to the next. Kernels in the interpreter are slow.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("night", settings.get_profile("ci"), max_examples=1000)

_PROPERTY = "fuzz cases"


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Load the profile "ci" unless another profile was asked for; take the profile's seed unless a seed was given.

    The seed of "ci" is 0, so that only a change can turn it red; every other profile draws a new one.
    """
    profile = config.getoption("hypothesis_profile")
    if config.getoption("hypothesis_seed") is None:
        # Hypothesis and the workers of pytest-xdist read the option afterwards.
        drawn = random.SystemRandom().getrandbits(32) if profile not in (None, "ci") else 0
        config.option.hypothesis_seed = str(drawn)
    if not profile:
        settings.load_profile("ci")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Send the number of cases along with the report of a fuzz test."""
    outcome = yield
    counts = getattr(getattr(item, "obj", None), "cases_run", None)
    if call.when == "call" and counts is not None:
        outcome.get_result().user_properties.append((_PROPERTY, counts()))


def pytest_report_header(config: pytest.Config) -> str:
    return f"fuzz: --hypothesis-seed={config.option.hypothesis_seed}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print how many cases ran, by test, and the option that repeats them."""
    counts = {
        report.nodeid: value
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == _PROPERTY
    }
    if counts:
        terminalreporter.section("fuzz")
        for nodeid, count in sorted(counts.items()):
            terminalreporter.line(f"{count:6d} cases  {nodeid.rpartition('::')[2]}")
        total = sum(counts.values())
        terminalreporter.line(f"{total:6d} cases in all, repeated by --hypothesis-seed={config.option.hypothesis_seed}")
