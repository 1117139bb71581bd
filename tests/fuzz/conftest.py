"""Profiles, seed and count of the fuzzer: README.md beside this file says how it is run."""

from __future__ import annotations

import random

import hypothesis
import pytest
from hypothesis import HealthCheck, settings

from tests.fuzz.cases import counts

# max_examples is a percentage here: tests.fuzz.cases.fuzz multiplies it with the share of each test.
settings.register_profile(
    "ci",
    max_examples=100,
    deadline=None,
    database=None,
    derandomize=False,
    print_blob=True,
    # A lane (a fixture) has no state that one case could leave to the next; kernels in the interpreter are slow.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("night", settings.get_profile("ci"), max_examples=1000)

_seed = pytest.StashKey[int]()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Load the profile "ci" unless another was asked for; take a new seed unless one was given."""
    given = config.getoption("hypothesis_seed")
    seed = random.SystemRandom().getrandbits(32) if given is None else int(given)
    config.stash[_seed] = seed
    # Through the option it reaches the workers of pytest-xdist; Hypothesis may have read the option already.
    config.option.hypothesis_seed = str(seed)
    hypothesis.core.global_force_seed = seed
    if not config.getoption("hypothesis_profile"):
        settings.load_profile("ci")


def pytest_report_header(config: pytest.Config) -> str:
    return f"fuzz: --hypothesis-seed={config.stash[_seed]}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if counts:
        terminalreporter.section("fuzz")
        for name, count in counts.items():
            terminalreporter.line(f"{count:6d} cases  {name}")
        terminalreporter.line(
            f"{sum(counts.values()):6d} cases in all; --hypothesis-seed={config.stash[_seed]} repeats them"
        )
