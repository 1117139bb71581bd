"""kernels/dropout.py in every kernel that has it: the mask bit for bit as the reference's, and values in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastmlp import reference
from fastmlp.activations import ACTIVATIONS, saved_for_grad
from fastmlp.kernels import Dropout, activation_bwd, head, linear_dgrad, linear_fwd
from fastmlp.kernels.column_sums import ColumnSums
from fastmlp.kernels.layout import Layer, Layout
from fastmlp.kernels.wgrad_update import wgrad_update
from fastmlp.reference.dropout import keep_mask
from tests.conftest import UNSIMULATED
from tests.support.harness import FLOATS, assert_within_budget, nan_like, poisoned

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

RATES = (0.1, 0.9, 0.5, 0.004)
SEED, STEP = -(2**62) - 12345, 2**33 + 7
E = 3


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def state(lane: torch.device, seed: int = SEED, step: int = STEP) -> Tensor:
    """Seed and step between other numbers."""
    return poisoned(torch.tensor([seed, step])).to(lane)


def factor(rows: int, cols: int, p: float, *, layer: int = 0, step: int = STEP, stream: int = 0) -> Tensor:
    """F in float64."""
    return keep_mask(SEED, step, layer, rows, cols, p, stream).double() / (1 - p)


class _Network:
    """What a pass through f and dropout of [M, K] is, by autograd in the dtype of ``z``."""

    def __init__(self, z: Tensor, activation: str, f: Tensor) -> None:
        z = z.detach().requires_grad_()
        self.f = f.to(z.dtype)
        self.a = reference.activate(z, activation) * self.f
        self.z, self.activation = z, activation

    def grad(self, da: Tensor) -> Tensor:
        if self.activation in ("identity", "step"):
            return da * self.f * reference.activation_grad(self.z.detach(), self.activation)
        return torch.autograd.grad(self.a, self.z, da)[0]


def saved_of(z: Tensor, activation: str, f: Tensor, lane: torch.device) -> Tensor | None:
    """What the backward pass has of the layer below: Z, or A' as a forward kernel rounds it."""
    dropped = (reference.activate(z.float(), activation) * f.float()).to(z.dtype)
    kept = {"z": z, "a": dropped, None: None}[saved_for_grad(activation)]
    return None if kept is None else poisoned(kept, layout="dense").to(lane)


@pytest.mark.covering
@pytest.mark.parametrize(("shape", "p"), [*zip([(1, 1), (17, 63), (33, 130), (64, 64)], RATES, strict=True)], ids=str)
def test_forward(lane, shape, p):
    """What is kept is the reference's mask, times the scale in float32, for rows that no group fits into."""
    M, N = shape
    x, w, b = draw(M, 20).to(lane), draw(N, 20, seed=1).to(lane), draw(N, seed=2).to(lane)
    plain, _ = linear_fwd(x, w, b, "identity")
    a, z = linear_fwd(
        x, w, b, "identity", save_z=True, a=nan_like((M, N), torch.float32).to(lane),
        dropout=Dropout(state(lane), 3, p, 2),
    )  # fmt: skip
    keep = keep_mask(SEED, STEP, 3, M, N, p, 2)
    assert torch.equal(a.cpu() != 0, keep)
    assert torch.equal(z, plain)
    assert torch.equal(a.cpu(), plain.cpu() * torch.where(keep, torch.tensor(1 / (1 - p)), 0.0))


@pytest.mark.parametrize(("activation", "dtype"), [*zip(ACTIVATIONS, FLOATS * 3, strict=False)], ids=str)
def test_forward_activations(lane, activation, dtype):
    x, w = draw(17, 20, dtype=dtype), draw(33, 20, seed=1, dtype=dtype)
    a, _ = linear_fwd(x.to(lane), w.to(lane), None, activation, dropout=(state(lane), 0, 0.3, 0))
    f = factor(17, 33, 0.3)
    truth, own = (
        reference.activate(u @ v.t(), activation) * f.to(u.dtype) for u, v in ((x.double(), w.double()), (x, w))
    )
    if activation == "step":  # a product near 0 may be on the other side of the step
        assert ((a.cpu().double() - truth).abs() > 0.01).sum() < 3
        assert (a.cpu()[f == 0] == 0).all()
        return
    assert_within_budget(a.cpu(), truth, own, reduction=20)


@UNSIMULATED
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_forward_of_gathered_pixels(unsimulated, dtype):
    """The numbers are those of the rows of the batch, not of the data."""
    g = torch.Generator().manual_seed(5)
    images, rows = (
        torch.randint(1, 256, (50, 20), generator=g, dtype=torch.uint8),
        torch.randint(0, 50, (21,), generator=g),
    )
    w = draw(17, 20).abs().to(dtype)
    drops = Dropout(state(unsimulated), 0, 0.5)
    a, _ = linear_fwd(images.to(unsimulated), w.to(unsimulated), None, "relu", rows=rows.to(unsimulated), dropout=drops)
    assert torch.equal(a.cpu() != 0, keep_mask(SEED, STEP, 0, 21, 17, 0.5))


@pytest.mark.covering
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("activation", "p"), [*zip(ACTIVATIONS, RATES * 2, strict=True)])
def test_dgrad(lane, p, activation, dtype):
    M, K, N = 17, 40, 24
    dz, w, z = draw(M, N, dtype=dtype), draw(N, K, seed=1, dtype=dtype) / N**0.5, 2 * draw(M, K, seed=2, dtype=dtype)
    f = factor(M, K, p, layer=1)
    sums = ColumnSums(M, K, lane)
    dx = linear_dgrad(
        dz.to(lane), w.to(lane), saved_of(z, activation, f, lane), activation,
        dx=nan_like((M, K), dtype).to(lane), sums=sums, dropout=Dropout(state(lane), 1, p),
    ).cpu()  # fmt: skip
    truth = _Network(z.double(), activation, f).grad(dz.double() @ w.double())
    assert_within_budget(dx, truth, _Network(z, activation, f).grad(dz @ w), reduction=N)
    assert (dx[f == 0] == 0).all()
    added = sums.values.cpu()[: sums.blocks, :K].sum(0)
    assert_within_budget(added, dx.double().sum(0), dx.float().sum(0), reduction=M)


@pytest.mark.parametrize(
    ("activation", "dtype", "layout"),
    [*zip(ACTIVATIONS, FLOATS * 3, ["dense", "rows", "columns", "expanded"] * 2, strict=False)],
    ids=str,
)
def test_activation_bwd(lane, activation, dtype, layout):
    M, N = 17, 63
    z, da, p = 3 * draw(M, N, dtype=dtype), draw(M, N, seed=1, dtype=dtype), 0.25
    da = da[0].expand(M, N) if layout == "expanded" else poisoned(da, layout=layout)
    f = factor(M, N, p)
    dz = activation_bwd(
        da.to(lane), saved_of(z, activation, f, lane), activation, dz=nan_like((M, N), dtype).to(lane),
        dropout=Dropout(state(lane), 0, p),
    ).cpu()  # fmt: skip
    truth = _Network(z.double(), activation, f).grad(da.double())
    assert_within_budget(dz, truth, _Network(z, activation, f).grad(da), reduction=1)
    assert (dz[f == 0] == 0).all()


@pytest.mark.parametrize("shape", [(1, 1), (130, 17), (64, 48), (3, 1030)], ids=str)
def test_activation_bwd_of_groups(lane, shape):
    """Groups that several programs share, with rows of one element and of many groups."""
    da = draw(*shape).to(lane)
    dz = activation_bwd(da, None, "identity", dropout=Dropout(state(lane), 0, 0.5))
    assert torch.equal(dz.cpu() != 0, keep_mask(SEED, STEP, 0, *shape, 0.5))


@pytest.mark.covering
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ["sigmoid", "gelu", "relu"])
def test_head(lane, activation, dtype):
    M, K, C, p = 17, 70, 10, 0.1
    z, y = draw(M, K, dtype=dtype), torch.arange(M) % C
    f = factor(M, K, p, layer=2)
    h = (reference.activate(z.float(), activation) * f.float()).to(dtype)
    w = (draw(C, K, seed=1) * 2 / K**0.5).to(dtype)
    saved = {"a": h, "z": z}[saved_for_grad(activation)]
    given = {"activation": activation, "saved": saved.to(lane), "dropout": Dropout(state(lane), 2, p)}
    loss, dz, dz_prev = head(h.to(lane), w.to(lane), None, y.to(lane), **given)
    plain = head(h.to(lane), w.to(lane), None, y.to(lane), want_dz_prev=False)
    assert torch.equal(loss, plain[0])
    assert torch.equal(dz, plain[1])
    of_double = reference.head(h.double(), w.double(), None, y)[2]
    truth = _Network(z.double(), activation, f).grad(of_double)
    own = _Network(z, activation, f).grad(reference.head(h, w, None, y)[1] @ w)
    assert_within_budget(dz_prev.cpu(), truth, own, reduction=K + C)
    assert (dz_prev.cpu()[f == 0] == 0).all()


@UNSIMULATED
def test_members_have_rows_of_their_own(unsimulated):
    """Member e has the rows from e M on, in every kernel, whether the others are active or not."""
    M, N, K, p, lane = 17, 40, 20, 0.5, unsimulated
    drops, active = Dropout(state(lane), 1, p), torch.tensor([True, False, True], device=lane)
    keep = keep_mask(SEED, STEP, 1, E * M, N, p).view(E, M, N)
    da, w = draw(E, M, N).to(lane), draw(E, N, K, seed=1).to(lane)
    x, dz, v = draw(E, M, K, seed=2).to(lane), draw(E, M, 24, seed=3).to(lane), draw(E, 24, N, seed=4).to(lane)
    y = torch.zeros(E, M, dtype=torch.int64, device=lane)
    results = [
        linear_fwd(x, w, None, "identity", active=active, dropout=drops)[0],
        linear_dgrad(dz, v, active=active, dropout=drops),
        activation_bwd(da, None, "identity", dropout=drops),
        activation_bwd(da.mT.contiguous().mT, None, "identity", active=active, dropout=drops),
        head(da, v, None, y, active=active, dropout=drops)[2],
    ]
    for result in results:
        assert torch.equal(result[[0, 2]].cpu() != 0, keep[[0, 2]])


def test_dropped_values_that_are_not_finite_are_nan(lane):
    """As in torch, whose dropout multiplies by 0."""
    keep = keep_mask(SEED, STEP, 0, 4, 40, 0.5)
    x, w, b = torch.zeros(4, 1).to(lane), torch.ones(40, 1).to(lane), torch.full((40,), math.inf).to(lane)
    a, _ = linear_fwd(x, w, b, "relu", dropout=Dropout(state(lane), 0, 0.5))
    assert torch.equal(a.cpu().isnan(), ~keep)
    assert (a.cpu()[keep] == math.inf).all()


def test_every_number_of_the_counter_counts(lane):
    """Another seed, step, layer or stream is another mask, also where a launch is remembered."""
    x, w = torch.ones(20, 1).to(lane), torch.ones(70, 1).to(lane)
    given = state(lane, 1, 0)

    def mask(layer: int = 0, p: float = 0.5, stream: int = 0) -> Tensor:
        return linear_fwd(x, w, None, "identity", dropout=Dropout(given, layer, p, stream))[0].cpu() != 0

    seen = [mask()]
    assert torch.equal(seen[0], mask())
    seen += [mask(layer=1), mask(stream=1), mask(p=0.4)]
    given[1] += 1
    seen.append(mask())
    assert torch.equal(seen[-1], keep_mask(1, 1, 0, 20, 70, 0.5))
    given[0] = -1
    seen.append(mask())
    assert torch.equal(seen[-1], keep_mask(-1, 1, 0, 20, 70, 0.5))
    assert len({tuple(m.flatten().tolist()) for m in seen}) == len(seen)


@pytest.mark.parametrize("optimizer", ["sgd", "none"])
@pytest.mark.parametrize("m", [20, 300])
def test_the_update_raises_the_step_once(lane, m, optimizer):
    """Whatever becomes of the gradients, and in whatever number of programs."""
    given = state(lane, SEED, 2**40)
    layout = Layout([Layer(draw(33, 40).to(lane), draw(33, seed=1).to(lane))])
    wgrad_update(
        layout, [draw(m, 33).to(lane)], [draw(m, 40).to(lane)], optimizer, torch.ones(8, device=lane),
        loss_rows=draw(m).to(lane), loss=torch.zeros((), device=lane), dropout_state=given,
    )  # fmt: skip
    assert given.tolist() == [SEED, 2**40 + 1]


@pytest.mark.parametrize("flags", [(True, True), (False, True), (False, False)], ids=str)
def test_the_step_is_that_of_all_members(lane, flags):
    given = state(lane, SEED, 5)
    layout = Layout([Layer(draw(2, 20, 17).to(lane), None)])
    wgrad_update(
        layout, [draw(2, 16, 20).to(lane)], [draw(2, 16, 17).to(lane)], "sgd", torch.ones(2, 8, device=lane),
        active=torch.tensor(flags, device=lane), dropout_state=given,
    )  # fmt: skip
    assert given.tolist() == [SEED, 6]
