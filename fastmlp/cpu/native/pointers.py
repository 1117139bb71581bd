"""What the compiled code does with addresses, and the decorators of its functions.

A unit of machine code is one function, compiled and kept by itself (``machine_code``). Units call each other by
addresses that the description of the network has. So a step needs only the units of its own activations, loss and
optimizer, and no function is optimized again within each of its callers.

The compiled code works on bare pointers (numba's ``CPointer``), which are indexed like arrays. Nothing in the code
allocates, raises or touches a Python object, so that its machine code needs nothing of numba at run time.

Results below the smallest normal number are 0 on x86 processors (``FLUSHES``), where each operation on such a number
takes some 150 cycles. Momenta of units that are never active shrink to such numbers after some hundred steps, and would
stay there. Where this happens to a third of a network's weights, a step takes ten times as long.

Sums are never reordered, so results do not depend on what LLVM finds profitable. Only a multiplication and an addition
may become one fused operation ("contract").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

#: Bytes of the vectors that the code computes with.
VECTOR_BYTES = 32

#: The settings of ``float_control`` that make operands and results below the smallest normal number 0.
FLUSHES = 0x8040

#: Options of all functions. A function of a unit of machine code has no use for wrappers that Python or C could call.
OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"contract"},
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}
#: A function that is compiled into the unit that calls it.
part = numba.njit(**OPTIONS)
#: A function whose text takes the place of its call.
inlined = numba.njit(inline="always", **OPTIONS)


@intrinsic
def pointer(typingctx: Any, address: Any, like: Any) -> Any:
    """The address as a pointer of the type of ``like``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return like(types.int64, like), generate


def _pointer_to(kind: Any) -> Any:
    """A function that makes an address a pointer to numbers of that kind."""

    @intrinsic
    def pointer_to(typingctx: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), generate

    return pointer_to


int64_at, float64_at, float32_at, uint8_at = map(_pointer_to, (types.int64, types.float64, types.float32, types.uint8))


@intrinsic
def moved(typingctx: Any, start: Any, elements: Any) -> Any:
    """The pointer so many elements further on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return start(start, types.int64), generate


@intrinsic
def number(typingctx: Any, value: Any, like: Any) -> Any:
    """The value in the dtype that ``like`` points to."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0]

    return like.dtype(like.dtype, like), generate


@intrinsic
def lanes(typingctx: Any, like: Any) -> Any:
    """How many elements of the dtype that ``like`` points to fill a vector."""
    count = VECTOR_BYTES // (like.dtype.bitwidth // 8)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(ir.IntType(64), count)

    return types.int64(like), generate


@intrinsic
def power_of_two(typingctx: Any, shifted: Any) -> Any:
    """2^n of ``shifted`` = n + 1.5 * 2^52, float64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], ir.IntType(64))
        exponent = builder.shl(bits, ir.Constant(bits.type, 52))
        return builder.bitcast(builder.add(exponent, ir.Constant(bits.type, 1023 << 52)), ir.DoubleType())

    return types.float64(types.float64), generate


def polynomial(coefficients: Sequence[float]) -> Any:
    """A function of x, float64: the polynomial with these coefficients, from the highest power down.

    numba would keep a loop over the coefficients, and LLVM computes several elements at once only without inner loops.
    """

    @intrinsic
    def of(typingctx: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value, *rest = [ir.Constant(ir.DoubleType(), c) for c in coefficients]
            for c in rest:
                value = builder.fadd(builder.fmul(value, args[0], flags=("contract",)), c, flags=("contract",))
            return value

        return types.float64(types.float64), generate

    return of


def _control_register(builder: Any, name: str, place: Any) -> None:
    """Store x86's control register of floating-point arithmetic to the place, or load it from there."""
    if "x86_64" in builder.module.triple:
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer()])
        instruction = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.sse.{name}")
        builder.call(instruction, [builder.bitcast(place, ir.IntType(8).as_pointer())])


@intrinsic
def float_control(typingctx: Any) -> Any:
    """The calling thread's settings of floating-point arithmetic; 0 on processors other than x86."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = cgutils.alloca_once_value(builder, ir.Constant(ir.IntType(32), 0))
        _control_register(builder, "stmxcsr", place)
        return builder.zext(builder.load(place), ir.IntType(64))

    return types.int64(), generate


@intrinsic
def set_float_control(typingctx: Any, settings: Any) -> Any:
    """Set what ``float_control`` returns; does nothing on processors other than x86."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = cgutils.alloca_once_value(builder, builder.trunc(args[0], ir.IntType(32)))
        _control_register(builder, "ldmxcsr", place)
        return context.get_dummy_value()

    return types.none(types.int64), generate


@intrinsic
def call(typingctx: Any, address: Any, arguments: Any) -> Any:
    """Call the unit of machine code at the address, and return its result, if it has one."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = cgutils.unpack_tuple(builder, args[1], len(signature.args[1]))
        result = cgutils.alloca_once(builder, ir.DoubleType())
        error = cgutils.alloca_once(builder, ir.IntType(8).as_pointer())
        places = [result, error, *values]
        kind = ir.FunctionType(ir.IntType(32), [place.type for place in places])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), places)
        return builder.load(result)

    return types.float64(types.int64, arguments), generate
