"""SimulatedGPU: ordinary Triton launches on CPU tensors, compiled and executed without a GPU."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from tests.ptxsim import TRITON, NullGPU, OutOfBounds, SharedRace, SimulatedGPU
from tests.ptxsim.samples.split_k import k_splitk

pytestmark = pytest.mark.execute

RECORD_ONLY = [("hip", "gfx90a"), ("hip", "gfx942"), ("hip", "gfx1100"), 90, 100]


@triton.jit
def scale(x, y, n, factor, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + offs, tl.load(x + offs, mask=offs < n) * factor, mask=offs < n)


@triton.jit
def scale_group(xs, sizes, L: tl.constexpr, BLOCK: tl.constexpr):
    for i in tl.static_range(L):
        if tl.program_id(0) == i:
            offs = tl.arange(0, BLOCK)
            tl.store(xs[i] + offs, tl.load(xs[i] + offs, mask=offs < sizes[i]) * 2, mask=offs < sizes[i])


@triton.jit
def optional_bias(x, b, y, n, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    v = tl.load(x + offs, mask=offs < n)
    if HAS_BIAS:
        v += tl.load(b + offs, mask=offs < n)
    if ACTIVATION == "relu":
        v = tl.maximum(v, 0.0)
    tl.store(y + offs, v, mask=offs < n)


def run_scale(factor: float = 2.0, n: int = 8) -> bool:
    """Whether a launch writes the right values."""
    x, y = torch.randn(n), torch.full((n,), float("nan"))
    scale[(1,)](x, y, n, factor, BLOCK=16)
    return torch.equal(y, x * factor)


@pytest.mark.parametrize("arch", [75, 80, 120])
@pytest.mark.parametrize("n", [1, 16, 130])
def test_launch_runs_the_compiled_kernel(arch: int, n: int) -> None:
    x, y = torch.randn(n), torch.full((n,), float("nan"))
    with SimulatedGPU(arch) as gpu:
        scale[(triton.cdiv(n, 64),)](x, y, n, 3.0, BLOCK=64)
    assert torch.equal(y, x * 3)
    (launch,) = gpu.launches
    assert (launch.name, launch.grid, launch.arch) == ("scale", (triton.cdiv(n, 64), 1, 1), arch)
    assert launch.arguments["n"] == n
    assert launch.arguments["x"] is x
    assert launch.constexprs == ({"BLOCK": 64, "n": 1} if n == 1 else {"BLOCK": 64})
    assert launch.stats.global_store["bytes"] == 4 * n
    assert (launch.num_warps, launch.shared) == (4, 0)
    assert launch.num_stages >= 1
    assert ".entry scale" in launch.asm["ptx"]
    assert (launch.asm["cubin"] == b"") == (TRITON >= (3, 8))


def test_tuple_of_tensors() -> None:
    xs = [torch.ones(10 + i) for i in range(3)]
    with SimulatedGPU(80) as gpu:
        scale_group[(3,)](tuple(xs), tuple(len(x) for x in xs), L=3, BLOCK=16)
    assert all(torch.equal(x, torch.full_like(x, 2.0)) for x in xs)
    assert gpu.launches[0].constexprs == {"L": 3, "BLOCK": 16}


def test_constexpr_within_a_tuple() -> None:
    xs = [torch.ones(1 + 9 * i) for i in range(2)]  # Triton makes the size of 1 a constant
    with SimulatedGPU(80) as gpu:
        scale_group[(2,)](tuple(xs), tuple(len(x) for x in xs), L=2, BLOCK=16)
    assert all(torch.equal(x, torch.full_like(x, 2.0)) for x in xs)
    assert gpu.launches[0].constexprs == {"sizes[0]": 1, "L": 2, "BLOCK": 16}


@pytest.mark.parametrize("bias", [True, False])
def test_none_and_flags(bias: bool) -> None:
    x, y = torch.randn(20), torch.full((20,), float("nan"))
    b = torch.randn(20) if bias else None
    with SimulatedGPU(80) as gpu:
        optional_bias[(1,)](x, b, y, 20, HAS_BIAS=bias, ACTIVATION="relu", BLOCK=32)
    assert torch.equal(y, torch.relu(x + b if bias else x))
    launch = gpu.launches[0]
    assert launch.arguments["b"] is b
    flags = {"HAS_BIAS": bias, "ACTIVATION": "relu", "BLOCK": 32}
    assert launch.constexprs == (flags if bias else {"b": None, **flags})


def test_no_real_gpu_has_the_number_of_a_simulated_one() -> None:
    """Otherwise Triton would hand a real GPU the kernels compiled for a simulated GPU of the same number."""
    numbers = [SimulatedGPU(arch, execute=False).get_current_device() for arch in (80, 90, ("hip", "gfx942"), 80)]
    assert min(numbers) >= 1000
    assert numbers[0] == numbers[3]
    assert len(set(numbers)) == 3


def test_two_architectures_in_one_process_keep_apart() -> None:
    with SimulatedGPU(80) as a:
        assert run_scale()
    with SimulatedGPU(("hip", "gfx942"), execute=False) as b:
        run_scale()
    with SimulatedGPU(80) as c:
        assert run_scale(3.0)
    assert [g.launches[0].arch for g in (a, b, c)] == [80, "gfx942", 80]
    assert len(a.launches) == len(b.launches) == len(c.launches) == 1


@pytest.mark.parametrize("target", RECORD_ONLY, ids=str)
def test_record_only_leaves_memory_alone(target: Any) -> None:
    x, y = torch.randn(8), torch.zeros(8)
    with SimulatedGPU(target, execute=False, assemble=True) as gpu:
        scale[(1,)](x, y, 8, 1.0, BLOCK=16)
    assert torch.equal(y, torch.zeros(8))
    (launch,) = gpu.launches
    assert launch.stats is None
    assert launch.arch == (target if isinstance(target, int) else target[1])
    assert launch.asm["cubin" if isinstance(target, int) else "hsaco"][:4] == b"\x7fELF"


def test_recording_and_executing_share_a_kernel() -> None:
    with SimulatedGPU(80, execute=False) as gpu:
        assert not run_scale(5.0)
    with SimulatedGPU(80):
        assert run_scale(5.0)
    assert gpu.launches[0].stats is None


def test_what_cannot_be_executed_is_refused() -> None:
    with pytest.raises(ValueError, match="execute=False"):
        SimulatedGPU(("hip", "gfx942"))


def test_interpreter_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), SimulatedGPU(80):
        pass


def test_out_of_bounds_is_an_error() -> None:
    x, y = torch.randn(64), torch.empty(32)
    with SimulatedGPU(80), pytest.raises(OutOfBounds, match="past the end of 'y'"):
        scale[(1,)](x, y, 64, 1.0, BLOCK=64)


def test_launch_options_reach_the_launch() -> None:
    X, W, o = torch.randn(16, 128), torch.randn(32, 128), torch.zeros(16, 32)
    with SimulatedGPU(80, global_races=True), pytest.raises(SharedRace, match="two CTAs"):
        k_splitk[(1, 1, 4)](X, W, o, 16, 32, 128, 32, ATOMIC=False, BM=16, BN=32, BK=32)


def test_members_of_a_tuple_in_messages() -> None:
    xs = (torch.ones(10), torch.ones(11))
    with SimulatedGPU(80), pytest.raises(OutOfBounds, match=r"past the end of 'xs\[1\]'"):
        scale_group[(2,)](xs, (10, 12), L=2, BLOCK=16)


def _state() -> tuple[Any, Any]:
    return driver._active, CompiledKernel._init_handles


@pytest.mark.parametrize("body", ["exception", "nested", "reused", "reentered"])
def test_state_is_restored(body: str) -> None:
    before = _state()
    gpu = SimulatedGPU(80)
    if body == "exception":
        with pytest.raises(ZeroDivisionError), gpu:
            raise ZeroDivisionError
    elif body == "nested":
        with gpu:
            inside = _state()
            with SimulatedGPU(75) as other:
                assert run_scale()
            assert _state() == inside
            assert run_scale()
        assert [(g.launches[0].arch, len(g.launches)) for g in (gpu, other)] == [(80, 1), (75, 1)]
    elif body == "reused":
        for _ in range(2):
            with gpu:
                assert run_scale()
            assert _state() == before
        assert len(gpu.launches) == 2
    else:
        with gpu:
            with gpu:
                assert run_scale()
            assert driver.active is gpu
            assert run_scale()
        assert len(gpu.launches) == 2
    assert _state() == before


def test_failed_launch_leaves_the_gpu_usable() -> None:
    with SimulatedGPU(80) as gpu:
        with pytest.raises(OutOfBounds):
            scale[(1,)](torch.randn(64), torch.empty(32), 64, 1.0, BLOCK=64)
        assert run_scale()
    assert len(gpu.launches) == 1


def test_kernel_needs_a_gpu_in_charge() -> None:
    x, y = torch.randn(8), torch.zeros(8)
    with SimulatedGPU(80):
        kernel = scale[(1,)](x, y, 8, 1.0, BLOCK=16)
    previous = driver._active
    driver.set_active(object())
    try:
        with pytest.raises(RuntimeError, match="within `with SimulatedGPU"):
            kernel.run(1, 1, 1, 0, None, None, None, None, None, x, y, 8, 1.0, 16)
    finally:
        driver.set_active(previous)


def test_launch_hooks_are_called() -> None:
    seen: list[tuple[str, str]] = []

    def note(when: str) -> Callable[[Any], None]:
        return lambda metadata: seen.append((when, metadata.get()["name"]))

    enter, leave = note("enter"), note("exit")
    knobs.runtime.launch_enter_hook.add(enter)
    knobs.runtime.launch_exit_hook.add(leave)
    try:
        with SimulatedGPU(80):
            run_scale()
    finally:
        knobs.runtime.launch_enter_hook.remove(enter)
        knobs.runtime.launch_exit_hook.remove(leave)
    assert seen == [("enter", "scale"), ("exit", "scale")]


def test_tensors_live_no_longer_than_the_record() -> None:
    with SimulatedGPU(80) as gpu:
        x, y = torch.randn(8), torch.empty(8)
        scale[(1,)](x, y, 8, 7.0, BLOCK=16)
    alive = weakref.ref(x)
    del x, y
    gc.collect()
    assert alive() is not None
    del gpu
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(
    ("target", "shared", "multiprocessors"),
    [(75, 65536, 40), (80, 166912, 108), (90, 232448, 132), (120, 101376, 170), (("hip", "gfx942"), 65536, 304)],
    ids=str,
)
def test_device_properties(target: Any, shared: int, multiprocessors: int) -> None:
    with SimulatedGPU(target, execute=False) as gpu:
        active = driver.active
        properties = active.utils.get_device_properties(active.get_current_device())
    assert (gpu.max_shared_mem, gpu.multiprocessor_count) == (shared, multiprocessors)
    assert properties["max_shared_mem"] == shared
    assert properties["multiprocessor_count"] == multiprocessors
    assert properties["warpSize"] == (64 if isinstance(target, tuple) else 32)
    assert active.get_active_torch_device() == torch.device("cpu")
    assert SimulatedGPU(80, multiprocessors=7).multiprocessor_count == 7


@triton.jit
def shared_tile(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    t = tl.load(x + i[:, None] * N + i[None, :])
    tl.store(y + i[:, None] * N + i[None, :], tl.dot(t, t, input_precision="tf32"))


def test_too_much_shared_memory_is_refused_as_on_the_device() -> None:
    x = torch.randn(128, 128)
    with SimulatedGPU(80, execute=False) as gpu:
        shared_tile[(1,)](x, torch.empty_like(x), N=128)
    assert 101376 < gpu.launches[0].shared <= gpu.max_shared_mem
    with SimulatedGPU(86, execute=False), pytest.raises(triton.runtime.OutOfResources, match="shared memory"):
        shared_tile[(1,)](x, torch.empty_like(x), N=128)


@pytest.mark.parametrize("first", [SimulatedGPU, NullGPU])
def test_null_gpu_compiles_and_launches_nothing(first: type[SimulatedGPU]) -> None:
    """Each of the two keeps its own launcher, whichever compiled a kernel first."""
    before = _state()
    factor = 11.0 if first is NullGPU else 12.0
    for kind in (first, NullGPU, SimulatedGPU):
        with kind(90) as gpu:
            assert run_scale(factor) is (kind is SimulatedGPU)
        assert len(gpu.launches) == (kind is SimulatedGPU)
    assert _state() == before
