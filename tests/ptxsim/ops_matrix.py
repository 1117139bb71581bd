"""Warp-wide matrices: ldmatrix, stmatrix, and the tensor cores' mma.sync."""

from __future__ import annotations

import functools
import re

import numpy as np

from .context import Context
from .decoder import Decoder, Execute, Mask, opcode, operand_type, unsupported, vector
from .dtypes import f16, f32, f64, i8, i32, i64, u8, u16, u32, u64
from .parser import Instruction
from .shared_memory import check_shared, count_shared, locate_shared, store_shared


class _Rows:
    """The 8x8 matrices of an ldmatrix or stmatrix: lane 8 i + r holds the address of row r of matrix i."""

    def __init__(self, D: Decoder, ins: Instruction, address: str) -> None:
        if "m8n8" not in ins.mods or operand_type(ins) != "b16":
            unsupported(ins)
        self.ins = ins
        self.count = next(int(m[1:]) for m in ins.mods if m in ("x1", "x2", "x4"))
        self.slot, self.off = D.addr(ins, address)
        ins.warp_sync = ins.ismem = True
        ins.shared_counts = [0, 0, 0]

    def locate(self, c: Context, m: Mask) -> tuple[np.ndarray, np.ndarray]:
        """(shared row of 16 bytes, lane) of every matrix row: [active warps * matrices * 8]."""
        first = 8 * self.count
        lanes = c.first_lanes(first)
        if m is not None:
            lanes = lanes & m
        rows, idx, a = locate_shared(c, self.ins, self.slot, self.off, 16, lanes, self.ins.op)
        if rows.size == 1 and len(idx) > 1:
            rows, a = np.broadcast_to(rows, (len(idx),)), np.broadcast_to(a, (len(idx),))
        count_shared(c, self.ins, a, idx, 16, lanes)
        return rows, idx


def _active_warps(c: Context, m: Mask) -> np.ndarray | None:
    """Indices of the participating warps; None for all."""
    return None if m is None else np.flatnonzero(m.reshape(c.W, 32).any(1))


@opcode("ldmatrix")
def ldmatrix(D: Decoder, ins: Instruction) -> Execute:
    rows = _Rows(D, ins, ins.ops[1])
    nm, trans = rows.count, "trans" in ins.mods
    ds = [D.dst(ins, x, 32) for x in vector(ins.ops[0])]

    def fn(c: Context, m: Mask) -> None:
        at, idx = rows.locate(c, m)
        check_shared(c, ins, at, idx, 16)
        if trans:
            x = c.shared.view(16, 2)[at].reshape(-1, nm, 8, 8)
            x = np.ascontiguousarray(x.transpose(1, 0, 3, 2)).view(u32)  # [nm, warps, 8, 4]
        else:
            x = c.shared.view(16, 4)[at].reshape(-1, nm, 8, 4).transpose(1, 0, 2, 3)
        warps = _active_warps(c, m)
        for j, d in enumerate(ds):
            v = np.ascontiguousarray(x[j]).reshape(-1)
            if warps is None:
                c.R[d] = v
            else:
                full = np.zeros((c.W, 32), u32)
                full[warps] = v.reshape(-1, 32)
                c.write_masked(d, full.reshape(-1), m)

    return fn


@opcode("stmatrix")
def stmatrix(D: Decoder, ins: Instruction) -> Execute:
    rows = _Rows(D, ins, ins.ops[0])
    nm, trans = rows.count, "trans" in ins.mods
    ss = [D.src(ins, x, 32) for x in vector(ins.ops[1])]

    def fn(c: Context, m: Mask) -> None:
        at, idx = rows.locate(c, m)
        warps = _active_warps(c, m)
        x = np.stack([c.per_lane(c.R[s]).reshape(c.W, 32) for s in ss], 1)  # [warps, nm, 32]
        if warps is not None:
            x = x[warps]
        x = np.ascontiguousarray(x).reshape(-1, nm, 8, 4)
        if trans:
            x = np.ascontiguousarray(x.view(u16).transpose(0, 1, 3, 2)).view(u32)
        store_shared(c, ins, at, idx, 16, 4, x.reshape(-1, 4))

    return fn


# Shapes (M, N, K) by the type of A, and how many elements a register holds.
_MMA_SHAPES = {
    "f16": [(16, 8, 16), (16, 8, 8)],
    "bf16": [(16, 8, 16), (16, 8, 8)],
    "tf32": [(16, 8, 8), (16, 8, 4)],
    "s8": [(16, 8, 32), (16, 8, 16), (8, 8, 16)],
    "u8": [(16, 8, 32), (16, 8, 16), (8, 8, 16)],
    "f64": [(8, 8, 4)],
}
_PER_REGISTER = {"f16": 2, "bf16": 2, "tf32": 1, "f64": 1, "s8": 4, "u8": 4}
_KEPT_FRAGMENTS = 64
_MMA_TYPES = (*_PER_REGISTER, "f32", "s32", "e4m3", "e5m2")


@functools.cache
def mma_layout(M: int, N: int, K: int, per: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the elements of the fragments lie (PTX manual, matrix fragments of mma.m16n8k*).

    Args:
        per: elements of A and of B in one register.

    Returns:
        Gather tables (A, B, C). The tables of A and B gather dense A [M * K] and B [K * N] from the [lane, element]
        order of a warp's registers. The table of C gathers [lane, element] from dense C [M * N].
    """
    lane = np.arange(32)
    group, t = lane // 4, lane % 4
    na = M * K // 32
    ia = np.empty(M * K, np.int64)
    for e in range(na):
        r, h = divmod(e, per)
        row = group + 8 * (r % 2 if M == 16 else 0)
        col = t * per + h + 4 * per * (r // 2 if M == 16 else r)
        ia[row * K + col] = lane * na + e
    nb = K * N // 32
    ib = np.empty(K * N, np.int64)
    for e in range(nb):
        r, h = divmod(e, per)
        k = t * per + h + 4 * per * r
        ib[k * N + group] = lane * nb + e
    nc = M * N // 32
    ic = np.empty((32, nc), np.int64)
    for e in range(nc):
        ic[:, e] = (group + 8 * (e // 2)) * N + 2 * t + e % 2
    return ia, ib, ic.reshape(-1)


class _Fragment:
    """A or B of an mma: registers of all warps to dense float64 matrices."""

    def __init__(self, D: Decoder, ins: Instruction, operand: str, T: str, table: np.ndarray) -> None:
        self.T, self.table = T, table
        self.container = u64 if T == "f64" else u32
        self.slots = [D.src(ins, x, 64 if T == "f64" else 32) for x in vector(operand)]

    def dense(self, c: Context, rows: int, cols: int) -> np.ndarray:
        """[warps, rows, columns]."""
        registers = [c.R[s] for s in self.slots]
        # Many instructions share a fragment. Register arrays are never changed, only replaced. The identity of an array
        # therefore stands for its contents as long as something (here the entry) keeps the array alive.
        key = (self.T, id(self.table), *map(id, registers))
        known = c.fragments.get(key)
        if known is not None:
            return known[1]
        x = np.empty((c.L, len(registers)), self.container)
        for j, r in enumerate(registers):
            x[:, j] = r
        dense = self._numbers(x, c.W).reshape(c.W, rows, cols)
        if len(c.fragments) >= _KEPT_FRAGMENTS:
            c.fragments.clear()
        c.fragments[key] = registers, dense
        return dense

    def _numbers(self, x: np.ndarray, warps: int) -> np.ndarray:
        T = self.T
        if T in ("f16", "bf16"):
            x = x.view(u16)
        elif T in ("s8", "u8"):
            x = x.view(i8 if T == "s8" else u8)
        x = x.reshape(warps, -1).take(self.table, axis=1)
        if T == "f16":
            return x.view(f16).astype(f64)
        if T == "bf16":
            return (x.astype(u32) << u32(16)).view(f32).astype(f64)
        if T == "tf32":  # the hardware reads only the upper 19 bits
            return (x & u32(0xFFFFE000)).view(f32).astype(f64)
        return x.view(f64) if T == "f64" else x.astype(f64)


@opcode("mma")
def mma(D: Decoder, ins: Instruction) -> Execute:
    mods = ins.mods
    shape = next((m for m in mods if re.match(r"m\d+n\d+k\d+$", m)), None)
    types = [m for m in mods if m in _MMA_TYPES]
    if shape is None or len(types) != 4 or "sp" in mods or "sparse" in mods or mods[3:5] != ["row", "col"]:
        unsupported(ins)
    M, N, K = map(int, re.findall(r"\d+", shape))
    tD, tA, tB, tC = types
    if (M, N, K) not in _MMA_SHAPES.get(tA, []) or tC != tD:
        unsupported(ins)
    ins.warp_sync = True
    ins.mma = 2 * M * N * K
    ia, ib, ic = mma_layout(M, N, K, _PER_REGISTER[tA])
    a, b = _Fragment(D, ins, ins.ops[1], tA, ia), _Fragment(D, ins, ins.ops[2], tB, ib)
    cb = 64 if tD == "f64" else 32
    ds = [D.dst(ins, x, cb) for x in vector(ins.ops[0])]
    sc = [D.src(ins, x, cb) for x in vector(ins.ops[3])]
    add = _ADD_C[tD]
    clamp = "satfinite" in mods
    n = M * N // 32

    def fn(c: Context, m: Mask) -> None:
        P = np.matmul(a.dense(c, M, K), b.dense(c, K, N)).reshape(c.W, M * N).take(ic, axis=1)
        columns = add(c, P.reshape(c.L, n), sc, clamp)
        for d, v in zip(ds, columns, strict=True):
            if m is None:
                c.R[d] = v
            else:
                c.write_masked(d, v, m)

    return fn


# D = P + C, from the float64 products P [lanes, elements] and the registers of C to the registers of D.


def _add_f16(c: Context, P: np.ndarray, sc: list[int], clamp: bool) -> list[np.ndarray]:
    x = np.empty((c.L, len(sc)), u32)
    for j, s in enumerate(sc):
        x[:, j] = c.R[s]
    r = np.ascontiguousarray((P + x.view(f16).astype(f64)).astype(f32).astype(f16)).view(u32)
    return [np.ascontiguousarray(r[:, j]) for j in range(r.shape[1])]


def _add_f32(c: Context, P: np.ndarray, sc: list[int], clamp: bool) -> list[np.ndarray]:
    P = np.ascontiguousarray(P.T)
    return [(P[j] + c.R[s].view(f32)).astype(f32).view(u32) for j, s in enumerate(sc)]


def _add_f64(c: Context, P: np.ndarray, sc: list[int], clamp: bool) -> list[np.ndarray]:
    P = np.ascontiguousarray(P.T)
    return [(P[j] + c.R[s].view(f64)).view(u64) for j, s in enumerate(sc)]


def _add_s32(c: Context, P: np.ndarray, sc: list[int], clamp: bool) -> list[np.ndarray]:
    P = np.ascontiguousarray(P.T).astype(i64)
    columns = [P[j] + c.R[s].view(i32) for j, s in enumerate(sc)]
    return [(np.clip(v, -(2**31), 2**31 - 1) if clamp else v).astype(u32) for v in columns]


_ADD_C = {"f16": _add_f16, "f32": _add_f32, "f64": _add_f64, "s32": _add_s32}
