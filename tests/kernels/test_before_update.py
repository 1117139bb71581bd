"""kernels/before_update.py against torch's own loss scale, counts and clipping; and the kernels that raise its flag."""

from __future__ import annotations

import math

import pytest
import torch

from fastmlp.kernels.before_update import LossScaleState, before_update
from fastmlp.kernels.layout import SEGMENT, Layer, Layout
from fastmlp.kernels.optimizer import HYPER_COLUMNS
from fastmlp.kernels.reduce_update import reduce_update
from fastmlp.kernels.wgrad_update import wgrad_update, workspace
from fastmlp.step.loss_scale import BACKOFF, GROWTH, GROWTH_STEPS, LEAST, LossScale
from fastmlp.step.optimizers import SGD, AdamW, Optimizer

# The interpreter is numpy, which warns of inf - inf and 0 / 0 in elements that a mask then drops.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def row_of(rule: Optimizer, lane) -> torch.Tensor:
    return rule.rows(torch.tensor([rule.lr], dtype=torch.float64), None)[0].to(lane)


def integer(lane, value: int = 0) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int32).to(lane)


def clip_factor(lane, most: float, squares: torch.Tensor) -> float:
    factor = torch.full((), math.nan).to(lane)
    before_update("sgd", row_of(SGD(0.1, max_grad_norm=most), lane), factor, squares=squares.to(lane))
    return factor.item()


class TestLossScale:
    @staticmethod
    def check(lane, start: float, good: int, overflows: list[int], growth_steps: int = GROWTH_STEPS) -> list[float]:
        """Every number after every step is bit by bit what torch's operations make of it; the scales."""
        own, torchs = LossScale(torch.device("cpu")), LossScale(torch.device("cpu"))
        for scale in (own, torchs):
            scale.set_counters({"loss_scale": start, "loss_scale_good_steps": good})
        numbers = [t.to(lane) for t in (own.scale, own.inverse, own.good_steps)]
        overflow, skip, factor = integer(lane), integer(lane, -1), torch.full((), math.nan).to(lane)
        state = LossScaleState(*numbers, overflow, skip, growth_steps, GROWTH, BACKOFF, LEAST)
        scales = []
        for bad in overflows:
            inverse = torchs.inverse.item()
            torchs.check([torch.tensor([math.inf if bad else 1.0])], scaled=False)
            torch._amp_update_scale_(torchs.scale, torchs.good_steps, torchs.overflow, GROWTH, BACKOFF, growth_steps)
            torch.reciprocal(torchs.scale.clamp_(min=LEAST), out=torchs.inverse)
            overflow.fill_(bad)
            before_update("sgd", row_of(SGD(0.1), lane), factor, loss_scale=state, scaled=True)
            assert (factor.item(), skip.item(), overflow.item()) == (inverse, bad, 0)
            for got, want in zip(numbers, (torchs.scale, torchs.inverse, torchs.good_steps), strict=True):
                assert torch.equal(got.cpu(), want)
            scales.append(torchs.scale.item())
        return scales

    def test_moves_as_torchs(self, lane):
        scales = self.check(lane, 2.0**15, 0, [0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0], growth_steps=3)
        assert [scale / 2**15 for scale in scales] == [1, 1, 2, 1, 1, 1, 0.5, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 1]

    def test_grows_after_2000_good_steps(self, lane):
        assert self.check(lane, 2.0**15, 1998, [0, 0, 0]) == [2.0**15, 2.0**16, 2.0**16]

    def test_is_at_least_1_and_finite(self, lane):
        assert self.check(lane, 2.0, 0, [1, 1, 1]) == [1.0, 1.0, 1.0]
        assert self.check(lane, 2.0**126, 0, [0, 0, 0], growth_steps=1) == [2.0**127] * 3

    def test_any_number_may_be_loaded(self, lane):
        self.check(lane, 3.7e4, 1, [0, 1, 0], growth_steps=2)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95), (0.8, 0.99999)], ids=str)
def test_adamw_counts_the_steps_that_are_not_skipped(lane, betas):
    """A row corrected on the device has the bits of torch's float64 operations, for any number of updates."""
    rule = AdamW(0.01, 0.1, betas=betas, max_grad_norm=3.0)
    row, decays = row_of(rule, lane), torch.tensor(betas, dtype=torch.float64).to(lane)
    count, counted, factor = integer(lane), torch.full((HYPER_COLUMNS,), math.nan).to(lane), torch.empty(()).to(lane)
    numbers = [torch.ones(()).to(lane), torch.ones(()).to(lane), integer(lane)]
    overflow = integer(lane)
    state = LossScaleState(*numbers, overflow, integer(lane), GROWTH_STEPS, GROWTH, BACKOFF, LEAST)
    updates = 0
    for updates, bad in ((0, 0), (1, 0), (2, 1), (2, 0), (9, 0), (999, 0), (17_000, 1), (17_000, 0), (3_000_000, 0)):
        count.fill_(updates)
        overflow.fill_(bad)
        before_update(
            "adamw", row, factor, loss_scale=state, scaled=True, count=count, decays=decays, counted_row=counted
        )
        assert count.item() == updates + 1 - bad
        t = torch.tensor(updates + 1.0, dtype=torch.float64)
        expected = row.cpu().clone()
        expected[1] = (expected[1] / (1 - betas[0] ** t)).float()
        expected[2] = ((1 - betas[1] ** t) ** -0.5).float()
        assert torch.equal(counted.cpu(), expected)


@pytest.mark.parametrize("blocks", [1, 655, 2100])
def test_clips_to_the_norm(lane, blocks):
    squares = torch.rand(blocks, generator=torch.Generator().manual_seed(0))
    norm = squares.double().sum().sqrt().item()
    assert clip_factor(lane, 0.5, squares) == pytest.approx(min(1.0, 0.5 / (norm + 1e-6)), rel=1e-6)
    assert clip_factor(lane, 1e3, squares) == 1.0


def test_clips_what_is_not_finite_as_torch_does(lane):
    assert math.isnan(clip_factor(lane, 1.0, torch.tensor([1.0, math.nan])))
    assert clip_factor(lane, 1.0, torch.tensor([1.0, math.inf])) == 0.0
    assert clip_factor(lane, 1.0, torch.zeros(3)) == 1.0
    assert clip_factor(lane, math.inf, torch.ones(3)) == 1.0


class TestGradients:
    """What the kernels that make gradients tell ``before_update``."""

    SIZES = (33, 17)

    def layout(self, lane) -> Layout:
        return Layout([Layer(torch.zeros(17, 33).to(lane), torch.zeros(17).to(lane))])

    @pytest.mark.parametrize("value", [-math.inf, math.nan], ids=str)
    @pytest.mark.parametrize("place", ["weight", "last bias", "padding", "nowhere"])
    def test_of_a_sum_of_slices(self, lane, value, place):
        layout = self.layout(lane)
        slices = torch.randn(2, layout.total, generator=torch.Generator().manual_seed(0))
        at = {"weight": 33 * 5 + 1, "last bias": SEGMENT + 16, "padding": SEGMENT + 17}.get(place)
        if at is not None:
            slices[1, at] = value
        overflow, squares = integer(lane), torch.full((layout.total // SEGMENT,), math.nan).to(lane)
        half, row = torch.tensor(0.5).to(lane), row_of(SGD(0.1), lane)
        reduce_update(layout, slices.to(lane), 2, "none", row, unscale=half, squares=squares, overflow=overflow)
        assert overflow.item() == (place in ("weight", "last bias"))
        if not overflow.item():
            for got, view in zip(squares.cpu(), layout.views(slices.double().sum(0) / 2), strict=True):
                assert got.item() == pytest.approx(view.square().sum().item(), rel=1e-6)

    @pytest.mark.parametrize("value", [math.inf, math.nan], ids=str)
    @pytest.mark.parametrize("m", [17, 1100], ids=["one slice", "split"])
    def test_of_the_products(self, lane, value, m):
        """One element of dZ that overflowed, in any slice, is seen; and nothing where none did."""
        layout, row = self.layout(lane), row_of(SGD(0.1), lane)
        partial = workspace(layout, m, torch.float16, lane, direct=False)
        assert (partial.shape[0] > 1) == (m == 1100)
        x = torch.ones(m, 33, dtype=torch.float16).to(lane)
        for at in (None, (0, 0), (m - 1, 16)):
            dz = torch.ones(m, 17, dtype=torch.float16)
            if at is not None:
                dz[at] = value
            overflow = integer(lane)
            wgrad_update(layout, [dz.to(lane)], [x], "none", row, partial=partial, overflow=overflow)
            assert overflow.item() == (at is not None)
            if at is None:
                sums = layout.views(partial.sum(0).cpu())
                assert all((t == m).all() for t in sums)


def test_a_skipped_update_changes_nothing(lane):
    layout = Layout([Layer(torch.ones(17, 33).to(lane), torch.ones(17).to(lane))])
    grads, row = torch.ones(1, layout.total).to(lane), row_of(SGD(0.1), lane)
    for skip in (1, 0):
        reduce_update(layout, grads, 1, "sgd", row, skip=integer(lane, skip))
        assert all((p.cpu() == (1.0 if skip else 1 - torch.tensor(0.1))).all() for p in layout.params)
