"""A step by several threads: OpenMP's team, the one that torch's own operations use, so that no threads compete.

Each thread runs the whole step and computes its own rows of each weight, in the forward and in the backward pass. So
these stay in the cache of its core. Between the layers the threads wait for each other.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .layout import BARRIER, TEAM
from .pointers import part

#: Rows of a weight that are not divided among threads: tiles are whole, so that threads round as one thread does.
TILE_ROWS = 16

_BYTES, _INT32, _INT64 = ir.IntType(8).as_pointer(), ir.IntType(32), ir.IntType(64)


@intrinsic
def start(typingctx: Any, address: Any, threads: Any, unit: Any, argument: Any) -> Any:
    """Call the unit, with the argument twice, in each of so many threads, by OpenMP's function at the address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pair = ir.LiteralStructType([_INT64, args[3].type])
        kind = ir.FunctionType(ir.VoidType(), [_BYTES])
        in_thread = ir.Function(builder.module, kind, builder.module.get_unique_name("in_thread"))
        in_thread.linkage = "internal"
        body = ir.IRBuilder(in_thread.append_basic_block())
        work = body.load(body.bitcast(in_thread.args[0], pair.as_pointer()))
        given = body.extract_value(work, 1)
        places = [body.alloca(ir.DoubleType()), body.alloca(_BYTES), given, given]
        of_unit = ir.FunctionType(_INT32, [place.type for place in places])
        body.call(body.inttoptr(body.extract_value(work, 0), of_unit.as_pointer()), places)
        body.ret_void()

        work = cgutils.alloca_once(builder, pair)
        for i in range(2):
            builder.store(args[2 + i], cgutils.gep_inbounds(builder, work, 0, i))
        of_openmp = ir.FunctionType(ir.VoidType(), [kind.as_pointer(), _BYTES, _INT32, _INT32])
        begin, no_flags = builder.inttoptr(args[0], of_openmp.as_pointer()), ir.Constant(_INT32, 0)
        count = builder.trunc(args[1], _INT32)
        builder.call(begin, [in_thread, builder.bitcast(work, _BYTES), count, no_flags])
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64, argument), generate


@intrinsic
def ask(typingctx: Any, address: Any) -> Any:
    """What OpenMP's function at the address returns."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = builder.inttoptr(args[0], ir.FunctionType(_INT32, []).as_pointer())
        return builder.sext(builder.call(function, []), _INT64)

    return types.int64(types.int64), generate


@intrinsic
def _meet(typingctx: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.call(builder.inttoptr(args[0], ir.FunctionType(ir.VoidType(), []).as_pointer()), [])
        return context.get_dummy_value()

    return types.none(types.int64), generate


@part
def wait(net: Any, threads: int) -> None:
    """Go on when all threads are here, with what they wrote."""
    if threads > 1:
        _meet(net[TEAM + BARRIER])


@part
def span(n: int, unit: int, thread: int, threads: int) -> tuple[int, int]:
    """(first, count) of the thread's part of n elements: as many whole units for each thread as are needed."""
    each = (n + unit * threads - 1) // (unit * threads) * unit
    first = min(n, thread * each)
    return first, min(each, n - first)
