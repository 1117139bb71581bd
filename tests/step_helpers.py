"""What the tests of TrainStep share: the same training by autograd and torch.optim, and the error budget of a run."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastmlp
from fastmlp import cpu_choices, cpu_gemm, reference, reference_losses

Batch = tuple[Tensor, Tensor]

needs_onednn = pytest.mark.skipif(not cpu_gemm._onednn_available(), reason="torch was built without oneDNN")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """For modules that import it: networks so small that a second thread only costs time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the choices of library that only live as long as a process."""
    monkeypatch.setattr(cpu_gemm, "_choices", {})
    monkeypatch.setattr(cpu_gemm, "_measured", {})
    cpu_choices.kept.cache_clear()


@pytest.fixture
def fresh_choices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No choice of library known or kept, and the mode restored afterwards."""
    new_process(monkeypatch)
    monkeypatch.setattr(cpu_choices, "choices_path", lambda: tmp_path / "cache" / "cpu-gemm.json")
    mode = fastmlp.get_cpu_gemm()
    yield
    fastmlp.set_cpu_gemm(mode)
    cpu_choices.kept.cache_clear()


def choices_of_products() -> dict[tuple[object, ...], str]:
    """What was chosen so far, but for whole steps."""
    return {key: choice for key, choice in cpu_gemm.choices().items() if not str(key[0]).startswith("step")}


def widen_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a processor without 16-bit products."""
    monkeypatch.setattr(cpu_gemm, "product_dtype", lambda dtype, device: torch.promote_types(dtype, torch.float32))


#: Every setting of the optimizers, by a name for the test.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.3},
    "weight decay": {"lr": 0.3, "weight_decay": 0.02},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "nesterov": {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01},
    "clipping": {"lr": 0.5, "max_grad_norm": 0.05},
    "clipping, momentum": {"lr": 0.1, "momentum": 0.9, "max_grad_norm": 0.05},
    "clipping that never acts": {"lr": 0.3, "max_grad_norm": 1e3},
    "adamw": {"optimizer": "adamw", "lr": 0.01},
    "adamw, all settings": {
        "optimizer": "adamw",
        "lr": 0.01,
        "betas": (0.8, 0.95),
        "eps": 1e-6,
        "weight_decay": 0.1,
        "max_grad_norm": 0.1,
    },
}


def problem(
    sizes: Sequence[int], rows: int, *, loss: str = "cross_entropy", uint8: bool = False, seed: int = 1
) -> Batch:
    """(X [rows, sizes[0]] float64 or uint8 pixels, Y) from a fixed seed; Y are class numbers or values in [0, 1]."""
    g = torch.Generator().manual_seed(seed)
    if uint8:
        x = torch.randint(0, 256, (rows, sizes[0]), generator=g, dtype=torch.uint8)
    else:
        # Values that every dtype here has, so that all of them solve one problem.
        x = torch.randn(rows, sizes[0], generator=g).bfloat16().double()
    if loss in ("cross_entropy", "softmax_squared_error"):
        return x, torch.randint(0, sizes[-1], (rows,), generator=g)
    return x, torch.rand(rows, sizes[-1], generator=g).bfloat16().double()


def batches(x: Tensor, y: Tensor, size: int, steps: int) -> list[Batch]:
    """``steps`` batches of the rows in turn, around the end and on."""
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
    other = fastmlp.MLP(model.sizes, model.activations, bias=model.layers[0].bias is not None, dtype=dtype)
    other.load_state_dict(model.state_dict())
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)
    return other


def torch_loss(loss: str, a: Tensor, y: Tensor) -> Tensor:
    """The loss by torch's own functions."""
    match loss:
        case "cross_entropy":
            return F.cross_entropy(a, y)
        case "softmax_squared_error":
            return reference_losses.softmax_squared_error(a, F.one_hot(y, a.shape[1]).to(a.dtype)).mean()
        case "mse":
            return F.mse_loss(a, y.to(a.dtype))
        case "l1":
            return F.l1_loss(a, y.to(a.dtype))
    return F.binary_cross_entropy_with_logits(a, y.to(a.dtype))


@dataclass
class Reference:
    """Training by autograd and torch.optim on the reference network: masters in ``master``, products in ``compute``."""

    model: fastmlp.MLP
    settings: dict[str, Any]
    loss: str = "cross_entropy"
    master: torch.dtype = torch.float64
    compute: torch.dtype | None = None
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        settings = dict(self.settings)
        self.max_grad_norm = settings.pop("max_grad_norm", None)
        kind = settings.pop("optimizer", "sgd")
        self.params = {
            name: p.detach().to(self.master, copy=True).requires_grad_(p.requires_grad)
            for name, p in self.model.named_parameters()
        }
        self.device = next(iter(self.params.values())).device.type
        trained = [p for p in self.params.values() if p.requires_grad]
        if kind == "adamw":
            settings.setdefault("weight_decay", 0.0)
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained, **settings)
        else:
            self.optimizer = torch.optim.SGD(trained, **settings)
        self.scaler = torch.amp.GradScaler(self.device, init_scale=2.0**15, enabled=self.compute == torch.float16)

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of a batch at the present parameters, on the tape."""
        count = len(self.model.activations)
        weights = [self.params[f"layers.{i}.weight"] for i in range(count)]
        biases = [self.params.get(f"layers.{i}.bias") for i in range(count)]
        x = reference.pixels(x, self.master) if x.dtype == torch.uint8 else x.to(self.master)
        if self.compute is None:
            return torch_loss(self.loss, reference.mlp(x, weights, biases, self.model.activations), y)
        with torch.autocast(self.device, self.compute):
            a = x
            for w, b, activation in zip(weights, biases, self.model.activations, strict=True):
                a = reference.activate(F.linear(a, w, b), activation)
        return torch_loss(self.loss, a.float(), y)

    def backward(self, x: Tensor, y: Tensor) -> None:
        """Add the gradients of a batch's loss."""
        loss = self.value(x, y)
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
        """One step a batch."""
        for x, y in data:
            self.backward(x, y)
            self.update()
        return self

    def flat(self, dtype: torch.dtype | None = None) -> Tensor:
        """All parameters as one float64 vector, rounded to ``dtype`` first."""
        return torch.cat([p.detach().to(dtype or p.dtype).double().flatten() for p in self.params.values()])


def flat(model: fastmlp.MLP) -> Tensor:
    """All parameters as one float64 vector."""
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def for_step(x: Tensor, y: Tensor, dtype: torch.dtype) -> Batch:
    """A batch of ``problem`` in the dtype that the step takes."""
    return (x if x.dtype == torch.uint8 else x.to(dtype)), (y.to(dtype) if y.is_floating_point() else y)


def assert_run_within_budget(actual: Tensor, expected: Tensor, own: Tensor, steps: int, eps: float) -> None:
    """|actual - expected| at most twice torch's own error, plus one rounding of every parameter a step.

    Norms over all parameters of the network: after many steps, the error of each has come from all of them. The
    roundings are independent, so that the floor grows with the square root of the steps.
    """
    assert actual.isfinite().all()
    error, torch_error = (actual - expected).norm().item(), (own - expected).norm().item()
    allowed = 2 * torch_error + eps * math.sqrt(steps) * expected.norm().item()
    assert error <= allowed, f"error {error:.3e} is over the budget {allowed:.3e}; torch's own is {torch_error:.3e}"


def check_against_torch(
    model: fastmlp.MLP,
    data: Sequence[Batch],
    settings: dict[str, Any],
    *,
    loss: str = "cross_entropy",
) -> None:
    """Train by TrainStep and by torch: parameters and losses, float64 to 1e-10, float32 within the budget."""
    before = flat(model)
    expected = Reference(model, settings, loss).train(data)
    start = converted(model, torch.float64)
    step = fastmlp.TrainStep(model, loss=loss, **settings)
    losses = [step(*for_step(x, y, torch.float64)).item() for x, y in data]
    assert (flat(model) - expected.flat()).norm() <= 1e-10 * expected.flat().norm()
    assert losses == pytest.approx(expected.losses, rel=1e-9, abs=1e-12)
    assert (expected.flat() - before).norm() > 1e-3 * before.norm(), "nothing was learned"
    check_float32(start, data, settings, loss=loss, expected=expected.flat())


def check_float32(
    model: fastmlp.MLP,
    data: Sequence[Batch],
    settings: dict[str, Any],
    *,
    loss: str = "cross_entropy",
    expected: Tensor | None = None,
) -> None:
    """A copy of ``model`` trained by TrainStep in float32 is within the budget of what float64 trains, ``expected``."""
    if expected is None:
        expected = Reference(model, settings, loss).train(data).flat()
    own = Reference(model, settings, loss, torch.float32).train(data).flat()
    narrow = converted(model, torch.float32)
    step = fastmlp.TrainStep(narrow, loss=loss, **settings)
    for x, y in data:
        step(*for_step(x, y, torch.float32))
    assert_run_within_budget(flat(narrow), expected, own, len(data), torch.finfo(torch.float32).eps)


def float32_step(sizes: Sequence[int], rows: int, optimizer: str) -> Callable[[], object]:
    """A function that takes a step on one batch of so many rows."""
    x, y = for_step(*problem(sizes, rows), torch.float32)
    step = fastmlp.TrainStep(converted(network(sizes), torch.float32), **OPTIMIZERS[optimizer])
    return lambda: step(x, y)


def allocations(step: Callable[[], object], warm: int = 3, steps: int = 2) -> list[int]:
    """Bytes of every allocation (positive) and release (negative) by torch in ``steps`` steps, after ``warm`` more."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(warm):
        step()
    # What the collector frees of other tests' garbage is not the step's. What it leaves (after a thousand compiled
    # kernels it takes a second to look through) need not be looked at by the next test again.
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
            for _ in range(steps):
                step()
    finally:
        gc.enable()
    assert record.profiler is not None
    assert record.profiler.kineto_results is not None
    events = record.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]"]
