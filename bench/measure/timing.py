"""Times of several contenders, which take turns: one turn each per round, in an order drawn anew for every round.

A disturbance of the machine (another process, the clock of a warm processor) then disturbs all contenders alike. A
round goes through all problems before the next round begins, so a disturbance of some seconds shows as a difference
between rounds. On a CPU the threads of the previous contender may still spin (OpenBLAS's do for 30 ms), so each turn
starts after a pause.

There are two ways to take a turn (``Problem.timing``):

- "chain": as many calls as fill ``TURN_S`` follow each other without a wait, and their time is divided by their
  number. Training is such a chain: the weights are where the previous step left them, and a GPU that is faster than its
  host waits for the host. The clock is the host's, and it stops when the device has finished.
- "flushed": a pair of events times every call on a GPU, after the L2 cache was overwritten. The turn's time is the
  median. Overwriting takes longer than the host needs for the launch, so the host's time is hidden.
"""

from __future__ import annotations

import functools
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from bench.rivals.protocol import Run

__all__ = ["Clock", "Samples", "Turns", "chain", "take_turns"]

#: Seconds since some moment.
Clock = Callable[[], float]

TURN_S = 0.1
PAUSE_S = 0.05
WARM_UP_S = 0.3
#: More than the L2 cache of any GPU.
FLUSH_BYTES = 256 << 20


@dataclass
class Samples:
    """Seconds per call, one number per round: the mean of a chain of ``calls`` calls, or the median of as many."""

    calls: int
    seconds: list[float] = field(default_factory=list)


class Turns:
    """The contenders of one problem, warmed up; every round adds one number to the ``samples`` of each.

    Args:
        runs: the contenders by name.
        device: where they compute.
        timing: "chain" or "flushed", see above.
        turn_s: seconds per turn.
        clock: the clock of the chains.
    """

    def __init__(
        self,
        runs: Mapping[str, Run],
        device: str,
        timing: str = "chain",
        *,
        turn_s: float = TURN_S,
        clock: Clock = time.perf_counter,
    ) -> None:
        self._runs = runs
        self._turn: Callable[[Run, int], float] = functools.partial(chain, clock=clock)
        if timing == "flushed":
            self._turn = functools.partial(_flushed, device=device)
        self.samples = {name: Samples(_warm_up(run, turn_s, clock)) for name, run in runs.items()}
        if timing == "chain" and device.startswith("cuda"):
            # The warm-up waits for the device after every call, which takes longer than a call of a chain.
            for name, samples in self.samples.items():
                seconds = chain(runs[name], samples.calls, clock)
                samples.calls = max(1, round(turn_s / seconds))

    def round(self, number: int) -> None:
        """One turn of each, in an order that ``number`` draws: no contender always follows the same other one."""
        names = list(self._runs)
        for name in random.Random(number).sample(names, len(names)):
            time.sleep(PAUSE_S)
            samples = self.samples[name]
            samples.seconds.append(self._turn(self._runs[name], samples.calls))


def take_turns(problems: Sequence[Turns], rounds: int) -> None:
    """``rounds`` rounds, each through all problems; the garbage collector runs between rounds only."""
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


def _warm_up(run: Run, turn_s: float, clock: Clock) -> int:
    """Call until caches, clocks and compilers have settled; returns how many calls fill a turn."""
    run()
    run.finish()
    calls, begin = 0, clock()
    while calls < 1 or clock() - begin < min(WARM_UP_S, 3 * turn_s):
        run()
        run.finish()
        calls += 1
    return max(1, round(turn_s * calls / (clock() - begin)))


def chain(run: Run, calls: int, clock: Clock = time.perf_counter) -> float:
    """Seconds per call of ``calls`` calls in a row."""
    if calls > 1:
        run()  # brings code and weights into the caches, as in the middle of a training run
        run.finish()
    begin = clock()
    for _ in range(calls):
        run()
    run.finish()
    return (clock() - begin) / calls


@functools.cache
def _flush_buffer(device: str) -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)


def _flushed(run: Run, calls: int, device: str) -> float:
    """Median seconds of ``calls`` calls on the device."""
    flush = _flush_buffer(device)
    run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
    for start, stop in events:
        flush.zero_()
        start.record()
        run()
        stop.record()
    run.finish()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(stop) for start, stop in events) / 1e3
