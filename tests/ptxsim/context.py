"""Warps that advance together: their registers, and the control flow of lanes that diverge and meet again.

A context holds either all warps of many CTAs (lockstep) or a single warp (warpwise). Its lanes are divided into
groups by program counter. The group that is furthest behind runs; it merges with another group on reaching that group's
program counter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .dtypes import i64, u8, u32, u64
from .errors import Deadlock, Divergence
from .parser import Instruction
from .shared_memory import SharedMemory

if TYPE_CHECKING:
    from .machine import LaunchState
    from .ops_async import PendingCopy

NORMAL, BRANCH, BAR, EXIT, BRX = range(5)

SIMULATED_MULTIPROCESSORS = 108  # the value of %nsmid

_KEPT_MASKS = 64


class Group:
    """Lanes at one program counter."""

    __slots__ = ("mask", "nw", "parked", "pc", "spins", "yields")

    def __init__(self, pc: int, mask: np.ndarray | None, nw: int, yields: int = 0) -> None:
        self.pc, self.mask, self.nw = pc, mask, nw  # mask: None for all lanes; nw: number of warps with lanes in it
        self.yields = yields  # how often the group has let others go first; groups with fewer yields run first
        self.spins = 0  # backward branches since the last yield
        self.parked = False  # waits at a .sync instruction for the rest of its warps


class Context:
    """Registers and control state of warps that advance together.

    Args:
        launch: the launch that the context belongs to.
        ctas, warps: linear indices of the CTAs, and which warps of each CTA are in the context.
        shared: shared memory of these CTAs.
        whole: whether all warps of each CTA are in the context, which then settles barriers by itself.
    """

    def __init__(
        self, launch: LaunchState, ctas: Sequence[int], warps: Sequence[int], shared: SharedMemory, whole: bool
    ) -> None:
        self.launch, self.shared, self.whole = launch, shared, whole
        self.code = launch.kernel.code
        self.ctas, self.ncta = np.asarray(ctas, i64), len(ctas)
        self.T = 32 * len(warps)  # lanes of a CTA
        self.L = self.T * self.ncta  # lanes
        self.W = self.L // 32  # warps
        self.lanes_all = np.arange(self.L)
        tid = (np.arange(32, dtype=u32)[None, :] + u32(32) * np.asarray(warps, u32)[:, None]).reshape(-1)
        self.tid = np.tile(tid, self.ncta)
        self.warp_of_lane = (self.tid // 32).astype(i64)
        self.cta_of_lane = np.repeat(np.arange(self.ncta), self.T)

        self.R = list(launch.registers)
        special = self._special_registers()
        for name, slot in launch.kernel.special_slots.items():
            if name not in special:
                raise NotImplementedError(f"special register {name}")
            self.R[slot] = special[name]
        self.carry = np.zeros(1, np.bool_)
        self.shared_base = self.cta_of_lane * shared.stride if self.ncta > 1 else np.zeros(1, i64)
        self.lstride = -(-launch.kernel.local_size // 16) * 16
        self.lmem = np.zeros(self.L * self.lstride, u8)
        self.pending: list[PendingCopy] = []
        self.fragments: dict[tuple, tuple[list[np.ndarray], np.ndarray]] = {}  # recently used operands of mma
        self._mask_lanes: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._first_lanes: dict[int, np.ndarray] = {}
        self.committed = np.zeros(self.L, i64)  # cp.async groups of each lane

        self.live = np.ones(self.L, np.bool_)
        self.waits = launch.dependent  # whether lanes may still have to wait for the previous kernel
        self.waited = np.zeros(self.L, np.bool_)
        self.groups = [Group(0, None, self.W)]
        self.waiting: dict[int, np.ndarray] = {}  # barrier id -> lanes that have arrived
        self.wait_count: dict[int, int | None] = {}  # barrier id -> threads that it waits for; None: all
        self.wait_pc = np.zeros(self.L, i64)  # where each lane goes on
        self.wait_yields = np.zeros(self.L, i64)
        self.bar_request: tuple[int, int | None] | None = None  # the barrier that a single warp waits for

    def _special_registers(self) -> dict[str, np.ndarray]:
        kernel, c = self.launch.kernel, self.ctas
        gx, gy, gz = self.launch.grid

        def one(v: int) -> np.ndarray:
            return np.array([v], u32)

        def per_cta(v: np.ndarray) -> np.ndarray:
            return np.repeat(v.astype(u32), self.T) if self.ncta > 1 else one(v[0])

        zero, unit = one(0), one(1)
        lane = np.tile(np.arange(32, dtype=u32), self.W)
        bit = unit << lane
        return {
            "%tid.x": self.tid,
            "%tid.y": zero,
            "%tid.z": zero,
            "%ntid.x": one(32 * kernel.num_warps),
            "%ntid.y": unit,
            "%ntid.z": unit,
            "%ctaid.x": per_cta(c % gx),
            "%ctaid.y": per_cta(c // gx % gy),
            "%ctaid.z": per_cta(c // gx // gy),
            "%nctaid.x": one(gx),
            "%nctaid.y": one(gy),
            "%nctaid.z": one(gz),
            "%laneid": lane,
            "%warpid": self.warp_of_lane.astype(u32),
            "%nwarpid": one(kernel.num_warps),
            "%smid": per_cta(c % SIMULATED_MULTIPROCESSORS),
            "%nsmid": one(SIMULATED_MULTIPROCESSORS),
            "%lanemask_eq": bit,
            "%lanemask_lt": bit - unit,
            "%lanemask_le": (bit - unit) | bit,
            "%lanemask_gt": ~((bit - unit) | bit),
            "%lanemask_ge": ~(bit - unit),
            "%cluster_ctarank": zero,
            "%cluster_nctarank": unit,
            "%cluster_ctaid.x": zero,
            "%cluster_ctaid.y": zero,
            "%cluster_ctaid.z": zero,
            "%clusterid.x": per_cta(c % gx),
            "%dynamic_smem_size": one(kernel.shared_bytes),
            "%total_smem_size": one(kernel.shared_bytes),
            "%gridid": np.array([1], u64),
        }

    # Used by the decoded closures.

    def write_masked(self, d: int, v: np.ndarray, m: np.ndarray) -> None:
        self.R[d] = np.where(m, v, self.R[d])

    def scatter(self, d: int, v: np.ndarray, idx: np.ndarray) -> None:
        """Write the lanes idx of a register."""
        old = self.R[d]
        new = old.copy() if old.size == self.L else np.full(self.L, old[0])
        new[idx] = v
        self.R[d] = new

    def per_lane(self, a: np.ndarray) -> np.ndarray:
        return a if a.size == self.L else np.full(self.L, a[0])

    def active_lanes(self, m: np.ndarray) -> np.ndarray:
        """Indices of the lanes of a mask. Like registers, masks are never changed; many are one predicate register."""
        known = self._mask_lanes.get(id(m))
        if known is None:
            if len(self._mask_lanes) >= _KEPT_MASKS:
                self._mask_lanes.clear()
            known = self._mask_lanes[id(m)] = m, np.flatnonzero(m)
        return known[1]

    def first_lanes(self, n: int) -> np.ndarray:
        """The mask of the first n lanes of every warp."""
        if n not in self._first_lanes:
            self._first_lanes[n] = np.tile(np.arange(32) < n, self.W)
        return self._first_lanes[n]

    def who(self, lane: int) -> str:
        """The program and thread of a lane, for messages."""
        c = self.ctas[self.cta_of_lane[lane]]
        gx, gy, _ = self.launch.grid
        return f"ctaid ({c % gx},{c // gx % gy},{c // gx // gy}) tid {self.tid[lane]}"

    def lane_at(self, i: int, idx: np.ndarray | None, n: int) -> int:
        """The lane of the i-th of n values that belong to the lanes idx (None: all)."""
        if idx is not None:
            return int(idx[min(i, len(idx) - 1)])
        return int(i) if n > 1 else 0

    # Running.

    def run(self) -> str:
        """Run until nothing can proceed here.

        Returns:
            "exit", "bar" (some lanes wait for a barrier), or "yield" (others should go first: spinning, preempted).
        """
        while True:
            best = None
            for g in self.groups:
                if not g.parked and (best is None or (g.yields, g.pc) < (best.yields, best.pc)):
                    best = g
            if best is None:
                if self.groups:
                    g = self.groups[0]
                    raise Divergence(
                        "lanes of one warp wait at different places",
                        self.code[g.pc],
                        threads=self.who(int(np.flatnonzero(g.mask)[0])),
                    )
                return "bar" if any(w.any() for w in self.waiting.values()) else "exit"
            stopped = self._run_group(best)
            if stopped is not None:
                return stopped

    def _run_group(self, g: Group) -> str | None:
        """Run a group until it ends, splits, merges or waits. None means that a group is to be chosen again."""
        code, launch = self.code, self.launch
        others = {o.pc: o for o in self.groups if o is not g}
        pc, m, nw = g.pc, g.mask, g.nw
        preempt, limit, steps = launch.preempt, launch.max_steps, launch.steps
        try:
            while True:
                ins = code[pc]
                steps += 1
                if steps > limit:
                    raise Deadlock(f"more than {limit} simulator steps (spin loop on a CTA that is not resident?)", ins)
                if ins.warp_sync and m is not None and not self._converged(m):
                    g.pc, g.parked = pc, True
                    return None
                ins.count += nw
                active = m if ins.guard_slot is None else self._guarded(ins, m)
                if active is False:
                    pc += 1
                elif ins.kind == NORMAL:
                    ins.fn(self, active)
                    pc += 1
                else:
                    after = _CONTROL[ins.kind](self, g, ins, pc, active)
                    if not isinstance(after, int):
                        return after
                    pc = after
                if others and pc in others:
                    self._merge(g, others[pc], pc)
                    return None
                if preempt and ins.ismem and launch.rng.random() < preempt:
                    g.pc = pc
                    return "yield"
        finally:
            launch.steps = steps

    def _guarded(self, ins: Instruction, m: np.ndarray | None) -> np.ndarray | bool | None:
        """The lanes of m whose predicate holds: a mask, None for all lanes, False for none."""
        p = self.R[ins.guard_slot]
        if ins.guard_negated:
            p = ~p
        if p.size == 1:
            return m if p[0] else False
        active = p if m is None else p & m
        n = np.count_nonzero(active)
        if n == 0:
            return False
        return None if n == self.L else active

    # Control flow: each takes the active lanes of the group g and the program counter of the instruction, and
    # returns where g goes on, or what _run_group is to return.

    def _branch(self, g: Group, ins: Instruction, pc: int, active: np.ndarray | None) -> int | str | None:
        m, target = g.mask, ins.target
        back = target <= pc
        if active is m or (active is not None and m is not None and np.array_equal(active, m)):
            if not back or not self._spun(g):
                return target
            g.pc = target
            for o in self.groups:
                if o is not g and o.pc == target:
                    self._merge(g, o, target)
                    break
            return None if self.whole else "yield"
        self.groups.remove(g)
        self.add_group(pc + 1, ~active if m is None else m & ~active, g.yields)
        taken = self.add_group(target, active, g.yields)
        if back:
            taken.spins = g.spins
            if self._spun(taken) and not self.whole:
                return "yield"
        return None

    def _spun(self, g: Group) -> bool:
        """Count a backward branch. After too many of them the group lets others go first."""
        g.spins += 1
        if g.spins <= self.launch.spin_limit:
            return False
        g.spins = 0
        g.yields += 1
        return True

    def _take_out(self, g: Group, pc: int, active: np.ndarray | None) -> np.ndarray:
        """Remove the group. Lanes that take no part go on behind pc; lanes that take part are returned as a mask."""
        self.groups.remove(g)
        if active is None:
            return np.ones(self.L, np.bool_)
        rest = ~active if g.mask is None else g.mask & ~active
        if rest.any():
            self.add_group(pc + 1, rest, g.yields)
        return active

    def _exit(self, g: Group, ins: Instruction, pc: int, active: np.ndarray | None) -> None:
        self.live = self.live & ~self._take_out(g, pc, active)
        self._release()

    def _branch_by_table(self, g: Group, ins: Instruction, pc: int, active: np.ndarray | None) -> None:
        index = self.per_lane(self.R[ins.index_slot])
        lanes = self._take_out(g, pc, active)
        for v in np.unique(index[lanes]):
            self.add_group(ins.targets[int(v)], lanes & (index == v), g.yields)

    def _barrier(self, g: Group, ins: Instruction, pc: int, active: np.ndarray | None) -> int | str | None:
        id_slot, count_slot = ins.bar
        if self.whole and count_slot is None and active is g.mask:
            # In the usual case all live threads of some CTAs arrive at once, and they pass without waiting.
            here = np.ones(self.ncta, np.bool_)
            complete = active is None
            if not complete:
                lanes = active.reshape(self.ncta, self.T)
                here = lanes.any(1)
                complete = (lanes | ~self.live.reshape(self.ncta, self.T))[here].all()
            if complete:
                self.shared.epoch[here] += 1
                self.launch.stats.barriers += int(here.sum())
                return pc + 1
        lanes = self._take_out(g, pc, active)
        first = int(np.flatnonzero(lanes)[0])
        number = int(self.per_lane(self.R[id_slot])[first])
        count = None if count_slot is None else int(self.per_lane(self.R[count_slot])[first])
        self.waiting[number] = self.waiting.get(number, np.zeros(self.L, np.bool_)) | lanes
        self.wait_count[number] = count
        self.wait_pc[lanes] = pc + 1
        self.wait_yields[lanes] = g.yields
        if self.whole:
            self._release()
        elif not self.groups:
            self.bar_request = (number, count)
            return "bar"
        return None

    def _release(self) -> None:
        """Let the lanes of complete barriers go on."""
        if not self.whole:
            return
        gone = ~self.live.reshape(self.ncta, self.T)
        for number, waiting in list(self.waiting.items()):
            if not waiting.any():
                continue
            lanes = waiting.reshape(self.ncta, self.T)
            count = self.wait_count[number]
            done = (lanes | gone).all(1) & lanes.any(1) if count is None else lanes.sum(1) >= count
            if not done.any():
                continue
            released = waiting & np.repeat(done, self.T)
            self.waiting[number] = waiting & ~released
            self.shared.epoch[done] += 1
            self.launch.stats.barriers += int(done.sum())
            for pc in np.unique(self.wait_pc[released]):
                some = released & (self.wait_pc == pc)
                self.add_group(int(pc), some, int(self.wait_yields[some].max()))

    def resume(self, number: int) -> None:
        """Let a single warp pass the barrier it waits for."""
        lanes = self.waiting.pop(number)
        for pc in np.unique(self.wait_pc[lanes]):
            self.add_group(int(pc), lanes & (self.wait_pc == pc))

    # Groups.

    def add_group(self, pc: int, mask: np.ndarray, yields: int = 0) -> Group:
        """Let lanes go on at pc, as a group of their own or as part of the group that is there."""
        for g in self.groups:
            if g.pc == pc and g.mask is not None:
                g.mask = g.mask | mask
                g.yields = max(g.yields, yields)
                g.parked = False
                self._refresh(g)
                return g
        g = Group(pc, mask, 0, yields)
        self._refresh(g)
        self.groups.append(g)
        return g

    def _merge(self, g: Group, o: Group, pc: int) -> None:
        self.groups.remove(g)
        self.groups.remove(o)
        mask = None if g.mask is None or o.mask is None else g.mask | o.mask
        merged = Group(pc, mask, 0, max(g.yields, o.yields))
        merged.spins = max(g.spins, o.spins)
        self._refresh(merged)
        self.groups.append(merged)

    def _refresh(self, g: Group) -> None:
        if g.mask is not None and g.mask.all():
            g.mask = None
        g.nw = self.W if g.mask is None else int(g.mask.reshape(self.W, 32).any(1).sum())

    def _converged(self, m: np.ndarray) -> bool:
        """Whether each participating warp takes part with all of its lanes that have not exited."""
        lanes = m.reshape(self.W, 32)
        return bool((lanes | ~self.live.reshape(self.W, 32))[lanes.any(1)].all())


_CONTROL = {
    BRANCH: Context._branch,
    BAR: Context._barrier,
    EXIT: Context._exit,
    BRX: Context._branch_by_table,
}
