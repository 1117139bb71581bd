"""Steps of ensembles as machine code: each member's is the step of a single model."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

import fastmlp
from fastmlp.cpu import choose
from fastmlp.step.cpu_ensemble import TorchEnsemble
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


@pytest.mark.parametrize("case", ["class_weight", "probabilities", "pos_weight"])
def test_sample_weights_come_and_go(case):
    """Where one unit of machine code serves batches with weights and without."""
    singles = models()
    settings = {
        "class_weight": {"class_weight": torch.tensor([1.0, 2.0, 0.5, 1.0])},
        "probabilities": {},
        "pos_weight": {"loss": "bce", "pos_weight": torch.tensor([1.0, 2.0, 0.5, 1.0])},
    }[case]
    together = fastmlp.TrainStep(fastmlp.MLPEnsemble.stack(singles), lr=0.1, **settings)
    alone = [fastmlp.TrainStep(model, lr=0.1, **settings) for model in singles]
    for i, weight in enumerate([None, torch.linspace(0.1, 2, 9), None, torch.linspace(2, 0.1, 9)]):
        x, y = batch(i)
        if case != "class_weight":
            y = torch.nn.functional.one_hot(y, 4).float()
        losses = together(x, y, weight)
        assert torch.equal(losses, torch.stack([step(*of, weight) for step, *of in zip(alone, x, y, strict=True)]))


ROWS, BATCH, STEPS = 23, 9, 3
RATES = [0.01 * (e + 1) for e in range(E)]
SETTINGS = {
    "plain": {"lr": 0.1},
    "settings of their own": {"lr": RATES, "momentum": [0.1 * e for e in range(E)], "weight_decay": 0.1},
    "clipping, average": {
        "optimizer": "adamw",
        "lr": RATES,
        "max_grad_norm": 0.5,
        "ema_decay": 0.9,
        "ema_warmup": True,
    },
    "groups": {
        "optimizer": "lion",
        "lr": 0.003,
        "weight_decay": 0.1,
        "param_groups": [{"params": "*.bias", "lr": RATES, "weight_decay": [0.1 * e for e in range(E)]}],
    },
}
#: What members have of their own among x, y, sample weights (None: there are none), order and factors of the rates.
OWN = {
    "nothing": (False, False, False, False, False),
    "everything": (True, True, True, True, True),
    "order": (False, False, None, True, False),
    "data": (True, False, False, False, True),
}


def epoch_data(
    own: tuple[bool | None, ...], kind: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """(x, y, sample weights, order, factors), with strides where ``kind`` says so."""
    g = torch.Generator().manual_seed(4)
    shapes = [(E, ROWS) if of_member else (ROWS,) for of_member in own[:3]]
    if kind == "pixels":
        x = torch.randint(0, 256, (*shapes[0], 7), generator=g, dtype=torch.uint8)
    else:
        x = torch.randn(*shapes[0], 7, generator=g, dtype=dtype)
    y, weight = torch.randint(0, 4, shapes[1], generator=g), None
    if own[2] is not None:
        weight = torch.rand(shapes[2], generator=g) + 0.1
    order = torch.stack([torch.randperm(ROWS, generator=g) for _ in range(E)])
    factors = 1 + torch.rand(STEPS, E, generator=g, dtype=torch.float64)
    if kind == "strided":
        x, y = x.transpose(-1, -2).contiguous().transpose(-1, -2), torch.stack((y, y), -1)[..., 0]
        weight = None if weight is None else torch.stack((weight, weight), -1)[..., 1]
        order = torch.stack((order, order), -1)[..., 0]
    return x, y, weight, order if own[3] else order[0], factors if own[4] else factors[:, 0]


def loop(step: fastmlp.TrainStep, x: Tensor, y: Tensor, weight: Tensor | None, order: Tensor, factors: Tensor):
    """The losses of the steps that an epoch takes, by calls of the step on rows of each member's."""
    base = [group["lr"] for group in step.optimizer.param_groups]
    members = range(E)

    def rows_of(t: Tensor, dims: int, rows: Tensor) -> Tensor:
        return torch.stack([(t[e] if t.dim() > dims else t)[rows[e]] for e in members])

    losses = []
    for i, rows in enumerate(order.expand(E, -1).split(BATCH, 1)):
        for group, lr in zip(step.optimizer.param_groups, base, strict=True):
            rates = torch.as_tensor(lr, dtype=torch.float64).expand(E) * factors[i]
            group["lr"] = rates.tolist()
        of_rows = None if weight is None else rows_of(weight, 1, rows)
        losses.append(step(rows_of(x, 2, rows), rows_of(y, 1 + y.is_floating_point(), rows), of_rows))
    for group, lr in zip(step.optimizer.param_groups, base, strict=True):
        group["lr"] = lr
    return torch.stack(losses)


def same(ours: fastmlp.TrainStep, theirs: fastmlp.TrainStep) -> None:
    """Parameters, states, counters and the number of passes have the same bits."""
    for of_ours, of_theirs in (
        (ours.model.state_dict(), theirs.model.state_dict()),
        (ours.state_dict(), theirs.state_dict()),
    ):
        assert list(of_ours) == list(of_theirs)
        for name, value in of_ours.items():
            assert torch.equal(value, of_theirs[name]), name


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[NativePiece]:
    """The pieces in the order in which their epochs were called; none goes step by step."""
    found: list[NativePiece] = []
    real = NativePiece.epoch

    def epoch(piece: NativePiece, *args) -> None:
        found.append(piece)
        real(piece, *args)

    def refuse(*args: object) -> None:
        raise AssertionError("the epoch gathered rows by operators")

    monkeypatch.setattr(NativePiece, "epoch", epoch)
    monkeypatch.setattr(TorchEnsemble, "_rows_of", refuse)
    return found


def two_steps(dtype: torch.dtype, dropout: float = 0.0, **settings) -> list[fastmlp.TrainStep]:
    """Steps of two equal ensembles, whose masks are the same."""
    found = []
    for _ in range(2):
        ensemble = fastmlp.MLPEnsemble.stack(models(dtype))
        torch.manual_seed(7)
        ensemble.dropout = dropout
        found.append(fastmlp.TrainStep(ensemble, **settings))
    return found


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["float", "pixels", "strided"])
@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("name", SETTINGS)
def test_an_epoch_is_one_call_with_the_bits_of_its_steps(name, own, kind, dtype, count, calls):
    """One call for each thread; also where some members pause and go on, and where steps come between."""
    whole, by_steps = two_steps(dtype, dropout=0.5 if own != "data" else 0.0, **SETTINGS[name])
    data = epoch_data(OWN[own], kind, dtype)
    x, y, weight, order, factors = data
    with threads(count):
        for active in ([True] * E, [True, False, True, True, False], [True] * E):
            whole.active = by_steps.active = torch.tensor(active)
            single = batch(2, dtype=dtype)
            whole(*single)
            by_steps(*single)
            calls.clear()
            whole.epoch(x, y, BATCH, order, factors, weight)
            assert len(calls) == len(set(calls)) == count
            losses = loop(by_steps, *data)
            assert torch.equal(whole.losses[:, active], losses[:, active])
            assert whole.losses.isnan().any(0).tolist() == [not trains for trains in active]
            same(whole, by_steps)
            assert torch.equal(whole(*single).nan_to_num(-1), by_steps(*single).nan_to_num(-1))
            same(whole, by_steps)


@pytest.mark.parametrize("loss", ["mse", "huber", "bce", "cross_entropy"])
def test_an_epoch_on_values(loss, calls):
    """Values and probabilities, of all members or of each."""
    whole, by_steps = two_steps(torch.float64, loss=loss, lr=0.1, momentum=0.9)
    x, _, weight, order, factors = epoch_data(OWN["everything"], "float", torch.float64)
    y = torch.rand(E, ROWS, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64).softmax(-1)
    for of in (y, y[0], y.transpose(1, 2).contiguous().transpose(1, 2)):
        whole.epoch(x, of, BATCH, order, factors, weight)
        assert torch.equal(whole.losses, loop(by_steps, x, of, weight, order, factors))
    assert len(calls) == 3 * torch.get_num_threads()
    same(whole, by_steps)


def test_what_an_epoch_lacks_goes_step_by_step(monkeypatch):
    """Targets of another dtype, and an ensemble without an active member, whose passes count all the same."""
    monkeypatch.setattr(NativePiece, "epoch", None)
    whole, by_steps = two_steps(torch.float64, 0.5, lr=0.1)
    x, y, _, order, factors = epoch_data(OWN["order"], "float", torch.float64)
    hot = torch.nn.functional.one_hot(y, 4).float()
    whole.epoch(x, hot, BATCH, order, factors)
    assert torch.equal(whole.losses, loop(by_steps, x, hot, None, order, factors))
    same(whole, by_steps)
    whole.active = by_steps.active = False
    assert whole.epoch(x, y, BATCH, order, factors).isnan().all()
    assert whole.losses.isnan().all()
    loop(by_steps, x, y, None, order, factors)
    same(whole, by_steps)
    assert whole.model.dropout_state[1] == 2 * STEPS


def test_a_label_out_of_range_of_an_epoch_changes_no_member(calls):
    (step, before) = two_steps(torch.float32, 0.5, optimizer="adamw", lr=0.1)
    x, y, _, order, _ = epoch_data(OWN["everything"], "float", torch.float32)
    y[E - 1, order[E - 1, -1]] = 4
    with pytest.raises(IndexError, match="class number 4 is out of range"):
        step.epoch(x, y, BATCH, order)
    assert not calls
    same(step, before)


@pytest.mark.parametrize("batch_size", [10, 1 << 40])
def test_a_batch_size_of_more_rows_than_there_are(batch_size):
    """An epoch is one step of all rows, and nothing is allocated for more of them."""
    singles = models()
    ensemble = fastmlp.MLPEnsemble.stack(singles)
    x, y = batch(1)
    together = fastmlp.TrainStep(ensemble, lr=0.1)
    together.epoch(x, y, batch_size)
    assert together.losses.shape == (1, E)
    for model, images, labels, member in zip(singles, x, y, ensemble.unstack(), strict=True):
        fastmlp.TrainStep(model, lr=0.1).epoch(images, labels, batch_size)
        assert torch.equal(flat(member), flat(model))
    first = models()[0]
    fastmlp.TrainStep(first, lr=0.1)(x[0], y[0])
    assert torch.equal(flat(first), flat(singles[0]))
