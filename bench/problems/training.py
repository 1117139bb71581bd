"""Whole training steps of a network: one batch, a stretch of samples one by one, or an epoch in batches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmlp import reference
from fastmlp.activations import ACTIVATIONS

from .base import GATE_CALLS, Problem, Results, generator, randn

__all__ = ["LOSSES", "OPTIMIZERS", "EpochProblem", "OnlineProblem", "StepProblem", "Training"]

#: torch.optim's default decay of the second moment.
ADAM_BETA_2 = 0.999

#: Settings of torch.optim by the name of a problem's optimizer.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.01},
    "nesterov": {"lr": 0.01, "momentum": 0.9, "nesterov": True},
    "adam": {"lr": 1e-3},
    "adamw": {"lr": 1e-3, "weight_decay": 0.01},
}
#: Those that correct their moments by the number of updates.
ADAMS: dict[str, type[torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


#: torch's losses by the name of a problem's loss; "mse" compares the logits with one-hot rows.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}


@dataclass(frozen=True)
class Training(Problem):
    """What all trainings share: a network, a batch size, an optimizer and a loss.

    With ``weighs_classes`` cross-entropy has class weights. ``dropout`` is the probability for all hidden layers.
    """

    sizes: tuple[int, ...]
    batch: int
    activation: str = "sigmoid"
    optimizer: str = "sgd"
    bias: bool = True
    loss: str = "cross_entropy"
    weighs_classes: bool = False
    dropout: float = 0.0

    @property
    def without_chance(self) -> Problem:
        """The step without dropout, whose masks every contender draws in its own way."""
        return dataclasses.replace(self, dropout=0.0) if self.dropout else self

    def class_weight(self) -> Tensor | None:
        """[C], from 1/2 to 3/2, or None."""
        return torch.linspace(0.5, 1.5, self.sizes[-1]) if self.weighs_classes else None

    @property
    def timing(self) -> str:
        """A chain everywhere: a step finds the caches as warm as the step before left them."""
        return "chain"

    @property
    def input_dtype(self) -> torch.dtype:
        """float32 at least, because a mixed-precision step rounds its inputs itself."""
        return torch.promote_types(self.torch_dtype, torch.float32)

    def parameters(self) -> list[Tensor]:
        """The starting values W_1, b_1, W_2, b_2, ... (without biases W_1, W_2, ...), float32 on the CPU."""
        out = []
        for i, (k, n) in enumerate(zip(self.sizes[:-1], self.sizes[1:], strict=True)):
            out += [randn(n, k, seed=100 + i, scale=k**-0.5), *([torch.zeros(n)] if self.bias else [])]
        return out

    def layers(self, params: list[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
        """(W, b) of every layer, from tensors in the order of ``parameters``; b is None without biases."""
        if self.bias:
            return list(zip(params[::2], params[1::2], strict=True))
        return [(w, None) for w in params]

    def make_inputs(self, index: int) -> tuple[Tensor, ...]:
        """X [rows, K] in [0, 1) and labels int64 [rows]; for mse one-hot rows [rows, C]."""
        g = generator(10 + index)
        x = torch.rand(self.rows, self.sizes[0], generator=g).bfloat16().float()
        y = torch.randint(0, self.sizes[-1], (self.rows,), generator=g)
        return x, F.one_hot(y, self.sizes[-1]).float() if self.loss == "mse" else y

    @property
    def rows(self) -> int:
        return self.batch

    @property
    def leading(self) -> int:
        """The length of the first axis of a batch."""
        return self.batch

    @property
    def shape_words(self) -> list[str]:
        """The network in words."""
        words = ["-".join(map(str, self.sizes)), self.activation]
        words += [] if self.bias else ["no bias"]
        words += ["mse"] if self.loss == "mse" else []
        words += ["class weights"] if self.weighs_classes else []
        return words + ([f"dropout {self.dropout:g}"] if self.dropout else [])

    @property
    def weights(self) -> int:
        """Weights of all layers, biases left out."""
        return sum(k * n for k, n in zip(self.sizes[:-1], self.sizes[1:], strict=True))

    @property
    def flops(self) -> int:
        # Forward and dW of every layer, dX of all but the first: 2 M K N each.
        return 2 * self.batch * (3 * self.weights - self.sizes[0] * self.sizes[1])

    @property
    def bytes(self) -> int:
        # W read forward, for dX and for the update, and written; optimizer state read and written; every activation
        # written once and read twice, every dZ written once and read twice.
        state = {"sgd": 0, "nesterov": 2, "adam": 4, "adamw": 4}[self.optimizer]
        passes = 4 * self.weights - self.sizes[0] * self.sizes[1] + state * self.weights
        return self.itemsize * (passes + self.batch * (2 * self.sizes[0] + 6 * sum(self.sizes[1:])))

    @property
    def reduction(self) -> int:
        return max(self.batch, *self.sizes)

    @property
    def roundings(self) -> int:
        # A GEMM that accumulates onto the weight itself rounds it once per panel of the batch, and BLAS libraries make
        # panels of 256 rows or more.
        return GATE_CALLS * (1 + self.rows // 256)

    @property
    def conditioning(self) -> float:
        # Adam divides by sqrt(1 - beta_2^t), which optimizers that keep t on the device compute in float32. 1 - x with
        # x near 1 has the rounding of x, eps / 2, against 1 - beta_2 at the first step; the root halves it.
        return torch.finfo(torch.float32).eps / (4 * (1 - ADAM_BETA_2)) if self.optimizer in ADAMS else 0.0

    def judged(self, results: Results) -> Results:
        """The changes by training: the parameters less their starting values."""
        start = map(self.compared, self.parameters())
        return {name: value - p for (name, value), p in zip(results.items(), start, strict=True)}

    def compared(self, t: Tensor) -> Tensor:
        """What the gate compares of a parameter or a batch: all of it, or some members."""
        return t

    def linear(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """X W^T + b."""
        return F.linear(x, w, b)

    def total_loss(self, a: Tensor, y: Tensor) -> Tensor:
        """What the oracle differentiates."""
        weight = self.class_weight()
        return LOSSES[self.loss](a, y) if weight is None else F.cross_entropy(a, y, weight.to(a.dtype))

    def batches(self) -> Sequence[tuple[Tensor, Tensor]]:
        """The batches of all calls before the comparison."""
        return [(x, y) for x, y in (self.inputs(i) for i in range(GATE_CALLS))]

    def oracle(self, dtype: torch.dtype, *, kink: float = 0.0) -> Results:
        """``kink`` is the z at which the derivative of relu or leaky_relu steps."""
        master = torch.promote_types(dtype, torch.float32)
        params = [self.compared(p).to(master, copy=True).requires_grad_() for p in self.parameters()]
        optimizer = ADAMS.get(self.optimizer, torch.optim.SGD)(params, **OPTIMIZERS[self.optimizer])
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15, enabled=dtype == torch.float16)
        activations = [*[self.activation] * (len(self.sizes) - 2), "identity"]
        for x, y in self.batches():
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=master != dtype):
                a = x.to(master)
                for (w, b), f in zip(self.layers(params), activations, strict=True):
                    z = self.linear(a, w, b)
                    a = _stepping_at(kink, z, f) if kink else reference.activate(z, f)
            scaler.scale(self.total_loss(a.to(master), y.to(master) if y.is_floating_point() else y)).backward()
            scaler.step(optimizer)
            scaler.update()
        return {f"parameter {i}": p.detach().double() for i, p in enumerate(params)}

    def unsettled(self) -> Results:
        # A unit whose z is nearer to a kink than float32's error has either derivative, by chance. In 16 bits there are
        # so many such units that torch's own error contains them.
        if ACTIVATIONS[self.activation].kink is None or self.torch_dtype != torch.float32:
            return {}
        error = max(
            (a - b).abs().max().item() for a, b in zip(*map(self._first_z, (torch.float32, torch.float64)), strict=True)
        )
        after, before = (self.oracle(torch.float64, kink=sign * 2 * error) for sign in (1, -1))
        return {name: after[name] - before[name] for name in after}

    def _first_z(self, dtype: torch.dtype) -> list[Tensor]:
        """Z of the hidden layers for the first batch and the starting values, computed in ``dtype``, as float64."""
        a, found = self.compared(self.inputs(0)[0]).to(dtype), []
        for w, b in self.layers([self.compared(p).to(dtype) for p in self.parameters()])[:-1]:
            z = self.linear(a, w, b)
            found.append(z.double())
            a = reference.activate(z, self.activation)
        return found


def _stepping_at(kink: float, z: Tensor, activation: str) -> Tensor:
    """A = f(Z), with a derivative that steps at ``kink``."""
    below = ACTIVATIONS[activation].kink
    if below is None:
        return reference.activate(z, activation)
    slope = torch.where(z > kink, 1.0, below).to(z.dtype)
    return reference.activate(z, activation).detach() + slope * (z - z.detach())


@dataclass(frozen=True)
class StepProblem(Training):
    """One training step: forward, softmax cross-entropy, backward and update on a batch [M, sizes[0]]."""

    kind: ClassVar[str] = "step"

    @property
    def name(self) -> str:
        words = [*self.shape_words, f"batch {self.batch}", self.optimizer, self.dtype]
        return " ".join(words)


@dataclass(frozen=True)
class OnlineProblem(Training):
    """``samples`` steps of plain SGD, each on one sample, in order: a stretch of an online epoch."""

    kind: ClassVar[str] = "online"
    batch: int = 1
    samples: int = 256

    @property
    def name(self) -> str:
        return " ".join([*self.shape_words, f"{self.samples} samples", self.dtype])

    @property
    def rows(self) -> int:
        return self.samples

    @property
    def flops(self) -> int:
        return super().flops * self.samples

    @property
    def bytes(self) -> int:
        return super().bytes * self.samples

    @property
    def memory(self) -> int:
        return super().bytes

    def batches(self) -> Sequence[tuple[Tensor, Tensor]]:
        """Single samples."""
        sets = [self.inputs(i) for i in range(GATE_CALLS)]
        return [(x[j : j + 1], y[j : j + 1]) for x, y in sets for j in range(self.samples)]


@dataclass(frozen=True)
class EpochProblem(Training):
    """An epoch: one step per ``batch`` rows of data on the device, gathered in a drawn order.

    Every call is the same epoch, because a training run has one set of data, at one place in memory.
    """

    kind: ClassVar[str] = "epoch"
    steps: int = 64

    @property
    def name(self) -> str:
        return " ".join([*self.shape_words, f"{self.steps} steps of {self.batch}", self.optimizer, self.dtype])

    @property
    def rows(self) -> int:
        return self.steps * self.batch

    @property
    def flops(self) -> int:
        return super().flops * self.steps

    @property
    def bytes(self) -> int:
        return super().bytes * self.steps

    @property
    def memory(self) -> int:
        return super().bytes + self.input_dtype.itemsize * self.rows * self.sizes[0]

    @property
    def roundings(self) -> int:
        return GATE_CALLS * self.steps * (1 + self.batch // 256)

    @functools.cached_property
    def input_sets(self) -> int:
        return 1

    def make_inputs(self, index: int) -> tuple[Tensor, ...]:
        """X [rows, K], targets [rows], and the order of the rows, int64 [rows]."""
        return *super().make_inputs(index), torch.randperm(self.rows, generator=generator(9))

    def batches(self) -> Sequence[tuple[Tensor, Tensor]]:
        """The batches of all epochs before the comparison."""
        x, y, order = self.inputs(0)
        return [(x[rows], y[rows]) for rows in order.split(self.batch)] * GATE_CALLS
