"""Every kernel warp by warp, in random order, with the executor's checks on.

In shared memory the checks find races between warps, reads of bytes that were never written, and use of data that an
asynchronous copy has not brought yet. In global memory they find accesses outside the arguments, and two programs that
store different values to one place. All programs are in flight together, and warps are switched after random memory
instructions. For every seed the result must equal the lockstep run bit by bit, because nothing may depend on an order
that the GPU does not promise.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastmlp.kernels import linear_wgrad
from tests.conftest import uninitialized_is_nan
from tests.kernels.launches import LAUNCHES
from tests.ptxsim import SimulatedGPU
from tests.support.harness import assert_within_budget, poisoned

pytestmark = pytest.mark.execute

CPU = torch.device("cpu")
#: Seeds for tests in which data pass from one launch or program to another.
SYNCHRONIZING_SEEDS = range(30)


def random_order(arch: int, seed: int) -> SimulatedGPU:
    """A simulated GPU that makes every check and promises no order."""
    return SimulatedGPU(arch, mode="warpwise", seed=seed, interleave=True, preempt=0.02, global_races=True)


def both_ways(
    launch: Callable[[], list[Tensor | None]], arch: int, seed: int
) -> list[tuple[Tensor | None, Tensor | None]]:
    """The results in lockstep and in random order."""
    with uninitialized_is_nan():
        with SimulatedGPU(arch):
            lockstep = launch()
        with random_order(arch, seed):
            shuffled = launch()
    return list(zip(lockstep, shuffled, strict=True))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One order on every architecture; with ``--full`` three on sm_80."""
    if "arch" in metafunc.fixturenames:
        more = [(80, 1), (80, 2)] if metafunc.config.getoption("full") else []
        metafunc.parametrize(("arch", "seed"), [(80, 0), (75, 0), (120, 0), *more])


@pytest.mark.parametrize("name", LAUNCHES)
def test_order_of_warps_and_programs_does_not_matter(name: str, arch: int, seed: int) -> None:
    for lockstep, shuffled in both_ways(lambda: LAUNCHES[name](CPU), arch, seed):
        if lockstep is not None:
            assert shuffled is not None
            assert torch.equal(lockstep, shuffled)


@pytest.mark.parametrize("seed", SYNCHRONIZING_SEEDS)
def test_split_reduction(seed: int) -> None:
    """Programs share a tile's reduction, and a second launch adds their partial sums."""
    dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
    g = torch.Generator().manual_seed(seed)
    dz = poisoned(torch.randn(515 + seed, 9, generator=g).to(dtype))
    x = poisoned(torch.randn(515 + seed, 17, generator=g).to(dtype))
    with random_order(75 if dtype == torch.float16 else 80, seed) as gpu, uninitialized_is_nan():
        dw, db = linear_wgrad(dz, x)
    assert [launch.name for launch in gpu.launches] == ["_linear_wgrad_kernel", "_wgrad_reduce_kernel"]
    assert gpu.launches[0].grid[1] == 2
    assert db is not None
    rows = dz.shape[0]
    assert_within_budget(dw, dz.double().T @ x.double(), dz.T @ x, reduction=rows, what="dW")
    assert_within_budget(db, dz.double().sum(0), dz.sum(0), reduction=rows, what="db")
