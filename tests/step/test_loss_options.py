"""Options of the losses in a TrainStep, and sample weights, against torch's own losses, autograd and torch.optim."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import fastmlp
from fastmlp.base.losses import STEP_LOSSES
from tests.support.steps import (
    Batch,
    Reference,
    allocations,
    batches,
    check_against_torch,
    converted,
    flat,
    for_step,
    in_dtype,
    network,
    one_thread,  # noqa: F401
    problem,
)
from tests.support.torchs import OPTIMIZERS

SIZES = (13, 17, 11, 5)
ROWS, SIZE, STEPS = 70, 24, 100
CLASS_WEIGHT = torch.tensor([0.5, 2.0, 0.25, 1.0, 3.0], dtype=torch.float64)
#: (loss, its options, whether its targets are probabilities)
OPTIONS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "class weights": ("cross_entropy", {"class_weight": CLASS_WEIGHT}, False),
    "smoothing": ("cross_entropy", {"label_smoothing": 0.2}, False),
    "smoothing, class weights": ("cross_entropy", {"label_smoothing": 0.2, "class_weight": CLASS_WEIGHT}, False),
    "ignored class": ("cross_entropy", {"ignore_index": 2}, False),
    "all": ("cross_entropy", {"ignore_index": 2, "label_smoothing": 0.1, "class_weight": CLASS_WEIGHT}, False),
    "-100 by name": ("cross_entropy", {"ignore_index": -100}, False),
    "probabilities": ("cross_entropy", {}, True),
    "probabilities, all": ("cross_entropy", {"label_smoothing": 0.1, "class_weight": CLASS_WEIGHT}, True),
    "huber": ("huber", {}, False),
    "huber, delta": ("huber", {"delta": 0.1}, False),
    "pos_weight": ("bce", {"pos_weight": CLASS_WEIGHT}, False),
    "pos_weight for all": ("bce", {"pos_weight": torch.tensor(3.0, dtype=torch.float64)}, False),
}
#: Every loss without options, and every option once.
WEIGHTED = {loss: (loss, {}, False) for loss in STEP_LOSSES} | OPTIONS


def data(
    loss: str,
    options: dict[str, Any],
    probabilities: bool,
    *,
    weighted: bool = False,
    steps: int = STEPS,
    sizes: tuple[int, ...] = SIZES,
    size: int = SIZE,
) -> list[Batch]:
    """Batches with some ignored labels, where the loss knows such. With ``weighted``, one weight in seven is 0."""
    x, y = problem(sizes, ROWS, loss=loss)
    if probabilities:
        y = problem(sizes, ROWS, loss="mse")[1] + 0.125
        y = (y / y.sum(1, keepdim=True)).float().double()
    elif loss == "cross_entropy" and "ignore_index" in options:
        y[::5] = options["ignore_index"]
    rows: list[Batch] = list(batches(x, y, size, steps))
    if weighted:
        s = torch.rand(ROWS, generator=torch.Generator().manual_seed(3)).double()
        s[::7] = 0
        rows = [(*batch, w) for batch, (_, w) in zip(rows, batches(x, s, size, steps), strict=True)]
    return rows


@pytest.mark.parametrize("case", OPTIONS)
def test_every_option(case):
    loss, options, probabilities = OPTIONS[case]
    optimizer = "adamw" if case in ("all", "probabilities, all", "huber, delta") else "momentum"
    check_against_torch(network(SIZES), data(loss, options, probabilities), OPTIMIZERS[optimizer], loss=loss, **options)


@pytest.mark.parametrize("case", WEIGHTED)
def test_sample_weights(case):
    loss, options, probabilities = WEIGHTED[case]
    batches_of = data(loss, options, probabilities, weighted=True, steps=100 if case == "all" else 25)
    check_against_torch(network(SIZES), batches_of, OPTIMIZERS["momentum"], loss=loss, **options)


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("case", ["all", "probabilities, all", "huber, delta", "pos_weight"])
def test_16_bits(case, weighted, parameters):
    """Masters, loss and update are float32; the first steps differ from float64 by the roundings of the products."""
    loss, options, probabilities = OPTIONS[case]
    rows = data(loss, options, probabilities, weighted=weighted, steps=5)
    start = network(SIZES)
    settings = OPTIMIZERS["momentum"]
    dtype = torch.bfloat16
    expected = Reference(start, settings, loss, options=options).train(rows)
    own = Reference(start, settings, loss, torch.float32, dtype, options=options).train(rows)
    model = converted(start, parameters)
    step = fastmlp.TrainStep(model, loss=loss, dtype=dtype, **settings, **in_dtype(options, parameters))
    losses = [step(*for_step(x, y, parameters), *weight).item() for x, y, *weight in rows]
    error, torchs = ((torch.tensor(run) - torch.tensor(expected.losses)).norm() for run in (losses, own.losses))
    assert error <= 2 * torchs + 0.02 * torch.tensor(expected.losses).norm()
    moved = (expected.flat() - flat(start)).norm()
    if parameters == torch.float32:
        assert (flat(model) - expected.flat()).norm() <= 2 * (own.flat() - expected.flat()).norm() + 0.01 * moved


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_long_batches(classes):
    """With few classes and many rows log-softmax runs along the columns."""
    x, y = problem((5, classes), 700)
    s = torch.rand(700, generator=torch.Generator().manual_seed(3)).double()
    rows: list[Batch] = [(x[:n], y[:n], s[:n]) for n in (700, 512, 511)]
    check_against_torch(network((5, classes)), rows, {"lr": 1.0}, label_smoothing=0.1)


def check_a_batch_of_ignored_rows(options):
    """torch's loss is NaN and its gradient 0: the optimizer updates by momentum and weight decay alone."""
    x, y = problem(SIZES, SIZE)
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    rows = [(x, y), (x, torch.full_like(y, -100)), (x, y)]
    model = network(SIZES)
    expected = Reference(model, settings, options=options).train(rows)
    step = fastmlp.TrainStep(model, **settings, **options)
    losses = [step(*batch).item() for batch in rows]
    assert losses == pytest.approx(expected.losses, nan_ok=True)
    assert math.isnan(losses[1])
    assert (flat(model) - expected.flat()).norm() <= 1e-10 * expected.flat().norm()


class TestIgnoredLabels:
    """What torch does with -100 unasked, a step on a CPU does too."""

    def test_by_default(self):
        x, y = problem(SIZES, ROWS)
        y[::5] = -100
        check_against_torch(network(SIZES), batches(x, y, SIZE, 40), OPTIMIZERS["momentum"])

    @pytest.mark.parametrize("batch_size", [1, 16])
    def test_in_an_epoch(self, batch_size):
        """Single rows also leave the exact recurrence of online steps."""
        model, twin = network(SIZES), network(SIZES)
        x, y = problem(SIZES, 30)
        y[[3, 11]] = -100
        losses = fastmlp.TrainStep(model, lr=0.3)
        losses.epoch(x, y, batch_size)
        other = Reference(twin, {"lr": 0.3}).train(zip(x.split(batch_size), y.split(batch_size), strict=True))
        assert (flat(model) - other.flat()).norm() <= 1e-10 * other.flat().norm()
        torch.testing.assert_close(losses.losses, torch.tensor(other.losses).double(), equal_nan=True)

    @pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"class_weight": CLASS_WEIGHT}], ids=str)
    def test_all_rows(self, options):
        check_a_batch_of_ignored_rows(options)

    def test_classes_that_weigh_nothing(self):
        """A batch of such classes alone has NaN for its loss and its gradient, as with torch."""
        x, y = problem(SIZES, SIZE)
        options = {"class_weight": torch.zeros(5, dtype=torch.float64)}
        step = fastmlp.TrainStep(network(SIZES), lr=0.1, **options)
        assert all(g.isnan().any() for g in step.gradients(x, y).values())
        assert step(x, y).isnan()

    @pytest.mark.parametrize("options", [{"ignore_index": 2}, {"class_weight": CLASS_WEIGHT}], ids=str)
    def test_other_labels_out_of_range_are_errors(self, options):
        x, y = problem(SIZES, SIZE)
        model = network(SIZES)
        step = fastmlp.TrainStep(model, lr=0.1, **options)
        for label in (-1, 5, *([-100] if "ignore_index" in options else [])):
            y[3] = label
            with pytest.raises(IndexError, match=f"class number {label} is out of range"):
                step(x, y)
            with pytest.raises(IndexError, match=f"class number {label} is out of range"):
                step.epoch(x, y, 8)
        assert torch.equal(flat(model), flat(network(SIZES)))


@pytest.mark.parametrize("case", ["all", "probabilities, all", "mse", "softmax_squared_error"])
@pytest.mark.parametrize("uint8", [False, True], ids=["", "pixels"])
def test_an_epoch_gathers_weights_like_labels(case, uint8):
    loss, options, probabilities = WEIGHTED[case]
    x, y, s = (torch.cat(t) for t in zip(*data(loss, options, probabilities, weighted=True, steps=2), strict=True))
    if uint8:
        x = problem(SIZES, len(x), uint8=True)[0]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(5))
    models = [network(SIZES) for _ in range(2)]
    steps = [fastmlp.TrainStep(model, loss=loss, lr=0.1, momentum=0.9, **options) for model in models]
    strided = torch.stack((s, s), 1)[:, 0]
    mean = steps[0].epoch(x, y, 20, order, sample_weight=strided.float())
    parts = order.split(20)
    losses = [steps[1](x[rows], y[rows], s[rows].float()) for rows in parts]
    assert torch.equal(flat(models[0]), flat(models[1]))
    assert torch.equal(steps[0].losses, torch.stack(losses))
    total = sum(loss.item() * len(rows) for loss, rows in zip(losses, parts, strict=True))
    assert mean.item() == pytest.approx(total / len(order))


@pytest.mark.parametrize("case", ["cross_entropy", "all", "huber"])
def test_gradients_are_those_of_the_weighted_mean(case):
    loss, options, probabilities = WEIGHTED[case]
    one, two = data(loss, options, probabilities, weighted=True, steps=2)
    start = network(SIZES)
    step = fastmlp.TrainStep(converted(start, torch.float64), loss=loss, lr=0.1, **options)
    step.gradients(*one[:2], sample_weight=one[2])
    grads = step.gradients(*two[:2], accumulate=True, sample_weight=two[2])
    expected = Reference(start, {"lr": 0.1}, loss, options=options)
    for batch in (one, two):
        expected.backward(*batch)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected.params[name].grad)


@pytest.mark.parametrize("case", WEIGHTED)
def test_equal_weights_change_nothing(case):
    """The weighted mean of equal weights is the plain one, whatever their size."""
    loss, options, probabilities = WEIGHTED[case]
    ((x, y),) = data(loss, options, probabilities, steps=1)
    step = fastmlp.TrainStep(network(SIZES), loss=loss, lr=0.0, **options)
    plain = step(x, y)
    for value in (1.0, 1e-3, 1e6):
        torch.testing.assert_close(step(x, y, torch.full((SIZE,), value)), plain, rtol=1e-12, atol=0)


def test_class_weights_are_copied():
    """Later changes of the tensor change nothing. Copies of the step have the same weights."""
    x, y = problem(SIZES, SIZE)
    weight = CLASS_WEIGHT.clone()
    step = fastmlp.TrainStep(network(SIZES), lr=0.0, class_weight=weight)
    before = step(x, y)
    weight.fill_(7.0)
    assert step(x, y) == before
    for other in (copy.deepcopy(step), pickle.loads(pickle.dumps(step))):
        assert other(x, y) == before


def test_options_stay_when_layers_are_frozen():
    """The step builds a new engine then."""
    x, y = problem(SIZES, SIZE)
    options = {"class_weight": CLASS_WEIGHT, "label_smoothing": 0.1}
    model = network(SIZES)
    step = fastmlp.TrainStep(model, lr=0.0, **options)
    before = step(x, y)
    model.layers[0].requires_grad_(False)
    assert step(x, y) == before


@pytest.mark.parametrize("case", WEIGHTED)
def test_nothing_is_allocated(case):
    loss, options, probabilities = WEIGHTED[case]
    ((x, y, s),) = data(loss, options, probabilities, weighted=True, steps=1)
    model = converted(network(SIZES), torch.float32)
    step = fastmlp.TrainStep(model, loss=loss, lr=0.1, **in_dtype(options, torch.float32))
    x, y = for_step(x, y, torch.float32)
    s = s.float()
    out = torch.empty(())
    engine: Any = step._engine
    assert allocations(lambda: engine.step(x, y, out)) == []
    assert allocations(lambda: engine.step(x, y, out, None, s)) == []


W = torch.ones(5)
SETTINGS = [
    ({"class_weight": [1.0] * 5}, TypeError, "class_weight to be a torch.Tensor, got list"),
    ({"class_weight": W[:4]}, RuntimeError, r"class_weight of shape \[5\], one value for each class, got \[4\]"),
    ({"class_weight": W.view(1, 5)}, RuntimeError, r"got \[1, 5\]"),
    ({"class_weight": W.double()}, RuntimeError, r"class_weight of dtype torch.float32, got torch.float64; convert"),
    ({"class_weight": W.long()}, RuntimeError, "got torch.int64"),
    ({"class_weight": W.to("meta")}, RuntimeError, "same device.*class_weight on meta"),
    ({"ignore_index": 1.0}, TypeError, "ignore_index to be an int, got float"),
    ({"label_smoothing": -0.1}, RuntimeError, "label_smoothing must be between 0.0 and 1.0, got -0.1"),
    ({"label_smoothing": 1.1}, RuntimeError, "got 1.1"),
    ({"label_smoothing": "a"}, TypeError, "label_smoothing to be a float, got str"),
    ({"loss": "bce", "pos_weight": W[:4]}, RuntimeError, r"pos_weight of shape \[5\].*got \[4\]"),
    ({"loss": "bce", "pos_weight": 2.0}, TypeError, "pos_weight to be a torch.Tensor, got float"),
    ({"loss": "bce", "pos_weight": W.long()}, RuntimeError, "floating-point pos_weight, got torch.int64"),
    ({"loss": "huber", "delta": 0.0}, RuntimeError, "delta to be above 0, got 0"),
    ({"loss": "huber", "delta": "1"}, TypeError, "delta to be a number"),
    (
        {"loss": "mse", "class_weight": W},
        ValueError,
        "class_weight is an option of the loss 'cross_entropy', and the loss is 'mse'; leave .*train with autograd",
    ),
    ({"loss": "softmax_squared_error", "label_smoothing": 0.1}, ValueError, "label_smoothing is an option of the loss"),
    ({"loss": "bce", "ignore_index": 3}, ValueError, "ignore_index is an option of the loss 'cross_entropy'"),
    ({"pos_weight": W}, ValueError, "pos_weight is an option of the loss 'bce', and the loss is 'cross_entropy'"),
    ({"delta": 2.0}, ValueError, "delta is an option of the loss 'huber'"),
]


@pytest.mark.parametrize(("settings", "error", "message"), SETTINGS, ids=lambda v: v if isinstance(v, str) else "")
def test_settings(settings, error, message):
    with pytest.raises(error, match=message):
        fastmlp.TrainStep(converted(network(SIZES), torch.float32), lr=0.1, **settings)


@pytest.mark.parametrize("loss", STEP_LOSSES)
def test_defaults_fit_every_loss(loss):
    defaults = {"class_weight": None, "ignore_index": -100, "label_smoothing": 0, "pos_weight": None, "delta": 1}
    assert fastmlp.TrainStep(network(SIZES), lr=0.1, loss=loss, **defaults)(*problem(SIZES, 9, loss=loss)).isfinite()


SAMPLE_WEIGHTS = [
    ([1.0] * SIZE, TypeError, "sample_weight to be a torch.Tensor, got list"),
    (torch.ones(SIZE - 1), RuntimeError, r"sample_weight of shape \[24\], one for each row, got \[23\]"),
    (torch.ones(SIZE, 1), RuntimeError, r"got \[24, 1\]"),
    (torch.ones(SIZE).long(), RuntimeError, "floating-point sample_weight, got torch.int64"),
    (torch.ones(SIZE, device="meta"), RuntimeError, "sample_weight on meta"),
    (torch.ones(SIZE).index_fill(0, torch.tensor([3]), -0.5), ValueError, "at least 0, got values from -0.5 to 1"),
    (torch.ones(SIZE).index_fill(0, torch.tensor([3]), math.nan), ValueError, "got values from nan"),
    (torch.ones(SIZE).index_fill(0, torch.tensor([3]), math.inf), ValueError, "finite sample weights"),
    (torch.zeros(SIZE), ValueError, "every sample weight is 0"),
]


@pytest.mark.parametrize(("weight", "error", "message"), SAMPLE_WEIGHTS, ids=lambda v: v if isinstance(v, str) else "")
def test_sample_weights_that_do_not_fit(weight, error, message):
    model = network(SIZES)
    step = fastmlp.TrainStep(model, lr=0.1)
    for function in (step, step.gradients, lambda *a, **k: step.epoch(*a, 7, **k)):
        with pytest.raises(error, match=message):
            function(*problem(SIZES, SIZE), sample_weight=weight)
    assert torch.equal(flat(model), flat(network(SIZES)))


@pytest.mark.parametrize(
    ("weight", "message"),
    [(1e-60, "every sample weight .*is 0"), (1e60, r"finite sample weights .* in torch.float32")],
)
def test_sample_weights_beyond_the_range_of_the_step(weight, message):
    """float64 weights of a step in float32."""
    step = fastmlp.TrainStep(converted(network(SIZES), torch.float32), lr=0.1)
    x, y = for_step(*problem(SIZES, SIZE), torch.float32)
    weights = torch.full((SIZE,), weight, dtype=torch.float64)
    for function in (step, step.gradients, lambda *a, **k: step.epoch(*a, 7, **k)):
        with pytest.raises(ValueError, match=message):
            function(x, y, sample_weight=weights)


def test_a_batch_of_an_epoch_that_weighs_nothing():
    model = network(SIZES)
    step = fastmlp.TrainStep(model, lr=0.1)
    weight = torch.ones(SIZE)
    weight[14:21] = 0
    with pytest.raises(ValueError, match="every sample weight of batch 2 is 0"):
        step.epoch(*problem(SIZES, SIZE), 7, sample_weight=weight)
    assert torch.equal(flat(model), flat(network(SIZES)))
    weight[14] = 1
    assert step.epoch(*problem(SIZES, SIZE), 7, sample_weight=weight).isfinite()


TARGETS = [
    (torch.rand(SIZE, 4), {}, RuntimeError, r"shape \[24\] or probabilities of shape \[24, 5\], got \[24, 4\]"),
    (torch.rand(SIZE, 5, 1), {}, RuntimeError, r"got \[24, 5, 1\]"),
    (torch.rand(SIZE, 5), {"ignore_index": 1}, RuntimeError, "ignore_index is for class numbers, got probabilities"),
    (torch.rand(SIZE, 5), {"loss": "softmax_squared_error"}, RuntimeError, r"class numbers of shape \[24\]"),
]


@pytest.mark.parametrize(("y", "settings", "error", "message"), TARGETS, ids=lambda v: v if isinstance(v, str) else "")
def test_probabilities_that_do_not_fit(y, settings, error, message):
    step = fastmlp.TrainStep(network(SIZES), lr=0.1, **settings)
    with pytest.raises(error, match=message):
        step(problem(SIZES, SIZE)[0], y)


def test_labels_and_probabilities_in_turn():
    """One step takes both, and the labels' result does not depend on what came before."""
    x, y = problem(SIZES, SIZE)
    step = fastmlp.TrainStep(network(SIZES), lr=0.0)
    labels = step(x, y)
    hot = F.one_hot(y, 5)
    for dtype in (torch.float64, torch.float32, torch.float16):
        torch.testing.assert_close(step(x, hot.to(dtype)), labels)
    assert step(x, y) == labels
    y[3] = -100
    assert step(x, y) == pytest.approx(F.cross_entropy(network(SIZES)(x), y).item())
