"""100 steps of an ensemble: each member against the same MLP trained alone, for every optimizer and every loss.

In Triton's interpreter both take the same tiles and agree bit by bit. A GPU may have other tiles for an ensemble, and a
CPU other products. There, and against float64, the error budget of a run holds.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastmlp
from fastmlp import MLPEnsemble, TrainStep
from fastmlp.base.losses import STEP_LOSSES
from fastmlp.step.optimizers import OPTIMIZERS as RULES
from tests.conftest import INTERPRETING, UNSIMULATED
from tests.support.covering import diagonal
from tests.support.steps import (
    assert_run_within_budget,
    batches,
    converted,
    flat,
    for_step,
    network,
    one_thread,  # noqa: F401
    problem,
    trained_by_torch,
)
from tests.support.torchs import OPTIMIZERS

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

SIZES, ROWS, BATCH, STEPS = (3, 5, 4), 10, 4, 100
#: What the learning rate of each member is multiplied by.
RATES = (1.0, 0.5)
EPS = torch.finfo(torch.float32).eps


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """By day every optimizer once and every loss once; on the kernels two of these cases."""
    grid = [(rule, loss) for rule in RULES for loss in STEP_LOSSES]
    if not metafunc.config.getoption("--full"):
        grid = [case for case, taken in zip(grid, diagonal(grid), strict=True) if taken]
        grid = grid[::3] if metafunc.function is test_on_the_kernels else grid
    metafunc.parametrize(("rule", "loss"), grid)


def test_on_plain_torch(rule, loss):
    check("torch", torch.device("cpu"), rule, loss, STEPS)


@UNSIMULATED
def test_on_the_kernels(request, unsimulated, rule, loss):
    """Two steps by day in the interpreter, which takes a third of a second per step."""
    full = request.config.getoption("--full") or not INTERPRETING
    check("triton", unsimulated, rule, loss, STEPS if full else 2)


def check(backend: str, device: torch.device, rule: str, loss: str, steps: int) -> None:
    """Members with data and learning rates of their own."""
    settings: dict[str, Any] = next(of for of in OPTIMIZERS.values() if of.get("optimizer", "sgd") == rule)
    rates = [settings["lr"] * factor for factor in RATES]
    starts = [network(SIZES, "gelu", seed=e) for e in range(len(rates))]
    data = [batches(*problem(SIZES, ROWS, loss=loss, seed=e + 1), BATCH, steps) for e in range(len(rates))]
    singles = [converted(start, torch.float32).to(device) for start in starts]
    with fastmlp.use_backend(backend):
        ensemble = MLPEnsemble.stack(singles)
        together = TrainStep(ensemble, loss=loss, **{**settings, "lr": rates})
        alone = [TrainStep(m, loss=loss, **{**settings, "lr": lr}) for m, lr in zip(singles, rates, strict=True)]
    same_bits = backend == "triton" and INTERPRETING
    for of_members in zip(*data, strict=True):
        given = [[t.to(device) for t in for_step(x, y, torch.float32)] for x, y in of_members]
        losses = together(*(torch.stack(of) for of in zip(*given, strict=True)))
        expected = torch.stack([step(*batch) for step, batch in zip(alone, given, strict=True)])
        if same_bits:
            assert torch.equal(losses, expected)
    members = ensemble.unstack()
    for start, lr, batches_of, member, single in zip(starts, rates, data, members, singles, strict=True):
        exact, own = (
            trained_by_torch(start, batches_of, {**settings, "lr": lr}, loss, dtype).parameters
            for dtype in (torch.float64, torch.float32)
        )
        got, apart = flat(member).cpu(), flat(single).cpu()
        assert (got - flat(start)).norm() > 1e-4 * flat(start).norm(), "nothing was learned"
        if same_bits:
            assert torch.equal(got, apart)
        for other in (own, apart):
            assert_run_within_budget(got, exact, other, steps, EPS)
