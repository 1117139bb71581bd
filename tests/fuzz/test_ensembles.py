"""TrainStep of an MLPEnsemble against autograd and torch.optim, member by member, with the budget of test_steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import fastmlp
from fastmlp import MLPEnsemble
from tests.conftest import WITH_KERNELS, uninitialized_is_nan
from tests.fuzz.cases import fuzz
from tests.fuzz.test_steps import BACKEND, DEVICE, OPTIMIZERS, Training, batches, check_trained, trainings
from tests.support.steps import converted, network, problem

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"), *WITH_KERNELS]


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
        training=draw(trainings()),
        active=tuple(draw(st.lists(st.booleans(), min_size=1, max_size=5))),
        rates=draw(st.booleans()),
        own_data=draw(st.booleans()),
        own_order=draw(st.booleans()),
    )


def own(t: Tensor, e: int, has_members: bool) -> Tensor:
    return t[e] if has_members else t


@fuzz(4, ensembles())
def test_train_step_of_an_ensemble(case: Members):
    t, count = case.training, len(case.active)
    starts = [network(t.sizes, t.activations, bias=t.bias, seed=t.seed + e) for e in range(count)]
    problems = [problem(t.sizes, t.rows, loss=t.loss, uint8=t.pixels, seed=t.seed + e) for e in range(count)]
    x, y = (torch.stack(ts) if case.own_data else ts[0] for ts in zip(*problems, strict=True))
    orders = [torch.randperm(t.rows, generator=torch.Generator().manual_seed(t.seed + e)) for e in range(count)]
    order = torch.stack(orders) if case.own_order and t.epoch else orders[0]
    settings: dict[str, Any] = dict(OPTIMIZERS[t.optimizer])
    rates = [settings["lr"] * (1 + e / 4 if case.rates else 1) for e in range(count)]

    ensemble = MLPEnsemble.stack([converted(start, torch.float32) for start in starts]).to(DEVICE)
    before = [p.detach().clone() for p in ensemble.parameters()]
    inputs = (x if t.pixels else x.float()).to(DEVICE)
    targets = (y.float() if y.is_floating_point() else y).to(DEVICE)
    with fastmlp.use_backend(BACKEND), uninitialized_is_nan():
        step = fastmlp.TrainStep(ensemble, loss=t.loss, dtype=t.dtype, **{**settings, "lr": rates})
        step.active = torch.tensor(case.active)
        if t.epoch:
            step.epoch(inputs, targets, t.batch, order.to(DEVICE))
            losses = step.losses[-1].cpu()
        else:
            for rows in batches(t, order):
                rows = rows.to(DEVICE)
                of_batch = [a[:, rows] if case.own_data else a[rows] for a in (inputs, targets)]
                losses = step(*of_batch).cpu()
    for e, active in enumerate(case.active):
        got = [losses[e], *(p.detach()[e].cpu() for p in ensemble.parameters())]
        if active:
            of_member = own(x, e, case.own_data), own(y, e, case.own_data), own(order, e, order.dim() == 2)
            check_trained(t, starts[e], *of_member, {**settings, "lr": rates[e]}, got)
        else:
            assert losses[e].isnan()
            assert all(torch.equal(p[e], old[e]) for p, old in zip(ensemble.parameters(), before, strict=True))
