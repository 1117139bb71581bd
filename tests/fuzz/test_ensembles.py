"""TrainStep of an MLPEnsemble on plain torch against autograd and torch.optim, member by member.

The budget is that of ``test_steps``. ``test_members`` has the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import fastmlp
from fastmlp import MLPEnsemble
from tests.conftest import HAS_GPU, INTERPRETING, uninitialized_is_nan
from tests.fuzz.cases import fuzz
from tests.fuzz.test_steps import OPTIMIZERS, Training, batches, check_trained, trainings
from tests.support.steps import converted, network, problem

pytestmark = pytest.mark.skipif(INTERPRETING or HAS_GPU, reason="plain torch is tested where no kernel runs")


@dataclass(frozen=True)
class Members:
    training: Training
    active: tuple[bool, ...]  #: of each member
    rates: bool  #: a learning rate of its own for each member
    own_data: bool
    own_order: bool


@st.composite
def ensembles(draw: st.DrawFn) -> Members:
    return Members(
        training=replace(draw(trainings()), weighted=False, options=(), dropout=()),
        active=tuple(draw(st.lists(st.booleans(), min_size=1, max_size=5))),
        rates=draw(st.booleans()),
        own_data=draw(st.booleans()),
        own_order=draw(st.booleans()),
    )


def own(t: Tensor, e: int, has_members: bool) -> Tensor:
    return t[e] if has_members else t


@fuzz(4, ensembles())
def test_train_step_of_an_ensemble(case: Members):
    check_ensemble(case)


def check_ensemble(case: Members) -> None:
    """Each member's loss and parameters are within the budget of what torch trains; those that stop do not change."""
    t, count = case.training, len(case.active)
    starts = [network(t.sizes, t.activations, bias=t.bias, seed=t.seed + e) for e in range(count)]
    problems = [problem(t.sizes, t.rows, loss=t.loss, uint8=t.pixels, seed=t.seed + e) for e in range(count)]
    x, y = (torch.stack(ts) if case.own_data else ts[0] for ts in zip(*problems, strict=True))
    orders = [torch.randperm(t.rows, generator=torch.Generator().manual_seed(t.seed + e)) for e in range(count)]
    order = torch.stack(orders) if case.own_order and t.epoch else orders[0]
    settings: dict[str, Any] = dict(OPTIMIZERS[t.optimizer])
    rates = [settings["lr"] * (1 + e / 4 if case.rates else 1) for e in range(count)]

    ensemble = MLPEnsemble.stack([converted(start, torch.float32) for start in starts])
    before = [p.detach().clone() for p in ensemble.parameters()]
    inputs = x if t.pixels else x.float()
    targets = y.float() if y.is_floating_point() else y
    with fastmlp.use_backend("torch"), uninitialized_is_nan():
        step = fastmlp.TrainStep(ensemble, loss=t.loss, dtype=t.dtype, **{**settings, "lr": rates})
        step.active = torch.tensor(case.active)
        if t.epoch:
            step.epoch(inputs, targets, t.batch, order)
            losses = step.losses[-1].cpu()
        else:
            for rows in batches(t, order):
                of_batch = [a[:, rows] if case.own_data else a[rows] for a in (inputs, targets)]
                losses = step(*of_batch).cpu()
    for e, active in enumerate(case.active):
        got = [losses[e], *(p.detach()[e].cpu() for p in ensemble.parameters())]
        if active:
            data = own(x, e, case.own_data), own(y, e, case.own_data)
            check_trained(t, starts[e], data, own(order, e, order.dim() == 2), {**settings, "lr": rates[e]}, got)
        else:
            assert losses[e].isnan()
            assert all(torch.equal(p[e], old[e]) for p, old in zip(ensemble.parameters(), before, strict=True))
