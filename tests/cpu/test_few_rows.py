"""The products of few rows: every way to compute them, which ways are measured, and the blocks that threads share."""

from __future__ import annotations

import pytest
import torch

import fastmlp
from fastmlp import reference
from fastmlp.activations import ACTIVATIONS
from fastmlp.cpu import choose, few_rows, products
from tests.support.steps import (
    allocations,
    batches,
    check_float32,
    choices_of_products,
    converted,
    float32_step,
    for_step,
    fresh_choices,  # noqa: F401
    have_fastest,
    needs_onednn,
    network,
    problem,
)
from tests.support.torchs import OPTIMIZERS

SIZES = (13, 16, 12, 6)
#: (rows, way to compute their products)
WAYS = [
    (1, "aten"),
    (1, "addmm"),
    pytest.param(1, "onednn", marks=needs_onednn),
    (1, "rows"),
    (3, "each"),
    pytest.param(3, "onednn", marks=needs_onednn),
    (3, "rows"),
]


@pytest.fixture(autouse=True)
def two_blocks(monkeypatch, fresh_choices) -> None:  # noqa: F811
    """Every layer of ``SIZES`` is large enough to be shared by two threads."""
    monkeypatch.setattr(few_rows, "row_blocks", lambda rows, columns: 2)
    fastmlp.set_cpu_gemm("auto")


def take(monkeypatch, way: str) -> None:
    """Take this way for few rows. All other products are oneDNN's if the way is "onednn", else aten's."""
    other = "onednn" if way == "onednn" else "aten"

    def choice(kind: str, *args: object, **settings: bool) -> str:
        return way if kind.startswith(("sample", "few rows")) else other

    monkeypatch.setattr(choose, "choose", choice)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
@pytest.mark.parametrize(("rows", "way"), WAYS)
def test_every_way_trains(monkeypatch, rows, way, optimizer, activation, bias):
    """Six steps equal six steps of torch.optim in float64, up to rounding."""
    take(monkeypatch, way)
    # The learning rates of other tests would be unstable on so few rows and would multiply every rounding.
    settings = OPTIMIZERS[optimizer] | ({} if optimizer == "adamw" else {"lr": 0.02})
    check_float32(network(SIZES, activation, bias=bias), batches(*problem(SIZES, 6 * rows), rows, 6), settings)


@pytest.mark.parametrize("activation", ["identity", "sigmoid", "relu", "tanh"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("rows", "way"), WAYS)
def test_products(monkeypatch, rows, way, bias, activation):
    """Each product against float64; no old content of the buffers is left."""
    take(monkeypatch, way)
    n, k = 16, 13
    weight, b = torch.randn(n, k), torch.randn(n) if bias else None
    x, dz = torch.randn(rows, k), torch.randn(rows, n)
    before = weight.double()
    out, dx, dw = (torch.full(shape, float("nan")) for shape in ((rows, n), (rows, k), (n, k)))
    stored = few_rows.layer_products(rows, weight, b, activation, out, dx, dw=dw)
    assert stored.update is None
    assert stored.wgrad is not None
    products = few_rows.layer_products(rows, weight, b, activation, out, dx, update=True)
    assert products.wgrad is None
    assert products.update is not None
    assert products.dgrad is not None
    exact = reference.linear_act(x.double(), before, None if b is None else b.double(), activation)
    torch.testing.assert_close(products.linear(x), exact.float())
    torch.testing.assert_close(products.dgrad(dz), (dz.double() @ before).float())
    exact_dw = dz.double().t() @ x.double()
    torch.testing.assert_close(stored.wgrad(dz, x), exact_dw.float())
    assert torch.equal(weight, before.float())
    products.update(dz, x, 0.25)
    torch.testing.assert_close(weight, (before - 0.25 * exact_dw).float())
    frozen = few_rows.layer_products(rows, weight, b, activation, out, None)
    assert frozen[1:] == (None, None, None)


@pytest.mark.parametrize(("rows", "way"), [w for w in WAYS if type(w) is tuple])
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
def test_a_step_allocates_nothing(monkeypatch, rows, way, optimizer):
    take(monkeypatch, way)
    assert allocations(float32_step(SIZES, rows, optimizer)) == []


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("rows", [1, 5])
def test_every_layer_is_measured_once(monkeypatch, rows, optimizer):
    have_fastest(monkeypatch)
    model = converted(network(SIZES), torch.float32)
    x, y = for_step(*problem(SIZES, 2 * rows), torch.float32)
    step = fastmlp.TrainStep(model, **OPTIMIZERS[optimizer])
    for i in range(2):
        step(x[i * rows : (i + 1) * rows], y[i * rows : (i + 1) * rows])
    kind, stored = ("sample", "") if rows == 1 else ("few rows", " stored" if optimizer == "adamw" else "")
    measured_rows = {1: 1, 5: 4}[rows]
    choices = choices_of_products()
    assert set(choices) == {
        (kind + what + stored, measured_rows, k, n, torch.float32, torch.get_num_threads())
        for what, k, n in ((" without dgrad", 13, 16), ("", 16, 12), ("", 12, 6))
    }
    assert set(choices.values()) <= ({"aten", "addmm", "rows"} if rows == 1 else {"each", "rows"})


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_are_not_measured(dtype, rows):
    weight = torch.randn(16, 12).to(dtype)
    out, dx = weight.new_empty(rows, 16), weight.new_empty(rows, 12)
    few_rows.layer_products(rows, weight, None, "identity", out, dx, update=True)
    assert choose.choices() == {}


def test_many_rows_are_not_measured_together(monkeypatch):
    monkeypatch.setattr(few_rows, "_by_rows", None)
    take(monkeypatch, "rows")
    rows = few_rows.FEW_ROWS + 1
    weight = torch.randn(16, 12)
    few_rows.layer_products(rows, weight, None, "identity", torch.empty(rows, 16), torch.empty(rows, 12), update=True)


def test_the_update_of_a_single_row_is_not_measured_twice(monkeypatch):
    """The update of a single row was measured with its products, so no other choice is made."""
    take(monkeypatch, "addmm")
    monkeypatch.setattr(products, "update", None)
    weight = torch.randn(16, 12)
    found = few_rows.layer_products(1, weight, None, "identity", torch.empty(1, 16), None, update=True)
    assert found.update is not None


def test_blocks(monkeypatch):
    """Blocks follow aten's sharing: at least 32,768 elements per thread, and one block unless all are whole rows."""
    monkeypatch.undo()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert [few_rows.row_blocks(*shape) for shape in ((64, 512), (128, 512), (512, 512), (66, 4096), (10, 4096))] == [
        1, 2, 4, 1, 2,
    ]  # fmt: skip
    assert few_rows.row_blocks(0, 5) == 1


@pytest.mark.parametrize("rows", [1, 5])
def test_a_way_that_was_kept_for_other_blocks_is_not_taken(monkeypatch, rows):
    """A cache that says "rows" where the rows cannot be shared alike leaves the products to BLAS."""
    take(monkeypatch, "rows")
    monkeypatch.setattr(few_rows, "row_blocks", lambda rows, columns: 1)
    monkeypatch.setattr(few_rows, "_by_rows", None)
    weight = torch.randn(16, 12)
    few_rows.layer_products(rows, weight, None, "identity", torch.empty(rows, 16), torch.empty(rows, 12))
