"""The main loops are found in machine code and in TTGIR, and a tile that computes something twice is seen to."""

from __future__ import annotations

import importlib
from unittest import mock

import pytest
import torch

from fastmlp.kernels import linear_fwd
from fastmlp.kernels.configs import Tile
from tests.ptxsim import Launch

from . import limits
from .block_form import block_loops
from .cases import Case
from .machine_code import _SASS, _amdgcn, _sass_of_one
from .main_loops import MainLoop, main_loops, report
from .targets import TARGETS

pytestmark = pytest.mark.compile


def sass_loops(*lines: str) -> list[dict[str, int]]:
    """The main loops of lines of machine code, which get the addresses 0x0000, 0x0010, ..."""
    text = "".join(f"        /*{16 * i:04x}*/  {line} ;\n" for i, line in enumerate(lines))
    return _sass_of_one(_SASS.findall(text))[-1]


HMMA = "HMMA.16816.F32 R4, R36.reuse, R2, R4"


def test_a_loop_ends_where_it_branches_back():
    assert sass_loops(HMMA, "BAR.SYNC 0x0", HMMA, "@!P0 BRA 0x10", HMMA, "EXIT") == [
        {"BAR.SYNC": 1, "HMMA.16816.F32": 1, "BRA": 1}
    ]
    assert sass_loops(HMMA, "@P0 BRA 0x30", HMMA, "EXIT") == []


def test_a_loop_without_products_is_no_main_loop():
    assert sass_loops("FADD R1, R1, R2", "@P0 BRA 0x0", HMMA, "EXIT") == []


def test_the_loop_inside_is_the_main_loop():
    """The outer loop goes from 0x00 to 0x50, the inner one from 0x10 to 0x20, and a wait at 0x30 is a loop too."""
    inner, wait = (HMMA, "@P1 BRA 0x10"), ("SYNCS.TRYWAIT P0, [UR4]", "@!P0 BRA 0x30")
    assert sass_loops("LDG.E R1, [R2]", *inner, *wait, "@P2 BRA 0x0", "EXIT") == [{"HMMA.16816.F32": 1, "BRA": 1}]
    assert sass_loops(HMMA, "NOP", "NOP", *wait, "@P2 BRA 0x0", "EXIT") == [
        {"HMMA.16816.F32": 1, "NOP": 2, "SYNCS.TRYWAIT": 1, "BRA": 2}
    ]


def test_a_wait_behind_the_end_belongs_to_the_loop():
    """tcgen05's waits are behind the end of the kernel and branch back into the loop."""
    code = ("UTCHMMA gdesc[UR4]", "@!P0 BRA 0x50", "BAR.SYNC 0x0", "BRA.U !UP0, 0x0", "EXIT", "NANOSLEEP", "BRA 0x20")
    assert sass_loops(*code) == [{"UTCHMMA": 1, "BRA": 2, "BAR.SYNC": 1, "BRA.U": 1, "NANOSLEEP": 1}]


def test_two_loops_are_in_the_order_of_the_code():
    first, second = (HMMA, "@P0 BRA 0x0"), ("HMMA.1688.F32.TF32 R4, R36, R2, R4", "@P0 BRA 0x20")
    assert [set(loop) - {"BRA"} for loop in sass_loops(*first, *second, "EXIT")] == [
        {"HMMA.16816.F32"},
        {"HMMA.1688.F32.TF32"},
    ]


def test_loops_of_amds_assembly():
    text = """
_kernel:
	s_cbranch_scc1 .LBB0_2
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	buffer_load_dwordx4 v[58:61], v50, s[24:27], 0 offen
	buffer_load_dword v50, s[24:27], 0 offen lds
	v_mfma_f32_32x32x8_f16 v[18:33], v[50:51], v[54:55], v[18:33]
	s_barrier
	s_cbranch_scc1 .LBB0_1
.LBB0_2:
	s_endpgm
	.section	.rodata
"""
    assert _amdgcn(text)[-1] == [
        {
            "buffer_load_dwordx4": 1,
            "buffer_load_dword lds": 1,
            "v_mfma_f32_32x32x8_f16": 1,
            "s_barrier": 1,
            "s_cbranch_scc1": 1,
        }
    ]


TTGIR = """
#blocked = #ttg.blocked<{sizePerThread = [1, 4]}>
#mma = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [4, 2], instrShape = [16, 64, 8]}>
#mma1 = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [8, 1], instrShape = [16, 64, 8]}>
    %acc:2 = scf.for %k = %c0_i32 to %K step %c32_i32 iter_args(%zeros = %cst, %x_ptrs = %x) -> (tensor<64x128xf32>)  : i32 {
      %a = ttg.local_load %s : !ttg.memdesc<64x32xf32, #shared> -> tensor<64x32xf32, #ttg.dot_op<{opIdx = 0, parent = #mma1, kWidth = 1}>> loc(#loc1)
      %b = ttg.local_alloc %b0 : (tensor<32x128xf32, #blocked>) -> !ttg.memdesc<32x128xf32, #shared2, #smem> loc(#loc165)
      %c = ttg.convert_layout %zeros : tensor<64x128xf32, #mma> -> tensor<64x128xf32, #mma1> loc(#loc1)
      %d = ttng.warp_group_dot %a, %b, %c {inputPrecision = 0 : i32, isAsync = true} : tensor<64x32xf32, #ttg.dot_op<{opIdx = 0, parent = #mma1, kWidth = 1}>> * !ttg.memdesc<32x128xf32, #shared2, #smem> -> tensor<64x128xf32, #mma1> loc(#loc1)
      %e:2 = ttng.warp_group_dot_wait %d, %b {pendings = 0 : i32} : tensor<64x128xf32, #mma1>, !ttg.memdesc<32x128xf32, #shared2, #smem> loc(#loc1)
      %f = ttg.convert_layout %e#0 : tensor<64x128xf32, #mma1> -> tensor<64x128xf32, #mma> loc(#loc1)
      scf.yield %f, %x_ptrs : tensor<64x128xf32, #mma>, i32 loc(#loc1)
    } loc(#loc1)
"""  # noqa: E501


def test_what_a_step_computes_in_block_form():
    """Eight warps in a column of 16 rows each cover 128 rows, and the block has 64."""
    (loop,) = block_loops(TTGIR)
    assert loop.accumulates
    assert loop.needed == 64 * 128 * 32
    assert [product.computed for product in loop.products] == [2 * 64 * 128 * 32]
    assert loop.conversions == ["64x128xf32 #mma -> #mma1", "64x128xf32 #mma1 -> #mma"]
    assert loop.moved_accumulators == ["%zeros", "%e"]


def test_a_loop_over_pieces_of_the_result_adds_nothing_up():
    (loop,) = block_loops(TTGIR.replace("convert_layout %zeros", "convert_layout %cst"))
    assert not loop.accumulates
    assert loop.needed == 64 * 128 * 32


def test_loops_on_two_sides_of_a_condition_do_not_follow_each_other():
    """Programs of their own may sum an operand; a program that multiplies must not read the operand a second time."""
    loop = "  scf.for %i = %a to %b step %c1_i32  : i32 {\n    %x = tt.load %p : tensor<2xf32>\n  } loc(#loc)\n"
    apart = block_loops(f" scf.if %c {{\n{loop} }} else {{\n{loop} }} loc(#loc)\n{loop}")
    assert [a.follows(b) for a in apart for b in apart] == [True, False, True, False, True, True, True, True, True]


def test_a_conversion_within_registers_is_none():
    """The result of one product as the first operand of the next one stays where it is."""
    operand = "tensor<64x128xf32, #ttg.dot_op<{opIdx = 0, parent = #mma1, kWidth = 1}>>"
    (loop,) = block_loops(TTGIR.replace("-> tensor<64x128xf32, #mma> loc", f"-> {operand} loc"))
    assert loop.conversions == ["64x128xf32 #mma -> #mma1"]


def test_an_operand_goes_through_shared_memory_once():
    """A block that was loaded into registers may be converted on its way to the product; not twice."""
    operand = "tensor<32x128xf32, #blocked> -> tensor<32x128xf32, #mma> loc(#loc1)"
    for load, conversions in (
        ("tt.load %ptrs : tensor<32x128x!tt.ptr<f32>, #blocked> loc(#loc1)", 2),
        ("ttg.local_load %s : !ttg.memdesc<32x128xf32, #shared> -> tensor<32x128xf32, #blocked> loc(#loc1)", 3),
    ):
        lines = f"      %r = {load}\n      %n = arith.negf %r : tensor<32x128xf32, #blocked> loc(#loc1)\n"
        lines += f"      %o = ttg.convert_layout %n : {operand}\n      %c = "
        (loop,) = block_loops(TTGIR.replace("      %c = ", lines))
        assert len(loop.conversions) == conversions
        assert len(loop.loads) == (conversions == 2)


def forward(target: str, tile: Tile, dtype: torch.dtype = torch.float32, depth: int = 1024) -> Launch:
    """A forward product with a tile, whether or not the tables have the tile."""
    module = importlib.import_module("fastmlp.kernels.linear_fwd")
    x, w = torch.zeros((512, depth), dtype=dtype), torch.zeros((512, depth), dtype=dtype)
    with (
        TARGETS[target].simulated(assemble=True) as gpu,
        mock.patch.object(module, "gemm_tile", return_value=tile),
    ):
        linear_fwd(x, w, None, "sigmoid")
    (launch,) = gpu.launches
    return launch


def main_loop(target: str, tile: Tile, dtype: torch.dtype = torch.float32) -> MainLoop:
    (loop,) = main_loops(forward(target, tile, dtype))
    return loop


@pytest.mark.parametrize(
    ("target", "tile", "dtype", "times"),
    [
        ("sm_80", Tile(16, 32, 32, 2, 3), torch.float16, 1),
        ("sm_80", Tile(16, 32, 32, 8, 3), torch.float16, 2),
        ("sm_90", Tile(64, 64, 32, 8, 3), torch.float16, 1),
        ("sm_100", Tile(64, 64, 32, 4, 3), torch.float16, 1),
        ("gfx942", Tile(32, 32, 32, 4, 2), torch.float16, 4),
    ],
)
def test_repeated_products_are_counted(target, tile, dtype, times):
    """More warps than the block has work for repeat what the others do; machine code and layouts agree on it."""
    loop = main_loop(target, tile, dtype)
    assert loop.computed == times * loop.needed == sum(product.computed for product in loop.block.products)
    assert loop.needed == tile.rows * tile.cols * tile.depth
    assert loop.steps == 1


def test_the_tile_that_computes_twice():
    """Eight warps share 64 rows: two of three products are computed twice, in a layout that the third has not."""
    bad, good = main_loop("sm_90", Tile(64, 128, 32, 8, 3)), main_loop("sm_90", Tile(64, 128, 32, 4, 3))
    assert bad.matrix == {"HGMMA.64x64x8.F32.TF32": 20}
    assert bad.computed * 3 == bad.needed * 5
    assert bad.block.conversions
    assert len(bad.block.moved_accumulators) == 2
    assert bad.barriers > 8
    assert good.matrix == {"HGMMA.64x128x8.F32.TF32": 12}
    assert good.computed == good.needed == 3 * 64 * 128 * 32
    assert good.block.conversions == good.block.moved_accumulators == []


def test_the_report_says_what_was_found():
    (line,) = report([forward("sm_80", Tile(16, 32, 32, 8, 3), torch.float16)])
    assert line.startswith("_linear_fwd_kernel: 2 HMMA.16816.F32: 2 times the products needed; barriers: 2;")


@pytest.mark.parametrize(
    ("tile", "dtype", "depth", "broken"),
    [
        (Tile(64, 128, 32, 4, 3), torch.float16, 1024, set()),
        (Tile(64, 128, 32, 8, 3), torch.float32, 1024, {"repeated products", "conversion", "barriers"}),
        (Tile(64, 64, 64, 4, 12), torch.float16, 1024, {"few warps"}),  # 196 KiB: one program
        (Tile(64, 64, 32, 4, 3), torch.float16, 77, {"waiting load"}),
    ],
)
def test_a_tile_breaks_the_limits(tile, dtype, depth, broken):
    """The same launches as in the table of cases, with tiles and operands that the tables do not have."""
    case = Case("linear_fwd", TARGETS["sm_90"], dtype, tile, "sigmoid")
    found = limits.violations(case, forward("sm_90", tile, dtype, depth))
    assert set(found) - {"narrow load"} == broken
