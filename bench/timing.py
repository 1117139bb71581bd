"""Times of several contenders, taken in turns: one turn of each a round, every round in another drawn order.

What disturbs the machine for a while (another process, the clock of a warm processor) then disturbs all of them
alike. A turn is as many calls as fill ``TURN_S``, and its time is divided by them. On a CPU the threads of the
contender before may still be spinning (OpenBLAS's do for 30 ms), so each turn starts after a pause. On a GPU every call
is timed by a pair of events, with the L2 cache overwritten before, and a turn's time is their median.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .rivals.protocol import Run

__all__ = ["Samples", "interleaved"]

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


def interleaved(runs: Mapping[str, Run], rounds: int, device: str, *, turn_s: float = TURN_S) -> dict[str, Samples]:
    """Time every run in each of ``rounds`` rounds."""
    on_gpu = device.startswith("cuda")
    samples = {name: Samples(_warm_up(run, turn_s)) for name, run in runs.items()}
    names = list(runs)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if on_gpu else None
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for round_ in range(rounds):
            # Drawn, not rotated: nobody should always come after the same contender.
            for name in random.Random(round_).sample(names, len(names)):
                time.sleep(PAUSE_S)
                calls = samples[name].calls
                seconds = _gpu_turn(runs[name], calls, flush) if flush is not None else _cpu_turn(runs[name], calls)
                samples[name].seconds.append(seconds)
    finally:
        if was_enabled:
            gc.enable()
    return samples


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


def _gpu_turn(run: Run, calls: int, flush: torch.Tensor) -> float:
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
