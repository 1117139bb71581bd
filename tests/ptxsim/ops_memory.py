"""Loads and stores: parameters, global, shared and local memory."""

from __future__ import annotations

import re

import numpy as np

from .context import Context
from .decoder import Decoder, Execute, Mask, opcode, operand_type, unsupported, vector
from .dtypes import BITS, SINT, UINT, i64, u64
from .errors import Misaligned, OutOfBounds
from .global_memory import count_global, locate_global, note_writes
from .parser import GBASE, PARAM_BASE, Instruction
from .shared_memory import check_shared, count_shared, locate_shared, store_shared


def state_space(ins: Instruction) -> str | None:
    """The memory an instruction names; None for generic addresses."""
    for m in ins.mods:
        s = m.split("::")[0]
        if s in ("global", "shared", "local", "param", "const"):
            return s
    return None


def vector_length(ins: Instruction) -> int:
    return next((int(m[1:]) for m in ins.mods if m in ("v2", "v4", "v8")), 1)


class _Load:
    """The part that all loads share: destinations, and the extension of an element to its register."""

    def __init__(self, D: Decoder, ins: Instruction) -> None:
        self.T, self.v = operand_type(ins), vector_length(ins)
        self.b = BITS[self.T]
        self.ds = [D.dst(ins, x, self.b) for x in vector(ins.ops[0])]
        self.register_bits = [D.bits[d] for d in self.ds]
        self.es = self.b // 8
        self.n = self.es * self.v

    def widen(self, column: np.ndarray, bits: int) -> np.ndarray:
        if bits == self.b:
            return column
        if self.T[0] == "s":
            return column.view(SINT[self.b]).astype(SINT[bits]).view(UINT[bits])
        return column.astype(UINT[bits])

    def deliver(self, c: Context, data: np.ndarray, idx: np.ndarray | None) -> None:
        """Write rows of elements, one per lane or one for all lanes, to the destination registers."""
        columns = np.ascontiguousarray(data.T)
        for column, d, bits in zip(columns, self.ds, self.register_bits, strict=True):
            value = self.widen(column, bits)
            if idx is None:
                c.R[d] = value
            else:
                c.scatter(d, value, idx)


@opcode("ld", "ldu")
def ld(D: Decoder, ins: Instruction) -> Execute:
    space = state_space(ins)
    load = _Load(D, ins)
    if space == "param":
        return _load_param(D, ins, load)
    slot, off = D.addr(ins, ins.ops[1])
    ins.ismem = True
    if space in ("global", "const"):
        return _load_global(ins, load, slot, off)
    if space == "shared":
        return _load_shared(ins, load, slot, off)
    if space == "local":
        return _load_local(ins, load, slot, off)
    if space is None:
        return _load_generic(ins, load, slot, off)
    unsupported(ins)


def _load_param(D: Decoder, ins: Instruction, load: _Load) -> Execute:
    """A parameter by name is the same for all lanes, and sits in a slot of its own."""
    m = re.match(r"\[\s*([\w$]+)\s*(?:\+\s*(\d+))?\s*\]", ins.ops[1])
    if not m or m.group(1) not in D.mod.param_addr:
        return _load_param_at(ins, load, *D.addr(ins, ins.ops[1]))
    first = D.mod.param_addr[m.group(1)] + int(m.group(2) or 0)
    signed = load.T[0] == "s"
    ss = [D.param(first + i * load.es, bits, load.b, signed) for i, bits in enumerate(load.register_bits)]

    def fn(c: Context, m: Mask) -> None:
        for d, s in zip(load.ds, ss, strict=True):
            if m is None:
                c.R[d] = c.R[s]
            else:
                c.write_masked(d, c.R[s], m)

    return fn


def _load_param_at(ins: Instruction, load: _Load, slot: int, off: np.ndarray | None) -> Execute:
    """Load a parameter by its address. Triton chooses among the members of a tuple at run time in this way."""
    n, t = load.n, UINT[load.b]

    def fn(c: Context, m: Mask) -> None:
        a = c.R[slot]
        if off is not None:
            a = a + off
        idx = None
        if m is not None:
            idx = c.active_lanes(m)
            if a.size > 1:
                a = a[idx]
        bad = (a & u64(n - 1)) != 0
        if bad.any():
            j = int(np.flatnonzero(bad)[0])
            who = c.who(c.lane_at(j, idx, a.size))
            raise Misaligned(f"load of {n} bytes from parameters at {int(a[j]):#x}", ins, int(a[j]), who)
        image = c.launch.parameters
        i = a - u64(PARAM_BASE)
        bad = i >= u64(max(0, len(image) - n + 1))
        if bad.any():
            j = int(np.flatnonzero(bad)[0])
            who = c.who(c.lane_at(j, idx, a.size))
            what = f"load of {n} bytes at {int(a[j]):#x}, which is not in the {len(image)} bytes of the parameters"
            raise OutOfBounds(what, ins, int(a[j]), who)
        elements = image[i.astype(i64)[:, None] + np.arange(n)].view(t)
        load.deliver(c, elements, idx)

    return fn


def _load_generic(ins: Instruction, load: _Load, slot: int, off: np.ndarray | None) -> Execute:
    """A generic address shows its space, which is the space of parameters or global memory."""
    from_param = _load_param_at(ins, load, slot, off)
    from_global = _load_global(ins, load, slot, off)

    def fn(c: Context, m: Mask) -> None:
        a = c.R[slot]
        if m is not None and a.size > 1:
            a = a[m]
        if (a >= u64(GBASE)).all():
            from_global(c, m)
        elif ((a >= u64(PARAM_BASE)) & (a < u64(GBASE))).all():
            from_param(c, m)
        else:
            unsupported(ins, "(generic address of shared or local memory, or of several spaces) ")

    return fn


def _load_global(ins: Instruction, load: _Load, slot: int, off: np.ndarray | None) -> Execute:
    n, es = load.n, load.es
    ins.global_counts = [0, 0, 0, 0]

    def fn(c: Context, m: Mask) -> None:
        i, idx, a, view = locate_global(c, ins, slot, off, n, es, m, "load")
        data = view[i]
        count_global(c, ins, a, idx, n, m)
        load.deliver(c, data, idx)

    return fn


def _load_shared(ins: Instruction, load: _Load, slot: int, off: np.ndarray | None) -> Execute:
    n, es = load.n, load.es
    ins.shared_counts = [0, 0, 0]

    def fn(c: Context, m: Mask) -> None:
        rows, idx, a = locate_shared(c, ins, slot, off, n, m, "load")
        check_shared(c, ins, rows, idx, n)
        data = c.shared.view(n, es)[rows]
        count_shared(c, ins, a, idx, n, m)
        load.deliver(c, data, idx)

    return fn


def _load_local(ins: Instruction, load: _Load, slot: int, off: np.ndarray | None) -> Execute:
    def fn(c: Context, m: Mask) -> None:
        A = _local(c, ins, slot, off, load.n, m)
        for j, d in enumerate(load.ds):
            column = load.widen(c.lmem.view(UINT[load.b])[A // load.es + j], load.register_bits[j])
            if m is None:
                c.R[d] = column
            else:
                c.write_masked(d, column, m)

    return fn


def _local(c: Context, ins: Instruction, slot: int, off: np.ndarray | None, n: int, m: Mask) -> np.ndarray:
    """Byte addresses in the local memory of each lane; an inactive lane gets its base address."""
    a = c.R[slot]
    if off is not None:
        a = a + off
    a = a.astype(i64)
    if m is not None:
        a = np.where(m, a, 0)
    if (a & (n - 1)).any():
        raise Misaligned("local access", ins)
    if (a < 0).any() or (a + n > c.lstride).any():
        raise OutOfBounds("local memory", ins)
    return c.lanes_all * c.lstride + a


class _Store:
    """The part that all stores share: sources, as rows of elements."""

    def __init__(self, D: Decoder, ins: Instruction) -> None:
        b = BITS[operand_type(ins)]
        self.es, self.v, self.t = b // 8, vector_length(ins), UINT[b]
        self.n = self.es * self.v
        self.ss = [D.src(ins, x, b) for x in vector(ins.ops[1])]

    def rows(self, c: Context, idx: np.ndarray | None) -> np.ndarray:
        """[active lanes, elements]."""
        out = np.empty((c.L if idx is None else len(idx), self.v), self.t)
        for j, s in enumerate(self.ss):
            x = c.R[s]
            if idx is not None and x.size > 1:
                x = x[idx]
            out[:, j] = x if x.dtype == self.t else x.astype(self.t)
        return out


@opcode("st")
def st(D: Decoder, ins: Instruction) -> Execute:
    space = state_space(ins)
    if space == "param":  # arguments of a call, which this model does not need
        return lambda c, m: None
    store = _Store(D, ins)
    slot, off = D.addr(ins, ins.ops[0])
    ins.ismem = True
    if space == "global":
        return _store_global(ins, store, slot, off)
    if space == "shared":
        return _store_shared(ins, store, slot, off)
    if space == "local":
        return _store_local(ins, store, slot, off)
    unsupported(ins, "(generic address) " if space is None else "")


def _store_global(ins: Instruction, store: _Store, slot: int, off: np.ndarray | None) -> Execute:
    n, es = store.n, store.es
    ins.global_counts = [0, 0, 0, 0]

    def fn(c: Context, m: Mask) -> None:
        i, idx, a, view = locate_global(c, ins, slot, off, n, es, m, "store")
        count_global(c, ins, a, idx, n, m)
        data = store.rows(c, idx)
        if i.size == 1 and len(data) > 1:
            i = np.broadcast_to(i, (len(data),))
        if c.launch.writers is None:
            view[i] = data
        else:
            note_writes(c, ins, i, idx, n, data, view)
            view[i] = data
            note_writes(c, ins, i, idx, n, data, view)  # noted again for CTAs that store in this very step

    return fn


def _store_shared(ins: Instruction, store: _Store, slot: int, off: np.ndarray | None) -> Execute:
    n, es = store.n, store.es
    ins.shared_counts = [0, 0, 0]

    def fn(c: Context, m: Mask) -> None:
        rows, idx, a = locate_shared(c, ins, slot, off, n, m, "store")
        count_shared(c, ins, a, idx, n, m)
        data = store.rows(c, idx)
        if rows.size == 1 and len(data) > 1:
            rows = np.broadcast_to(rows, (len(data),))
        store_shared(c, ins, rows, idx, n, es, data)

    return fn


def _store_local(ins: Instruction, store: _Store, slot: int, off: np.ndarray | None) -> Execute:
    def fn(c: Context, m: Mask) -> None:
        row = _local(c, ins, slot, off, store.n, m) // store.es
        data = store.rows(c, None)
        mem = c.lmem.view(store.t)
        for j in range(store.v):
            if m is None:
                mem[row + j] = data[:, j]
            else:
                mem[(row + j)[m]] = data[m, j]

    return fn
