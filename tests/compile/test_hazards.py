"""The hazards are found where they are, and the measures against them are needed."""

from __future__ import annotations

import importlib

import pytest
import torch

from .cases import Case, registry
from .hazards import copied_accumulators, overwritten_operands, pending_operands
from .machine_code import _SASS
from .targets import TARGETS

pytestmark = pytest.mark.compile

HEAD = """
        /*1980*/                   WARPGROUP.ARRIVE ;
        /*1990*/                   HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR4], R24, gsb0 ;
"""
WAIT = "        /*19c0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n"
WAIT_BUT_ONE = WAIT.replace("0x0", "0x1")


def hazards_of(text: str) -> list[str]:
    return overwritten_operands([rest for _, _, *rest in _SASS.findall(text)])


@pytest.mark.parametrize(
    "writer",
    [
        "I2F.BF16.U8 R88, R111.B1",
        "@P0 PRMT R91, R89, 0x5410, R88",
        "LDS.128 R85, [R16+UR7+0xc000]",
        "LDS.64 R90, [R16]",
        "LDSM.16.M88.4 R88, [R4]",
        "IMAD.WIDE R87, R4, 0x2, R2",
        "HMMA.16816.F32.BF16 R85, R80, R40, R84",
    ],
)
def test_a_write_before_the_wait_is_found(writer):
    """The wgmma reads R88 to R91."""
    line = f"        /*19b0*/                   {writer} ;\n"
    assert len(hazards_of(HEAD + line + WAIT)) == 1
    assert hazards_of(HEAD + WAIT + line) == []
    assert len(hazards_of(HEAD + WAIT_BUT_ONE + line)) == 1, "that wait leaves the last group pending"


def test_what_does_no_harm():
    for harmless in ("STS.128 [R88], R88", "FADD R92, R88, R88", "LDS.128 R84, [R88]", "ISETP.NE P0, R88, R89"):
        assert hazards_of(HEAD + f"        /*19b0*/                   {harmless} ;\n" + WAIT) == [], harmless
    shared = HEAD.replace("R88, gdesc", "gdesc") + "        /*19b0*/                   MOV R88, R1 ;\n"
    assert hazards_of(shared) == [], "both operands are in shared memory"


def test_a_branch_before_the_wait_is_found():
    branch = "        /*19b0*/              @!P4 BRA `(.L_x_1) ;\n"
    assert len(hazards_of(HEAD + branch)) == 1
    assert hazards_of(HEAD + WAIT + branch) == []


@pytest.mark.parametrize("operand", ["{%r1,%r2,%r3,%r4}", "%rd81"], ids=["registers", "shared memory"])
@pytest.mark.parametrize("pending", [0, 1, 3])
def test_a_wait_that_leaves_registers_pending_is_found(operand, pending):
    product = f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%r9,%r8,%r7,%r6}}, {operand}, %rd82, %p1, 1, 1;"
    ptx = f"{product}\nwgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned {pending};\n"
    assert pending_operands(ptx) == (operand.startswith("{") and pending > 0)


def test_products_through_one_accumulator_are_found(monkeypatch):
    """If this fails, Triton has stopped copying accumulators, and "tf32x3 apart" is no longer needed."""
    module = importlib.import_module("fastmlp.kernels.linear_dgrad")
    target = TARGETS["sm_100"]
    tile = next(t for t in registry()["linear_dgrad"].tiles(torch.float32, target.device, "sigmoid") if t.rows == 64)
    case = Case("linear_dgrad", target, torch.float32, tile, "sigmoid")
    (apart,) = case.run(assemble=False)
    monkeypatch.setattr(module, "input_precision", lambda device, dtype, fma=False: "tf32x3")
    (chained,) = case.run(assemble=False)
    assert [copied_accumulators(str(launch.asm["ttgir"])) for launch in (apart, chained)] == [0, 6]
