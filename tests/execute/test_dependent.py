"""A step of dependent launches on a simulated sm_90: each kernel waits, and the results are those without the option.

The simulated GPU raises an error where a dependent launch touches global memory before its wait. It runs one launch
after the other, so the test cannot show what happens where launches overlap.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import fastmlp
from fastmlp import TrainStep, use_backend
from fastmlp.kernels.dependent import dependent_launch, wait_for_previous
from tests.ptxsim import EarlyAccess, Launch, SimulatedGPU

pytestmark = pytest.mark.execute


def one_step(*, dependent: bool) -> tuple[list[Launch], list[Tensor]]:
    """The launches of a step, and the loss and parameters after it."""
    torch.manual_seed(0)
    model, loss = fastmlp.MLP((16, 16, 4)), torch.empty(())
    x, y = torch.randn(6, 16), torch.randint(0, 4, (6,))
    with SimulatedGPU(90, global_races=True) as gpu, use_backend("triton"):
        dependent_launch(dependent)
        try:
            loss = TrainStep(model, lr=0.1)(x, y)
        finally:
            dependent_launch(False)
    return gpu.launches, [loss, *(p.detach() for p in model.parameters())]


def test_a_step_of_dependent_launches():
    plain, expected = one_step(dependent=False)
    launches, found = one_step(dependent=True)
    assert [launch.name for launch in launches] == [launch.name for launch in plain]
    assert [launch.dependent for launch in launches] == [True] * 3
    assert not any(launch.dependent for launch in plain)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@triton.jit
def _add_one(x_ptr, y_ptr, BEFORE: tl.constexpr, WAITS: tl.constexpr):
    offs = tl.program_id(0) * 128 + tl.arange(0, 128)
    if BEFORE:
        x = tl.load(x_ptr + offs)
    if WAITS and tl.program_id(0) > 0:
        wait_for_previous()
    if not BEFORE:
        x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, x + 1)


@pytest.mark.parametrize("mode", ["lockstep", "warpwise"])
def test_an_early_access_is_an_error(mode):
    """A load before the wait, no wait, and a wait that one program leaves out; without the option all are right."""
    x = torch.arange(256.0)
    for before, waits in ((True, True), (False, False), (False, True)):
        y = torch.zeros(256)
        with SimulatedGPU(90, mode=mode):
            _add_one[(2,)](x, y, before, waits)
            assert torch.equal(y, x + 1)
            with pytest.raises(EarlyAccess, match="before the wait"):
                _add_one[(2,)](x, y, before, waits, launch_pdl=True)
