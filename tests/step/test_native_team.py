"""Steps of machine code by several threads: the same each time, and one thread's up to the order of sums in dX."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from threading import Thread

import pytest
import torch

import fastmlp
from fastmlp.activations import ACTIVATIONS
from fastmlp.base.losses import STEP_LOSSES
from fastmlp.cpu import choose, whole_step
from fastmlp.cpu import threads as cpu_threads
from fastmlp.step.cpu_native import NativeStep
from tests.support.steps import batches, check_against_torch, converted, flat, for_step, network, problem, threads
from tests.support.torchs import OPTIMIZERS

pytestmark = [
    pytest.mark.usefixtures("native_code"),
    pytest.mark.skipif(not cpu_threads.team(), reason="torch uses no OpenMP whose teams the machine code can have"),
]

#: Each of three threads has rows of its own, of a whole tile or less; one has; two have.
SIZES = (13, 40, 9, 20)


#: Threads of a team.
TEAM = 3


@pytest.fixture
def team(monkeypatch) -> Iterator[None]:
    """Every step that is planned takes so many threads."""
    choose.set_cpu_gemm("auto")
    monkeypatch.setattr(whole_step, "_step_way", lambda *args: "native team")
    monkeypatch.setattr(whole_step, "_team", lambda weights, m: TEAM)
    with threads(TEAM):
        yield


def step_of(sizes=SIZES, activation="tanh", dtype=torch.float64, **settings) -> fastmlp.TrainStep:
    return fastmlp.TrainStep(converted(network(sizes, activation), dtype), **{"lr": 0.1, **settings})


def trained(rows: int = 6, sizes=SIZES, dtype=torch.float64, **settings) -> torch.Tensor:
    """The parameters after steps, an epoch with an order, and gradients."""
    step = step_of(sizes, dtype=dtype, **settings)
    data = [for_step(x, y, dtype) for x, y in batches(*problem(sizes, 3 * rows), rows, 2)]
    for x, y in data:
        step(x, y)
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    step.epoch(x, y, rows, torch.arange(len(y)).flip(0), [1.0, 0.5])
    step.gradients(*data[0])
    step.update()
    assert isinstance(step._engine._planned(rows), NativeStep)
    return torch.cat([flat(step.model), *(t.double().flatten() for t in step.state_dict().values())])


@pytest.mark.usefixtures("team")
@pytest.mark.parametrize(("number", "activation"), list(enumerate(ACTIVATIONS)))
def test_against_torch(number, activation):
    """Every activation, with losses, rules and numbers of rows in turn."""
    loss, optimizer = list(STEP_LOSSES)[number % len(STEP_LOSSES)], list(OPTIMIZERS)[number % len(OPTIMIZERS)]
    rows = (1, 3, 8, 20)[number % 4]
    data = batches(*problem(SIZES, 40, loss=loss), rows, 3)
    check_against_torch(network(SIZES, activation), data, OPTIMIZERS[optimizer], loss=loss)


@pytest.mark.usefixtures("team")
@pytest.mark.parametrize("rows", [1, 5, 8, 19])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "adamw", "max_grad_norm": 0.1, "ema_decay": 0.9},
        {"momentum": 0.9, "weight_decay": 0.1, "param_groups": [{"params": "*.bias", "lr": 0.02}]},
    ],
    ids=["sgd", "clipped", "groups"],
)
def test_like_one_thread(monkeypatch, rows, settings):
    """Weights of several blocks, transposed ones, and layers with fewer rows than there are threads."""
    sizes = (300, 70, 33, 5)
    actual = trained(rows, sizes, **settings)
    torch.testing.assert_close(trained(rows, sizes, **settings), actual, rtol=0, atol=0)
    monkeypatch.setattr(whole_step, "_step_way", lambda *args: "native")
    expected = trained(rows, sizes, **settings)
    assert (actual - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.usefixtures("team")
def test_dropout(monkeypatch):
    """The same masks, whichever thread draws a row's."""

    def losses() -> list[float]:
        torch.manual_seed(0)
        model = fastmlp.MLP(SIZES, "relu", dtype=torch.float64, dropout=0.4)
        step = fastmlp.TrainStep(model, lr=0.1)
        return [step(x, y).item() for x, y in (for_step(*b, torch.float64) for b in batches(*problem(SIZES, 30), 7, 6))]

    actual = losses()
    monkeypatch.setattr(whole_step, "_step_way", lambda *args: "native")
    assert actual == pytest.approx(losses(), rel=1e-12)


@pytest.mark.usefixtures("team")
def test_fewer_threads_than_planned(monkeypatch):
    """torch.set_num_threads holds for steps that are planned already; one thread rounds as one that was planned."""
    step = step_of()
    batch = for_step(*batches(*problem(SIZES, 6), 6, 1)[0], torch.float64)
    step._engine._planned(6)
    with threads(1):
        step(*batch)
    monkeypatch.setattr(whole_step, "_step_way", lambda *args: "native")
    alone = step_of()
    alone(*batch)
    assert torch.equal(flat(step.model), flat(alone.model))


@pytest.mark.usefixtures("team")
def test_more_threads_than_planned():
    step, other = step_of(), step_of()
    batch = for_step(*batches(*problem(SIZES, 6), 6, 1)[0], torch.float64)
    step._engine._planned(6)
    with threads(TEAM + 2):
        step(*batch)
    other(*batch)
    assert torch.equal(flat(step.model), flat(other.model))


@pytest.mark.usefixtures("team")
def test_another_thread_of_python():
    """A thread of Python has a team of its own."""
    result: list[torch.Tensor] = []
    other = Thread(target=lambda: result.append(trained()))
    other.start()
    here = trained()
    other.join()
    assert torch.equal(result[0], here)


@pytest.mark.usefixtures("team")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process():
    """It has none of the threads, and its steps go on with one."""
    step = step_of()
    batch = for_step(*batches(*problem(SIZES, 6), 6, 1)[0], torch.float64)
    step(*batch)
    child = os.fork()
    if not child:
        signal.alarm(60)  # without a team that ends, nothing else would
        os._exit(0 if step(*batch).isfinite() else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.usefixtures("team")
def test_a_class_out_of_range():
    step = step_of(dtype=torch.float32)
    x, y = torch.ones(5, SIZES[0]), torch.tensor([0, 1, 2, 3, SIZES[-1]])
    before = flat(step.model)
    for _ in range(2):
        with pytest.raises(IndexError, match="out of range"):
            step(x, y)
    assert torch.equal(flat(step.model), before)
    assert step(x, y.clamp(max=3)).isfinite()


def test_how_many_threads(monkeypatch):
    """As many as torch has, but none with few rows of the largest weight, and one for a step of little work."""
    weights = [torch.zeros(512, 300), torch.zeros(10, 512)]
    with threads(16):
        assert whole_step._team(weights, 1) == 8
        assert whole_step._team([torch.zeros(100, 4096)], 1) == 1
        assert whole_step._team([torch.zeros(128, 8)], 8) == 1
    with threads(2):
        assert whole_step._team(weights, 1) == 2
        monkeypatch.setattr(cpu_threads, "team", tuple)
        assert whole_step._team(weights, 1) == 1
