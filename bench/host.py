"""The host's time per training step: Python, dispatcher, autograd and Triton's launch code, without a GPU.

fastmlp runs on ``NullGPU``, a driver that takes launches and does nothing. PyTorch has no such driver, so eager runs on
the CPU. All tensors are CPU tensors of a few elements, so that next to no arithmetic is in the times. Two things differ
on a GPU:

- The driver takes some microseconds per launch or replay, which are missing here. Eager launches the most.
- Eager's operators end in code for a GPU. Python, dispatcher and autograd are the same.

So both times are less than the host of a GPU needs, and their ratio is an approximation. Graphs are stand-ins: a
capture runs the launches, and a replay is a call that does nothing. The clock is the CPU time of the thread, which a
busy machine disturbs less than the time of day.
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unittest import mock

import click
import torch
from torch import Tensor, nn

import fastmlp
from bench.measure.results import FORMAT, Document
from bench.measure.timing import TURN_S, Turns, take_turns
from bench.report.tables import stated_range
from tests.ptxsim import NullGPU

from .measure import machine

__all__ = ["WAYS", "host_gpu", "measure", "print_host"]

#: A network with as many layers, operators and launches as the reference network.
SIZES, BATCH = (16, 16, 16, 10), 16
#: Steps of an epoch of 60,000 images in batches of 64.
STEPS = 938
LR = 0.01
#: Calls until kernels are compiled and graphs captured.
_UNTIL_REPLAYED = 3

#: Key in the JSON -> what is timed.
WAYS = {
    "eager_us": "PyTorch eager: nn.Sequential, CrossEntropyLoss, SGD",
    "modules_us": "fastmlp modules: MLP, CrossEntropyLoss, SGD",
    "step_launches_us": "TrainStep, plain launches",
    "step_us": "TrainStep in a graph",
    "epoch_step_launches_us": "a step of TrainStep.epoch, plain launches",
    "epoch_step_us": "a step of TrainStep.epoch in graphs",
    "eager_forward_backward_us": "eager without SGD: forward, loss and backward",
    "modules_forward_backward_us": "modules without SGD: forward, loss and backward",
}


@dataclass
class _Call:
    """A function as a run that ``Turns`` can time."""

    function: Callable[[], object]

    def __call__(self) -> object:
        return self.function()

    def finish(self) -> None:
        """Nothing is asynchronous."""

    def results(self) -> dict[str, Tensor]:
        """Nothing to judge."""
        return {}


class _NullGraph:
    """torch.cuda.CUDAGraph without a device."""

    def replay(self) -> None:
        """Nothing."""

    def pool(self) -> None:
        """No pool: every capture has one of its own."""


class _NullStream:
    """torch.cuda.Stream without a device."""

    def __init__(self, *device: Any, **options: Any) -> None:
        pass

    def wait_stream(self, other: _NullStream) -> None:
        """Nothing is asynchronous."""


def _context(*args: Any, **options: Any) -> Any:
    return nullcontext()


def _yes(device: torch.device) -> bool:
    return True


def _they_do() -> bool:
    return True


def _unchecked(*labels: Any, **options: Any) -> None:
    pass


def _unseen(device: object) -> bool:
    return False


@contextmanager
def host_gpu() -> Iterator[None]:
    """Inside, fastmlp takes CPU tensors to its kernels and graphs, and neither launches nor replays do anything.

    Two checks that CPU tensors alone go through are left out: of class numbers, and whether the driver takes them.
    """
    stream = _NullStream()
    stand_ins = {
        "Stream": _NullStream,
        "current_stream": lambda *device: stream,
        "CUDAGraph": _NullGraph,
        "is_current_stream_capturing": lambda: False,
        **dict.fromkeys(("device", "graph", "stream"), _context),
    }
    with ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        stack.enter_context(mock.patch("fastmlp.step.triton_step.can_capture", _yes))
        stack.enter_context(mock.patch("fastmlp.step.validation.host_sees_labels", _unseen))
        stack.enter_context(mock.patch("fastmlp.step.triton_loss.host_sees_labels", _unseen))
        stack.enter_context(mock.patch("fastmlp.autograd.cross_entropy._check_labels", _unchecked))
        stack.enter_context(mock.patch("fastmlp.backend._kernels_take_cpu", _they_do))
        stack.enter_context(NullGPU())
        stack.enter_context(fastmlp.use_backend("triton"))
        yield


def _autograd_step(model: nn.Module, loss_function: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    # On a GPU torch takes foreach by default.
    optimizer = torch.optim.SGD(model.parameters(), LR, foreach=True)

    def step() -> object:
        loss = loss_function(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step


def _forward_backward(model: nn.Module, loss_function: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    parameters = list(model.parameters())

    def forward_backward() -> object:
        for parameter in parameters:
            parameter.grad = None
        loss = loss_function(model(x), y)
        loss.backward()
        return loss

    return forward_backward


def _eager() -> nn.Module:
    layers: list[nn.Module] = []
    for k, n in pairwise(SIZES):
        layers += [nn.Linear(k, n), nn.Sigmoid()]
    return nn.Sequential(*layers[:-1])


def _calls() -> dict[str, tuple[Callable[[], object], int]]:
    """(Function, steps per call) of every kind of step."""
    x, y = torch.rand(STEPS * BATCH, SIZES[0]), torch.randint(0, SIZES[-1], (STEPS * BATCH,))
    order, batch = torch.randperm(len(y)), (x[:BATCH], y[:BATCH])
    plain, graph = (fastmlp.TrainStep(fastmlp.MLP(SIZES), lr=LR, cuda_graph=graphs) for graphs in (False, True))
    return {
        "eager_us": (_autograd_step(_eager(), nn.CrossEntropyLoss(), *batch), 1),
        "modules_us": (_autograd_step(fastmlp.MLP(SIZES), fastmlp.CrossEntropyLoss(), *batch), 1),
        "step_launches_us": (lambda: plain(*batch), 1),
        "step_us": (lambda: graph(*batch), 1),
        "epoch_step_launches_us": (lambda: plain.epoch(x, y, BATCH, order), STEPS),
        "epoch_step_us": (lambda: graph.epoch(x, y, BATCH, order), STEPS),
        "eager_forward_backward_us": (_forward_backward(_eager(), nn.CrossEntropyLoss(), *batch), 1),
        "modules_forward_backward_us": (
            _forward_backward(fastmlp.MLP(SIZES), fastmlp.CrossEntropyLoss(), *batch),
            1,
        ),
    }


def measure(rounds: int, command: str, *, turn_s: float = TURN_S) -> Document:
    """Microseconds of the host per step, for each kind of step: the medians over the rounds, and all rounds.

    Raises:
        RuntimeError: Triton is in interpreter mode, which launches nothing.
    """
    started = datetime.datetime.now(datetime.timezone.utc)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with host_gpu():
            calls = _calls()
            for function, _ in calls.values():
                for _ in range(_UNTIL_REPLAYED):
                    function()
            runs = {way: _Call(function) for way, (function, _) in calls.items()}
            turns = Turns(runs, "cpu", turn_s=turn_s, clock=time.thread_time)
            take_turns([turns], rounds)
            about = machine.describe("cpu")
    finally:
        torch.set_num_threads(threads)
    samples = {
        way: [1e6 * seconds / steps for seconds in turns.samples[way].seconds] for way, (_, steps) in calls.items()
    }
    return {
        "format": FORMAT,
        "kind": "host",
        "command": command,
        "started": started.isoformat(timespec="seconds"),
        "rounds": rounds,
        "machine": about,
        "network": {"sizes": SIZES, "batch": BATCH, "steps_of_an_epoch": STEPS},
        **{way: statistics.median(values) for way, values in samples.items()},
        "samples_us": samples,
    }


def print_host(document: Document) -> None:
    """Print the times: median, spread, and share of eager's."""
    about, samples = document["machine"], document["samples_us"]
    click.echo(f"host time of a step: {about['name']}, commit {about['commit']}, {document['rounds']} rounds\n")
    click.echo(f"  {'':<52}{'median':>9}  spread  / eager")
    for way, label in WAYS.items():
        smallest, largest = stated_range(samples[way])
        spread = f"±{50 * (largest - smallest) / document[way]:.0f} %"
        share = statistics.median(own / base for own, base in zip(samples[way], samples["eager_us"], strict=True))
        click.echo(f"  {label:<52}{document[way]:>6.1f} µs{spread:>8}{share:>9.2g}")
