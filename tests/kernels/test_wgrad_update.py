"""kernels/wgrad_update.py against float64 gradients and torch.optim in float64."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from fastmlp import reference
from fastmlp.kernels.column_sums import ColumnSums, padded
from fastmlp.kernels.layout import Layer, Layout
from fastmlp.kernels.optimizer import HYPER_COLUMNS
from fastmlp.kernels.reduce_update import reduce_update
from fastmlp.kernels.wgrad_update import _plan, wgrad_update
from fastmlp.step.optimizers import OPTIMIZERS, SGD, Optimizer
from tests.support.harness import FLOATS, assert_within_budget, poisoned
from tests.support.torchs import UPDATES, torch_optimizer

LR = 0.1


def hyper_row(t: int, lane, optimizer: str | None = None) -> torch.Tensor:
    """The settings of step number t = 1, 2, ...; without an update's name those of plain SGD."""
    rates, count = (torch.tensor([value], dtype=torch.float64) for value in (LR, t))
    (row,) = (SGD(LR) if optimizer is None else rule(optimizer)).rows(rates, count)
    assert row.shape == (HYPER_COLUMNS,)
    return row.to(lane)


def rule(name: str) -> Optimizer:
    """The settings of an update."""
    settings = dict(UPDATES[name])
    return OPTIMIZERS[settings.pop("optimizer", "sgd")](**settings)


def problem(sizes, m, dtype, *, bias=True, seed=0):
    """(layers with float32 masters, dzs, xs) of an MLP with the given sizes."""
    g = torch.Generator().manual_seed(seed)
    weights = [torch.randn(n, k, generator=g) for k, n in itertools.pairwise(sizes)]
    biases = [torch.randn(n, generator=g) if bias else None for n in sizes[1:]]
    dzs = [torch.randn(m, n, generator=g).to(dtype) for n in sizes[1:]]
    xs = [torch.randn(m, k, generator=g).to(dtype) for k in sizes[:-1]]
    return weights, biases, dzs, xs


def on(lane, tensors):
    return [None if t is None else poisoned(t, layout="dense").to(lane) for t in tensors]


def run(lane, optimizer, sizes, m, dtype, *, steps=2, bias=True, low=None):
    """Masters after some steps of the kernel, and after the same steps of torch.optim in float64 and float32."""
    weights, biases, _, _ = problem(sizes, m, dtype, bias=bias)
    w, b = on(lane, weights), on(lane, biases)
    low_w = [None if low is None else t.to(low) for t in w]
    low_b = [None if low is None or t is None else t.to(low) for t in b]
    layout = Layout([Layer(*t) for t in zip(w, b, low_w, low_b, strict=True)])
    states = torch.zeros(len(rule(optimizer).states), layout.total, device=lane)
    params = [[copy.deepcopy(t).to(d) for t in weights + biases if t is not None] for d in (torch.double, torch.float)]
    optims = [torch_optimizer(p, UPDATES[optimizer]) for p in params]
    # Rounding errors are relative to the sums of the terms' absolute values, where an update is linear in the gradient.
    rate = LR if UPDATES[optimizer].get("optimizer", "sgd") == "sgd" else 0.0
    sizes_of_terms = [0.0] * len(params[0])
    for t in range(1, steps + 1):
        _, _, dzs, xs = problem(sizes, m, dtype, seed=t)
        row = hyper_row(t, lane, optimizer)
        terms = [reference.linear_wgrad(dz.double().abs(), x.double().abs()) for dz, x in zip(dzs, xs, strict=True)]
        for i, of_terms in enumerate([w for w, _ in terms] + [b for _, b in terms] * bias):
            sizes_of_terms[i] += rate * of_terms.max().item()
        wgrad_update(layout, on(lane, dzs), on(lane, xs), rule(optimizer).kernel, row, states=states)
        for ps, optim in zip(params, optims, strict=True):
            grads = [
                reference.linear_wgrad(dz.to(ps[0].dtype), x.to(ps[0].dtype)) for dz, x in zip(dzs, xs, strict=True)
            ]
            for p, grad in zip(
                ps, [g[0] for g in grads] + [g[1] for g in grads][: len(ps) - len(weights)], strict=True
            ):
                p.grad = grad
            optim.step()
    got = [t for t in w + b if t is not None]
    for i, (p, truth, own, size) in enumerate(zip(got, *params, sizes_of_terms, strict=True)):
        assert_within_budget(p.cpu(), truth, own, reduction=m, magnitude=size, what=f"parameter {i}")
    for copied, master in zip(low_w + low_b, w + b, strict=True):
        if copied is not None:
            assert torch.equal(copied, master.to(low))


#: What the sum of a split batch is updated by, beside what every rule does to the gradient of one program.
SPLIT = ("sgd", "momentum", "nesterov", "adamw", "rmsprop centered momentum")


@pytest.mark.parametrize(
    ("optimizer", "m"),
    [pytest.param(name, 17, id=f"direct-{name}") for name in UPDATES]
    + [pytest.param(name, 1100, id=f"split-{name}") for name in SPLIT],
)
def test_every_optimizer(lane, optimizer, m):
    sizes = (33, 17, 5)
    layout = Layout([Layer(torch.empty(n, k), torch.empty(n)) for k, n in itertools.pairwise(sizes)])
    assert (_plan(layout, m, torch.float32, wide=False, summed=False)[1] > 1) == (m == 1100)
    run(lane, optimizer, sizes, m, torch.float32)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("m", [40, 1100], ids=["direct", "split"])
def test_16_bit_products_with_float32_masters(lane, dtype, m):
    run(lane, "momentum", (33, 17, 5), m, dtype, low=dtype)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("m", [40, 1100], ids=["direct", "split"])
def test_16_bit_parameters_that_were_assigned_are_updated(lane, dtype, m):
    """Their masters, which have more digits than the others' parameters, are left where nothing was assigned."""
    sizes = (33, 17)
    (weight,), (bias,), dzs, xs = problem(sizes, m, dtype)
    masters, params = on(lane, (weight, bias)), on(lane, (weight.to(dtype), bias.to(dtype)))
    params[0][3:5, 7:] = 2.0
    params[1][2] = float("nan")
    expected = [torch.where(p == w.to(dtype), w, p.float()).cpu() for w, p in zip(masters, params, strict=True)]
    layout = Layout([Layer(*masters, *params)], low_is_param=True)
    wgrad_update(layout, on(lane, dzs), on(lane, xs), "sgd", hyper_row(1, lane))
    grads = reference.linear_wgrad(dzs[0].double(), xs[0].double())
    own = reference.linear_wgrad(dzs[0].float(), xs[0].float())
    for master, param, start, grad, less in zip(masters, params, expected, grads, own, strict=True):
        torch.testing.assert_close(param, master.to(dtype), rtol=0, atol=0, equal_nan=True)
        known = ~start.isnan()
        assert torch.equal(~master.cpu().isnan(), known)
        results = [t[known] for t in (master.cpu(), start.double() - LR * grad, start - LR * less)]
        assert_within_budget(*results, reduction=m)


@pytest.mark.parametrize("sizes", [(20, 3), (5, 1, 1, 3), (130, 63, 40, 17, 9, 4)], ids=str)
def test_depths_and_no_bias(lane, sizes):
    run(lane, "nesterov", sizes, 33, torch.float32, bias=False)


@pytest.mark.parametrize("layout", ["dense", "spread"])
def test_pixels_gathered_and_mean_loss(lane, layout):
    g = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (50, 63), generator=g, dtype=torch.uint8)
    rows = torch.randint(0, 50, (21,), generator=g)
    weights, biases, dzs, xs = problem((63, 17, 9, 5), 21, torch.float32)
    loss_rows = torch.rand(21, generator=g)
    w, b = on(lane, weights), on(lane, biases)
    loss = torch.full((), float("nan"), device=lane)
    wgrad_update(
        Layout([Layer(*t) for t in zip(w, b, strict=True)]),
        on(lane, dzs),
        [poisoned(images).to(lane), *on(lane, xs[1:])],
        "sgd",
        hyper_row(1, lane),
        rows=poisoned(rows, layout=layout).to(lane),
        loss_rows=poisoned(loss_rows).to(lane),
        loss=loss,
    )
    for got, start, dz, x in zip(w, weights, dzs, (images[rows], *xs[1:]), strict=True):
        grad = reference.linear_wgrad(dz.double(), x if x.dtype == torch.uint8 else x.double())[0]
        own = start - LR * reference.linear_wgrad(dz, x)[0]
        assert_within_budget(got.cpu(), start.double() - LR * grad, own, reduction=21)
    torch.testing.assert_close(loss.cpu(), loss_rows.mean())


@pytest.mark.parametrize("m", [17, 1100])
def test_plain_gradients_accumulate_and_update(lane, m):
    weights, biases, dzs, xs = problem((33, 17, 5), m, torch.float32)
    w, b = on(lane, weights), on(lane, biases)
    layout = Layout([Layer(*t) for t in zip(w, b, strict=True)])
    grads = torch.zeros(layout.total, device=lane)
    half = torch.tensor(0.5, device=lane)
    for accumulate in (False, True):
        wgrad_update(
            layout,
            on(lane, dzs),
            on(lane, xs),
            "none",
            hyper_row(1, lane),
            grads=grads,
            unscale=half,
            accumulate=accumulate,
        )
    truth = [t for dz, x in zip(dzs, xs, strict=True) for t in reference.linear_wgrad(dz.double(), x.double())]
    own = [t for dz, x in zip(dzs, xs, strict=True) for t in reference.linear_wgrad(dz, x)]
    for got, want, torchs in zip(layout.views(grads), truth, own, strict=True):
        assert_within_budget(got.cpu(), want, torchs, reduction=m)
    reduce_update(layout, grads, 1, "sgd", hyper_row(1, lane))
    assert_within_budget(w[0].cpu(), weights[0].double() - LR * truth[0], weights[0] - LR * own[0], reduction=m)


def sums_of(dz: torch.Tensor, rows: int, lane: torch.device) -> ColumnSums:
    """What a producer with blocks of ``rows`` rows writes; NaN where it writes nothing."""
    m, n = dz.shape
    sums = ColumnSums(m, n, lane)
    sums.values.fill_(float("nan"))
    blocks = [block.float().sum(0) for block in dz.split(rows)]
    sums.written(len(blocks))[: len(blocks), :n] = torch.stack(blocks).to(lane)
    return sums


@pytest.mark.parametrize(
    ("m", "rows", "dtype"), [(33, 16, torch.float32), (33, 32, torch.bfloat16), (1100, 128, torch.float32)]
)
def test_bias_gradients_from_the_sums_of_the_producers(lane, m, rows, dtype):
    """dZ may have more columns, with anything in them; a layer without bias has no sums."""
    sizes = (33, 40, 17, 5)
    weights, biases, dzs, xs = problem(sizes, m, dtype)
    w, b = on(lane, weights), on(lane, [biases[0], None, biases[2]])
    wider = []
    for dz in dzs:
        buffer = torch.full((m, padded(dz.shape[1])), float("nan"), dtype=dtype)
        buffer[:, : dz.shape[1]] = dz
        wider.append(buffer.to(lane))
    sums = [sums_of(dzs[0], rows, lane), None, sums_of(dzs[2], rows, lane)]
    layout = Layout([Layer(*t) for t in zip(w, b, strict=True)])
    wgrad_update(layout, wider, on(lane, xs), "sgd", hyper_row(1, lane), sums=sums)
    for i, (dz, x) in enumerate(zip(dzs, xs, strict=True)):
        truth, own = (reference.linear_wgrad(dz.to(d), x.to(d)) for d in (torch.double, torch.float))
        for got, start, grad, torchs in zip((w[i], b[i]), (weights[i], biases[i]), truth, own, strict=True):
            if got is not None:
                assert_within_budget(got.cpu(), start.double() - LR * grad, start - LR * torchs, reduction=m)


def test_sums_of_some_layers_are_not_enough(lane):
    """db of every layer is then the sum of dZ's rows; what stands in the sums is not read."""
    weights, biases, dzs, xs = problem((33, 17, 5), 40, torch.float32)
    results = []
    for of in ((), (sums_of(torch.full((40, 17), float("nan")), 16, lane), None)):
        w, b = on(lane, weights), on(lane, biases)
        layout = Layout([Layer(*t) for t in zip(w, b, strict=True)])
        wgrad_update(layout, on(lane, dzs), on(lane, xs), "sgd", hyper_row(1, lane), sums=of)
        results.append(w + b)
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_two_runs_are_bitwise_equal(lane):
    results = []
    for _ in range(2):
        weights, biases, dzs, xs = problem((33, 17, 5), 1100, torch.float32)
        w, b = on(lane, weights), on(lane, biases)
        layout = Layout([Layer(*t) for t in zip(w, b, strict=True)])
        wgrad_update(layout, on(lane, dzs), on(lane, xs), "sgd", hyper_row(1, lane))
        results.append(w + b)
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))
