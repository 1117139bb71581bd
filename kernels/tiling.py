"""Device functions shared by the GEMM kernels: which output tile a program computes, and the block product."""

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from .device import interpreting

#: Elements that an epilogue takes at a time: a larger block and what its epilogue loads overflow the registers.
EPILOGUE_SIZE: tl.constexpr = tl.constexpr(64 * 128)

_INTERPRETING: tl.constexpr = tl.constexpr(interpreting())


@triton.jit
def _tf32(x, KEEP_NAN: tl.constexpr):
    """x rounded to the nearest tf32 (10 fraction bits). Infinities stay infinite, and KEEP_NAN keeps NaN.

    From sm_90 on one instruction does all of this, with ties to even. Elsewhere an integer addition rounds, with ties
    away from zero. The addition alone turns the NaN that GPUs make, bits 0x7fffffff, into -0.0. KEEP_NAN prevents this
    at the cost of one comparison per element.
    """
    if _INTERPRETING or not cuda_capability_geq(9, 0):
        bits = x.to(tl.int32, bitcast=True)
        if KEEP_NAN:
            rounded = tl.where(x == x, bits + 0x1000, bits)
        else:
            rounded = bits + 0x1000
        return (rounded & -0x2000).to(tl.float32, bitcast=True)
    else:
        bits = tl.inline_asm_elementwise(
            "cvt.rn.tf32.f32 $0, $1;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1
        )  # fmt: skip
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def _on_hopper():
    """Whether blocks of 64 rows and more run on wgmma."""
    if _INTERPRETING:
        return False
    else:
        return cuda_capability_geq(9, 0) and not cuda_capability_geq(10, 0)


@triton.jit
def accumulator(SHAPE: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """0, in the form that ``dot`` adds products to. SHAPE is (rows, columns) or (slices, rows, columns)."""
    if len(SHAPE) == 3 and SHAPE[0] == 1:
        zeros = tl.zeros(SHAPE[1:], dtype=tl.float32)
    else:
        zeros = tl.zeros(SHAPE, dtype=tl.float32)
    if INPUT_PRECISION == "tf32x3 apart" or (INPUT_PRECISION == "tf32x3" and len(zeros.shape) == 3):
        return zeros, zeros, zeros
    else:
        return zeros


@triton.jit
def accumulated(acc, INPUT_PRECISION: tl.constexpr):
    """The sum of products as one block [rows, columns], from the form that ``dot`` adds to.

    Sums that were kept apart are added from the smallest to the largest product. Slices are added last, in pairs: of
    four, the first and the third, the second and the fourth, then both sums.
    """
    if isinstance(acc, tl.tensor):
        total = acc
    else:
        total = acc[0] + acc[1] + acc[2]
    if len(total.shape) == 3:
        total = tl.sum(total, 0)
    return total


@triton.jit
def dot(a, b, acc, INPUT_PRECISION: tl.constexpr):
    """Acc + A B, accumulated in float32. INPUT_PRECISION is what ``device.input_precision`` says, ``acc`` comes from
    ``accumulator`` or from ``dot``, and ``accumulated`` makes one block of it. A and B are blocks, or have a block per
    slice.

    With "tf32x3" float32 operands are split into high and low tf32 parts,

        A B = A_low B_high + A_high B_low + A_high B_high,

    which leaves out A_low B_low, 2^-22 of the product, and so is as accurate as float32. (Operands that are not finite
    give NaN, since x - high is NaN.) ``tl.dot(input_precision="tf32x3")`` would do the same, but copies every operand
    through shared memory a second time, with eightfold bank conflicts. Each product here gets a high part of its own,
    a - a_low = a_high, for the same reason: the compiler moves only an operand's first change of layout up to its load,
    and only then reads shared memory once. wgmma reads B from shared memory, and tcgen05 reads A and B from there. The
    compiler stores these parts anew in any case, so the products share them.

    Each of the three products has an accumulator of its own with "tf32x3 apart", and where the reduction is cut into
    slices. Triton 3.6 to 3.8 can run consecutive products through one accumulator of tcgen05 in the wrong order (triton
    issue 10821). Where the order is right, they move the accumulator through registers between the products. Slices are
    for products so small that each waits for the previous one, and three chains wait a third as long.
    """
    APART: tl.constexpr = not isinstance(acc, tl.tensor)
    if APART or INPUT_PRECISION == "tf32x3":
        TCGEN05: tl.constexpr = a.shape[0] >= 64 and INPUT_PRECISION == "tf32x3 apart"
        SHARED_B: tl.constexpr = TCGEN05 or (a.shape[0] >= 64 and _on_hopper())
        a_high = _tf32(a, False)
        b_high = _tf32(b, False)
        a_low = a - a_high
        b_low = b - b_high
        low_high = tl.dot(a_low, b_high, acc[0] if APART else acc, input_precision="tf32")
        if not TCGEN05:
            a_high = a - a_low
        if not SHARED_B:
            b_high = b - b_low
        high_low = tl.dot(a_high, b_low, acc[1] if APART else low_high, input_precision="tf32")
        if not TCGEN05:
            a_high = a - (a - a_high)
        high_high = tl.dot(a_high, b_high, acc[2] if APART else high_low, input_precision="tf32")
        if APART:
            acc = low_high, high_low, high_high
        else:
            acc = high_high
    elif INPUT_PRECISION == "tf32":
        # The matrix units cut off the bits beyond tf32's, which is an error towards zero. Rounding first halves it.
        acc = tl.dot(_tf32(a, True), _tf32(b, True), acc, input_precision="tf32")
    elif _INTERPRETING:
        # The interpreter keeps bfloat16 as its bits in uint16 and would multiply those; widening is exact.
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def as_column(x, SLICES: tl.constexpr):
    """A vector along the rows of a block [rows, cols], or of each block of [SLICES, rows, cols]."""
    if SLICES == 1:
        return x[:, None]
    else:
        return x[None, :, None]


@triton.jit
def as_row(x, SLICES: tl.constexpr):
    """A vector along the columns of a block [rows, cols], or of each block of [SLICES, rows, cols]."""
    if SLICES == 1:
        return x[None, :]
    else:
        return x[None, None, :]


@triton.jit
def reduced(BLOCK: tl.constexpr, SLICES: tl.constexpr):
    """0 to BLOCK - 1, the places of one step of a reduction, as a row. Every slice has the next of these places."""
    if SLICES == 1:
        return tl.arange(0, BLOCK)[None, :]
    else:
        DEPTH: tl.constexpr = BLOCK // SLICES
        return tl.arange(0, SLICES)[:, None, None] * DEPTH + tl.arange(0, DEPTH)[None, None, :]


@triton.jit
def transposed(x):
    """A block, or each slice of one, with rows and columns exchanged."""
    if len(x.shape) == 2:
        return tl.trans(x)
    else:
        return tl.permute(x, (0, 2, 1))


@triton.jit
def halves(x):
    """The left and the right half of the columns of a block."""
    rows: tl.constexpr = x.shape[0]
    cols: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x, (rows, 2, cols)), (0, 2, 1)))


@triton.jit
def grouped_tile(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(pid_m, pid_n) in grouped order: GROUP_M rows of tiles are walked column by column.

    Programs that run at the same time then share rows of X and of W in the L2 cache; in plain row-major order
    a wave of programs would touch few rows of tiles but every column.
    """
    group = pid // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return first_m + within % group_m, within // group_m
