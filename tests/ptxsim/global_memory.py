"""Global memory: the arguments of a launch in one arena with red zones, the checks of bounds, and traffic counts."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .dtypes import UINT, byte_flags, i64, u8, u64
from .errors import EarlyAccess, Misaligned, OutOfBounds, SharedRace
from .parser import GBASE, REDZONE, Instruction

if TYPE_CHECKING:
    from .context import Context

NO_LANE = u64(0xFFFFFFFFFFFFFFFF)


def host_bytes(address: int, n: int) -> np.ndarray:
    """The n bytes of this process at `address`, writable."""
    return np.frombuffer((ctypes.c_uint8 * n).from_address(address), u8) if n else np.zeros(0, u8)


class Buffer:
    """A tensor or array argument: its storage block and the strided bytes that it may touch."""

    def __init__(self, obj: Any, name: str) -> None:
        self.name, self.dtype = name, obj.dtype
        if isinstance(obj, np.ndarray):
            self.item, self.shape, self.strides = obj.itemsize, obj.shape, obj.strides
            self.ptr = obj.__array_interface__["data"][0]
            base = obj
            while isinstance(base.base, np.ndarray):
                base = base.base
            address = base.__array_interface__["data"][0]
            reach = [(d - 1) * s for d, s in zip(base.shape, base.strides, strict=True)]
            self.lo = address + sum(min(0, r) for r in reach)
            self.hi = address + sum(max(0, r) for r in reach) + self.item if base.size else self.lo
        else:
            if obj.device.type != "cpu":
                raise ValueError(f"{name or 'a tensor'} is on {obj.device}: pass tensors on the CPU")
            self.item, self.shape = obj.element_size(), tuple(obj.shape)
            self.strides = tuple(s * self.item for s in obj.stride())
            self.ptr = obj.data_ptr()
            storage = obj.untyped_storage()
            self.lo, self.hi = storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def is_buffer(x: Any) -> bool:
    """Whether `x` is passed as a pointer: a numpy array or a torch tensor."""
    return isinstance(x, np.ndarray) or (hasattr(x, "data_ptr") and hasattr(x, "untyped_storage"))


class GlobalMemory:
    """One flat arena; every storage has red zones on both sides.

    Storages begin at multiples of 512 bytes, as a device allocates them. Host storage that is not even 16-byte
    aligned keeps its address modulo 16, because Triton has specialised the kernel on that.

    Args:
        image: initial contents of the module's own variables.
        buffers: (name, tensor or array) of every pointer argument; arguments that share storage overlap here too.
        scratch: bytes of scratch memory to add, or 0.
        strict: admit only the elements of a strided view, not the whole of its storage.
    """

    def __init__(self, image: bytes | bytearray, buffers: list[tuple[str, Any]], scratch: int, strict: bool) -> None:
        args = [Buffer(o, n) for n, o in buffers]
        blocks: list[list[int]] = []  # merged host ranges
        for lo, hi in sorted({(a.lo, a.hi) for a in args}):
            if blocks and lo < blocks[-1][1]:
                blocks[-1][1] = max(hi, blocks[-1][1])
            else:
                blocks.append([lo, hi])
        pos = REDZONE + len(image)
        self.blocks: list[tuple[int, int, int]] = []  # (host lo, host hi, arena offset)
        for lo, hi in blocks:
            pos = -(-(pos + REDZONE) // 512) * 512 + lo % 16
            self.blocks.append((lo, hi, pos))
            pos += hi - lo
        self.scratch = None  # arena offset
        if scratch:
            self.scratch = -(-(pos + REDZONE) // 512) * 512
            pos = self.scratch + scratch
        n = -(-(pos + REDZONE) // 4096) * 4096
        self.mem = np.full(n, 0xCD, u8)
        self._valid = np.zeros(n, np.bool_)
        self.mem[REDZONE : REDZONE + len(image)] = np.frombuffer(bytes(image), u8)
        self._valid[REDZONE : REDZONE + len(image)] = True
        if scratch:
            self._valid[self.scratch : pos] = True
        self.addr: dict[str, int] = {}
        self.regions: list[tuple[int, int, Buffer]] = []
        for a in args:
            self._place(a, strict)
        for lo, hi, off in self.blocks:
            self.mem[off : off + hi - lo] = host_bytes(lo, hi - lo)
        self._views: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self._ok: dict[int, np.ndarray] = {}

    def _place(self, a: Buffer, strict: bool) -> None:
        """Give a buffer its address and mark the bytes that it may touch."""
        if a.hi == a.lo:
            self.addr[a.name] = GBASE + REDZONE + a.ptr - a.lo
            return
        lo, hi, off = next(b for b in self.blocks if b[0] <= a.lo < b[1])
        start = off + a.ptr - lo
        self.addr[a.name] = GBASE + start
        if 0 in a.shape:
            return
        if strict:
            if any(s < 0 for s in a.strides):
                raise NotImplementedError("negative strides")
            touched = np.lib.stride_tricks.as_strided(self._valid[start:], (*a.shape, a.item), (*a.strides, 1))
            touched[...] = True
        else:
            self._valid[off : off + hi - lo] = True
        extent = sum((d - 1) * s for d, s in zip(a.shape, a.strides, strict=True)) + a.item
        self.regions.append((start, start + extent, a))

    def view(self, nbytes: int, elem: int) -> tuple[np.ndarray, np.ndarray]:
        """The arena as unsigned elem-byte integers [n / nbytes, nbytes / elem], and which rows may be touched."""
        found = self._views.get((nbytes, elem))
        if found is None:
            if nbytes not in self._ok:
                words, full = byte_flags(self._valid, nbytes)
                self._ok[nbytes] = np.logical_and.reduce([column == full for column in words.T])
            view = self.mem.view(UINT[elem * 8]).reshape(-1, nbytes // elem)
            found = self._views[nbytes, elem] = view, self._ok[nbytes]
        return found

    def write_back(self) -> None:
        """Copy the changed bytes to the tensors and arrays of the caller."""
        for lo, hi, off in self.blocks:
            new, host = self.mem[off : off + hi - lo], host_bytes(lo, hi - lo)
            changed = new != host
            if changed.any():
                host[changed] = new[changed]

    def written(self, writers: Mapping[int, np.ndarray]) -> dict[str, np.ndarray]:
        """The written bytes of each argument that was stored to, as noted by ``note_writes``."""
        stored = np.zeros(self.mem.size, np.bool_)
        for nbytes, last in writers.items():
            stored |= np.repeat(last != 0, nbytes)
        return {a.name: stored[start:end] for start, end, a in self.regions if stored[start:end].any()}

    def describe(self, address: int) -> str:
        """Where an address lies relative to the nearest argument."""
        off = int(address) - GBASE
        best = None
        for s, e, a in self.regions:
            d = 0 if s <= off < e else min(abs(off - s), abs(off - e + 1))
            if best is None or d < best[0]:
                best = (d, s, e, a)
        if best is None:
            return "no registered buffer"
        d, s, e, a = best
        if d == 0:
            return (
                f"inside the extent of {a.name!r} (shape {a.shape}, byte offset {off - s}) but at bytes that its "
                f"strides skip, or running past its end"
            )
        side = f"{s - off} bytes before the start" if off < s else f"{off - e} bytes past the end"
        return f"{side} of {a.name!r} (shape {a.shape}, {e - s} bytes)"


def locate_global(
    c: Context,
    ins: Instruction,
    slot: int,
    off: np.ndarray | None,
    nbytes: int,
    elem: int,
    m: np.ndarray | None,
    what: str,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray]:
    """The checked place of a global access of nbytes per lane.

    Returns:
        (row in the [n, nbytes / elem] view, lanes or None for all, addresses, view); rows and addresses have one
        element when the address is uniform.
    """
    a = c.R[slot]
    if off is not None:
        a = a + off
    idx = None
    if m is not None:
        idx = c.active_lanes(m)
        if a.size > 1:
            a = a[idx]
    if c.waits and not (waited := c.waited if idx is None else c.waited[idx]).all():
        j = int(np.flatnonzero(~waited)[0])
        lane = j if idx is None else int(idx[j])
        raise EarlyAccess(f"{what} of {nbytes} bytes", ins, int(a[j if a.size > 1 else 0]), c.who(lane))
    view, ok = c.launch.global_memory.view(nbytes, elem)
    i = a - u64(GBASE)
    bits = int(np.bitwise_or.reduce(i))  # the bits set in any lane: no address is larger
    if bits & (nbytes - 1):
        j = int(np.flatnonzero(a & u64(nbytes - 1))[0])
        raise Misaligned(
            f"{what} of {nbytes} bytes at {int(a[j]):#x}", ins, int(a[j]), c.who(c.lane_at(j, idx, a.size))
        )
    if bits >= c.launch.global_memory.mem.size and int(i.max()) >= c.launch.global_memory.mem.size:
        _out_of_bounds(c, ins, a, int(i.argmax()), idx, nbytes, what)
    i = (i >> u64(nbytes.bit_length() - 1)).view(i64)
    good = ok[i]
    if not good.all():
        _out_of_bounds(c, ins, a, int(np.flatnonzero(~good)[0]), idx, nbytes, what)
    return i, idx, a, view


def _out_of_bounds(
    c: Context, ins: Instruction, a: np.ndarray, j: int, idx: np.ndarray | None, nbytes: int, what: str
) -> None:
    raise OutOfBounds(
        f"{what} of {nbytes} bytes at {int(a[j]):#x}: {c.launch.global_memory.describe(a[j])}",
        ins,
        int(a[j]),
        c.who(c.lane_at(j, idx, a.size)),
    )


def count_global(
    c: Context, ins: Instruction, a: np.ndarray, idx: np.ndarray | None, nbytes: int, m: np.ndarray | None
) -> None:
    """Add an access to the instruction's requests, 32-byte sectors, minimal sectors and bytes."""
    if not c.launch.count_traffic:
        return
    st = ins.global_counts
    if a.size == 1:
        w = c.W if m is None else int(m.reshape(c.W, 32).any(1).sum())
        st[0] += w
        st[1] += w
        st[2] += w
        st[3] += w * nbytes
        return
    if idx is None:
        s = np.sort(a.reshape(c.W, 32), axis=1)
        n = 1 + np.count_nonzero(s[:, 1:] != s[:, :-1], axis=1)
        s >>= u64(5)
        sectors = c.W + np.count_nonzero(s[:, 1:] != s[:, :-1])
        st[0] += c.W
    else:
        full = np.full(c.L, NO_LANE, u64)
        full[idx] = a
        s = full.reshape(c.W, 32)
        s = np.sort(s[s.min(1) != NO_LANE], axis=1)
        valid = s != NO_LANE
        n = 1 + np.count_nonzero((s[:, 1:] != s[:, :-1]) & valid[:, 1:], axis=1)
        s >>= u64(5)
        sectors = len(s) + np.count_nonzero((s[:, 1:] != s[:, :-1]) & valid[:, 1:])
        st[0] += len(s)
    b = n * nbytes  # distinct bytes requested per warp
    st[1] += int(sectors)
    st[2] += int(((b + 31) // 32).sum())
    st[3] += int(b.sum())


def note_writes(
    c: Context,
    ins: Instruction,
    i: np.ndarray,
    idx: np.ndarray | None,
    nbytes: int,
    data: np.ndarray,
    view: np.ndarray,
) -> None:
    """For `global_races`: report CTAs that store different values to one place. No order between CTAs is assumed."""
    lanes = c.lanes_all if idx is None else idx
    cta = c.ctas[c.cta_of_lane[lanes]] + 1
    own = c.launch.writers.get(nbytes)
    if own is None:
        own = c.launch.writers[nbytes] = np.zeros(len(view), i64)
    prev = own[i]
    bad = (prev != 0) & (prev != cta) & (view[i] != data).any(1)
    if bad.any():
        j = int(np.flatnonzero(bad)[0])
        address = GBASE + int(i[j]) * nbytes
        place = c.launch.global_memory.describe(address)
        raise SharedRace(
            f"two CTAs store different values to one global place ({place})", ins, address, c.who(int(lanes[j]))
        )
    own[i] = cta
