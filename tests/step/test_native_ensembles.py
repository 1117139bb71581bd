"""Steps of ensembles as machine code: each member's is the step of a single model."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import fastmlp
from fastmlp.cpu import choose
from fastmlp.step.cpu_native_members import NativePiece
from tests.support.steps import flat, fresh_choices, have_fastest, threads  # noqa: F401
from tests.support.torchs import OPTIMIZERS

pytestmark = pytest.mark.usefixtures("native_code")

SIZES = (7, 18, 11, 4)
E = 5


def models(dtype=torch.float32) -> list[fastmlp.MLP]:
    torch.manual_seed(3)
    return [fastmlp.MLP(SIZES, "tanh", dtype=dtype) for _ in range(E)]


def batch(seed: int, rows: int = 9, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(E, rows, 7, generator=g, dtype=dtype), torch.randint(0, 4, (E, rows), generator=g)


def pieces(step: fastmlp.TrainStep, rows: int = 9) -> list[NativePiece]:
    way, parts = step._engine._planned(rows)
    assert way == "native"
    found = [piece for part in parts for piece in part]
    assert all(isinstance(piece, NativePiece) for piece in found)
    return found


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["sgd", "nesterov", "clipping, momentum", "adamw, all settings", "lion"])
def test_members_are_single_models(name, count):
    """Bit for bit, with batches of their own, in one thread or two."""
    singles = models()
    ensemble = fastmlp.MLPEnsemble.stack(singles)
    with threads(count):
        together = fastmlp.TrainStep(ensemble, **OPTIMIZERS[name])
        alone = [fastmlp.TrainStep(model, **OPTIMIZERS[name]) for model in singles]
        for i in range(4):
            x, y = batch(i)
            losses = together(x, y)
            assert torch.equal(losses, torch.stack([step(*of) for step, *of in zip(alone, x, y, strict=True)]))
        found = pieces(together)
        assert len(found) == count
        assert all(piece._pieces is None for piece in found)
    for model, single in zip(ensemble.unstack(), singles, strict=True):
        assert torch.equal(flat(model), flat(single))


@pytest.mark.usefixtures("fresh_choices")
def test_the_calling_thread_may_do_all(monkeypatch):
    """Whether a second thread is worth waking is measured; on one thread there is nothing to choose."""
    choose.set_cpu_gemm("auto")
    asked = []

    def fastest(candidates):
        asked.append(tuple(candidates))
        return asked[-1][-1]

    have_fastest(monkeypatch, fastest)
    for count, way in ((2, "native alone"), (1, "native")):
        singles = models()
        with threads(count):
            step = fastmlp.TrainStep(fastmlp.MLPEnsemble.stack(singles))
            step(*batch(0))
            assert step._engine._planned(9)[0] == way
            assert len(step._engine._planned(9)[1]) == 1
        assert asked[-1][-count:] == ("native", "native alone")[:count]
        for e, (trained, single) in enumerate(zip(step.model.unstack(), singles, strict=True)):
            x, y = batch(0)
            choose.set_cpu_gemm("native")
            fastmlp.TrainStep(single)(x[e], y[e])
            choose.set_cpu_gemm("auto")
            assert torch.equal(flat(trained), flat(single))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_one_batch_for_all_rates_of_their_own_and_pauses(loss, dropout):
    """The same as the operators, also where only some members train and what the machine code lacks comes between."""
    results = []
    for mode in ("native", "aten"):
        choose.set_cpu_gemm(mode)
        ensemble = fastmlp.MLPEnsemble.stack(models(torch.float64))
        torch.manual_seed(7)
        ensemble.dropout = dropout
        step = fastmlp.TrainStep(
            ensemble, "adamw", lr=[0.01 * (e + 1) for e in range(E)], weight_decay=0.1, max_grad_norm=1.0, loss=loss
        )
        x, y = batch(1, dtype=torch.float64)
        y = y if loss == "cross_entropy" else torch.nn.functional.one_hot(y, 4).double()
        losses = [step(x, y), step(x[0], y[0])]
        step.active = torch.tensor([True, False, True, True, False])
        losses += [step(x, y[0]), step(x.transpose(1, 2).contiguous().transpose(1, 2), y)]
        step.active = True
        step.lr = 0.02
        losses.append(step(x, y, torch.linspace(0.5, 1.5, 9, dtype=torch.float64)))
        step.gradients(x, y)
        step.update()
        losses.append(step.epoch(x[0], y[0], 4, order=torch.randperm(9, generator=torch.Generator().manual_seed(1))))
        losses.append(copy.deepcopy(step)(x, y))
        results.append((flat(ensemble), torch.stack([loss.double() for loss in losses])))
    assert math.isnan(results[0][1][2, 1])
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-7, equal_nan=True)


def test_a_label_out_of_range_changes_no_member():
    ensemble = fastmlp.MLPEnsemble.stack(models())
    step = fastmlp.TrainStep(ensemble, lr=0.1)
    x, y = batch(1)
    step(x, y)
    before = flat(ensemble)
    y[4, 8] = 4
    with pytest.raises(IndexError):
        step(x, y)
    assert torch.equal(flat(ensemble), before)
