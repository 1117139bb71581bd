"""The last wave of every launch of a training step is full, or the exceptions say why it is not."""

from __future__ import annotations

import pytest
import torch

from .cases import FAMILIES
from .limits import LimitException
from .waves import BATCHES, EXCEPTIONS, LIMITS, Waves, allowed, step_waves, violations

pytestmark = pytest.mark.compile


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "batch" in metafunc.fixturenames:
        targets = (*FAMILIES[1:], "sm_120") if metafunc.config.getoption("--full") else ("sm_90",)
        steps = [(t, dtype, batch) for t in targets for dtype in ("float32", "bfloat16") for batch in BATCHES]
        metafunc.parametrize(("target", "dtype", "batch"), steps, ids=["/".join(map(str, step)) for step in steps])


def test_waves(target: str, dtype: str, batch: int) -> None:
    problems = [
        f"{waves}: {LIMITS[limit]}"
        for waves in step_waves(target, getattr(torch, dtype), batch)
        for limit in violations(waves) - allowed(waves)
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("exception", EXCEPTIONS, ids=lambda exception: f"{exception.limit}-{exception.cases}")
def test_every_exception_is_needed(exception: LimitException) -> None:
    target, dtype, batch, *_ = exception.witness.split("/")
    found = [w for w in step_waves(target, getattr(torch, dtype), int(batch)) if w.name == exception.witness]
    assert found, f"no launch is named {exception.witness}: choose another witness, or remove the exception"
    assert exception.limit in allowed(found[0])
    assert exception.limit in violations(found[0]), f"{found[0]}: choose another witness, or remove the exception"


@pytest.mark.parametrize(
    ("programs", "resident", "last", "found"),
    [
        (264, 2, 1, set()),
        (345, 2, 81 / 264, {"last wave"}),  # a third of the device works while the rest waits
        (140, 1, 8 / 132, {"last wave"}),
        (220, 1, 88 / 132, set()),  # exactly two thirds
        (2048, 1, 68 / 132, set()),  # half a wave of sixteen
        (256, 6, 256 / 264, {"one wave"}),  # two for nearly all multiprocessors, which have six places each
        (140, 6, 140 / 264, {"last wave", "one wave"}),  # two for eight multiprocessors, one for the others
        (64, 8, 64 / 132, {"last wave", "one wave"}),
    ],
)
def test_the_last_wave(programs: int, resident: int, last: float, found: set[str]) -> None:
    waves = Waves("launch", 4096, programs, 132, resident)
    assert waves.last == pytest.approx(last)
    assert violations(waves) == found


def test_a_small_batch_need_not_fill_every_place() -> None:
    assert violations(Waves("launch", 512, 256, 132, 6)) == set()
