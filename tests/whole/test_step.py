"""TrainStep on the kernels (fastmlp/step/triton_step.py): launches, agreement with float64, graphs' static tables.

The reference is the same TrainStep on the torch backend, which tests/step/ compares with torch.optim and autograd.
"""

from __future__ import annotations

import copy
import statistics

import pytest
import torch

import fastmlp
from fastmlp import TrainStep, reference, use_backend
from fastmlp.base.losses import STEP_LOSSES, takes_classes
from fastmlp.kernels import linear_fwd
from tests.conftest import INTERPRETING
from tests.support.harness import assert_within_budget
from tests.support.steps import Reference, batches, budget_used, converted, flat, network, problem
from tests.support.torchs import OPTIMIZERS

# Triton's interpreter is numpy, which warns of 0 times inf in columns that a mask then drops.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

SETTINGS = {
    "sgd": {"lr": 0.1},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "adamw": {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "clipped": {"lr": 0.1, "max_grad_norm": 0.05},
    "adam": {"optimizer": "adam", "lr": 0.01, "amsgrad": True, "weight_decay": 0.1, "max_grad_norm": 0.05},
    # With a tiny eps a gradient near 0 moves its parameter as far as any other, and so do its rounding errors.
    "rmsprop": {"optimizer": "rmsprop", "lr": 0.003, "eps": 0.01, "momentum": 0.5, "centered": True, "maximize": True},
    "lion": {"optimizer": "lion", "lr": 0.003, "weight_decay": 0.1},
    "groups": {
        "lr": 0.1,
        "momentum": 0.9,
        "param_groups": [
            {"params": "*.bias", "lr": 0.5, "weight_decay": 0.2},
            {"params": "layers.1.weight", "lr": 0.0},
        ],
    },
    "groups, float16": {
        "optimizer": "adamw",
        "lr": 0.01,
        "param_groups": [{"params": "*.bias", "lr": 0.05}, {"params": "layers.1.weight", "lr": 0.0}],
        "dtype": torch.float16,
    },
}


def data(n, features, classes, *, values=False, seed=1):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, features), generator=g, dtype=torch.uint8)
    if values:
        return images, torch.rand(n, classes, generator=g)
    return images, torch.randint(0, classes, (n,), generator=g)


def compare(
    lane, sizes, activation="sigmoid", *, m=16, n=45, dtype=None, loss="cross_entropy", pixels=True, **settings
):  # fmt: skip
    """One shuffled epoch with a short last batch: kernels, torch in the same dtype, torch in float64."""
    torch.manual_seed(0)
    start = fastmlp.MLP(sizes, activation)
    images, labels = data(n, sizes[0], sizes[-1], values=not takes_classes(STEP_LOSSES[loss]))
    images = images if pixels else (images / 255).to(dtype or torch.float32)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(2))
    models, losses = {}, {}
    for name in ("triton", "torch", "float64"):
        model = models[name] = copy.deepcopy(start).to(lane if name == "triton" else "cpu")
        target = labels
        if name == "float64":
            model.double()
            target = labels.double() if labels.is_floating_point() else labels
        with use_backend("triton" if name == "triton" else "torch"):
            step = TrainStep(model, loss=loss, dtype=None if name == "float64" else dtype, **settings)
        where = next(model.parameters()).device
        x = images.double() if name == "float64" and not pixels else images
        losses[name] = step.epoch(x.to(where), target.to(where), m, order.to(where))
        assert step.losses.shape == (-(-n // m),)
    for p, own, truth in zip(*(models[k].parameters() for k in ("triton", "torch", "float64")), strict=True):
        assert_within_budget(p.detach().cpu(), truth.detach(), own.detach(), reduction=n)
    assert_within_budget(
        losses["triton"].cpu().view(1), losses["float64"].double().view(1), losses["torch"].view(1), reduction=n
    )


@pytest.mark.parametrize("pixels", [True, False], ids=["pixels", "float images"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m", [64, 512, 4096, 65536])
def test_the_reference_network(lane, m, dtype, pixels):
    """Three steps of 784-512-512-10; without a GPU a smaller network and a smaller batch."""
    if lane.type == "cuda":
        compare(lane, (784, 512, 512, 10), m=m, n=3 * m, dtype=dtype, pixels=pixels, lr=0.1, momentum=0.9)
    elif m == 64:
        compare(lane, (33, 17, 16, 10), m=24, n=72, dtype=dtype, pixels=pixels, lr=0.1, momentum=0.9)
    else:
        pytest.skip("the smaller network runs once; large batches need a GPU")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m", [4096, 65536])
def test_pixels_in_16_bits_give_the_same_bits(lane, m, dtype):
    """20 times; on a GPU in tiles that wgmma multiplies with an operand in registers."""
    gpu = lane.type == "cuda"
    m, n, k = (m, 512, 784) if gpu else (m // 64, 17, 33)
    if not gpu and m > 64:
        pytest.skip("the smaller batch runs once; large batches need a GPU")
    images, _ = data(m, k, 10)
    w = (torch.randn(n, k, generator=torch.Generator().manual_seed(3)) / k**0.5).to(dtype)
    results = [linear_fwd(images.to(lane), w.to(lane), None, "relu")[0] for _ in range(20 if gpu else 2)]
    assert all(torch.equal(results[0], other) for other in results[1:])
    exact, own = (reference.linear_act(images, w.to(d), None, "relu") for d in (torch.float64, dtype))
    assert_within_budget(results[0].cpu(), exact, own, reduction=k)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_optimizers(lane, settings):
    compare(lane, (33, 20, 17, 5), **settings)


@pytest.mark.parametrize("params", [torch.float32, "16 bits"], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_100_steps_in_16_bits(request, lane, name, dtype, params):
    """With ``--full`` and on a GPU; without, some steps of one rule. Lion jumps, so the median of five runs counts."""
    full = request.config.getoption("full") or lane.type == "cuda"
    if not full and (name, dtype, params) != ("adam, amsgrad", torch.bfloat16, "16 bits"):
        pytest.skip("every rule only with --full")
    steps, settings = 100 if full else 10 if INTERPRETING else 3, OPTIMIZERS[name]
    params, used = dtype if params == "16 bits" else params, []
    for seed in range(5 if settings.get("optimizer") == "lion" else 1):
        start = network((5, 9, 4), seed=seed)
        batches_of = batches(*problem((5, 9, 4), 45, seed=seed + 1), 8, steps)
        expected = Reference(start, settings).train(batches_of).flat()
        own = Reference(start, settings, master=torch.float32, compute=dtype).train(batches_of).flat(params)
        model = converted(start, params).to(lane)
        with use_backend("triton"):
            step = TrainStep(model, dtype=dtype, **settings)
        for x, y in batches_of:
            step(x.to(lane, dtype), y.to(lane))
        # Both runs round to the parameters' dtype at the end, and some of their roundings may go to different sides.
        eps = torch.finfo(torch.float32).eps if params == torch.float32 else torch.finfo(params).eps / steps**0.5
        used.append(budget_used(flat(model).cpu(), expected, own, steps, eps))
    assert statistics.median(used) <= 1, f"parts of the budget: {used}"


@pytest.mark.parametrize("activation", ["relu", "gelu", "identity"])
def test_activations_and_depth(lane, activation):
    compare(lane, (20, 17, 16, 9, 5), activation, lr=0.05)


EMA = {
    "sgd": {"lr": 0.1, "dtype": None},
    "adamw float16": {"optimizer": "adamw", "lr": 0.01, "dtype": torch.float16},
    "momentum groups float16": {
        "lr": 0.1,
        "momentum": 0.9,
        "dtype": torch.float16,
        "max_grad_norm": 0.5,
        "param_groups": [{"params": "*.bias", "lr": 0.5}],
    },
}


@pytest.mark.parametrize("warmup", [False, True], ids=["", "warm-up"])
@pytest.mark.parametrize("settings", EMA.values(), ids=EMA)
def test_averages(lane, settings, warmup):
    """The average of the kernels' own parameters after each step, which float64 averages too."""
    torch.manual_seed(0)
    model = fastmlp.MLP((33, 20, 17, 5)).to(lane)
    images, labels = (t.to(lane) for t in data(16, 33, 5))
    with use_backend("triton"):
        step = TrainStep(model, ema_decay=0.75, ema_warmup=warmup, **settings)
    expected = [p.detach().double().cpu() for p in model.parameters()]
    for t in range(1, 5):
        step(images, labels)
        decay = min(0.75, (1 + t) / (10 + t)) if warmup else 0.75
        for e, p in zip(expected, model.parameters(), strict=True):
            e.mul_(decay).add_(p.detach().double().cpu(), alpha=1 - decay)
    for name, average, e in zip(model.state_dict(), step.ema_state_dict().values(), expected, strict=True):
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double().cpu(), e, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # numpy's, interpreting
def test_skipped_steps_do_not_count_in_the_average(lane):
    """Plain SGD with a warm-up counts its updates like a rule that needs their number."""
    torch.manual_seed(0)
    model = fastmlp.MLP((33, 17, 5)).to(lane)
    images, labels = (t.to(lane) for t in data(16, 33, 5))
    with use_backend("triton"):
        step = TrainStep(model, lr=0.1, dtype=torch.float16, ema_decay=0.9, ema_warmup=True)
    before = step.ema_state_dict()
    step._engine.loss_scale.scale.fill_(2.0**30)
    step(images, labels)
    assert all(torch.equal(t, before[name]) for name, t in step.ema_state_dict().items())
    step._engine.loss_scale.scale.fill_(2.0**15)
    step._engine.loss_scale.inverse.fill_(2.0**-15)
    step(images, labels)
    assert step.state_dict()["step"] == 1
    for (name, t), p in zip(step.ema_state_dict().items(), model.parameters(), strict=True):
        torch.testing.assert_close(t, (before[name] * 2 + p.detach() * 9) / 11, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("loss", list(STEP_LOSSES)[1:])
def test_losses(lane, loss):
    compare(lane, (33, 17, 5), loss=loss, lr=0.1)


@pytest.mark.parametrize("sizes", [(20, 5), (20, 17, 150)], ids=["one layer", "more classes than the head takes"])
def test_without_and_beyond_the_head(lane, sizes):
    compare(lane, sizes, lr=0.1)


def test_gradients_accumulate_and_update(lane):
    torch.manual_seed(0)
    start = fastmlp.MLP((33, 17, 5))
    images, labels = data(20, 33, 5)
    results = []
    for backend, device in (("triton", lane), ("torch", torch.device("cpu"))):
        model = copy.deepcopy(start).to(device)
        with use_backend(backend):
            step = TrainStep(model, lr=0.1)
        step.gradients(images[:8].to(device), labels[:8].to(device))
        grads = step.gradients(images[8:].to(device), labels[8:].to(device), accumulate=True)
        kept = {name: g.clone().cpu() for name, g in grads.items()}
        step.update()
        results.append((kept, [p.detach().cpu() for p in model.parameters()]))
    (ours, params), (theirs, expected) = results
    assert ours.keys() == theirs.keys() == {f"layers.{i}.{p}" for i in range(2) for p in ("weight", "bias")}
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q)


def test_frozen_layers_stay(lane):
    torch.manual_seed(0)
    model = fastmlp.MLP((33, 17, 16, 5)).to(lane)
    for parameter in model.layers[0].parameters():
        parameter.requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]
    images, labels = data(16, 33, 5)
    with use_backend("triton"):
        step = TrainStep(model, lr=0.1)
    step(images.to(lane), labels.to(lane))
    changed = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert changed == [False, False, True, True, True, True]


def test_two_runs_are_bitwise_equal(lane):
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = fastmlp.MLP((33, 17, 5)).to(lane)
        images, labels = data(45, 33, 5)
        with use_backend("triton"):
            TrainStep(model, lr=0.1, momentum=0.9).epoch(images.to(lane), labels.to(lane), 16)
        runs.append([p.detach().cpu() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


PRECISIONS = [(torch.float32, None), (torch.float32, torch.float16), (torch.float16, None)]


@pytest.mark.parametrize(("parameters", "products"), PRECISIONS, ids=str)
@pytest.mark.parametrize("optimizer", ["nesterov", "adamw"])
def test_goes_on_where_it_stopped(lane, optimizer, parameters, products):
    """A new TrainStep takes the state and the parameters of an old one, and both go on alike."""
    settings = SETTINGS[optimizer]
    torch.manual_seed(0)
    model, other = (fastmlp.MLP((33, 17, 5)).to(lane, parameters) for _ in range(2))
    images, labels = (t.to(lane) for t in data(16, 33, 5))
    with use_backend("triton"):
        step, resumed = (TrainStep(m, dtype=products, **settings) for m in (model, other))
    resumed(images, labels)
    for _ in range(2):
        step(images, labels)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(step.state_dict())
    for _ in range(2):
        step(images, labels)
        resumed(images, labels)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    if products is None:
        with use_backend("torch"):
            names = set(TrainStep(copy.deepcopy(model).cpu(), dtype=products, **settings).state_dict())
        assert set(step.state_dict()) == names


@pytest.mark.parametrize(("parameters", "products"), PRECISIONS[1:], ids=str)
def test_follows_parameters_that_were_loaded(lane, parameters, products):
    """Masters and 16-bit copies follow the present parameters."""
    torch.manual_seed(0)
    model, other = (fastmlp.MLP((33, 17, 5)).to(lane, parameters) for _ in range(2))
    images, labels = (t.to(lane) for t in data(16, 33, 5))
    with use_backend("triton"):
        step = TrainStep(model, dtype=products, lr=0.1)
        step(images, labels)
        model.load_state_dict(other.state_dict())
        step(images, labels)
        TrainStep(other, dtype=products, lr=0.1)(images, labels)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(("parameters", "products"), PRECISIONS[1:], ids=str)
def test_follows_values_that_raise_no_version(lane, parameters, products):
    torch.manual_seed(0)
    model = fastmlp.MLP((33, 17, 5)).to(lane, parameters)
    images, labels = (t.to(lane) for t in data(16, 33, 5))
    with use_backend("triton"):
        step = TrainStep(model, dtype=products, lr=0.1)
        step(images, labels)
        for parameter in model.parameters():
            parameter.data.neg_()
        other = copy.deepcopy(model)
        loss = step(images, labels)
        assert TrainStep(other, dtype=products, lr=0.1)(images, labels) == loss
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def as_on_a_gpu(monkeypatch):
    """Nobody looks at labels on the host, because the host would wait."""
    monkeypatch.setattr("fastmlp.step.validation.check_classes", lambda y, classes, ignore_index: None)
    monkeypatch.setattr("fastmlp.step.triton_loss.host_sees_labels", lambda device: False)


@pytest.mark.parametrize("label", [-1, -100, 5])
@pytest.mark.parametrize("classes", [5, 80], ids=["head", "more classes than the head takes"])
def test_a_label_out_of_range_makes_the_loss_nan(lane, monkeypatch, classes, label):
    """This includes the label that torch ignores by default, unless an option asks to ignore it."""
    as_on_a_gpu(monkeypatch)
    model = fastmlp.MLP((33, 17, classes)).to(lane)
    images, labels = data(16, 33, 5)
    labels[3] = label if label < 0 else classes
    with use_backend("triton"):
        step = TrainStep(model, lr=0.1)
        assert step.gradients(images.to(lane), labels.to(lane))["layers.1.bias"].isnan().any()
        assert step(images.to(lane), labels.to(lane)).isnan()


WEIGHT = torch.tensor([0.5, 2.0, 0.25, 1.0, 3.0])
#: (loss, its options, whether its targets are probabilities, sizes)
OPTIONS = {
    "class weights": ("cross_entropy", {"class_weight": WEIGHT, "label_smoothing": 0.1}, False, (33, 17, 5)),
    "ignored": ("cross_entropy", {"ignore_index": 2}, False, (33, 5)),
    "-100": ("cross_entropy", {}, False, (33, 17, 5)),
    "probabilities": ("cross_entropy", {}, True, (33, 17, 5)),
    "probabilities, all": ("cross_entropy", {"class_weight": WEIGHT, "label_smoothing": 0.2}, True, (33, 17, 5)),
    "beyond the head": ("cross_entropy", {"ignore_index": -100, "label_smoothing": 0.1}, False, (33, 9, 70)),
    "probabilities beyond the head": ("cross_entropy", {}, True, (33, 9, 70)),
    "huber": ("huber", {"delta": 0.1}, False, (33, 17, 5)),
    "pos_weight": ("bce", {"pos_weight": WEIGHT}, False, (33, 17, 5)),
    "squared error": ("softmax_squared_error", {}, False, (33, 17, 5)),
}


def with_options(lane, case, *, weighted, dtype=None, steps=1, m=16, features=33, **settings):
    """``steps`` single steps and an epoch with a short last batch: [losses and parameters] of the three ways."""
    loss, options, probabilities, (_, *sizes) = OPTIONS[case]
    sizes = [features, *sizes]
    torch.manual_seed(0)
    start = fastmlp.MLP(sizes, "tanh")
    x, y = data(45, sizes[0], sizes[-1], values=probabilities or not takes_classes(STEP_LOSSES[loss]))
    if probabilities:
        y = y.softmax(1)
    elif loss == "cross_entropy":
        y[::5] = options.get("ignore_index", -100)
    s = torch.rand(45, generator=torch.Generator().manual_seed(3)) if weighted else None
    order = torch.randperm(45, generator=torch.Generator().manual_seed(2))
    results = []
    for name in ("triton", "torch", "float64"):
        where = lane if name == "triton" else torch.device("cpu")
        wide = torch.float64 if name == "float64" else torch.float32
        model = copy.deepcopy(start).to(where, wide)
        moved = {k: v.to(where, wide) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        with use_backend("triton" if name == "triton" else "torch"):
            step = TrainStep(model, loss=loss, dtype=None if name == "float64" else dtype, **moved, **settings)
        target = (y.to(wide) if y.is_floating_point() else y).to(where)
        weight = None if s is None else s.to(where)
        losses = []
        for i in range(steps):
            rows = (torch.arange(i * m, (i + 1) * m) % 45).to(where)
            losses.append(step(x.to(where)[rows], target[rows], None if weight is None else weight[rows]))
        step.epoch(x.to(where), target, m, order.to(where), sample_weight=weight)
        results.append([torch.stack([*losses, *step.losses]).cpu(), *(p.detach().cpu() for p in model.parameters())])
    return results


@pytest.mark.parametrize("case", OPTIONS)
def test_options_of_losses(lane, case):
    """Every other case has sample weights."""
    weighted = list(OPTIONS).index(case) % 2 == 0 or case == "squared error"
    for ours, torchs, exact in zip(*with_options(lane, case, weighted=weighted, lr=0.1, momentum=0.9), strict=True):
        assert_within_budget(ours, exact.double(), torchs, reduction=7 * 33)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["class weights", "probabilities, all", "huber"])
@pytest.mark.covering
def test_options_of_losses_in_16_bits(lane, case, dtype):
    """With float16's loss scale and with clipping."""
    settings = {"lr": 0.1, "dtype": dtype, "max_grad_norm": 0.05}
    for ours, torchs, exact in zip(*with_options(lane, case, weighted=True, steps=6, **settings), strict=True):
        assert_within_budget(ours, exact.double(), torchs, reduction=7 * 33)


@pytest.mark.parametrize("case", OPTIONS)
def test_100_steps_with_options(lane, case, request):
    """With ``--full`` and on a GPU; without, a few steps of one option."""
    full = request.config.getoption("full") or lane.type == "cuda"
    if case != "class weights" and not full:
        pytest.skip("every option only with --full")
    steps = 100 if full else 10 if INTERPRETING else 3
    results = with_options(lane, case, weighted=True, steps=steps, m=8, features=5, optimizer="adamw", lr=0.01)
    for ours, torchs, exact in zip(*results, strict=True):
        assert_within_budget(ours, exact.double(), torchs, reduction=steps * 33)


@pytest.mark.parametrize("options", [{"ignore_index": -100}, {"class_weight": WEIGHT}], ids=str)
def test_ignored_labels_need_no_look_of_the_host(lane, monkeypatch, options):
    as_on_a_gpu(monkeypatch)
    images, labels = data(16, 33, 5)
    labels[::3] = -100
    results = []
    for backend, where in (("triton", lane), ("torch", torch.device("cpu"))):
        torch.manual_seed(0)
        moved = {k: v.to(where) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        with use_backend(backend):
            step = TrainStep(fastmlp.MLP((33, 17, 5)).to(where), lr=0.1, **moved)
        results.append(step(images.to(where), labels.to(where)).cpu())
    torch.testing.assert_close(*results)


def test_a_batch_of_ignored_labels_has_no_gradient(lane):
    """As with torch: the loss is NaN, and momentum and weight decay move the parameters alone."""
    images, labels = data(16, 33, 5)
    results = []
    for backend, where in (("triton", lane), ("torch", torch.device("cpu"))):
        torch.manual_seed(0)
        model = fastmlp.MLP((33, 17, 5)).to(where)
        with use_backend(backend):
            step = TrainStep(model, lr=0.1, momentum=0.9, weight_decay=0.1, ignore_index=-100)
        step(images.to(where), labels.to(where))
        assert step(images.to(where), torch.full_like(labels, -100).to(where)).isnan()
        results.append([p.detach().cpu() for p in model.parameters()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # numpy's, interpreting
def test_skipped_steps_do_not_count(lane):
    """AdamW in float16: the first step overflows, so the second step is the optimizer's first."""
    torch.manual_seed(0)
    start = fastmlp.MLP((33, 17, 5)).to(lane)
    images, labels = (t.to(lane) for t in data(16, 33, 5))
    settings = {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1, "dtype": torch.float16}
    results = []
    for overflow in (True, False):
        model = copy.deepcopy(start)
        with use_backend("triton"):
            step = TrainStep(model, **settings)
            if overflow:
                step._engine.loss_scale.scale.fill_(2.0**30)
                step(images, labels)
                assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start.parameters(), strict=True))
                step._engine.loss_scale.scale.fill_(2.0**15)
                step._engine.loss_scale.inverse.fill_(2.0**-15)
            for _ in range(2):
                step(images, labels)
        state = step.state_dict()
        assert state["step"] == 2
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_graphs_give_what_launches_give():
    images, labels = data(300, 784, 10)
    runs = []
    for cuda_graph in (False, True):
        torch.manual_seed(0)
        model = fastmlp.MLP((784, 128, 64, 10), device="cuda")
        step = TrainStep(model, lr=0.1, momentum=0.9, cuda_graph=cuda_graph)
        for epoch in range(3):
            order = torch.randperm(300, generator=torch.Generator().manual_seed(epoch)).cuda()
            step.epoch(images.cuda(), labels.cuda(), 64, order)
            step(images[:50].cuda(), labels[:50].cuda())
        runs.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))
