"""Shared memory: bounds, uninitialised reads, races, hazards of asynchronous copies, bank conflicts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .dtypes import UINT, byte_flags, i32, i64, u8, u32, u64
from .errors import AsyncHazard, Misaligned, OutOfBounds, SharedRace, UninitShared
from .parser import Instruction

if TYPE_CHECKING:
    from .context import Context

_MEMO_ENTRIES = 4096  # access patterns whose bank conflicts are remembered


class SharedMemory:
    """Shared memory of one or many CTAs, with shadow state for the checks.

    Args:
        size: bytes of one CTA.
        ncta, nwarps: number of CTAs that live here, and of warps per CTA.
        gran: bytes that one element of the shadow state stands for.
        race: keep which warp read and wrote which bytes since the last barrier.
        uninit: keep which bytes have been written at all.
    """

    def __init__(self, size: int, ncta: int, nwarps: int, gran: int, race: bool, uninit: bool) -> None:
        self.size = size
        self.stride = -(-max(size, 16) // 128) * 128  # from one CTA to the next
        self.mem = np.full(self.stride * ncta, 0xFF, u8)  # a NaN in every float type
        self.gran, self.nwarps = gran, nwarps
        n = self.stride * ncta // gran
        self.init = np.zeros(n, np.bool_) if uninit else None
        self.flight = np.zeros(n, np.bool_)  # where an asynchronous copy will write
        self.nflight = 0
        # A barrier begins a new epoch of its CTA. rd and wr hold the epoch in which each warp last read and wrote.
        self.epoch = np.ones(ncta, i32)
        self.rd = np.zeros((nwarps, n), i32) if race else None
        self.wr = np.zeros((nwarps, n), i32) if race else None
        self._views: dict[tuple[int, int], np.ndarray] = {}

    def view(self, nbytes: int, elem: int) -> np.ndarray:
        """All shared memory as unsigned elem-byte integers [n / nbytes, nbytes / elem]."""
        v = self._views.get((nbytes, elem))
        if v is None:
            v = self._views[nbytes, elem] = self.mem.view(UINT[elem * 8]).reshape(-1, nbytes // elem)
        return v

    def flags(self, state: np.ndarray, nbytes: int) -> tuple[np.ndarray, np.unsignedinteger]:
        """`flight` or `init` as [n / nbytes, words], and the word in which all flags are set."""
        return byte_flags(state, nbytes // self.gran)

    def cells(self, rows: np.ndarray, nbytes: int) -> np.ndarray:
        """[lanes, cells]: the elements of `rd` and `wr` that belong to rows of nbytes."""
        n = nbytes // self.gran
        return rows[:, None] * n + np.arange(n)


def locate_shared(
    c: Context,
    ins: Instruction,
    slot: int,
    off: np.ndarray | None,
    nbytes: int,
    m: np.ndarray | None,
    what: str,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """The checked place of a shared access of nbytes per lane.

    Returns:
        (row in the [n / nbytes, ...] views, lanes or None for all, byte address within the CTA).
    """
    a = c.R[slot]
    if a.dtype == u64:
        a = a.astype(u32)
    if off is not None:
        a = a + off
    idx = None
    base = c.shared_base
    if m is not None:
        idx = c.active_lanes(m)
        if a.size > 1:
            a = a[idx]
        if base.size > 1:
            base = base[idx]
    bits = int(np.bitwise_or.reduce(a))  # the bits set in any lane: no address is larger
    if bits & (nbytes - 1):
        j = int(np.flatnonzero(a & u32(nbytes - 1))[0])
        raise Misaligned(
            f"{what} of {nbytes} bytes at shared address {int(a[j]):#x}",
            ins,
            int(a[j]),
            c.who(c.lane_at(j, idx, a.size)),
        )
    top = bits if bits + nbytes <= c.shared.size else int(a.max())
    if top + nbytes > c.shared.size:
        raise OutOfBounds(
            f"{what} of {nbytes} bytes at shared address {top:#x} (shared memory is {c.shared.size} bytes)",
            ins,
            top,
            c.who(c.lane_at(int(a.argmax()), idx, a.size)),
        )
    return (a + base) >> (nbytes.bit_length() - 1), idx, a


def count_shared(
    c: Context, ins: Instruction, a: np.ndarray, idx: np.ndarray | None, nbytes: int, m: np.ndarray | None
) -> None:
    """Add an access to the instruction's requests, wavefronts and conflicts."""
    if not c.launch.count_traffic:
        return
    st = ins.shared_counts
    if a.size == 1:
        w = c.W if m is None else int(m.reshape(c.W, 32).any(1).sum())
        st[0] += w
        st[1] += w
        return
    size, times = c.L, 1
    if c.ncta > 1:  # mostly all CTAs do the same, so one is counted for all
        first = None if m is None else m[: c.T]
        if m is None or (m.reshape(c.ncta, c.T) == first).all():
            per_cta = a.reshape(c.ncta, -1)
            if (per_cta == per_cta[0]).all():
                a, m, size, times = per_cta[0], first, c.T, c.ncta
                idx = None if idx is None else idx[: a.size]
    memo = c.launch.bank_memo
    key = (nbytes, size, a.tobytes(), None if m is None else m.tobytes())
    r = memo.get(key)
    if r is None:
        if len(memo) > _MEMO_ENTRIES:
            memo.clear()
        A = np.full(size, -1, i64)
        A[... if idx is None else idx] = a
        r = memo[key] = bank_wavefronts(A, nbytes)
    st[0] += r[0] * times
    st[1] += r[1] * times
    st[2] += r[2] * times


def bank_wavefronts(A: np.ndarray, nbytes: int) -> tuple[int, int, int]:
    """(requests, wavefronts, wavefronts beyond the necessary) of one access.

    There are 32 banks of 4 bytes. 8-byte accesses go by half-warps, 16-byte accesses by quarter-warps. Lanes on the
    same word share a wavefront.

    Args:
        A: shared byte address per lane [32 * warps], -1 where the lane is inactive.
        nbytes: bytes of each lane.
    """
    W = A.size // 32
    nwords = max(1, nbytes // 4)
    rows = A.reshape(W * nwords, 32 // nwords)
    word = np.where(rows < 0, -1, rows >> 2)
    if nwords > 1:
        word = np.where(word[:, :, None] < 0, -1, word[:, :, None] + np.arange(nwords)).reshape(len(rows), -1)
    s = np.sort(word, axis=1)
    first = np.ones(s.shape, np.bool_)
    first[:, 1:] = s[:, 1:] != s[:, :-1]
    first &= s >= 0
    r, c = np.nonzero(first)
    per_bank = np.bincount(r * 32 + (s[r, c] & 31), minlength=len(rows) * 32).reshape(len(rows), 32)
    waves = per_bank.max(1)
    requests = int((A.reshape(W, 32) >= 0).any(1).sum())
    return requests, int(waves.sum()), int((waves - (waves > 0)).sum())


def check_shared(
    c: Context,
    ins: Instruction,
    rows: np.ndarray,
    idx: np.ndarray | None,
    nbytes: int,
    changes: np.ndarray | None = None,
) -> None:
    """Check an access for uninitialised reads, cp.async hazards and races.

    Args:
        rows: row of nbytes per lane, or one for all.
        changes: None for a read. For a write, whether the value changes, per lane and element. Rewriting the value
            already there is harmless, and Triton lets replicas of a value do so.
    """
    sm = c.shared
    if sm.nflight:
        flight, _ = sm.flags(sm.flight, nbytes)
        bad = flight[rows] != 0
        if bad.any():
            j = int(np.flatnonzero(bad.any(1))[0])
            address = int(rows[j]) * nbytes % sm.stride
            raise AsyncHazard(
                f"{'read' if changes is None else 'write'} at shared address {address:#x}",
                ins,
                address,
                c.who(c.lane_at(j, idx, len(rows))),
            )
    if sm.init is not None:
        init, every = sm.flags(sm.init, nbytes)
        if changes is not None:
            init[rows] = every
        else:
            good = init[rows] == every
            if not good.all():
                _uninitialised(c, ins, rows, idx, nbytes, good.all(1))
    if sm.rd is not None:
        _check_race(c, ins, rows, idx, nbytes, changes)


def _uninitialised(
    c: Context, ins: Instruction, rows: np.ndarray, idx: np.ndarray | None, nbytes: int, good: np.ndarray
) -> None:
    if c.launch.uninit == "raise":
        j = int(np.flatnonzero(~good)[0])
        address = int(rows[j]) * nbytes % c.shared.stride
        raise UninitShared(f"shared address {address:#x}", ins, address, c.who(c.lane_at(j, idx, len(rows))))
    c.launch.stats.uninit_reads += int(np.count_nonzero(~good))


def _check_race(
    c: Context,
    ins: Instruction,
    rows: np.ndarray,
    idx: np.ndarray | None,
    nbytes: int,
    changes: np.ndarray | None,
) -> None:
    sm = c.shared
    lanes = c.lanes_all if idx is None else idx
    G = sm.cells(rows, nbytes)
    n = G.shape[1]
    if len(rows) == 1 and len(lanes) > 1:  # a uniform address needs one representative per warp
        lanes = lanes[np.unique(lanes // 32, return_index=True)[1]]
        G = np.broadcast_to(G, (len(lanes), n))
    w, epoch = _warp_and_epoch(c, lanes)
    if changes is None:
        bad = _used_by_others(sm, sm.wr, w, G, epoch) & (sm.wr[w, G] != epoch)
        sm.rd[w, G] = epoch
    else:
        bad = _used_by_others(sm, sm.wr, w, G, epoch) | _used_by_others(sm, sm.rd, w, G, epoch)
        bad &= np.repeat(changes, n // changes.shape[1], axis=1) if n > changes.shape[1] else changes
        sm.wr[w, G] = epoch
    if bad.any():
        j = int(np.flatnonzero(bad.any(1))[0])
        address = int(G[j][np.flatnonzero(bad[j])[0]]) * sm.gran % sm.stride
        what = "read of another warp's write" if changes is None else "write after another warp's access"
        raise SharedRace(
            f"{what} at shared address {address:#x} with no barrier between", ins, address, c.who(int(lanes[j]))
        )


def _warp_and_epoch(c: Context, lanes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The warp of each lane and the epoch of its CTA, as columns."""
    return c.warp_of_lane[lanes][:, None], c.shared.epoch[c.cta_of_lane[lanes]][:, None]


def _used_by_others(sm: SharedMemory, use: np.ndarray, w: np.ndarray, G: np.ndarray, epoch: np.ndarray) -> np.ndarray:
    """Whether a warp other than w has read (use = rd) or written (wr) the cells G in this epoch."""
    bad = np.zeros(G.shape, np.bool_)
    for x in range(sm.nwarps):
        bad |= (w != x) & (use[x][G] == epoch)
    return bad


def mark_written(c: Context, lanes: np.ndarray, rows: np.ndarray, nbytes: int) -> None:
    """Note for the race detector that the lanes wrote rows of nbytes (or one row) in this epoch."""
    w, epoch = _warp_and_epoch(c, lanes)
    G = c.shared.cells(rows, nbytes)
    c.shared.wr[w, np.broadcast_to(G, (len(lanes), G.shape[1]))] = epoch


def check_overwrite(c: Context, ins: Instruction, lanes: np.ndarray, rows: np.ndarray, nbytes: int) -> None:
    """An asynchronous copy may not write a place that another copy will write or another warp used in this epoch."""
    sm = c.shared
    if sm.nflight:
        flight, _ = sm.flags(sm.flight, nbytes)
        bad = flight[rows] != 0
        if bad.any():
            j = int(np.flatnonzero(bad.any(1))[0])
            address = int(rows[j]) * nbytes % sm.stride
            raise AsyncHazard("two copies to the same place", ins, address, c.who(int(lanes[j])))
    if sm.rd is None:
        return
    w, epoch = _warp_and_epoch(c, lanes)
    G = sm.cells(rows, nbytes)
    bad = _used_by_others(sm, sm.wr, w, G, epoch) | _used_by_others(sm, sm.rd, w, G, epoch)
    if bad.any():
        j = int(np.flatnonzero(bad.any(1))[0])
        raise SharedRace(
            "cp.async into a place that another warp accessed with no barrier between",
            ins,
            int(rows[j]) * nbytes % sm.stride,
            c.who(int(lanes[j])),
        )


def store_shared(
    c: Context,
    ins: Instruction,
    rows: np.ndarray,
    idx: np.ndarray | None,
    nbytes: int,
    elem: int,
    data: np.ndarray,
) -> None:
    """Write rows of elements, one for each active lane."""
    view = c.shared.view(nbytes, elem)
    check_shared(c, ins, rows, idx, nbytes, view[rows] != data)
    view[rows] = data
    if c.shared.rd is not None:
        lost = view[rows] != data
        if lost.any():
            j = int(np.flatnonzero(lost.any(1))[0])
            raise SharedRace(
                "lanes store different values to one place in the same instruction",
                ins,
                int(rows[j]) * nbytes % c.shared.stride,
                c.who(c.lane_at(j, idx, len(rows))),
            )
