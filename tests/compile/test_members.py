"""An ensemble's step keeps the limits of the compile lane, and a single model's code has no member axis."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import fastmlp
from fastmlp import TrainStep, use_backend
from fastmlp.kernels.configs import Tile, all_tiles
from fastmlp.kernels.members import MOST
from tests.ptxsim import Launch

from . import limits
from .cases import Case
from .machine_code import disassemble
from .step_cases import Head
from .targets import TARGETS, Target

pytestmark = pytest.mark.compile

SIZES, BATCH = (64, 64, 64, 16), 64
#: How the launcher of a kernel is called in the tables of cases, and a variant with the same operands.
CASES = {
    "_linear_fwd_kernel": ("linear_fwd", "sigmoid"),
    "_linear_dgrad_kernel": ("linear_dgrad", "sigmoid"),
    "_wgrad_update_kernel": ("wgrad_update", "sgd"),
    "_head_kernel": ("head", "sigmoid"),
}
#: A target of each kind of GPU; --full takes all targets and dtypes.
FEW = (("sm_90", torch.float32), ("sm_80", torch.bfloat16), ("gfx942", torch.float16))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" in metafunc.fixturenames:
        every = [(name, dtype) for name, target in TARGETS.items() for dtype in target.dtypes]
        chosen = every if metafunc.config.getoption("--full") else FEW
        metafunc.parametrize(
            ("target", "dtype"), [pytest.param(TARGETS[name], dtype, id=f"{name}-{dtype}") for name, dtype in chosen]
        )


def step(target: Target, dtype: torch.dtype, members: int) -> list[Launch]:
    """The launches of a step of plain SGD."""
    x, y = torch.zeros(BATCH, SIZES[0], dtype=dtype), torch.zeros(BATCH, dtype=torch.int64)
    with target.simulated(assemble=True) as gpu, use_backend("triton"):
        model = fastmlp.MLPEnsemble(SIZES, members)
        TrainStep(model, lr=0.1, dtype=dtype)(x, y)
    return gpu.launches


def tile_of(launch: Launch, kind: str, dtype: torch.dtype, target: Target) -> Tile:
    """The tile of the tables that the launch took."""
    at = launch.constexprs
    rows, cols, depth = {
        "fwd": (at["BLOCK_M"], at["BLOCK_N"], at.get("BLOCK_K")),
        "dgrad": (at["BLOCK_M"], at.get("BLOCK_K"), at["BLOCK_N"]),
        "update": (at["BLOCK_N"], at.get("BLOCK_K"), at["BLOCK_M"]),
    }[kind]
    tiles = all_tiles(kind, dtype, target.device, wide=True)
    return next(t for t in tiles if (t.rows, t.cols, t.depth, t.num_warps) == (rows, cols, depth, launch.num_warps))


def cases(launches: list[Launch], dtype: torch.dtype, target: Target) -> Iterator[tuple[Case, Launch]]:
    for launch in launches:
        # The table's heads have 512 inputs, for which sm_100 has a deeper step of the main loop than for 64.
        if launch.name in CASES and (target.name, launch.name) != ("sm_100", "_head_kernel"):
            name, variant = CASES[launch.name]
            # Programs of 64 rows are those of a single model's large batches, whose exceptions are named so.
            tile = Head(16384 if launch.constexprs["BLOCK_M"] > 16 else BATCH, SIZES[-1], SIZES[-2])
            if name != "head":
                kind = {"linear_fwd": "fwd", "linear_dgrad": "dgrad"}.get(name, "update")
                tile = tile_of(launch, kind, dtype, target)
            yield Case(name, target, dtype, tile, variant), launch


@pytest.mark.parametrize("members", [10, 1000])
def test_limits(target: Target, dtype: torch.dtype, members: int) -> None:
    """No spill, no narrow load, no second pass and so on, with tiles for few and for many members."""
    launches = step(target, dtype, members)
    disassemble(launches)
    found = [
        f"{case.name}: {limits.LIMITS[limit]}: {what}"
        for case, launch in cases(launches, dtype, target)
        for limit, what in limits.violations(case, launch).items()
        if limit not in limits.exceptions_for(case)
    ]
    assert not found, "\n".join(found)
    late = {"_reduce_update_kernel", "_before_update_kernel"} if dtype == torch.float16 else set()
    assert {launch.name for launch in launches} == set(CASES) | late
    assert {launch.grid[2] for launch in launches} == {members}


def test_one_member_has_the_tiles_of_a_single_model() -> None:
    def tiles(model: nn.Module) -> list[tuple[object, ...]]:
        with TARGETS["sm_90"].simulated() as gpu, use_backend("triton"):
            TrainStep(model, lr=0.1)(torch.zeros(BATCH, SIZES[0]), torch.zeros(BATCH, dtype=torch.int64))
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_C", "SLICES")
        return [(of.name, of.grid, of.num_warps, [of.constexprs.get(n) for n in names]) for of in gpu.launches]

    assert tiles(fastmlp.MLPEnsemble(SIZES, 1)) == tiles(fastmlp.MLP(SIZES))


def test_a_single_model_has_no_member_axis() -> None:
    """The code of its kernels asks for no z axis and gets no strides of members."""
    with TARGETS["sm_90"].simulated() as gpu, use_backend("triton"):
        TrainStep(fastmlp.MLP(SIZES), lr=0.1, max_grad_norm=1.0)(
            torch.zeros(BATCH, SIZES[0]), torch.zeros(BATCH, dtype=torch.int64)
        )
    for launch in gpu.launches:
        assert "%ctaid.z" not in str(launch.asm["ptx"]), launch.name
        assert launch.arguments["members"] is None


def test_too_many_members(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a launch that the GPU would refuse."""
    # Parameters without values take ten seconds to be drawn one member after the other.
    monkeypatch.setattr(fastmlp.MLPEnsemble, "reset_parameters", lambda self: None)
    with TARGETS["sm_90"].simulated() as gpu, use_backend("triton"):
        model = fastmlp.MLPEnsemble((2, 2), MOST + 1, device="meta").to_empty(device="cpu")
        with pytest.raises(ValueError, match="at most 65,535 members"):
            TrainStep(model, lr=0.1)
    assert not gpu.launches
