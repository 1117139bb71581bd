"""Times of several contenders, taken in turns: one turn of each a round, every round in another drawn order.

What disturbs the machine for a while (another process, the clock of a warm processor) then disturbs all of them
alike. A round goes through all problems before the next one begins, so that what is typical of some seconds only is
seen as a difference between rounds. A turn is as many calls as fill ``TURN_S``, and its time is divided by them. On a
CPU the threads of the contender before may still be spinning (OpenBLAS's do for 30 ms), so each turn starts after a
pause. On a GPU every call is timed by a pair of events, with the L2 cache overwritten before, and a turn's time is
their median.
"""

from __future__ import annotations

import functools
import gc
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .rivals.protocol import Run

__all__ = ["Samples", "Turns", "take_turns"]

TURN_S = 0.1
PAUSE_S = 0.05
WARM_UP_S = 0.3
#: More than the L2 cache of any GPU.
FLUSH_BYTES = 256 << 20


@dataclass
class Samples:
    """Seconds a call, one number a round; ``calls`` is how many calls each number is the mean (GPU: median) of."""

    calls: int
    seconds: list[float] = field(default_factory=list)


class Turns:
    """The contenders of one problem, warmed up; ``samples`` grows by one number each with every round."""

    def __init__(self, runs: Mapping[str, Run], device: str, *, turn_s: float = TURN_S) -> None:
        self._runs, self._device = runs, device
        self.samples = {name: Samples(_warm_up(run, turn_s)) for name, run in runs.items()}

    def round(self, number: int) -> None:
        """One turn of each, in an order drawn by ``number``: nobody should always come after the same contender."""
        names = list(self._runs)
        for name in random.Random(number).sample(names, len(names)):
            time.sleep(PAUSE_S)
            run, samples = self._runs[name], self.samples[name]
            turn = _gpu_turn if self._device.startswith("cuda") else _cpu_turn
            samples.seconds.append(turn(run, samples.calls))


def take_turns(problems: Sequence[Turns], rounds: int) -> None:
    """``rounds`` rounds, each through all problems, without the garbage collector."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            gc.collect()
            for turns in problems:
                turns.round(number)
    finally:
        if was_enabled:
            gc.enable()


def _warm_up(run: Run, turn_s: float) -> int:
    """Call until caches, clocks and compilers have settled; returns the calls that fill a turn."""
    run()
    run.finish()
    calls, begin = 0, time.perf_counter()
    while calls < 1 or time.perf_counter() - begin < min(WARM_UP_S, 3 * turn_s):
        run()
        run.finish()
        calls += 1
    return max(1, round(turn_s * calls / (time.perf_counter() - begin)))


def _cpu_turn(run: Run, calls: int) -> float:
    if calls > 1:
        run()  # brings its code and weights into the caches, as in the middle of a training run
        run.finish()
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    run.finish()
    return (time.perf_counter() - begin) / calls


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")


def _gpu_turn(run: Run, calls: int) -> float:
    flush = _flush_buffer()
    run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
    for start, stop in events:
        flush.zero_()
        start.record()
        run()
        stop.record()
    run.finish()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events) / 1e3
