"""Every planted bug is caught by a lane, and the copy without a bug passes the same tests."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from tests.conftest import HAS_GPU, INTERPRETING
from tests.mutation import dropout, linear, losses, members, optimizers
from tests.mutation.harness import KERNELS, Mutant, check, plant

MUTANTS = (*dropout.MUTANTS, *linear.MUTANTS, *losses.MUTANTS, *members.MUTANTS, *optimizers.MUTANTS)
LANE = "interpret" if INTERPRETING else "execute"
#: The kinds of bug that must be among the planted ones.
KINDS = {
    "bias added twice",
    "derivative from the wrong tensor",
    "gather index ignored",
    "label smoothing dropped",
    "mask dropped in a load",
    "mask dropped in a store",
    "mask dropped in the reduction tail",
    "member stride ignored",
    "missing int64",
    "partials buffer one short",
    "reduce before the partials are written",
    "the halves of a block at one place",
    "transposed store",
    "uint8 scale dropped",
    "wrong stride",
}

in_lane = pytest.mark.interpret if INTERPRETING else pytest.mark.execute


def here() -> list[Mutant]:
    """The mutants that this process's lane is to catch."""
    return [m for m in MUTANTS if m.lane == LANE]


def baselines() -> dict[str, str]:
    """By test file, a -k expression for all tests that the mutants of this lane run."""
    expressions: dict[str, dict[str, None]] = defaultdict(dict)
    for mutant in here():
        expressions[mutant.tests[0]][mutant.tests[1]] = None
    return {path: " or ".join(f"({e})" for e in chosen) for path, chosen in expressions.items()}


@in_lane
@pytest.mark.skipif(HAS_GPU and not INTERPRETING, reason="a mutant can bring down the GPU's context")
class TestInThisLane:
    @pytest.mark.parametrize("path", baselines())
    def test_the_copy_without_a_bug_passes(self, path: str, tmp_path: Path):
        outcome = check(plant(None, tmp_path), (path, baselines()[path]))
        assert outcome.passed, outcome

    @pytest.mark.parametrize("mutant", here(), ids=lambda m: m.name)
    def test_the_bug_is_caught(self, request: pytest.FixtureRequest, mutant: Mutant, tmp_path: Path):
        """By day every other one, and of each file the first."""
        by_day = set(MUTANTS[::2]) | {next(m for m in MUTANTS if m.kernel == mutant.kernel)}
        if mutant not in by_day and not request.config.getoption("--full"):
            pytest.skip("with --full")
        outcome = check(plant(mutant, tmp_path), mutant.tests)
        assert outcome.caught, f"{mutant.name} survived {mutant.tests}: {outcome}"


def test_every_mutant_changes_one_file(tmp_path: Path):
    """The texts that the mutants replace are in the current kernels."""
    stale = []
    for i, mutant in enumerate(MUTANTS):
        try:
            copy = plant(mutant, tmp_path / str(i))
        except ValueError as error:
            stale.append(str(error))
            continue
        changed = [p.name for p in copy.glob("*.py") if p.read_text() != (KERNELS / p.name).read_text()]
        assert changed == [f"{mutant.kernel}.py"]
    assert not stale, "\n\n".join(stale)


def test_every_kernel_has_a_mutant():
    with_kernels = {p.stem for p in KERNELS.glob("*.py") if "@triton.jit" in p.read_text()}
    assert {m.kernel for m in MUTANTS} >= with_kernels


def test_every_kind_of_bug_is_planted():
    assert {m.bug for m in MUTANTS} >= KINDS


def test_a_text_that_is_not_there_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match=r"found it 0 times(.|\n)*Lines like its first: \['row_m = "):
        plant(Mutant("linear_fwd", "none", "row_m = offs_m.to(tl.int32)", "", ("", "")), tmp_path)


def test_an_error_in_the_mutant_is_not_a_catch(tmp_path: Path):
    """A name that does not exist would make any test fail."""
    broken = Mutant("linear_fwd", "none", "acc = acc * (1.0 / 255.0)", "acc = no_such_name", ("", ""))
    tests = ("tests/kernels/test_linear_fwd.py", "uint8 and float32 and 16" + ("" if INTERPRETING else " and sm_80"))
    outcome = check(plant(broken, tmp_path), tests)
    assert outcome.exit_code == pytest.ExitCode.TESTS_FAILED
    assert not outcome.caught
