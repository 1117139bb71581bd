"""Whole steps on a CPU: every way of running them, which ways are measured, and no trace left by measuring."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastmlp
from fastmlp.base.losses import STEP_LOSSES
from fastmlp.cpu import choose, whole_step
from fastmlp.step import cpu_step
from tests.support.steps import (
    allocations,
    batches,
    check_float32,
    converted,
    flat,
    float32_step,
    for_step,
    fresh_choices,  # noqa: F401
    have_fastest,
    network,
    new_process,
    problem,
    threads,
)
from tests.support.torchs import OPTIMIZERS

SIZES = (13, 17, 11, 5)
WAYS = ("each", "aten")


@pytest.fixture(autouse=True)
def two_threads(monkeypatch, fresh_choices) -> Iterator[None]:  # noqa: F811
    """Two threads and the mode "auto". The choices end with the test. Products of any size are measured."""
    fastmlp.set_cpu_gemm("auto")
    monkeypatch.setattr(choose, "_WORTH_MEASURING", 0)
    with threads(2):
        yield


def take(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Have steps run in the given way."""
    monkeypatch.setattr(whole_step, "_step_way", lambda *args: way)


def data(rows: int, steps: int, loss: str = "cross_entropy") -> list[tuple[Tensor, Tensor]]:
    return batches(*problem(SIZES, 70, loss=loss), rows, steps)


@pytest.mark.parametrize("loss", STEP_LOSSES)
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_trains(monkeypatch, way, rows, optimizer, loss):
    take(monkeypatch, way)
    check_float32(network(SIZES), data(rows, 6, loss), OPTIMIZERS[optimizer], loss=loss)


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_step_allocates_nothing(monkeypatch, rows, optimizer):
    take(monkeypatch, "aten")
    assert allocations(float32_step(SIZES, rows, optimizer)) == []


@pytest.mark.parametrize("fastest", WAYS)
def test_the_fastest_is_taken_and_kept(monkeypatch, fastest):
    """A later process does not measure again, but a process with another number of threads does."""
    plans = []
    in_way = whole_step._in_way
    monkeypatch.setattr(whole_step, "_in_way", lambda way, plan: plans.append(way) or in_way(way, plan))
    have_fastest(monkeypatch, lambda candidates: fastest if "each" in candidates else "aten")
    x, y = for_step(*problem(SIZES, 40), torch.float32)

    def one_step() -> None:
        fastmlp.TrainStep(converted(network(SIZES), torch.float32), lr=0.1)(x, y)

    one_step()
    assert plans == [*WAYS, fastest]
    ((kind, *shape),) = [key for key in choose.choices() if "step" in key[0]]
    assert kind == "step to 17-11-5 identity sigmoid cross_entropy sgd"
    assert shape == [32, 13, 5, torch.float32, 2]
    plans.clear()
    new_process(monkeypatch)
    one_step()
    assert plans == [fastest]
    plans.clear()
    torch.set_num_threads(3)
    one_step()
    assert plans == [*WAYS, fastest]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "clipping, momentum"])
@pytest.mark.parametrize("activation", ["relu", "gelu", ["step", "tanh"]], ids=str)
def test_measuring_touches_nothing(monkeypatch, activation, optimizer, dtype):
    """Parameters, optimizer, learning rate and torch's random numbers are the same as without measuring."""
    have_fastest(monkeypatch)

    def train(state: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor, float]:
        torch.set_rng_state(state)
        model = converted(network(SIZES, activation), dtype)
        model.layers[1].weight.requires_grad_(False)
        step = fastmlp.TrainStep(model, **OPTIMIZERS[optimizer])
        for batch in data(40, 3):
            step(*for_step(*batch, dtype))
        return flat(model), step.state_dict(), torch.rand(3), step.lr

    state = torch.get_rng_state()
    measured = train(state)
    assert any("step" in key[0] for key in choose.choices())
    known = dict(choose.choices())
    again = train(state)
    assert choose.choices() == known
    assert torch.equal(measured[0], again[0])
    assert measured[1].keys() == again[1].keys()
    assert all(torch.equal(value, again[1][name]) for name, value in measured[1].items())
    assert torch.equal(measured[2], again[2])
    assert measured[3] == again[3]


@pytest.mark.parametrize("why", ["long", "mode", "deterministic", "short", "float64"])
def test_not_measured(monkeypatch, why):
    have_fastest(monkeypatch)
    rows = 40
    if why == "long":
        monkeypatch.setattr(whole_step, "_LONG", rows * (13 * 17 + 17 * 11 + 11 * 5))
    elif why == "mode":
        fastmlp.set_cpu_gemm("aten")
    elif why == "deterministic":
        torch.use_deterministic_algorithms(True)
    elif why == "short":
        monkeypatch.setattr(choose, "_WORTH_MEASURING", 1 << 20)
    dtype = torch.float64 if why == "float64" else torch.float32
    seen = []
    monkeypatch.setattr(cpu_step.TorchStep, "_scratch", lambda *args: seen.append(args))
    try:
        step = fastmlp.TrainStep(converted(network(SIZES), dtype), lr=0.1)
        step(*for_step(*problem(SIZES, rows), dtype))
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == []


def test_only_aten_ends_with_an_error():
    def fail() -> None:
        with choose.only_aten():
            assert choose.get_cpu_gemm() == "aten"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert choose.get_cpu_gemm() == "auto"
