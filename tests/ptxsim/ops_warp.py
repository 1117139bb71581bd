"""Exchange between the lanes of a warp: shuffles, votes, reductions."""

from __future__ import annotations

import numpy as np

from .context import Context
from .decoder import Decoder, Execute, Mask, opcode, operand_type
from .dtypes import as_numbers, i64, u32, u64
from .parser import Instruction


def _put(c: Context, d: int, v: np.ndarray, m: Mask) -> None:
    if m is None:
        c.R[d] = v
    else:
        c.write_masked(d, v, m)


def _ballot(bits: np.ndarray) -> np.ndarray:
    """[warps, 32] predicates -> one 32-bit word per warp."""
    return (bits.astype(u64) << np.arange(32, dtype=u64)).sum(1).astype(u32)


@opcode("activemask")
def activemask(D: Decoder, ins: Instruction) -> Execute:
    d = D.dst(ins, ins.ops[0], 32)

    def fn(c: Context, m: Mask) -> None:
        active = np.ones(c.L, np.bool_) if m is None else m
        c.write_masked(d, np.repeat(_ballot(active.reshape(c.W, 32)), 32), active)

    return fn


@opcode("elect")
def elect(D: Decoder, ins: Instruction) -> Execute:
    """The lowest lane of the member mask, and whether each lane is this lane."""
    ds, ps = (x.strip() for x in ins.ops[0].split("|"))
    d, p = D.dst(ins, ds, 32), D.dst(ins, ps, 1)
    mask = D.src(ins, ins.ops[1], 32)
    ins.warp_sync = True

    def fn(c: Context, m: Mask) -> None:
        members = c.per_lane(c.R[mask])[:, None] >> np.arange(32, dtype=u32) & u32(1)
        first = np.argmax(members, axis=1).astype(u32)
        lane = np.tile(np.arange(32, dtype=u32), c.W)
        _put(c, d, first, m)
        _put(c, p, lane == first, m)

    return fn


@opcode("shfl")
def shfl(D: Decoder, ins: Instruction) -> Execute:
    mode = ins.mods[1]
    ins.warp_sync = True
    ds, *ps = (x.strip() for x in ins.ops[0].split("|"))
    d = D.dst(ins, ds, 32)
    p = D.dst(ins, ps[0], 1) if ps else None
    a, b, clamp = (D.src(ins, x, 32) for x in ins.ops[1:4])
    lane = np.arange(32, dtype=i64)[None, :]

    def fn(c: Context, m: Mask) -> None:
        R = c.R
        bv, cv = R[b].astype(i64), R[clamp].astype(i64)
        bv = bv.reshape(c.W, 32) if bv.size > 1 else bv[None, :]
        cv = cv.reshape(c.W, 32) if cv.size > 1 else cv[None, :]
        bv, segment, limit = bv & 31, (cv >> 8) & 31, cv & 31
        last = (lane & segment) | (limit & ~segment)
        if mode == "up":
            j = lane - bv
            ok = j >= last
        else:
            if mode == "down":
                j = lane + bv
            elif mode == "bfly":
                j = lane ^ bv
            else:
                j = (lane & segment) | (bv & ~segment)
            ok = j <= last
        x = R[a]
        if x.size > 1:
            j = np.broadcast_to(np.where(ok, j, lane), (c.W, 32))
            x = np.take_along_axis(x.reshape(c.W, 32), j, 1).reshape(-1)
        _put(c, d, x, m)
        if p is not None:
            _put(c, p, np.broadcast_to(ok, (c.W, 32)).reshape(-1).copy(), m)

    return fn


@opcode("vote")
def vote(D: Decoder, ins: Instruction) -> Execute:
    mode = ins.mods[1]
    ins.warp_sync = True
    predicate = ins.ops[1].strip()
    negated = predicate.startswith("!")
    a = D.src(ins, predicate.lstrip("!"), 1)
    mask = D.src(ins, ins.ops[2], 32)
    d = D.dst(ins, ins.ops[0], 32 if mode == "ballot" else 1)

    def fn(c: Context, m: Mask) -> None:
        x = c.per_lane(c.R[a])
        x = (~x if negated else x).reshape(c.W, 32)
        members = ((c.per_lane(c.R[mask]).reshape(c.W, 32) >> np.arange(32, dtype=u32)) & u32(1)).astype(bool)
        active = members if m is None else members & m.reshape(c.W, 32)
        if mode == "ballot":
            r = _ballot(x & active)
        elif mode == "all":
            r = (x | ~active).all(1)
        elif mode == "any":
            r = (x & active).any(1)
        else:
            r = (x | ~active).all(1) | (~x | ~active).all(1)
        _put(c, d, np.repeat(r, 32), m)

    return fn


_REDUCE = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@opcode("redux")
def redux(D: Decoder, ins: Instruction) -> Execute:
    o, T = ins.mods[1], operand_type(ins)
    ins.warp_sync = True
    a, d = D.src(ins, ins.ops[1], 32), D.dst(ins, ins.ops[0], 32)
    reduce = {"min": np.fmin, "max": np.fmax}[o] if T == "f32" else _REDUCE[o]
    numbers = as_numbers(T)

    def fn(c: Context, m: Mask) -> None:
        x = numbers(c.per_lane(c.R[a])).reshape(c.W, 32)
        if m is not None:
            active = m.reshape(c.W, 32)
            if not active[active.any(1)].all():
                raise NotImplementedError("redux.sync on a partial warp")
        _put(c, d, np.repeat(reduce.reduce(x, axis=1, dtype=x.dtype), 32).view(u32), m)

    return fn
