"""The two ways to run a grid: all warps in lockstep, or warp by warp in random order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .context import Context
from .errors import Deadlock
from .global_memory import GlobalMemory
from .shared_memory import SharedMemory
from .stats import Stats

if TYPE_CHECKING:
    from .kernel import PtxKernel


@dataclass
class LaunchState:
    """The state of one launch that belongs neither to the kernel nor to single warps."""

    kernel: PtxKernel
    grid: tuple[int, int, int]
    registers: list[np.ndarray]  # initial value of every slot, parameters included
    parameters: np.ndarray  # bytes of the parameters
    global_memory: GlobalMemory
    rng: np.random.Generator
    preempt: float
    max_steps: int
    spin_limit: int
    races: bool
    uninit: str
    count_traffic: bool
    shuffle_atomics: bool
    dependent: bool  # global memory may be touched after griddepcontrol.wait only
    writers: dict[int, np.ndarray] | None  # for global_races: the CTA that stored last, by access size; None: off
    stats: Stats = field(default_factory=Stats)
    steps: int = 0
    bank_memo: dict = field(default_factory=dict)

    @property
    def ncta(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    def shared_memory(self, ncta: int) -> SharedMemory:
        k = self.kernel
        return SharedMemory(k.shared_bytes, ncta, k.num_warps, k.gran, self.races, self.uninit != "off")


def _never_complete(launch: LaunchState, c: Context, lane: int) -> Deadlock:
    return Deadlock(
        "warps of a CTA wait at a barrier that the others do not reach",
        launch.kernel.code[c.wait_pc[lane] - 1],
        threads=c.who(lane),
    )


def run_lockstep(launch: LaunchState, resident: int) -> None:
    """Run all warps of `resident` CTAs together, batch after batch."""
    warps = range(launch.kernel.num_warps)
    for start in range(0, launch.ncta, resident):
        ctas = range(start, min(launch.ncta, start + resident))
        c = Context(launch, ctas, warps, launch.shared_memory(len(ctas)), whole=True)
        if c.run() != "exit":
            waiting = next(w for w in c.waiting.values() if w.any())
            raise _never_complete(launch, c, int(np.flatnonzero(waiting)[0]))


def run_warpwise(launch: LaunchState, resident: int) -> None:
    """Run each warp alone until it waits, ends or is preempted; then run a random warp of those that can go on.

    `resident` CTAs are in flight together. CTAs begin in random order.
    """
    todo = list(launch.rng.permutation(launch.ncta))
    live: dict[int, dict[int, Context]] = {}  # CTA -> warp -> context
    arrived: dict[tuple[int, int], dict[int, int | None]] = {}  # (CTA, barrier) -> warp -> threads to wait for
    runnable: list[tuple[int, int]] = []
    while todo or live:
        while todo and len(live) < resident:
            cta = int(todo.pop())
            shared = launch.shared_memory(1)
            live[cta] = {w: Context(launch, [cta], [w], shared, whole=False) for w in range(launch.kernel.num_warps)}
            runnable += [(cta, w) for w in live[cta]]
        if not runnable:
            c = next(iter(next(iter(live.values())).values()))
            raise _never_complete(launch, c, int(np.flatnonzero(c.live)[0]))
        j = int(launch.rng.integers(len(runnable)))
        runnable[j], runnable[-1] = runnable[-1], runnable[j]
        cta, w = runnable.pop()
        c = live[cta][w]
        stopped = c.run()
        if stopped == "yield":
            runnable.append((cta, w))
            continue
        if stopped == "exit":
            del live[cta][w]
        else:
            number, count = c.bar_request
            arrived.setdefault((cta, number), {})[w] = count
        # Exited warps count as arrived, so any change may complete any barrier of this CTA.
        for key in [k for k in arrived if k[0] == cta]:
            waiting = arrived[key]
            count = next(iter(waiting.values()))
            if len(waiting) >= (len(live[cta]) if count is None else count // 32):
                launch.stats.barriers += 1
                next(iter(live[cta].values())).shared.epoch += 1
                for x in waiting:
                    live[cta][x].resume(key[1])
                    runnable.append((cta, x))
                del arrived[key]
        if not live[cta]:
            del live[cta]
