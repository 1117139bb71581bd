"""Machine code with options of losses, sample weights and probabilities: as torch, and without a step on operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastmlp
from fastmlp.cpu import choose
from fastmlp.step import cpu_step
from fastmlp.step.cpu_ensemble import TorchEnsemble
from fastmlp.step.cpu_members import Piece
from tests.step.test_loss_options import (
    CLASS_WEIGHT,
    OPTIONS,
    SIZE,
    SIZES,
    WEIGHTED,
    check_a_batch_of_ignored_rows,
    data,
)
from tests.support.steps import (
    Reference,
    check_against_torch,
    converted,
    flat,
    for_step,
    in_dtype,
    network,
    one_thread,  # noqa: F401
    problem,
    threads,
)
from tests.support.torchs import OPTIMIZERS

pytestmark = pytest.mark.usefixtures("native_code")
DTYPES = (torch.float32, torch.float64)
#: Steps against torch.
STEPS = 40


def refuse_operators(patch: pytest.MonkeyPatch) -> None:
    """Have steps and gradients on operators fail, and rows that operators gather."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the step went to the operators")

    patch.setattr(cpu_step, "_step", refuse)
    patch.setattr(Piece, "run", refuse)
    patch.setattr(TorchEnsemble, "_rows_of", refuse)


@pytest.fixture
def no_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs on operators."""
    refuse_operators(monkeypatch)


def made(loss: str = "cross_entropy", dtype: torch.dtype = torch.float64, **settings) -> fastmlp.TrainStep:
    """A step of a network, with settings in the dtype."""
    model = converted(network(SIZES, "tanh"), dtype)
    step = fastmlp.TrainStep(model, loss=loss, **{"lr": 0.1, **in_dtype(settings, dtype)})
    return step


@pytest.mark.usefixtures("no_operators")
@pytest.mark.parametrize("case", OPTIONS)
def test_every_option(case):
    loss, options, probabilities = OPTIONS[case]
    rows = data(loss, options, probabilities, steps=STEPS)
    check_against_torch(network(SIZES), rows, OPTIMIZERS["momentum"], loss=loss, **options)


@pytest.mark.usefixtures("no_operators")
@pytest.mark.parametrize("case", WEIGHTED)
def test_sample_weights(case):
    loss, options, probabilities = WEIGHTED[case]
    rows = data(loss, options, probabilities, weighted=True, steps=STEPS)
    check_against_torch(network(SIZES), rows, OPTIMIZERS["adamw"], loss=loss, **options)


class NoOperators(TorchDispatchMode):
    """Every operator of torch is an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was called")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("case", WEIGHTED)
def test_no_operator_is_called(case, dropout):
    """By a step, with and without weights, or by its gradients; and by an epoch."""
    loss, options, probabilities = WEIGHTED[case]
    ((x, y, s),) = data(loss, options, probabilities, weighted=True, steps=1)
    step = made(loss, **options)
    step.model.dropout = dropout
    engine: Any = step._engine
    out, order, losses = torch.empty(()).double(), torch.arange(SIZE), torch.empty(2).double()
    rates = torch.full((2,), 0.1, dtype=torch.float64)
    step.gradients(x, y)
    planned = engine._planned(SIZE)
    with NoOperators():
        for weight in (None, s):
            engine.step(x, y, out, None, weight)
            planned(x, y, out, None, weight, update=False)
            assert planned.epoch(x, y, 12, order, rates, losses, weight)


@pytest.mark.usefixtures("no_operators")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("case", WEIGHTED)
def test_epoch_is_a_loop_of_steps(case, weighted, dtype):
    """In any order, with strides and weights of another dtype."""
    loss, options, probabilities = WEIGHTED[case]
    batches = data(loss, options, probabilities, weighted=True, steps=2)
    x, y, s = (torch.cat(parts)[:43] for parts in zip(*batches, strict=True))
    x, y = for_step(x, y, dtype)
    order = torch.randperm(43, generator=torch.Generator().manual_seed(5))
    s = torch.stack((s, s), 1)[:, 0] if weighted else None
    epoch, loop = made(loss, dtype, **options), made(loss, dtype, **options)
    epoch.epoch(x, y, 10, order, sample_weight=s)
    losses = [loop(x[rows], y[rows], None if s is None else s[rows]) for rows in order.split(10)]
    assert torch.equal(epoch.losses, torch.stack(losses))
    assert torch.equal(flat(epoch.model), flat(loop.model))


@pytest.mark.usefixtures("no_operators")
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_weighs_the_same_changes_no_bit(dtype):
    """Labels that all count, factors of 1, and batches with ignored labels between others."""
    x, y = for_step(*problem(SIZES, SIZE), dtype)
    models = []
    for options in ({}, {"ignore_index": -100}, {"class_weight": torch.ones(5)}):
        step = made(dtype=dtype, **options)
        for _ in range(3):
            loss = step(x, y)
        models.append(torch.cat((flat(step.model), loss.double().view(1))))
    assert torch.equal(models[0], models[1])
    assert torch.equal(models[0], models[2])
    some = torch.cat((y, y.where(torch.arange(SIZE) % 5 > 0, -100), y))
    epoch, loop = made(dtype=dtype), made(dtype=dtype)
    epoch.epoch(torch.cat((x, x, x)), some, SIZE)
    assert torch.equal(epoch.losses, torch.stack([loop(x, labels) for labels in some.split(SIZE)]))
    assert torch.equal(flat(epoch.model), flat(loop.model))


@pytest.mark.usefixtures("no_operators")
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"class_weight": CLASS_WEIGHT}], ids=str)
def test_a_batch_of_ignored_rows(options):
    check_a_batch_of_ignored_rows(options)


@pytest.mark.usefixtures("no_operators")
@pytest.mark.parametrize(("dtype", "small"), [(torch.float32, 1e-40), (torch.float64, 1e-310)])
@pytest.mark.parametrize("case", WEIGHTED)
def test_sample_weights_below_the_smallest_normal_number(case, dtype, small):
    """They are numbers, although the machine code treats such results of layers as 0."""
    loss, options, probabilities = WEIGHTED[case]
    ((x, y),) = data(loss, options, probabilities, steps=1)
    x, y = for_step(x, y, dtype)
    step = made(loss, dtype, **{"lr": 0.0, **options})
    plain = step(x, y)
    torch.testing.assert_close(step(x, y, torch.full((SIZE,), small, dtype=dtype)), plain, rtol=1e-3, atol=1e-6)


@pytest.mark.usefixtures("no_operators")
def test_classes_that_weigh_nothing():
    """A batch of such classes alone has NaN for its loss and its gradient, as with torch."""
    x, y = problem(SIZES, SIZE)
    step = made(class_weight=torch.zeros(5))
    assert step(x, y).isnan()
    assert flat(step.model).isnan().any()


@pytest.mark.parametrize(
    "options", [{}, {"ignore_index": 2}, {"class_weight": CLASS_WEIGHT}, {"loss": "softmax_squared_error"}], ids=str
)
def test_labels_out_of_range(options):
    """They change nothing, with sample weights too. -100 is such a label where another one is ignored."""
    x, y = problem(SIZES, SIZE)
    step = made(**options)
    weight = torch.ones(SIZE)
    no_class = [-100] if "ignore_index" in options or "loss" in options else []
    for label in (-1, 5, -(1 << 63), *no_class):
        y[3] = label
        for call in (step, lambda *a: step(*a, weight), lambda *a: step.epoch(*a, 8)):
            with pytest.raises(IndexError, match=f"class number {label} is out of range"):
                call(x, y)
    assert torch.equal(flat(step.model), flat(network(SIZES, "tanh")))


@pytest.mark.usefixtures("no_operators")
def test_turns():
    """Labels, probabilities, weights and none: each batch has the unit of its own, on contiguous data and other."""
    x, y = problem(SIZES, SIZE)
    hot, s = torch.nn.functional.one_hot(y, 5).double(), torch.linspace(0, 2, SIZE).double()
    wide = torch.stack((hot, hot), -1)[..., 0]
    ignored = y.where(torch.arange(SIZE) > 3, -100)
    turns = [(x, y), (x, y, s), (x, hot), (x, y), (x, ignored), (x, wide, s), (x, y), (x[:, :], hot), (x, y, s)]
    models = []
    for turn in range(2):
        step = made(optimizer="adamw")
        for batch in turns:
            step(*(batch if turn else tuple(t.clone(memory_format=torch.contiguous_format) for t in batch)))
        models.append(flat(step.model))
    assert torch.equal(*models)
    expected = Reference(network(SIZES, "tanh"), {"optimizer": "adamw", "lr": 0.1}).train(turns)
    assert (models[0] - expected.flat()).norm() <= 1e-10 * expected.flat().norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("case", WEIGHTED)
def test_what_is_not_finite_shows(case, weighted, value):
    """Losses and parameters are NaN or infinite where those of the operators are."""
    loss, options, probabilities = WEIGHTED[case]
    (batch,) = data(loss, options, probabilities, weighted=weighted, steps=1)
    batch[0][2, 3] = value
    found = []
    for mode in ("native", "aten"):
        fastmlp.set_cpu_gemm(mode)
        step = made(loss, **options)
        found.append((step(*batch), step(*batch), flat(step.model)))
    for native, operators in zip(*found, strict=True):
        assert torch.equal(native.isnan(), operators.isnan())
        assert torch.equal(native.isinf(), operators.isinf())


E = 3


@pytest.mark.usefixtures("no_operators")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("members", [1, E])
@pytest.mark.parametrize("weights", ["none", "one", "each"])
@pytest.mark.parametrize("case", WEIGHTED)
def test_members_are_single_models(case, weights, members, dtype):
    """Bit for bit, steps and epochs, with data of their own or the same for all."""
    loss, options, probabilities = WEIGHTED[case]
    batches = data(loss, options, probabilities, weighted=True, steps=members)
    x, y, s = (torch.stack(parts) for parts in zip(*batches, strict=True))
    x, y = for_step(x, y, dtype)
    singles = [converted(network(SIZES, "tanh", seed=e), dtype) for e in range(members)]
    settings = {"loss": loss, "lr": 0.1, "momentum": 0.9, **in_dtype(options, dtype)}
    together = fastmlp.TrainStep(fastmlp.MLPEnsemble.stack(singles), **settings)
    alone = [fastmlp.TrainStep(model, **settings) for model in singles]
    own = {"none": [None] * members, "one": [s[0]] * members, "each": list(s)}[weights]
    given = {"none": None, "one": s[0], "each": s}[weights]
    for labels in (y, y[0]):
        of = list(labels) if labels.dim() == y.dim() else [labels] * members
        losses = together(x, labels, given)
        assert torch.equal(losses, torch.stack([step(*b) for step, *b in zip(alone, x, of, own, strict=True)]))
    together.epoch(x, y, 10, sample_weight=given)
    for e, step in enumerate(alone):
        step.epoch(x[e], y[e], 10, sample_weight=own[e])
        assert torch.equal(together.losses[:, e], step.losses)
    for model, single in zip(together.model.unstack(), singles, strict=True):
        assert torch.equal(flat(model), flat(single))


@pytest.mark.parametrize("members", [1, E])
def test_minus_100_of_members(members):
    """No class unless cross-entropy has an option; then it is ignored, as for a single model."""
    x, y = problem(SIZES, SIZE)
    y[3] = -100
    for mode in ("native", "aten"):
        choose.set_cpu_gemm(mode)
        for weight in ((), (torch.ones(SIZE),)):
            step = fastmlp.TrainStep(fastmlp.MLPEnsemble(SIZES, members, dtype=torch.float64), lr=0.1)
            before = flat(step.model)
            with pytest.raises(IndexError, match="class number -100 is out of range"):
                step(x, y, *weight)
            assert torch.equal(flat(step.model), before)
            options = {"class_weight": CLASS_WEIGHT}
            model = fastmlp.MLPEnsemble.stack([network(SIZES, "tanh")] * members)
            losses = fastmlp.TrainStep(model, lr=0.1, **options)(x, y, *weight)
            single = made(**options)(x, y, *weight)
            torch.testing.assert_close(losses, single.expand(members))


def dropping(dtype: torch.dtype, *, members: int | None = None) -> fastmlp.MLP | fastmlp.MLPEnsemble:
    """A model whose masks are the same at every call."""
    torch.manual_seed(7)
    more = {"activation": "gelu", "dtype": dtype, "dropout": (0.25, 0.5)}
    return fastmlp.MLP(SIZES, **more) if members is None else fastmlp.MLPEnsemble(SIZES, members, **more)


@pytest.mark.usefixtures("no_operators")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("members", [None, 1, E])
@pytest.mark.parametrize("threads_", [1, 2])
def test_dropout(members, threads_, dtype):
    """An epoch is a loop of steps, which evaluation mode may interrupt; each counts its passes."""
    x, y = problem(SIZES, 43)
    x, s = x.to(dtype), torch.linspace(0.5, 2, 43, dtype=dtype)
    loops = [fastmlp.TrainStep(dropping(dtype, members=members), lr=0.1, momentum=0.9) for _ in range(2)]
    losses = []
    with threads(threads_):
        for step in loops:
            step(x, y)
            step.model.eval()
            step(x, y)
            step.model.train()
        loops[0].epoch(x, y, 10, sample_weight=s)
        for rows in torch.arange(43).split(10):
            losses.append(loops[1](x[rows], y[rows], s[rows]))
    assert torch.equal(loops[0].losses, torch.stack(losses))
    for ours, theirs in zip(*(step.model.state_dict().values() for step in loops), strict=True):
        assert torch.equal(ours, theirs)
    assert loops[0].model.dropout_state[1] == 6


@pytest.mark.parametrize("members", [None, 1, E])
@pytest.mark.parametrize("settings", [{}, {"optimizer": "adamw", "max_grad_norm": 0.5, "ema_decay": 0.9}], ids=str)
def test_gradients(members, settings, monkeypatch):
    """Of a mean with weights, probabilities and dropout, accumulated; steps come between, and some members stop."""
    x, y = problem(SIZES, SIZE)
    s, hot = torch.linspace(0, 2, SIZE).double(), torch.nn.functional.one_hot(y, 5).double()
    found = []
    for mode in ("native", "aten"):
        choose.set_cpu_gemm(mode)
        with monkeypatch.context() as patch:
            if mode == "native":
                refuse_operators(patch)
            model = dropping(torch.float64, members=members)
            step = fastmlp.TrainStep(model, lr=0.1, **settings)
            for i in range(3):
                before = flat(model)
                one = step.gradients(x, y, sample_weight=s)
                grads = step.gradients(x, hot, accumulate=True)
                assert torch.equal(flat(model), before)
                assert all(one[name] is grads[name] or torch.equal(one[name], grads[name]) for name in grads)
                found.append(torch.cat([grad.flatten() for grad in grads.values()]))
                step.update()
                step(x, y)
                found.append(flat(model))
                if members == E:
                    step.active = torch.tensor([True, i == 1, True])
            assert model.dropout_state[1] == 9
            found.append(torch.cat([t.double().flatten() for t in (s, *step.state_dict().values())]))
    for ours, theirs in zip(found[:7], found[7:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("members", [None, 1, E])
def test_in_turns_with_operators(members):
    """The state of dropout is the model's, wherever its memory is, and operators take what the machine code lacks."""
    x, y = problem(SIZES, SIZE)
    hot = torch.nn.functional.one_hot(y, 5)
    models = []
    for mode in ("native", "aten"):
        choose.set_cpu_gemm(mode)
        model = dropping(torch.float64, members=members)
        step = fastmlp.TrainStep(model, lr=0.1, momentum=0.9, max_grad_norm=1.0)
        for _ in range(2):
            step(x, y)
            step(x, hot.float())
            step.gradients(x, hot.float())
            step.gradients(x, y, accumulate=True)
            step.update()
            model.dropout_state.data = model.dropout_state.data.clone()
            step(x, hot.double())
            model.dropout_state.data = torch.stack((model.dropout_state, model.dropout_state), 1)[:, 0]
            step.epoch(x, y, 10)
            model.dropout_state.data = model.dropout_state.data.clone()
        models.append(flat(model))
        assert model.dropout_state[1] == 16
    torch.testing.assert_close(*models, rtol=1e-11, atol=1e-13)
