"""Atomic read-modify-write on global and shared memory (atom, red)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .context import Context
from .decoder import Decoder, Execute, Mask, opcode, operand_type, unsupported, vector
from .dtypes import BITS, UINT, as_bits, as_numbers, u16, u32
from .global_memory import count_global, locate_global
from .ops_memory import state_space, vector_length
from .parser import Instruction
from .shared_memory import check_shared, count_shared, locate_shared, mark_written

_KINDS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")

Update = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def _update(ins: Instruction, kind: str, T: str) -> Update:
    """f(old, x, y) -> new, all in bits. A cas compares x, and y is its new value."""
    t = UINT[BITS[T]]
    if kind == "exch":
        return lambda old, x, y: x
    if kind == "cas":
        return lambda old, x, y: np.where(old == x, y, old)
    if kind in ("and", "or", "xor"):
        logic = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[kind]
        return lambda old, x, y: logic(old, x)
    if kind == "inc":
        return lambda old, x, y: np.where(old >= x, t(0), old + t(1))
    if kind == "dec":
        return lambda old, x, y: np.where((old == 0) | (old > x), x, old - t(1))
    if T in ("f16x2", "bf16x2"):
        if kind != "add":
            unsupported(ins)
        half, bits = as_numbers(T[:-2]), as_bits(T[:-2])

        def add_half(old: np.ndarray, x: np.ndarray, shift: int) -> np.ndarray:
            a, b = (half((z >> u32(shift)).astype(u16)) for z in (old, x))
            return bits(a + b).astype(u32) << u32(shift)

        return lambda old, x, y: add_half(old, x, 0) | add_half(old, x, 16)
    numbers, bits = as_numbers(T), as_bits(T)
    combine = {"add": np.add, "min": np.minimum, "max": np.maximum}[kind]
    return lambda old, x, y: bits(np.asarray(combine(numbers(old), numbers(x))))


def _check_shared_atomic(c: Context, ins: Instruction, rows: np.ndarray, idx: np.ndarray | None, n: int) -> None:
    """Atomics do not race with each other, but they race with a later plain read by another warp."""
    sm = c.shared
    if sm.nflight or sm.init is not None:
        rd, sm.rd = sm.rd, None
        check_shared(c, ins, rows, idx, n)
        sm.rd = rd
    if sm.wr is not None:
        mark_written(c, c.lanes_all if idx is None else idx, rows, n)


@opcode("atom", "red")
def atomic(D: Decoder, ins: Instruction) -> Execute:
    space, T, v = state_space(ins), operand_type(ins), vector_length(ins)
    kind = next((m for m in ins.mods if m in _KINDS), None)
    if space not in ("global", "shared") or kind is None or (space == "shared" and v > 1):
        unsupported(ins)
    b = BITS[T]
    es, t = b // 8, UINT[b]
    n = es * v
    operands = list(ins.ops)
    ds = [] if ins.op == "red" else [D.dst(ins, x, b) for x in vector(operands.pop(0))]
    slot, off = D.addr(ins, operands[0])
    values = [D.src(ins, x, b) for x in vector(operands[1])]
    new_value = D.src(ins, operands[2], b) if kind == "cas" else None
    update = _update(ins, kind, T)
    ins.ismem = True
    if space == "global":
        ins.global_counts = [0, 0, 0, 0]
    else:
        ins.shared_counts = [0, 0, 0]

    def fn(c: Context, m: Mask) -> None:
        if space == "global":
            i, idx, a, view = locate_global(c, ins, slot, off, n, es, m, "atomic")
            count_global(c, ins, a, idx, n, m)
        else:
            i, idx, a = locate_shared(c, ins, slot, off, n, m, "atomic")
            count_shared(c, ins, a, idx, n, m)
            _check_shared_atomic(c, ins, i, idx, n)
            view = c.shared.view(n, es)
        count = c.L if idx is None else len(idx)
        c.launch.stats.atomics += count
        if i.size == 1 and count > 1:
            i = np.broadcast_to(i, (count,))

        def pick(s: int) -> np.ndarray:
            x = c.R[s]
            if x.size == 1:
                return np.full(count, x[0], t)
            return (x if idx is None else x[idx]).astype(t)

        xs = np.stack([pick(s) for s in values], 1)
        ys = xs if new_value is None else pick(new_value)[:, None]
        out = np.empty((count, v), t)
        # Lanes that hit one place go in random order when the launch asks for it, else in the order of lanes.
        order = c.launch.rng.permutation(count) if c.launch.shuffle_atomics else np.arange(count)
        order = order[np.argsort(i[order], kind="stable")]
        place = i[order]
        start = np.flatnonzero(np.concatenate([[True], place[1:] != place[:-1]]))
        length = np.diff(np.append(start, count))
        for r in range(int(length.max())):  # round r: the r-th access to every place
            sel = order[start[length > r] + r]
            old = view[i[sel]]
            out[sel] = old
            new = update(old.reshape(-1), xs[sel].reshape(-1), ys[sel].reshape(-1))
            view[i[sel]] = new.reshape(old.shape)
        for j, d in enumerate(ds):
            column = np.ascontiguousarray(out[:, j])
            if D.bits[d] != b:
                column = column.astype(UINT[D.bits[d]])
            if idx is None:
                c.R[d] = column
            else:
                c.scatter(d, column, idx)

    return fn
