"""TritonStep with members: each member against the same network trained alone by the kernels, and against float64.

A member computes the bits of a single model wherever both take the same tiles, as always in the interpreter.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmlp.step.groups import Groups
from fastmlp.step.optimizers import SGD, AdamW, Lion, Optimizer, RMSprop
from fastmlp.step.per_member import PerMember
from fastmlp.step.triton_step import TritonStep
from tests.conftest import INTERPRETING, UNSIMULATED
from tests.support.harness import assert_within_budget

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

E, M, SIZES = 2, 7, (6, 5, 4)
RATES = (0.1, 0.03)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layers(lane: torch.device, e: int | None, *, dtype: torch.dtype = torch.float32, frozen: int = 0) -> list[Any]:
    """The layers of all members, or of member e; the first ``frozen`` ones are not trained."""
    made = []
    for i, (k, n) in enumerate(itertools.pairwise(SIZES)):
        weight, bias = draw(E, n, k, seed=i) / k**0.5, draw(E, n, seed=i + 9)
        of = [(t if e is None else t[e]).to(lane, dtype).clone().requires_grad_(i >= frozen) for t in (weight, bias)]
        activation = "gelu" if i == 0 else "identity"
        made.append(SimpleNamespace(weight=of[0], bias=of[1], activation=activation))
    return made


def batch(lane: torch.device, loss: str, seed: int, *, own: bool = True, count: int = M) -> tuple[Tensor, Tensor]:
    """X and targets of each member, or the same for all."""
    x = draw(E, count, SIZES[0], seed=seed)
    if loss in ("cross_entropy", "softmax_squared_error"):
        y = torch.randint(0, SIZES[-1], (E, count), generator=torch.Generator().manual_seed(seed))
    else:
        y = draw(E, count, SIZES[-1], seed=seed + 1).sigmoid()
    return (x.to(lane), y.to(lane)) if own else (x[0].to(lane), y[0].to(lane))


def single_rule(rule: Optimizer, e: int) -> Optimizer:
    """The rule with the settings of member e."""
    own = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)}
    return type(rule)(**{name: v[e] if isinstance(v, PerMember) else v for name, v in own.items()})


def of(t: Tensor, e: int, dims: int) -> Tensor:
    """Member e's part of a batch that may be shared."""
    return t if t.dim() == dims else t[e]


def engines(lane, rule, loss, dtype, active=None, **options):
    """(engine of all members, engines of single members), and their layers."""
    together, alone = layers(lane, None, **options), [layers(lane, e, **options) for e in range(E)]
    ensemble = TritonStep(together, rule, loss, dtype, cuda_graph=False, members=E, active=active)
    singles = [
        TritonStep(own, single_rule(rule, e), loss, dtype, cuda_graph=False) for e, own in enumerate(alone)
    ]  # fmt: skip
    return ensemble, singles, together, alone


def assert_same(ensemble, singles, together, alone) -> None:
    """Parameters and states of every member are those of the single models."""
    state = ensemble.parameter_state()
    assert list(state) == list(singles[0].parameter_state())
    for e, own in enumerate(alone):
        pairs = [
            (getattr(a, name)[e], getattr(b, name))
            for a, b in zip(together, own, strict=True)
            for name in ("weight", "bias")
        ]
        for name, tensors in singles[e].parameter_state().items():
            pairs += [(t[e], s) for t, s in zip(state[name], tensors, strict=True)]
        for got, want in pairs:
            if INTERPRETING:
                assert torch.equal(got, want), f"member {e}: {(got - want).abs().max()}"
            torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-3)


CASES = {
    "sgd": (SGD(PerMember(RATES)), "cross_entropy", torch.float32, True),
    "adamw": (
        AdamW(PerMember(RATES), weight_decay=PerMember((0.0, 0.1)), ema_decay=0.9, ema_warmup=True),
        "cross_entropy",
        torch.float32,
        False,
    ),
    "momentum bfloat16": (SGD(0.1, momentum=PerMember((0.1, 0.9)), max_grad_norm=0.5), "mse", torch.bfloat16, False),
    "adamw float16 clipped": (
        AdamW(PerMember(RATES), max_grad_norm=0.1, ema_decay=0.9, ema_warmup=True),
        "cross_entropy",
        torch.float16,
        True,
    ),
    "lion": (Lion(PerMember(RATES), weight_decay=PerMember((0.0, 0.1))), "cross_entropy", torch.float32, False),
    "rmsprop": (RMSprop(0.01, momentum=0.5, centered=True, maximize=True), "mse", torch.float32, True),
    "squared error": (SGD(0.1, weight_decay=0.1, ema_decay=0.9), "softmax_squared_error", torch.float32, False),
}


@UNSIMULATED
@pytest.mark.parametrize("case", ["adamw", "momentum bfloat16", "squared error"])
def test_members_are_single_models(unsimulated, case):
    """Steps on batches of each member's own or one for all; the second member pauses for a step."""
    check_steps(unsimulated, case)


@pytest.mark.parametrize("case", ["sgd", "adamw float16 clipped"])
def test_members_are_single_models_in_every_lane(lane, case):
    check_steps(lane, case)


def check_steps(lane, case):
    rule, loss, dtype, own = CASES[case]
    active = torch.ones(E, dtype=torch.bool, device=lane)
    ensemble, singles, together, alone = engines(lane, rule, loss, dtype, active)
    out = torch.zeros(E, device=lane)
    for step in range(3):
        x, y = batch(lane, loss, step, own=own)
        active[1] = step != 1
        before = [t.clone() for layer in together for t in (layer.weight, layer.bias)]
        ensemble.step(x, y, out)
        for e, engine in enumerate(singles):
            if active[e]:
                want = torch.zeros((), device=lane)
                engine.step(of(x, e, 2), of(y, e, 1 if y.dtype == torch.int64 else 2), want)
                torch.testing.assert_close(out[e], want, atol=0 if INTERPRETING else 1e-4, rtol=1e-5)
            else:
                assert out[e].isnan()
                after = [t for layer in together for t in (layer.weight, layer.bias)]
                assert all(torch.equal(was[e], is_[e]) for was, is_ in zip(before, after, strict=True))
        assert_same(ensemble, singles, together, alone)
    for name, numbers in ensemble.counters().items():
        assert numbers == [engine.counters()[name] for engine in singles]


@UNSIMULATED
@pytest.mark.parametrize("case", ["adamw", "adamw float16 clipped"])
def test_param_groups(unsimulated, case):
    """Weights and biases have settings of their own, and the second group a rate for each member."""
    rule, loss, dtype, _ = CASES[case]
    rules = [dataclasses.replace(rule, lr=0.05), dataclasses.replace(rule, weight_decay=0.0)]
    numbers = [0, 1, 0, 1]
    together, alone = layers(unsimulated, None), [layers(unsimulated, e) for e in range(E)]
    options = {"cuda_graph": False, "groups": Groups(rules, numbers)}
    active = torch.ones(E, dtype=torch.bool, device=unsimulated)
    ensemble = TritonStep(together, rules[0], loss, dtype, members=E, active=active, **options)
    singles = []
    for e, own in enumerate(alone):
        options["groups"] = Groups([single_rule(of_group, e) for of_group in rules], numbers)
        singles.append(TritonStep(own, options["groups"].rules[0], loss, dtype, **options))
    for step in range(3):
        x, y = batch(unsimulated, loss, step)
        ensemble.step(x, y, torch.zeros(E, device=unsimulated))
        for e, engine in enumerate(singles):
            engine.step(x[e], y[e], torch.zeros((), device=unsimulated))
    assert_same(ensemble, singles, together, alone)


@UNSIMULATED
@pytest.mark.parametrize("own", [True, False], ids=["own", "the same"])
def test_probabilities(unsimulated, own):
    ensemble, singles, together, alone = engines(unsimulated, SGD(0.1), "cross_entropy", torch.float32)
    x, y = batch(unsimulated, "mse", 0, own=own)
    out = torch.zeros(E, device=unsimulated)
    ensemble.step(x, y, out)
    for e, engine in enumerate(singles):
        want = torch.zeros((), device=unsimulated)
        engine.step(of(x, e, 2), of(y, e, 2), want)
        torch.testing.assert_close(out[e], want, atol=0 if INTERPRETING else 1e-4, rtol=1e-5)
    assert_same(ensemble, singles, together, alone)


@UNSIMULATED
@pytest.mark.parametrize("own_order", [True, False], ids=["own order", "one order"])
def test_epochs(unsimulated, own_order):
    """Orders of each member or one for all, rates of each step and member, a shorter last batch, the same pixels."""
    rule = AdamW(PerMember(RATES))
    active = torch.tensor([True, False], device=unsimulated)
    ensemble, singles, together, alone = engines(unsimulated, rule, "cross_entropy", torch.float32, active)
    images = torch.randint(0, 256, (12, SIZES[0]), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).to(
        unsimulated
    )
    labels = torch.randint(0, SIZES[-1], (12,), generator=torch.Generator().manual_seed(1)).to(unsimulated)
    for epoch in range(2):
        g = torch.Generator().manual_seed(epoch)
        order = torch.stack([torch.randperm(12, generator=g) for _ in range(E)]).to(unsimulated)
        lrs = torch.rand(2, E, dtype=torch.float64, generator=g)
        losses = torch.zeros(2, E, device=unsimulated)
        ensemble.epoch(images, labels, M, order if own_order else order[0], lrs, losses)
        assert losses[:, 1].isnan().all()
        for e in range(1):
            want = torch.zeros(2, device=unsimulated)
            singles[e].epoch(images, labels, M, order[e if own_order else 0], lrs[:, e].contiguous(), want)
            torch.testing.assert_close(losses[:, e], want, atol=0 if INTERPRETING else 1e-4, rtol=1e-5)
    assert_same(ensemble, singles, together, alone)
    assert ensemble.counters()["step"] == [4, 0]


@UNSIMULATED
@pytest.mark.parametrize("clipped", [False, True])
def test_gradients_and_update(unsimulated, clipped):
    """Two accumulated batches, then the update; a member that is not active has gradients of 0 and no update."""
    rule = AdamW(PerMember(RATES), max_grad_norm=0.5 if clipped else None)
    active = torch.tensor([False, True], device=unsimulated)
    ensemble, singles, together, alone = engines(unsimulated, rule, "mse", torch.float32, active, frozen=1)
    for _ in range(2):
        for accumulate in (False, True):
            x, y = batch(unsimulated, "mse", 5 + accumulate)
            grads = ensemble.gradients(x, y, torch.zeros(E, device=unsimulated), accumulate=accumulate)
            for e in (1,):
                want = singles[e].gradients(x[e], y[e], torch.zeros((), device=unsimulated), accumulate=accumulate)
                for got, single in zip(grads, want, strict=True):
                    assert not got[0].any()
                    torch.testing.assert_close(got[e], single, atol=0 if INTERPRETING else 1e-4, rtol=1e-5)
        ensemble.update()
        for e in (1,):
            singles[e].update()
    assert_same(ensemble, singles, together, alone)
    assert ensemble.counters()["step"] == [0, 2]


@UNSIMULATED
def test_float16_overflows_of_one_member(unsimulated):
    """One member's scale is halved and its step skipped; the others go on."""
    active = torch.ones(E, dtype=torch.bool, device=unsimulated)
    ensemble, singles, together, alone = engines(unsimulated, AdamW(0.01), "mse", torch.float16, active)
    for step in range(2):
        x, y = batch(unsimulated, "mse", step)
        if step == 0:
            y[1] = 6e4
        ensemble.step(x, y, torch.zeros(E, device=unsimulated))
        for e, engine in enumerate(singles):
            engine.step(x[e], y[e], torch.zeros((), device=unsimulated))
    assert_same(ensemble, singles, together, alone)
    counters = ensemble.counters()
    assert counters["step"] == [2, 1]
    assert counters["loss_scale"] == [2.0**15, 2.0**14]
    assert counters == {name: [engine.counters()[name] for engine in singles] for name in counters}


@UNSIMULATED
def test_counters_are_taken_up(unsimulated):
    """A member with fewer updates than another goes on with its own number."""
    active = torch.ones(E, dtype=torch.bool, device=unsimulated)
    ensemble, singles, together, alone = engines(unsimulated, AdamW(0.01), "mse", torch.float32, active)
    ensemble.set_counters({"step": [3.0, 0.0]})
    for engine, count in zip(singles, (3.0, 0.0), strict=True):
        engine.set_counters({"step": count})
    for seed in range(2):
        x, y = batch(unsimulated, "mse", seed)
        ensemble.step(x, y, torch.zeros(E, device=unsimulated))
        for e, engine in enumerate(singles):
            engine.step(x[e], y[e], torch.zeros((), device=unsimulated))
    assert_same(ensemble, singles, together, alone)
    assert ensemble.counters() == {"step": [5.0, 2.0]}


@UNSIMULATED
def test_against_float64(unsimulated):
    """Three steps of AdamW, within the budget that the same steps of torch in float32 set."""
    rule = AdamW(PerMember(RATES), weight_decay=0.1)
    ensemble, _, together, _ = engines(unsimulated, rule, "cross_entropy", torch.float32)
    references = {}
    for dtype in (torch.float64, torch.float32):
        for e in range(E):
            own = layers(torch.device("cpu"), e, dtype=dtype)
            params = [t for layer in own for t in (layer.weight, layer.bias)]
            optimizer = torch.optim.AdamW(params, lr=RATES[e], weight_decay=0.1)
            for step in range(3):
                x, y = batch(torch.device("cpu"), "cross_entropy", step)
                h = torch.nn.functional.gelu(x[e].to(dtype) @ own[0].weight.T + own[0].bias)
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(h @ own[1].weight.T + own[1].bias, y[e]).backward()
                optimizer.step()
            references[dtype, e] = params
    for step in range(3):
        ensemble.step(*batch(unsimulated, "cross_entropy", step), torch.full((E,), math.nan, device=unsimulated))
    got = [t for layer in together for t in (layer.weight, layer.bias)]
    for e in range(E):
        for t, truth, own in zip(got, references[torch.float64, e], references[torch.float32, e], strict=True):
            assert_within_budget(t[e].detach().cpu(), truth.detach(), own.detach(), reduction=SIZES[0])
    assert ensemble.counters() == {"step": [3.0] * E}
    with pytest.raises(ValueError, match="one number of updates"):
        ensemble.set_counters({"step": [1.0, 2.0]})
