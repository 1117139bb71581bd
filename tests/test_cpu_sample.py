"""The products of a single sample: every way of them, what is measured, and the blocks that threads share."""

from __future__ import annotations

import pytest
import torch

import fastmlp
from fastmlp import cpu_gemm, cpu_sample
from fastmlp.activations import ACTIVATIONS

from .step_helpers import (
    OPTIMIZERS,
    Reference,
    allocations,
    assert_run_within_budget,
    converted,
    flat,
    for_step,
    fresh_choices,  # noqa: F401
    needs_onednn,
    network,
    problem,
)

SIZES = (13, 16, 12, 6)
WAYS = ["aten", "addmm", pytest.param("onednn", marks=needs_onednn), "rows"]


@pytest.fixture(autouse=True)
def two_blocks(monkeypatch, fresh_choices) -> None:  # noqa: F811
    """Every layer of ``SIZES`` is large enough to be shared by two threads."""
    monkeypatch.setattr(cpu_sample, "row_blocks", lambda rows, columns: 2)
    fastmlp.set_cpu_gemm("auto")


def take(monkeypatch, way: str) -> None:
    """For single samples; other products are aten's, or all oneDNN's."""
    other = "onednn" if way == "onednn" else "aten"
    monkeypatch.setattr(cpu_gemm, "choose", lambda kind, *args: way if kind.startswith("sample") else other)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_trains(monkeypatch, way, optimizer, activation, bias):
    """Six steps are those of torch.optim in float64, to rounding."""
    take(monkeypatch, way)
    model = network(SIZES, activation, bias=bias)
    x, y = problem(SIZES, 6)
    samples, settings = [(x[i : i + 1], y[i : i + 1]) for i in range(6)], OPTIMIZERS[optimizer]
    expected = Reference(model, settings).train(samples).flat()
    own = Reference(model, settings, master=torch.float32).train(samples).flat()
    model = converted(model, torch.float32)
    step = fastmlp.TrainStep(model, **settings)
    for sample in samples:
        step(*for_step(*sample, torch.float32))
    assert_run_within_budget(flat(model), expected, own, 6, torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("way", WAYS)
def test_products(monkeypatch, way):
    take(monkeypatch, way)
    n, k = 16, 13
    weight, bias = torch.randn(n, k), torch.randn(n)
    a, dz = torch.randn(1, k), torch.randn(1, n)
    before = weight.double()
    nan = float("nan")
    products = cpu_sample.sample_products(weight, bias, "tanh", torch.full((1, n), nan), torch.full((1, k), nan))
    assert products.dgrad is not None
    torch.testing.assert_close(products.linear(a), torch.tanh(a.double() @ before.t() + bias.double()).float())
    torch.testing.assert_close(products.dgrad(dz), (dz.double() @ before).float())
    products.update(dz, a, 0.25)
    torch.testing.assert_close(weight, (before - 0.25 * dz.double().t() @ a.double()).float())
    assert cpu_sample.sample_products(weight, bias, "tanh", torch.empty(1, n), None).dgrad is None


@pytest.mark.parametrize("way", ["aten", "addmm", "rows"])
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
def test_a_step_allocates_nothing(monkeypatch, way, optimizer):
    take(monkeypatch, way)
    x, y = for_step(*problem(SIZES, 1), torch.float32)
    step = fastmlp.TrainStep(converted(network(SIZES), torch.float32), **OPTIMIZERS[optimizer])
    assert allocations(lambda: step(x, y)) == []


@needs_onednn
def test_every_layer_is_measured_once():
    model = converted(network(SIZES), torch.float32)
    x, y = for_step(*problem(SIZES, 2), torch.float32)
    step = fastmlp.TrainStep(model, lr=0.1)
    for i in range(2):
        step(x[i : i + 1], y[i : i + 1])
    threads = torch.get_num_threads()
    assert set(cpu_gemm.choices()) == {
        (kind, 1, k, n, torch.float32, threads)
        for kind, k, n in (("sample without dgrad", 13, 16), ("sample", 16, 12), ("sample", 12, 6))
    }
    assert set(cpu_gemm.choices().values()) <= {"aten", "addmm", "rows"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_are_not_measured(dtype):
    weight = torch.randn(16, 12).to(dtype)
    cpu_sample.sample_products(weight, None, "identity", weight.new_empty(1, 16), weight.new_empty(1, 12))
    assert cpu_gemm.choices() == {}


def test_blocks(monkeypatch):
    """As aten shares elements: 32,768 for a thread at least, and one block unless all are whole rows."""
    monkeypatch.undo()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert [cpu_sample.row_blocks(*shape) for shape in ((64, 512), (128, 512), (512, 512), (66, 4096), (10, 4096))] == [
        1, 2, 4, 1, 2,
    ]  # fmt: skip
    assert cpu_sample.row_blocks(0, 5) == 1


def test_a_way_that_was_kept_for_other_blocks_is_not_taken(monkeypatch):
    """A cache that says "rows" where the rows cannot be shared alike leaves the products to BLAS."""
    take(monkeypatch, "rows")
    monkeypatch.setattr(cpu_sample, "row_blocks", lambda rows, columns: 1)
    monkeypatch.setattr(cpu_sample, "_by_rows", None)
    weight = torch.randn(16, 12)
    cpu_sample.sample_products(weight, None, "identity", torch.empty(1, 16), torch.empty(1, 12))
