"""The parts of ``bench.static``: their counts against known values, and the report kept in the repository."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
import triton

from bench.static.__main__ import RESULTS
from bench.static.execution import execute
from bench.static.findings import EXCEPTIONS, LIMITS, LimitException, findings
from bench.static.gpus import GPUS, MODES, Mode, roofline, total_roofline
from bench.static.instructions import GROUPS, group_of, mix
from bench.static.markdown import markdown, table
from bench.static.numbers import bytes_text, compact, significant
from bench.static.numerics import Result, errors, tf32
from bench.static.occupancy import MULTIPROCESSORS, occupancy, warps_by_registers
from bench.static.operations import OperationCounter
from bench.static.report import dump
from bench.static.steps import eager_step, fastmlp_autograd_step, fastmlp_step
from bench.static.work import WORK, Work, touched, work_of
from bench.static.workloads import WORKLOADS, draw, float32_precision, labels
from fastmlp import kernels
from fastmlp.kernels.device import tf32_allowed
from fastmlp.kernels.layout import Layer, Layout
from fastmlp.kernels.reduce_update import reduce_update
from tests.compile.machine_code import instructions, resources
from tests.compile.targets import TARGETS
from tests.kernels.launches import kernel_names
from tests.ptxsim import SimulatedGPU
from tests.support.precision import SETTINGS

HEADER = Path(triton.__file__).parent / "backends" / "nvidia" / "include" / "cuda_occupancy.h"

# For each line of input this prints one line with the programs per multiprocessor, by NVIDIA's own rules.
_CALCULATOR = """
#include <stdio.h>
#include "cuda_occupancy.h"
int main(void) {
    int major, minor, warps, shared_sm, reserved, registers, num_warps, shared;
    while (scanf("%d %d %d %d %d %d %d %d", &major, &minor, &warps, &shared_sm, &reserved, &registers, &num_warps,
                 &shared) == 8) {
        cudaOccDeviceProp p = {0};
        cudaOccFuncAttributes a = {0};
        cudaOccDeviceState s = {0};
        cudaOccResult r;
        p.computeMajor = major; p.computeMinor = minor; p.maxThreadsPerBlock = 1024;
        p.maxThreadsPerMultiprocessor = 32 * warps; p.regsPerBlock = p.regsPerMultiprocessor = 65536;
        p.warpSize = 32; p.sharedMemPerBlock = 49152; p.sharedMemPerMultiprocessor = shared_sm; p.numSms = 1;
        p.sharedMemPerBlockOptin = shared_sm - reserved; p.reservedSharedMemPerBlock = reserved;
        a.maxThreadsPerBlock = 1024; a.numRegs = registers; a.maxDynamicSharedSizeBytes = shared_sm;
        a.partitionedGCConfig = PARTITIONED_GC_OFF; a.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
        s.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
        if (cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &a, &s, 32 * num_warps, shared)) return 1;
        printf("%d\\n", r.activeBlocksPerMultiprocessor);
    }
    return 0;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None or not HEADER.exists(), reason="needs a C compiler and cuda_occupancy.h")
def test_occupancy_is_that_of_nvidias_calculator(tmp_path):
    (tmp_path / "occupancy.c").write_text(_CALCULATOR)
    subprocess.run(["cc", "-w", "-I", HEADER.parent, "-o", "occupancy", "occupancy.c"], cwd=tmp_path, check=True)
    draw_from, cases, lines = random.Random(0), [], []
    for target, mp in MULTIPROCESSORS.items():
        if target.startswith("sm_"):
            number = int(target.removeprefix("sm_"))
            for _ in range(300):
                num_warps = draw_from.choice((1, 2, 4, 8, 16))
                registers = draw_from.randint(16, min(255, 2048 // num_warps // 8 * 8))
                shared = draw_from.choice((0, draw_from.randint(1, mp.shared - mp.shared_reserved)))
                cases.append((target, registers, shared, num_warps))
                fixed = (number // 10, number % 10, mp.max_warps, mp.shared, mp.shared_reserved)
                lines.append(" ".join(map(str, (*fixed, registers, num_warps, shared))))
    printed = subprocess.run(
        [tmp_path / "occupancy"], input="\n".join(lines), capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(printed) == len(cases)
    for case, programs in zip(cases, printed, strict=True):
        assert occupancy(*case).programs == int(programs), case


@pytest.mark.compile
@pytest.mark.parametrize("target", ["gfx90a", "gfx942", "gfx1100"])
@pytest.mark.parametrize("workload", ["head", "activation_bwd"])
def test_occupancy_by_registers_is_llvms(target, workload):
    with TARGETS[target].simulated(assemble=True) as gpu:
        WORKLOADS[workload].run(64, torch.bfloat16)
    (launch,) = gpu.launches
    mp, needs = MULTIPROCESSORS[target], resources(launch)
    printed = re.search(r"^; Occupancy: (\d+)", str(launch.asm["amdgcn"]), re.MULTILINE)
    assert printed is not None
    assert min(warps_by_registers(target, needs.registers), mp.max_warps // mp.schedulers) == int(printed[1])


def test_occupancy_names_the_limit():
    assert occupancy("sm_80", 32, 0, 4).limited_by == "warps"
    assert occupancy("sm_80", 16, 0, 1).limited_by == "programs"
    assert occupancy("sm_80", 255, 0, 4).limited_by == "registers"
    assert occupancy("sm_80", 32, 100_000, 4).limited_by == "shared memory"
    assert occupancy("gfx942", 512, 0, 4).programs == 1
    assert occupancy("gfx1100", 64, 0, 4).fraction == 1.0
    with pytest.raises(ValueError, match="no program of 4 warps"):
        occupancy("sm_75", 64, 70_000, 4)


def test_every_kernel_has_its_work():
    assert set(WORK) == kernel_names()


def _small(name):
    """A launch that reads and writes each byte exactly once. It has one program, or programs that share nothing."""
    x, w, b = draw(16, 64), draw(16, 64, seed=1), draw(16)
    if name == "linear_fwd":
        kernels.linear_fwd(x, w, b, "gelu", save_z=True)
    elif name == "linear_dgrad":
        kernels.linear_dgrad(draw(16, 16), draw(16, 32), draw(16, 32, seed=1), "tanh")
    elif name == "linear_wgrad":
        kernels.linear_wgrad(draw(16, 16), draw(16, 32, seed=1), bias=False)
    elif name == "activation_bwd":
        kernels.activation_bwd(draw(48, 64), draw(48, 64, seed=1), "silu")
    elif name == "cross_entropy":
        kernels.cross_entropy(draw(96, 16), labels(96, 16), smoothing=0.1)
    elif name == "reduce_update":
        layers = [Layer(draw(30, 40), draw(30)), Layer(draw(7, 30), draw(7))]
        layout = Layout(layers)
        row = torch.tensor((1.0, 0.1, 1.0, 0.1, 0.999, 0.001, 1e-8, 0.0))
        reduce_update(layout, draw(3, layout.total), 3, "adamw", row, states=torch.zeros(2, layout.total))


@pytest.mark.execute
@pytest.mark.parametrize(
    "name", ["linear_fwd", "linear_dgrad", "linear_wgrad", "activation_bwd", "cross_entropy", "reduce_update"]
)
def test_compulsory_bytes_are_those_of_an_execution_that_repeats_nothing(name):
    with SimulatedGPU(80) as gpu:
        _small(name)
    (launch,) = gpu.launches
    work, stats = work_of(launch), launch.stats
    assert stats is not None
    scalars = 64 * math.prod(launch.grid) * launch.num_warps  # scalars such as the optimizer's row, read by every warp
    read = stats.global_load["bytes"] + stats.async_copy["bytes"]
    assert work.read <= read <= work.read + (scalars if name == "reduce_update" else 0)
    assert stats.global_store["bytes"] == work.written


@pytest.mark.execute
def test_sampled_execution_counts_as_the_whole():
    """All programs of a matrix product do the same, so a share of the programs has the same share of the counts."""
    with SimulatedGPU(80) as gpu:
        kernels.linear_fwd(draw(64, 64), draw(64, 64, seed=1), None, "relu")
    (launch,) = gpu.launches
    total = math.prod(launch.grid)
    assert total % 2 == 0
    stats, executed = execute(launch, total // 2)
    assert executed == total // 2
    assert launch.stats is not None
    assert stats.mma_flops * 2 == launch.stats.mma_flops == 3 * work_of(launch).matrix_flops
    assert stats.warp_instructions * 2 == launch.stats.warp_instructions


def test_touched_bytes():
    assert touched(torch.zeros(4, 6), None) == 96
    assert touched(torch.zeros(()).expand(100)) == 4
    assert touched(torch.zeros(8, 8, dtype=torch.bfloat16)[::2]) == 64
    assert touched(torch.zeros(0, 8)) == 0


def test_instruction_groups():
    expected = {
        "tensor core": "HMMA HGMMA UTCHMMA IMMA v_mfma_f32_16x16x16_bf16 v_wmma_f32_16x16x16_f16",
        "fma": "FFMA HFMA2 v_fma_f32 v_fmac_f32_e32 v_pk_fma_f32 v_dual_fmac_f32 v_fmamk_f32",
        "other float": "FADD FMUL MUFU F2FP I2F FSETP v_exp_f32_e32 v_add_f32_e32 v_cvt_f32_i32_e32 v_cmp_lt_f32_e64",
        "integer": "IMAD IADD3 LEA ISETP UIADD3 PRMT SHFL R2UR s_add_i32 v_mov_b32_e32 v_accvgpr_read_b32 v_and_b32",
        "global memory": "LDG STG global_load_dwordx4 buffer_store_short",
        "shared memory": "LDS STS LDSM STSM LDTM ds_read_b128 ds_bpermute_b32",
        "async": "LDGSTS LDGDEPBAR DEPBAR UTMALDG SYNCS",
        "control": "BRA EXIT BAR BSSY s_waitcnt s_barrier s_cbranch_scc0 WARPGROUP",
        "other": "ULDC LDC s_load_dwordx2",
    }
    assert tuple(expected) == GROUPS
    for group, names in expected.items():
        assert {name: group_of(name) for name in names.split()} == dict.fromkeys(names.split(), group)
    assert mix({"HMMA": 3, "NOP": 9, "FFMA": 2})["tensor core"] == 3
    assert sum(mix({"HMMA": 3, "NOP": 9, "FFMA": 2}).values()) == 5


@pytest.mark.compile
@pytest.mark.parametrize("target", ["sm_90", "gfx1100"])
def test_every_instruction_of_a_kernel_has_a_group(target):
    with TARGETS[target].simulated(assemble=True) as gpu:
        WORKLOADS["head"].run(64, torch.float16)
    counts = instructions(gpu.launches[0]).counts
    constants = re.compile(r"U?LDCU?$|s_load_b\d+$|s_load_dword|s_buffer_load")
    assert [name for name in counts if group_of(name) == "other" and not constants.match(name)] == []
    assert mix(counts)["tensor core"] > 0


def test_roofline():
    gpu = GPUS["A100 SXM 80 GB"]
    memory = roofline(Work(read=2_039_000_000), gpu, MODES["float32"])
    assert (memory.bound, memory.seconds) == ("memory", pytest.approx(1e-3))
    products = Work(matrix_flops=156_000_000_000)
    assert roofline(products, gpu, MODES["tf32"]).seconds == pytest.approx(1e-3)
    assert roofline(products, gpu, MODES["float32"]).seconds == pytest.approx(3e-3)
    assert roofline(products, gpu, MODES["bfloat16"]).seconds == pytest.approx(0.5e-3)
    assert roofline(Work(vector_flops=19_500_000_000), gpu, MODES["float32"]).bound == "vector"
    amd = GPUS["MI300X"]  # float32 stays as it is: no product is split in three
    assert roofline(Work(matrix_flops=163_400_000_000), amd, MODES["float32"]).seconds == pytest.approx(1e-3)
    works = [Work(read=2_039_000_000), products]
    assert total_roofline(works, gpu, MODES["tf32"]) == pytest.approx(2e-3)
    assert all(isinstance(mode, Mode) and mode.dtype in ("float32", "bfloat16", "float16") for mode in MODES.values())


def test_eager_kernels_are_counted():
    """The reference workload: forward, the loss and its gradient, 5 products and 3 sums backward, the optimizer."""
    operations = eager_step(64, fused=False)
    counts = Counter(op.name.removeprefix("aten.") for op in operations)
    assert counts == {
        "addmm": 3, "sigmoid": 2, "_log_softmax": 1, "nll_loss_forward": 1, "ones_like": 1, "nll_loss_backward": 1,
        "_log_softmax_backward_data": 1, "mm": 5, "sum": 3, "sigmoid_backward": 2, "_foreach_add_": 1,
    }  # fmt: skip
    first = operations[0].work
    assert first.matrix_flops == 2 * 64 * 784 * 512
    assert first.read == 4 * (512 + 64 * 784 + 784 * 512)
    assert first.written == 4 * 64 * 512
    params = 784 * 512 + 512 + 512 * 512 + 512 + 5120 + 10
    for fused in (False, True):
        update = eager_step(64, fused=fused)[-1].work
        assert (update.read, update.written) == (8 * params, 4 * params)
    assert len(eager_step(64, fused=True, resident=True)) == len(operations) + 4  # 2 index, a conversion, a division


def test_views_and_allocations_are_no_kernels():
    with OperationCounter() as counter:
        x = torch.empty(4, 6).t()[1:].reshape(-1).detach()
    assert [op.name for op in counter.operations] == ["aten.clone"]  # the reshape of a transposed tensor
    with OperationCounter() as counter:
        x.add_(1)
    (operation,) = counter.operations
    assert (operation.work.read, operation.work.written) == (80, 80)


@pytest.mark.launch
def test_fastmlps_launches_are_counted():
    step = Counter(op.name for op in fastmlp_step("sm_80", 64))
    launches = {name: n for name, n in step.items() if not name.startswith("aten.")}
    assert launches == {
        "_linear_fwd_kernel": 2, "_head_kernel": 1, "_linear_dgrad_kernel": 1, "_wgrad_update_kernel": 1,
    }  # fmt: skip
    assert set(step) - set(launches) <= {"aten.copy_"}
    tape = Counter(op.name for op in fastmlp_autograd_step("sm_80", 64))
    assert tape["_linear_wgrad_kernel"] == 3
    assert tape["aten._foreach_add_"] == 1
    assert "aten.copy_" not in tape  # gradients are handed over, not copied


def _row(**changes):
    row = {
        "target": "sm_80", "mode": "float32", "batch": 64, "workload": "linear_fwd", "kernel": "_linear_fwd_kernel",
        "spilled": 0, "shared": 100, "shared_limit": 100, "instructions": {"tensor core": 1},
        "expects_tensor_core": True, "sectors_over_minimum": 1.1, "gemm": True, "conflict_share": 0.1,
        "on_matrix_units": True, "matrix_flops_over_needed": 4.5, "budget_share": 1.0,
    }  # fmt: skip
    return {**row, **changes}


@pytest.mark.parametrize(
    ("section", "changes", "limit"),
    [
        (0, {"spilled": 8}, "spill"),
        (0, {"shared": 101}, "shared memory"),
        (0, {"instructions": {"tensor core": 0}}, "tensor core"),
        (1, {"on_matrix_units": False}, "tensor core"),
        (1, {"sectors_over_minimum": 1.2}, "sectors"),
        (1, {"conflict_share": 0.11}, "bank conflicts"),
        (1, {"matrix_flops_over_needed": 5.0}, "repeated products"),
        (2, {"budget_share": 1.01}, "error budget"),
        (2, {"budget_share": math.nan}, "error budget"),
    ],
)
def test_findings(section, changes, limit):
    clean = ([_row()], [_row()], [_row()])
    assert findings(*clean) == []
    clean[section].append(_row(**changes))
    (found,) = findings(*clean)
    assert (found.limit, found.workload, found.places) == (limit, "linear_fwd", ("sm_80 float32 64",))
    assert limit in LIMITS


def test_an_exception_has_a_reason_and_an_end(monkeypatch):
    exception = LimitException("sectors", "linear_fwd", "_linear_fwd_kernel", 1.25, "because")
    monkeypatch.setattr("bench.static.findings.EXCEPTIONS", (exception,))
    for sectors, reason in ((1.2, "because"), (1.3, "")):
        (found,) = findings([], [_row(sectors_over_minimum=sectors)], [])
        assert found.reason == reason


def test_errors_are_shares_of_the_budget():
    exact = torch.linspace(1, 2, 100, dtype=torch.float64)
    own = exact.float() * (1 + 1e-5)
    same = errors(Result("A", own, exact, own, 1))
    assert same["kernel_max"] == same["torch_max"] == pytest.approx(1e-5, rel=0.05)
    assert same["kernel_rms"] == same["torch_rms"] == pytest.approx(1e-5, rel=0.05)
    assert 0.45 < same["budget_share"] < 0.5
    assert errors(Result("A", exact.float() * (1 + 3e-5), exact, own, 1))["budget_share"] > 1


def test_tf32_rounds_to_ten_bits():
    x = torch.tensor([1 + 2**-10, 1 + 2**-11, 1 + 2**-12, -1 - 2**-11, 3.0])
    assert tf32(x).tolist() == [1 + 2**-10, 1 + 2**-10, 1.0, -1 - 2**-10, 3.0]
    assert tf32(torch.tensor([0x7FC00000, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)).isnan().all()
    assert tf32(torch.tensor([math.inf, -math.inf])).tolist() == [math.inf, -math.inf]


@pytest.mark.usefixtures("default_precision")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_mode_sets_the_precision_and_takes_it_back(name):
    steps, allowed = SETTINGS[name]
    for set_to, value in steps:
        set_to(value)
    for mode in ("tf32", "float32"):
        with float32_precision(mode):
            assert tf32_allowed() == (mode == "tf32")
        assert tf32_allowed() == allowed
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.backends.cudnn.fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"
    with float32_precision("float32"):
        assert not tf32_allowed()
    torch.backends.fp32_precision = "ieee"
    assert not tf32_allowed(), "the mode left a setting of its own behind"


def test_numbers():
    assert [significant(x) for x in (0.0, 1234.5, 0.00123456, -9.999)] == [0.0, 1230.0, 0.00123, -10.0]
    assert [compact(x) for x in (None, 0.5, 1234, 12345, 1.5e6, 2e12)] == ["-", "0.5", "1230", "12.3 k", "1.5 M", "2 T"]
    assert [bytes_text(n) for n in (12, 3456, 7_890_000, 2e9)] == ["12 B", "3.46 kB", "7.89 MB", "2 GB"]
    assert table(("a", "b"), [(1, 2)]) == "| a | b |\n|---|---:|\n| 1 | 2 |\n"


@pytest.fixture(scope="module")
def kept():
    return (RESULTS / "static.json").read_text(), (RESULTS / "STATIC.md").read_text()


def test_the_kept_report_is_written_from_its_json(kept):
    text, page = kept
    report = json.loads(text)
    assert dump(report) == text
    assert markdown(report) == page


def test_the_kept_report_is_complete(kept):
    report = json.loads(kept[0])
    assert {row["target"] for row in report["machine"]} == set(TARGETS)
    for section in ("machine", "execution"):
        assert {row["workload"] for row in report[section]} == set(WORKLOADS)
    # sm_80 splits neither reduction of these shapes. The kernel that adds the parts is in the steps of large batches.
    launched = {row["kernel"] for row in report["machine"]} | {
        name for row in report["steps"] for name in row["kernels"]
    }
    assert kernel_names() <= launched
    assert Counter(row["kernel"] for row in report["step_execution"]) == {
        "_linear_fwd_kernel": 2, "_head_kernel": 1, "_linear_dgrad_kernel": 1, "_wgrad_update_kernel": 1
    }  # fmt: skip
    assert [row for row in report["findings"] if not row["reason"]] == []
    # Every exception is needed by a finding.
    assert len({row["reason"] for row in report["findings"]}) == len({e.reason for e in EXCEPTIONS})
    assert {row["mode"] for row in report["numerics"]} == {"float32", "tf32", "bfloat16", "float16"}


def test_an_ensembles_step_is_the_work_of_its_members():
    """As many launches, all FLOPs of the members, and bytes of the batch that they share once."""
    from bench.static import ensembles

    one, ten = (ensembles._row("sm_90", "float32", members) for members in (1, 10))
    assert ten["launches"] == one["launches"] == 5
    assert ten["launches_of_a_loop"] == 50
    assert ten["matrix_flops"] == 10 * one["matrix_flops"]
    shared = 4 * 64 * 64 + 8 * 64  # x, which two launches read, and the labels
    assert 9 * one["bytes"] < ten["bytes"] <= 10 * one["bytes"]
    assert 10 * one["bytes"] - ten["bytes"] >= 9 * shared
    text = ensembles.ensemble_table([one, ten])
    assert "| sm_90 | float32 | 10 | 5 | 50 |" in text
    assert ensembles.ensemble_table([]) == ""
