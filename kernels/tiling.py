"""Device functions shared by the GEMM kernels: which output tile a program computes, and the block product."""

import triton
import triton.language as tl

from .device import interpreting

_INTERPRETING: tl.constexpr = tl.constexpr(interpreting())


@triton.jit
def dot(a, b, acc, INPUT_PRECISION: tl.constexpr):
    """Acc + A B, accumulated in float32.

    Triton's interpreter keeps bfloat16 as its bits in uint16 and would multiply those; there the operands are
    widened first, which is exact.
    """
    if _INTERPRETING:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=INPUT_PRECISION)


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
