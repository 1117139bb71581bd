"""What the tests of TrainStep share: the same training by autograd and torch.optim, and the error budget of a run."""

from __future__ import annotations

import gc
import hashlib
import math
import pickle
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastmlp
from fastmlp import reference
from fastmlp.activations import ACTIVATIONS
from fastmlp.base.losses import LOSSES, STEP_LOSSES, takes_classes
from fastmlp.cpu import cache, choose, onednn, processor
from tests.support.torchs import OPTIMIZERS, torch_optimizer

#: X, Y and, where rows have weights, those of the rows.
Batch = tuple[Tensor, ...]
CPU = torch.device("cpu")

needs_onednn = pytest.mark.skipif(not onednn.available(), reason="torch was built without oneDNN")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch with ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """For modules that import it: networks so small that a second thread only costs time."""
    with threads(1):
        yield


@pytest.fixture(autouse=True, params=["operators", "machine code"])
def either_way(request: pytest.FixtureRequest) -> None:
    """For modules that import it: steps run on operators, and as machine code where numba is installed."""
    if request.param == "machine code":
        request.getfixturevalue("native_code")


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the choices of libraries that last only as long as a process."""
    for name in ("_choices", "_named", "_adopted"):
        monkeypatch.setattr(choose, name, {})
    cache.kept.cache_clear()


@pytest.fixture
def fresh_choices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No choice of library known or kept, and the mode restored afterwards."""
    new_process(monkeypatch)
    monkeypatch.setattr(cache, "choices_path", lambda: tmp_path / "cache" / "cpu-gemm.json")
    mode = fastmlp.get_cpu_gemm()
    yield
    fastmlp.set_cpu_gemm(mode)
    cache.kept.cache_clear()


def choices_of_products() -> dict[tuple[object, ...], str]:
    """The choices so far, without those of whole steps."""
    return {key: choice for key, choice in choose.choices().items() if not str(key[0]).startswith("step")}


def have_16_bit_products(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    """Pretend that the processor has, or has not, 16-bit products.

    aten has loops for 16-bit products on any processor. oneDNN refuses them on a processor without, but makes large
    products only.
    """
    monkeypatch.setattr(processor, "_product_dtype_here", lambda dtype: dtype if native else torch.float32)


def have_fastest(monkeypatch: pytest.MonkeyPatch, fastest: Callable[[Collection[str]], str] | None = None) -> None:
    """Have choices measured with any build of torch; ``fastest`` names the winner of the candidates.

    For tests of small products only, which aten makes: a build without oneDNN cannot run oneDNN's candidates.
    """
    monkeypatch.setattr(onednn, "available", lambda: True)
    if fastest is not None:
        monkeypatch.setattr(choose, "_fastest", fastest)


def problem(
    sizes: Sequence[int], rows: int, *, loss: str = "cross_entropy", uint8: bool = False, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """(X [rows, sizes[0]] float64 or uint8 pixels, Y) from a fixed seed; Y are class numbers or values in [0, 1]."""
    g = torch.Generator().manual_seed(seed)
    if uint8:
        x = torch.randint(0, 256, (rows, sizes[0]), generator=g, dtype=torch.uint8)
    else:
        # Every dtype here has these values, so all dtypes solve one problem.
        x = torch.randn(rows, sizes[0], generator=g).bfloat16().double()
    if takes_classes(STEP_LOSSES[loss]):
        return x, torch.randint(0, sizes[-1], (rows,), generator=g)
    return x, torch.rand(rows, sizes[-1], generator=g).bfloat16().double()


def batches(x: Tensor, y: Tensor, size: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    """``steps`` batches of the rows in turn; after the last row comes the first."""
    n = len(x)
    rows = [torch.arange(i * size, (i + 1) * size) % n for i in range(steps)]
    return [(x[r], y[r]) for r in rows]


def network(
    sizes: Sequence[int], activation: str | Sequence[str] = "sigmoid", *, bias: bool = True, seed: int = 0
) -> fastmlp.MLP:
    """A float64 MLP with weights of unit gain and small biases, rounded so that every dtype has the values."""
    model = fastmlp.MLP(sizes, activation, bias=bias, dtype=torch.float64)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            scale = p.shape[1] ** -0.5 if p.dim() == 2 else 0.1
            p.copy_((torch.randn(p.shape, generator=g) * scale).bfloat16())
    return model


def converted(model: fastmlp.MLP, dtype: torch.dtype) -> fastmlp.MLP:
    """A copy with parameters of another dtype."""
    bias = model.layers[0].bias is not None
    other = fastmlp.MLP(model.sizes, model.activations, bias=bias, dtype=dtype, dropout=model.dropout)
    other.load_state_dict(model.state_dict())
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)
    return other


#: A network, 100 batches and settings with which Lion moves most parameters in one direction.
LION_IN_SMALL_STEPS = (
    network((3, 5, 4), "gelu", seed=1),
    batches(*problem((3, 5, 4), 10, seed=2), 4, 100),
    {"optimizer": "lion", "lr": 0.0015, "weight_decay": 0.1},
)


def has_kink(name: str) -> bool:
    """Whether the derivative of an activation or a loss jumps at 0."""
    return name == "l1" or (name in ACTIVATIONS and ACTIVATIONS[name].kink is not None)


def torch_loss(loss: str, a: Tensor, y: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
    """The loss by torch's own functions. ``weight`` are sample weights, ``options`` those of a TrainStep's loss."""
    options = {name: v.to(a.dtype) if isinstance(v, Tensor) else v for name, v in options.items()}
    if weight is not None:
        return weighted_torch_loss(loss, a, y, weight.to(a.dtype), options)
    match loss:
        case "cross_entropy":
            class_weight = options.pop("class_weight", None)
            return F.cross_entropy(a, y.to(a.dtype) if y.is_floating_point() else y, class_weight, **options)
        case "softmax_squared_error":
            return reference.softmax_squared_error(a, F.one_hot(y, a.shape[1]).to(a.dtype)).mean()
        case "mse":
            return F.mse_loss(a, y.to(a.dtype))
        case "l1":
            return F.l1_loss(a, y.to(a.dtype))
        case "huber":
            return F.huber_loss(a, y.to(a.dtype), **options)
    return F.binary_cross_entropy_with_logits(a, y.to(a.dtype), **options)


def weighted_torch_loss(loss: str, a: Tensor, y: Tensor, weight: Tensor, options: dict[str, Any]) -> Tensor:
    """sum s w l / sum s w of the losses of single rows, w being what the row's label weighs."""
    counted = weight
    if loss == "cross_entropy":
        class_weight = options.pop("class_weight", None)
        y = y.to(a.dtype) if y.is_floating_point() else y
        rows = F.cross_entropy(a, y, class_weight, reduction="none", **options)
        if not y.is_floating_point():
            ignored = y == options.get("ignore_index", -100)
            of_class = torch.ones(a.shape[1], dtype=a.dtype) if class_weight is None else class_weight
            counted = weight * of_class[y.masked_fill(ignored, 0)].masked_fill(ignored, 0)
    elif loss == "softmax_squared_error":
        rows = reference.softmax_squared_error(a, F.one_hot(y, a.shape[1]).to(a.dtype))
    else:
        function = LOSSES[STEP_LOSSES[loss]].torch
        assert function is not None
        rows = function(a, y.to(a.dtype), reduction="none", **options).mean(1)
    return (weight * rows).sum() / counted.sum()


def in_groups(params: dict[str, Tensor], groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The param groups of a TrainStep as torch takes them: those of no pattern first."""
    found = [
        {**group, "params": [p for name, p in params.items() if fnmatch(name, group["params"])]} for group in groups
    ]
    rest = [p for name, p in params.items() if not any(fnmatch(name, group["params"]) for group in groups)]
    return [{"params": rest}, *found]


@dataclass
class Reference:
    """Training by autograd and torch.optim on the reference network: masters in ``master``, products in ``compute``.

    The masks of dropout are those of the model's ``dropout_state``, computed again.
    """

    model: fastmlp.MLP
    settings: dict[str, Any]
    loss: str = "cross_entropy"
    master: torch.dtype = torch.float64
    compute: torch.dtype | None = None
    options: dict[str, Any] = field(default_factory=dict)  #: of the loss
    losses: list[float] = field(default_factory=list)
    nearest: list[float] = field(default_factory=list)  #: per loss, how near to a kink or a jump a value came

    def __post_init__(self) -> None:
        self.max_grad_norm = self.settings.get("max_grad_norm")
        self.params = {
            name: p.detach().to(self.master, copy=True).requires_grad_(p.requires_grad)
            for name, p in self.model.named_parameters()
        }
        self.rates = (*self.model._rates(), 0.0)
        self.seed, self.passes = self.model.dropout_state.tolist() if any(self.rates) else (0, 0)
        self.device = next(iter(self.params.values())).device.type
        trained = {name: p for name, p in self.params.items() if p.requires_grad}
        self.optimizer = torch_optimizer(in_groups(trained, self.settings.get("param_groups", [])), self.settings)
        self.scaler = torch.amp.GradScaler(self.device, init_scale=2.0**15, enabled=self.compute == torch.float16)

    def value(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of a batch at the present parameters, on the tape."""
        count = len(self.model.activations)
        weights = [self.params[f"layers.{i}.weight"] for i in range(count)]
        biases = [self.params.get(f"layers.{i}.bias") for i in range(count)]
        x = reference.pixels(x, self.master) if x.dtype == torch.uint8 else x.to(self.master)
        a, distances = x, []
        with torch.autocast(self.device, self.compute, enabled=self.compute is not None):
            layers = zip(weights, biases, self.model.activations, self.rates, strict=True)
            for i, (w, b, activation, p) in enumerate(layers):
                z = F.linear(a, w, b)
                a = reference.activate(z, activation)
                if p:
                    keep = reference.keep_mask(self.seed, self.passes, i, *a.shape, p).to(a.device)
                    a = a * keep * (1 / (1 - p))
                if has_kink(activation) or activation == "step":
                    distances.append(z.detach().abs())
        if self.loss == "l1":
            distances.append((a - y).detach().abs())
        self.passes += 1
        # A value that is exactly 0, as after units that are all off, is 0 on every processor.
        self.nearest.append(min((d.where(d > 0, math.inf).min().item() for d in distances), default=math.inf))
        return torch_loss(self.loss, a if self.compute is None else a.float(), y, weight, **self.options)

    def backward(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Add the gradients of a batch's loss."""
        loss = self.value(x, y, weight)
        self.losses.append(loss.item())
        if loss.requires_grad:
            self.scaler.scale(loss).backward()

    def update(self) -> None:
        """One step of the optimizer, and gradients to None."""
        for p in self.params.values():
            if p.requires_grad and p.grad is None:  # below a step function nothing is on the tape
                p.grad = torch.zeros_like(p)
        if self.max_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_([p for p in self.params.values() if p.requires_grad], self.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def train(self, data: Iterable[Batch]) -> Reference:
        """One step per batch."""
        for batch in data:
            self.backward(*batch)
            self.update()
        return self

    def flat(self, dtype: torch.dtype | None = None) -> Tensor:
        """All parameters as one float64 vector, rounded to ``dtype`` first."""
        return torch.cat([p.detach().to(dtype or p.dtype).double().flatten() for p in self.params.values()])


def flat(model: fastmlp.MLP) -> Tensor:
    """All parameters as one float64 vector."""
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def for_step(x: Tensor, y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A batch of ``problem`` in the dtype that the step takes."""
    return (x if x.dtype == torch.uint8 else x.to(dtype)), (y.to(dtype) if y.is_floating_point() else y)


def in_dtype(values: dict[str, Any], dtype: torch.dtype, device: torch.device = CPU) -> dict[str, Any]:
    """Options of a loss with their tensors in the dtype, and on the device, that the step takes."""
    return {name: value.to(device, dtype) if isinstance(value, Tensor) else value for name, value in values.items()}


class Trained(NamedTuple):
    """A network after training by torch."""

    parameters: Tensor  #: one float64 vector
    losses: list[float]
    settled: int  #: the steps before a rounding in float32 might take the other side of a kink or a jump


#: How near to a kink or a jump a value may come.
_NEAR = 3e-5
_trained: dict[bytes, Trained] = {}


def trained_by_torch(
    model: fastmlp.MLP,
    data: Sequence[Batch],
    settings: dict[str, Any],
    loss: str,
    dtype: torch.dtype = torch.float64,
    options: dict[str, Any] | None = None,
) -> Trained:
    """Train by ``Reference``, once for all the runs that are compared with it."""
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    options = options or {}
    about = [model.sizes, model.activations, trained, sorted(settings.items()), loss, str(dtype), str(options)]
    about += [model.dropout, model.dropout_state.tolist()] if model.dropout else []
    tensors = [t.numpy().tobytes() for t in (flat(model), *(t for batch in data for t in batch))]
    key = hashlib.sha256(pickle.dumps([about, tensors])).digest()
    if key not in _trained:
        with threads(1):
            run = Reference(model, settings, loss, dtype, options=options).train(data)
        settled = next((i for i, distance in enumerate(run.nearest) if distance < _NEAR), len(data))
        _trained[key] = Trained(run.flat(), run.losses, settled)
    return _trained[key]


def budget_used(actual: Tensor, expected: Tensor, own: Tensor, steps: int, eps: float) -> float:
    """|actual - expected| relative to its budget: twice torch's own, plus one rounding of every parameter per step.

    The norms are over all parameters of the network, since after many steps the error of each comes from all of them.
    The roundings are independent, so the floor grows with the square root of the steps.
    """
    assert actual.isfinite().all()
    allowed = 2 * (own - expected).norm() + eps * math.sqrt(steps) * expected.norm()
    return ((actual - expected).norm() / allowed).item()


def assert_run_within_budget(actual: Tensor, expected: Tensor, own: Tensor, steps: int, eps: float) -> None:
    """The error of a run is within the budget."""
    used = budget_used(actual, expected, own, steps, eps)
    assert used <= 1, f"error {(actual - expected).norm():.3e}, {used:.2f} of the budget; torch's own is " + (
        f"{(own - expected).norm():.3e}"
    )


def check_against_torch(
    model: fastmlp.MLP,
    data: Sequence[Batch],
    settings: dict[str, Any],
    *,
    loss: str = "cross_entropy",
    **options: Any,
) -> None:
    """Train by TrainStep and by torch: parameters and losses, float64 to 1e-10, float32 within the budget."""
    start = check_float64(model, data, settings, loss=loss, **options)
    check_float32(start, data, settings, loss=loss, **options)


def check_float64(
    model: fastmlp.MLP,
    data: Sequence[Batch],
    settings: dict[str, Any],
    *,
    loss: str = "cross_entropy",
    **options: Any,
) -> fastmlp.MLP:
    """Train by TrainStep and by torch: equal to 1e-10. Returns ``model`` as before training."""
    start = converted(model, torch.float64)
    expected = trained_by_torch(model, data, settings, loss, options=options)
    step = fastmlp.TrainStep(model, loss=loss, **settings, **options)
    losses = [step(*for_step(x, y, torch.float64), *weight).item() for x, y, *weight in data]
    assert (flat(model) - expected.parameters).norm() <= 1e-10 * expected.parameters.norm()
    assert losses == pytest.approx(expected.losses, rel=1e-9, abs=1e-12)
    assert (expected.parameters - flat(start)).norm() > 1e-3 * flat(start).norm(), "nothing was learned"
    return start


def check_float32(
    model: fastmlp.MLP,
    data: Sequence[Batch],
    settings: dict[str, Any],
    *,
    loss: str = "cross_entropy",
    **options: Any,
) -> None:
    """A copy of ``model`` trained by TrainStep in float32 is within the budget of what float64 trains."""
    actual, expected, own, steps = float32_run(model, data, settings, loss=loss, **options)
    assert_run_within_budget(actual, expected, own, steps, torch.finfo(torch.float32).eps)


def float32_run(
    model: fastmlp.MLP,
    data: Sequence[Batch],
    settings: dict[str, Any],
    *,
    loss: str = "cross_entropy",
    device: torch.device = CPU,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Parameters trained by TrainStep in float32, by torch in float64 and in float32, and the number of steps.

    The run ends before a step in which a value comes near to a kink or a jump. There, rounding decides on the side, and
    differs between processors.
    """
    steps = trained_by_torch(model, data, settings, loss, options=options).settled
    assert steps > 0, "no step is settled; take another seed"
    data = data[:steps]
    expected, own = (
        trained_by_torch(model, data, settings, loss, d, options).parameters for d in (torch.float64, torch.float32)
    )
    trained = converted(model, torch.float32).to(device)
    step = fastmlp.TrainStep(trained, loss=loss, **settings, **in_dtype(options, torch.float32, device))
    for x, y, *weight in data:
        step(*(t.to(device) for t in (*for_step(x, y, torch.float32), *weight)))
    return flat(trained).cpu(), expected, own, steps


def float32_step(sizes: Sequence[int], rows: int, optimizer: str) -> Callable[[], object]:
    """A function that runs one step on one batch of ``rows`` rows."""
    x, y = for_step(*problem(sizes, rows), torch.float32)
    step = fastmlp.TrainStep(converted(network(sizes), torch.float32), **OPTIMIZERS[optimizer])
    return lambda: step(x, y)


def allocations(step: Callable[[], object], warm: int = 3, steps: int = 2) -> list[int]:
    """Bytes of every allocation (positive) and release (negative) by torch in ``steps`` steps, after ``warm`` more.

    The profiler knows the size of a block only if it saw the allocation. What it remembers of a block that was released
    unseen, it takes for the size of the next block at that address. So it watches one step more than it reports.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    for _ in range(warm):
        step()
    # Garbage of other tests is collected first, so that its release is not counted. What is left is frozen: after a
    # thousand compiled kernels, the next collection would take a second to look through it.
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
            step()
            with record_function("counted"):
                for _ in range(steps):
                    step()
    finally:
        gc.enable()
    assert record.profiler is not None
    assert record.profiler.kineto_results is not None
    events = record.profiler.kineto_results.events()
    (counted,) = (event.start_ns() for event in events if event.name() == "counted")
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.start_ns() >= counted]
