"""Asynchronous copies from global to shared memory (cp.async).

The source is read when the copy is issued; the data lands when a wait_group allows it, and until then any other
access to the destination is a fault.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .context import Context
from .decoder import Decoder, Execute, Mask, immediate, opcode, unsupported
from .dtypes import UINT, u8, u32, u64
from .global_memory import count_global, locate_global
from .parser import Instruction
from .shared_memory import check_overwrite, count_shared, locate_shared, mark_written


class PendingCopy(NamedTuple):
    """Copies of some lanes that have been issued together and have not landed."""

    lanes: np.ndarray
    group: np.ndarray  # number of groups that each lane had committed before
    rows: np.ndarray  # destinations, in rows of nbytes
    nbytes: int
    data: np.ndarray  # [lanes, elements]

    def select(self, keep: np.ndarray) -> PendingCopy:
        return PendingCopy(*(x[keep] if isinstance(x, np.ndarray) else x for x in self))


def _issue(c: Context, ins: Instruction, lanes: np.ndarray, rows: np.ndarray, nbytes: int, data: np.ndarray) -> None:
    check_overwrite(c, ins, lanes, rows, nbytes)
    flight, every = c.shared.flags(c.shared.flight, nbytes)
    flight[rows] = every
    c.shared.nflight += 1
    c.pending.append(PendingCopy(lanes, c.committed[lanes], rows, nbytes, data))


def _commit(c: Context, m: Mask) -> None:
    if m is None:
        c.committed += 1
    else:
        c.committed[m] += 1


def _wait(c: Context, n: int | None, m: Mask) -> None:
    """Land the copies of the active lanes, except the n latest groups of each lane.

    n = None lands all copies, committed or not.
    """
    left = []
    sm = c.shared
    for copy in c.pending:
        if n is None:
            done = np.ones(len(copy.lanes), np.bool_)
        else:
            done = copy.group < c.committed[copy.lanes] - n
        if m is not None:
            done &= m[copy.lanes]
        if not done.any():
            left.append(copy)
            continue
        if done.all():
            sm.nflight -= 1
        else:
            left.append(copy.select(~done))
            copy = copy.select(done)
        sm.view(copy.nbytes, copy.data.dtype.itemsize)[copy.rows] = copy.data
        sm.flags(sm.flight, copy.nbytes)[0][copy.rows] = 0
        if sm.init is not None:
            init, every = sm.flags(sm.init, copy.nbytes)
            init[copy.rows] = every
        if sm.wr is not None:
            mark_written(c, copy.lanes, copy.rows, copy.nbytes)
    c.pending = left


@opcode("cp")
def cp(D: Decoder, ins: Instruction) -> Execute:
    if ins.mods[0] != "async" or "bulk" in ins.mods or "mbarrier" in ins.mods:
        unsupported(ins)
    what = ins.mods[1]
    if what == "commit_group":
        return _commit
    if what == "wait_all":
        return lambda c, m: _wait(c, None, m)
    if what == "wait_group":
        n_left = immediate(ins.ops[0], 32)
        return lambda c, m: _wait(c, n_left, m)
    dst, dst_off = D.addr(ins, ins.ops[0])
    src, src_off = D.addr(ins, ins.ops[1])
    n = immediate(ins.ops[2], 32)
    elem = min(n, 4)
    operands = len(ins.ops) - any("cache_hint" in x for x in ins.mods)  # without the cache policy
    size = D.src(ins, ins.ops[3], 32) if operands > 3 else None
    ins.global_counts, ins.shared_counts, ins.ismem = [0, 0, 0, 0], [0, 0, 0], True

    def read_some(c: Context, m: Mask, lanes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Copies of fewer than n bytes (0 bytes where a mask is off). The rest of the destination becomes zero."""
        data = np.zeros((len(lanes), n // elem), UINT[8 * elem])
        by_lane = np.zeros(c.L, u32)
        by_lane[lanes] = sizes
        for s in np.unique(sizes[sizes > 0]):
            ms = by_lane == s
            rows = np.flatnonzero(ms[lanes])
            if s == n:
                i, idx, a, view = locate_global(c, ins, src, src_off, n, elem, ms, "cp.async read")
                data[rows] = view[i]
            else:
                as_bytes = data.view(u8).reshape(len(lanes), n)
                for q in range(int(s)):
                    o = np.array([q], u64) if src_off is None else src_off + u64(q)
                    i, idx, _, view = locate_global(c, ins, src, o, 1, 1, ms, "cp.async read")
                    as_bytes[rows, q] = view[i][:, 0]
                a = c.per_lane(c.R[src])[ms]
            count_global(c, ins, a, idx, n, ms)
        return data

    def fn(c: Context, m: Mask) -> None:
        rows, idx, a = locate_shared(c, ins, dst, dst_off, n, m, "cp.async destination")
        count_shared(c, ins, a, idx, n, m)
        lanes = c.lanes_all if idx is None else idx
        if rows.size == 1 and len(lanes) > 1:
            rows = np.broadcast_to(rows, (len(lanes),))
        sizes = np.full(1, n, u32) if size is None else np.minimum(c.R[size], u32(n))
        if sizes.size > 1 and idx is not None:
            sizes = sizes[idx]
        if (sizes == n).all():
            i, _, ga, view = locate_global(c, ins, src, src_off, n, elem, m, "cp.async read")
            count_global(c, ins, ga, idx, n, m)
            data = np.broadcast_to(view[i], (len(lanes), n // elem))
        else:
            data = read_some(c, m, lanes, np.broadcast_to(sizes, (len(lanes),)))
        _issue(c, ins, lanes, rows, n, data)

    return fn
