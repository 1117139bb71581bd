"""The latency model of bench.static: its arithmetic on counts made by hand, and that it leaves nothing out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from bench.contact import estimates
from bench.static.__main__ import main
from bench.static.latency.cache import Touched, hit_shares
from bench.static.latency.constants import CHIPS, CONSTANTS, SHORT_NAMES, Chip, chip_of
from bench.static.latency.eager import eager_estimate, eager_operations, eager_us
from bench.static.latency.gcn import decode_gcn
from bench.static.latency.library import library_product
from bench.static.latency.model import Kernel, Section, estimate
from bench.static.latency.model import Path as Programs
from bench.static.latency.rows import LATENCY_TARGETS, constant_rows
from bench.static.latency.sass import Instruction, _instruction, loops
from bench.static.latency.steps import BATCHES, recorded, step_estimate
from bench.static.latency.text import latency_text
from bench.static.latency.walk import Demand, demand, walk

H100 = CHIPS["H100 SXM"]
#: A GPU whose numbers are easy: a cycle is a nanosecond, 10 multiprocessors, no gap.
EASY = dataclasses.replace(
    H100, multiprocessors=10, clock=1.0, gap=0.0, sustained=1.0, sustained_tf32=1.0, bandwidth=1e12, hbm_share=1.0,
    l2_bandwidth=2.0, l2_port=64, barrier=20, shared_latency=30, l2_latency=200, special_latency=40, wgmma_drain=30,
)  # fmt: skip


def kernel(programs: int, section: Section, *, resident: int = 1, hbm_bytes: float = 0.0) -> Kernel:
    return Kernel("k", (Programs(programs, (section,)),), resident, hbm_bytes)


def test_every_constant_has_a_source_a_meaning_and_a_value_for_each_gpu() -> None:
    assert [c.name for c in CONSTANTS if not c.source or not c.meaning or len(c.values) != len(CHIPS)] == []
    names = [c.name for c in CONSTANTS]
    assert len(set(names)) == len(names)
    assert {field.name for field in dataclasses.fields(Chip)} == {"name", "target", "bandwidth", *names}
    assert set(SHORT_NAMES.values()) == set(CHIPS)
    assert H100.clock == 1.755
    assert set(LATENCY_TARGETS) == {"sm_80", "sm_90", "sm_89", "gfx942"}


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"), ("NVIDIA H200", "H200 SXM"), ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80 GB"), ("NVIDIA A100-PCIE-40GB", None), ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA GeForce RTX 4090 D", None),
        ("AMD Instinct MI300X", "MI300X"), ("NVIDIA B200", None),
    ],
)  # fmt: skip
def test_a_board_is_known_by_its_name_or_not_at_all(device: str, name: str | None) -> None:
    chip = chip_of(device)
    assert (chip.name if chip else None) == name


def test_twice_the_programs_beyond_a_wave_take_twice_the_time() -> None:
    work = Section("products", 100.0, Demand(issue=60), passes=10)
    one, two, three = (estimate(kernel(n, work), EASY) for n in (10, 20, 25))
    assert one.microseconds == pytest.approx(1.0)  # 10 passes of 100 cycles
    assert two.microseconds == pytest.approx(2.0)
    assert three.microseconds == pytest.approx(3.0)  # the last wave is not full, and takes as long
    assert (one.waves, three.waves) == (1.0, 2.5)
    assert one.bound == "latency of products"


def test_programs_that_fit_together_hide_their_latency_until_a_shared_unit_is_full() -> None:
    work = Section("products", 100.0, Demand(issue=60), passes=10)
    # Two programs on each multiprocessor want 120 cycles of issue slots a pass, more than the latency of 100.
    both = estimate(kernel(20, work, resident=2), EASY)
    assert both.microseconds == pytest.approx(1.2)
    assert both.bound == "issue of products"
    # A latency of 500 hides both: as long as one program.
    waiting = dataclasses.replace(work, latency=500.0)
    assert estimate(kernel(20, waiting, resident=2), EASY).microseconds == pytest.approx(5.0)
    # 11 programs: one multiprocessor has two, and the others wait for it.
    assert estimate(kernel(11, work, resident=2), EASY).microseconds == pytest.approx(1.2)


def test_bytes_bound_what_latency_does_not() -> None:
    moved = Section("all", 100.0, Demand(loaded=6400))
    # The port needs 6400 / 64 = 100 cycles; all 10 programs load 64,000 bytes, at 2 TB/s 32 ns.
    assert estimate(kernel(10, moved), EASY).terms["L2"] == pytest.approx(0.032)
    slow = estimate(kernel(10, moved, hbm_bytes=5e6), EASY)
    assert (slow.microseconds, slow.bound) == (pytest.approx(5.0), "HBM")
    narrow = dataclasses.replace(EASY, l2_bandwidth=0.1)
    assert estimate(kernel(10, moved), narrow).bound == "L2"
    assert estimate(kernel(10, moved), dataclasses.replace(EASY, gap=1.5)).microseconds == pytest.approx(1.6)


def test_matrix_units_cannot_exceed_the_rate_that_the_gpu_sustains() -> None:
    products = Section("products", 100.0, Demand(matrix=100))
    throttled = estimate(kernel(10, products), dataclasses.replace(EASY, sustained=0.5))
    tf32 = dataclasses.replace(kernel(10, products), tf32=True)
    assert estimate(tf32, dataclasses.replace(EASY, sustained_tf32=0.25)).microseconds == pytest.approx(0.4)
    assert (throttled.microseconds, throttled.bound) == (pytest.approx(0.2), "matrix")


def test_one_long_program_ends_a_kernel() -> None:
    short, long = Section("products", 100.0), Section("products", 1000.0)
    paths = (Programs(9, (short,)), Programs(1, (long,), "loss"))
    found = estimate(Kernel("k", paths, 1, 0.0), EASY)
    assert (found.microseconds, found.bound) == (pytest.approx(1.0), "latency of loss products")
    # Behind a full wave the last program begins only when that wave has ended.
    late = (Programs(10, (short,)), Programs(1, (long,), "loss"))
    assert estimate(Kernel("k", late, 1, 0.0), EASY).microseconds == pytest.approx(0.1 + 1.0)
    # Short programs in front take slots, and give them to the long ones at once: 10 long ones on 10 multiprocessors.
    mixed = (Programs(5, (short,)), Programs(10, (long,)))
    assert estimate(Kernel("k", mixed, 1, 0.0), EASY).microseconds == pytest.approx(1.1)


def instruction(name: str, stall: int = 1, operands: str = "", **more: Any) -> Instruction:
    mnemonic, *modifiers = name.split(".")
    given = {"address": 0, "predicate": "", "sets": None, "reads": None, "waits": ()} | more
    return Instruction(name=mnemonic, modifiers=tuple(modifiers), operands=operands, stall=stall, **given)


def test_the_bits_of_an_instruction() -> None:
    # stall 5, yield, sets barrier 2, no read barrier, waits for barriers 0 and 3
    control = 5 | 1 << 4 | 2 << 5 | 7 << 8 | 0b001001 << 11
    code = bytes(16) + bytes(8) + (control << 41).to_bytes(8, "little")
    i = _instruction(code, "0010", "", "LDSM", ".16.M88.4", " R4, [R2]")
    assert (i.stall, i.sets, i.reads, i.waits) == (5, 2, None, (0, 3))
    assert i.bytes == 16
    assert instruction("LDG.E.U16").bytes == 2
    assert instruction("LDGSTS.E.BYPASS.128").bytes == 16
    assert instruction("HGMMA.64x128x8.F32.TF32").shape == (64, 128, 8)
    assert instruction("HMMA.16816.F32.BF16").shape == (16, 8, 16)


def test_a_warp_waits_for_stalls_barriers_and_units() -> None:
    assert walk([instruction("FADD", 4), instruction("FADD", 5)], 4, EASY) == 9
    # The load's data are there after 30 cycles, and the sum waits for them.
    loads = [instruction("LDS", 2, sets=1), instruction("FADD", 4, waits=(1,))]
    assert walk(loads, 4, EASY) == 34
    assert walk([instruction("LDG.E.128", 2, sets=0), instruction("FADD", 4, waits=(0,))], 4, EASY) == 204
    assert walk([instruction("BAR.SYNC", 1)], 4, EASY) == 21
    # tf32 products of 16x8x8 occupy their unit for 2048 / (2048 * 0.62 / 4) cycles, for each warp of the scheduler.
    product = instruction("HMMA.1688.F32.TF32", 1)
    cycles = 2 * 16 * 8 * 8 / (2048 * 0.62 / 4)
    assert walk([product, product, product], 4, EASY, again=True) == pytest.approx(3 * cycles)
    assert walk([product, product, product], 8, EASY, again=True) == pytest.approx(6 * cycles)


def test_wgmma_runs_beside_the_warp_until_it_waits() -> None:
    product = instruction("HGMMA.64x256x16.F32.BF16", 2, "R24, gdesc[UR8], R24, gsb0")
    add = instruction("FADD", 100)
    wait = instruction("WARPGROUP.DEPBAR.LE", 1, "gsb0, 0x0")
    # 2 * 64 * 256 * 16 FLOPs at 4096 a cycle are 128 cycles; 30 more until the result is there.
    assert walk([product, wait], 4, EASY) == 128 + 30 + 1
    assert walk([product, add, wait], 4, EASY) == 128 + 30 + 1
    assert walk([product, wait], 8, EASY) == 2 * 128 + 30 + 1  # two warpgroups take turns
    needs = demand([product], 4, EASY)
    assert needs.matrix == 128
    assert needs.shared == (64 + 256) * 16 * 2 / 128


def test_what_a_program_takes_from_its_multiprocessor() -> None:
    code = [
        instruction("LDGSTS.E.BYPASS.128"), instruction("LDSM.16.M88.4"), instruction("FADD"), instruction("IADD3"),
        instruction("STG.E.64"), instruction("LDS", predicate="@!PT"), instruction("NOP"),
    ]  # fmt: skip
    needs = demand(code, 8, EASY)
    assert needs.issue == 5 * 2  # 8 warps on 4 schedulers
    assert needs.units == 2 * EASY.integer_cycles
    assert needs.shared == 8 * (4 + 4)
    assert (needs.loaded, needs.stored) == (32 * 8 * 16, 32 * 8 * 8)


def test_loops_of_the_code_and_of_amds_assembly() -> None:
    code = [
        instruction("FADD", address=0x00), instruction("FADD", address=0x10),
        instruction("SYNCS", address=0x20), instruction("BRA", address=0x30, predicate="@!P0", operands="0x20"),
        instruction("BRA", address=0x40, predicate="@P1", operands="0x10"), instruction("EXIT", address=0x50),
        instruction("BRA", address=0x60, operands="0x60"),
    ]  # fmt: skip
    (loop,) = loops(code)  # the loop that only spins is part of the one around it
    assert [i.address for i in loop.body] == [0x10, 0x20, 0x30, 0x40]
    assembly = """
.LBB0_1:
	buffer_load_dwordx4 v[0:3], v4, s[4:7], 0 offen
	s_waitcnt vmcnt(0)
	v_mfma_f32_32x32x8_bf16 v[0:15], v[34:35], v[42:43], v[0:15]
	s_cbranch_scc1 .LBB0_1
	s_endpgm
.Lfunc_end0:
"""
    amd = decode_gcn(assembly)
    assert [i.name for i in amd] == ["LDG", "WAIT", "VMMA", "BRA", "EXIT"]
    (again,) = loops(amd)
    assert (again.products, again.loaded) == (1, 16)
    mi300x = CHIPS["MI300X"]
    assert walk(again.body, 4, mi300x, again=True) > mi300x.l2_latency
    assert demand(again.body, 4, mi300x).matrix == pytest.approx(2 * 32 * 32 * 8 / (2048 / 4))


def test_what_the_cache_still_has() -> None:
    first, second = Touched({1: 40, 2: 40}), Touched({2: 40, 3: 40})
    assert hit_shares([first, second], 1000) == [1.0, 1.0]
    # Room for 60 bytes. Before the first kernel 3 was used last, so 20 bytes are left of 1 and of 2. Before the second
    # kernel 2 was used last and is whole, and 1 leaves 20 bytes of 3.
    assert hit_shares([first, second], 60) == [(20 + 20) / 80, (40 + 20) / 80]
    assert hit_shares([Touched({1: 1000})], 100) == [0.1]


# Published microseconds of products on an H100 (XLA's matmul_interpolator_data.h): M, N, K, bfloat16, float32 as tf32.
PUBLISHED = (
    (512, 512, 512, 6.6, 10.3), (4096, 256, 512, 7.8, 13.7), (512, 256, 2048, 8.9, 18.8), (1024, 512, 4096, 14.4, 36.2),
    (1024, 1024, 4096, 18.3, 47.3), (4096, 4096, 1024, 50.8, 111.2), (2048, 4096, 2048, 48.1, 108.5),
    (512, 4096, 4096, 26.7, 65.1),
)  # fmt: skip


@pytest.mark.parametrize(("m", "n", "k", "half", "tf32"), PUBLISHED)
def test_products_of_a_library_take_about_what_was_published(m: int, n: int, k: int, half: float, tf32: float) -> None:
    for mode, published in (("bfloat16", half), ("tf32", tf32)):
        us = sum(e.microseconds for _, e in library_product(m, n, k, mode, H100))
        assert 0.3 * published < us < 1.3 * published  # a rival may be estimated as too fast rather than too slow


def test_a_library_splits_the_reduction_of_few_tiles() -> None:
    few = library_product(512, 512, 65536, "bfloat16", H100)
    assert [k.name for k, _ in few][-1] == "sum of splits"
    assert few[0][0].programs > 100
    assert len(library_product(65536, 512, 512, "bfloat16", H100)) == 1


def test_no_operation_of_eager_is_left_out() -> None:
    for mode in ("float32", "bfloat16"):
        operations, kernels = eager_operations(mode, 64), eager_estimate(mode, 64, H100)
        sums = sum(k.name == "sum of splits" for k, _ in kernels)
        assert len(kernels) - sums == len(operations)
        assert all(e.microseconds >= H100.gap for _, e in kernels)
        assert eager_us(mode, 64, H100) == pytest.approx(sum(e.microseconds for _, e in kernels))


@pytest.mark.compile
def test_every_launch_of_a_step_and_every_loop_is_counted() -> None:
    launches = recorded("sm_80", "bfloat16", 64)
    step = step_estimate(launches, CHIPS["A100 SXM 80 GB"], "bfloat16")
    assert [k.name for k, _ in step.kernels] == [launch.name for launch in launches]
    assert [k.note for k, _ in step.kernels if k.note] == []
    for (counted, _), launch in zip(step.kernels, launches, strict=True):
        x, y, z = launch.grid
        assert counted.programs == x * y * z
    first = step.kernels[0][0].paths[0]
    passes = {section.name: section.passes for section in first.sections}
    assert passes["products"] == -(-784 // launches[0].constexprs["BLOCK_K"])
    assert step.microseconds == pytest.approx(sum(e.microseconds for _, e in step.kernels))
    assert step.microseconds > step.floor


def row(us: float, eager: float) -> dict[str, Any]:
    terms = {"gap": 1.0, "waves": 2.0, "matrix": 0.1, "L2": 0.2, "HBM": 0.0}
    one = {
        "kernel": "linear_fwd",
        "us": 3.0,
        "library_us": 2.0,
        "bound": "L2",
        "programs": 64,
        "resident": 2,
        "waves": 0.2,
        "terms_us": terms,
    }
    return {
        "gpu": "H100 SXM", "mode": "float32", "batch": 64, "step_us": us, "floor_us": 1.0, "eager_us": eager,
        "products_us": 9.0, "kernels": [one, {**one, "us": 4.0}, {**one, "kernel": "wgrad_update", "us": 5.0}],
    }  # fmt: skip


def test_the_section_says_that_nothing_was_measured_and_where_eager_is_faster() -> None:
    text = latency_text([row(12.0, 90.0)], constant_rows())
    assert "No number in this section was measured" in text
    assert "exceeds eager in a graph nowhere" in text
    assert "H100 SXM float32 64 (2.00 times)" in latency_text([row(12.0, 6.0)], constant_rows())
    slower = latency_text([{**row(12.0, 6.0), "gpu": "RTX 4090"}], constant_rows())
    assert "RTX 4090, float32: The forward product takes three tf32 products" in slower
    assert all(f"`{c.name}`" in text for c in CONSTANTS)
    assert latency_text([], []) == ""


def test_the_first_contact_finds_the_estimates_of_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "static.json"
    file.write_text(json.dumps({"latency": [row(12.0, 90.0)]}))
    monkeypatch.setattr(estimates, "RESULTS", file)

    def report(name: str, rehearsal: bool = False) -> Any:
        return SimpleNamespace(
            rehearsal=rehearsal, device=SimpleNamespace(batches=(8, 16), properties=lambda: {"device": name})
        )

    here = report("NVIDIA H100 80GB HBM3")
    found = estimates.step_estimate(here, "float32", 64)
    assert (found["estimate_us"], found["estimate_eager_us"]) == (12.0, 90.0)
    assert "never measured" in found["estimate_of"]
    assert [estimates.kernel_us(here, "fwd", i, "float32", 64) for i in range(3)] == [3.0, 4.0, None]
    assert estimates.kernel_us(here, "update", 0, "float32", 64) == 5.0
    assert estimates.step_estimate(report("NVIDIA B200"), "float32", 64) == {}
    assert estimates.library_us(report("NVIDIA B200"), 64, 512, 784, "float32") is None
    assert (estimates.library_us(here, 64, 512, 784, "tf32") or 0) > 1
    # A rehearsal takes the rows of an A100, in the order of the batch sizes, and says that they stand in.
    file.write_text(json.dumps({"latency": [{**row(12.0, 90.0), "gpu": "A100 SXM 80 GB"}]}))
    estimates._rows.cache_clear()
    assert "standing in" in estimates.step_estimate(report("simulated", True), "float32", 8)["estimate_of"]
    assert estimates.step_estimate(report("simulated", True), "float32", 16) == {}
    estimates._rows.cache_clear()


def test_the_command_explains_itself() -> None:
    shown = CliRunner().invoke(main, ["latency", "--help"])
    assert shown.exit_code == 0
    assert "never measured" in " ".join(shown.output.split())
    assert CliRunner().invoke(main, ["latency", "--gpu", "H1000"]).exit_code == 2
    assert BATCHES == (64, 512, 4096, 16384, 65536)
