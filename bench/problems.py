"""What is timed: problems with fixed inputs, counted arithmetic and traffic, and an oracle in plain torch.

A problem is a frozen description. ``inputs(i)`` are the inputs of call i on the CPU in float32: several sets in turn,
so that no contender meets its last batch in the cache. ``oracle(dtype)`` is what a contender's ``results()`` must be
after ``GATE_CALLS`` calls, computed by autograd in that dtype. M is the batch, K and N inputs and outputs of a layer.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmlp import reference

__all__ = [
    "GATE_CALLS",
    "CrossEntropyProblem",
    "HeadProblem",
    "LinearBackwardProblem",
    "LinearProblem",
    "OnlineProblem",
    "Problem",
    "Results",
    "StepProblem",
    "WgradProblem",
]

#: Most input sets of a problem, and the bytes that all of them may take, unless two take more.
MOST_SETS, SETS_BYTES = 8, 64 << 20
#: Calls after which results are compared: enough for momentum and second moments to show.
GATE_CALLS = 3

#: Named tensors that a contender is judged by, float64 on the CPU.
Results = dict[str, Tensor]


def generator(seed: int) -> torch.Generator:
    """A CPU generator of its own."""
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Problem:
    """Base of all problems; ``kind`` is also the stem of the bench file."""

    kind: ClassVar[str]
    dtype: str = field(default="float32", kw_only=True)
    device: str = field(default="cpu", kw_only=True)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the products."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def input_dtype(self) -> torch.dtype:
        """The dtype of floating-point inputs."""
        return self.torch_dtype

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.torch_dtype.itemsize

    def make_inputs(self, index: int) -> tuple[Tensor, ...]:
        """Input set ``index``: float32 values, which every dtype of the problem has exactly, and int64 labels."""
        raise NotImplementedError

    @functools.cached_property
    def input_sets(self) -> int:
        """How many different input sets there are."""
        one = sum(t.nbytes for t in self.make_inputs(0))
        return max(2, min(MOST_SETS, SETS_BYTES // one))

    def inputs(self, call: int) -> tuple[Tensor, ...]:
        """The inputs of a call, on the CPU."""
        return self.make_inputs(call % self.input_sets)

    def on_device(self) -> list[tuple[Tensor, ...]]:
        """Every input set on the device, floating-point tensors in ``input_dtype``; shared, not to be changed."""
        return _on_device(self)

    def judged(self, results: Results) -> Results:
        """What the gate compares: the results, or what the calls have changed in them."""
        return results

    def oracle(self, dtype: torch.dtype) -> Results:
        """The results after ``GATE_CALLS`` calls on input sets 0, 1, ... from the start, computed in ``dtype``."""
        raise NotImplementedError

    @property
    def flops(self) -> int:
        """Multiplications and additions of the products of one call; everything else is left out."""
        raise NotImplementedError

    @property
    def bytes(self) -> int:
        """Least traffic of one call: every operand and result of every product once."""
        raise NotImplementedError

    @property
    def rows(self) -> int:
        """Samples a call."""
        raise NotImplementedError

    @property
    def reduction(self) -> int:
        """The longest sum of products."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """A short name: unique within its kind and device."""
        raise NotImplementedError

    @property
    def roundings(self) -> int:
        """How often the calls before the comparison may round a result that they update in place; 0: they don't."""
        return 0

    @property
    def conditioning(self) -> float:
        """By how much float32 rounds the scalars that all of a result is multiplied by; 0: they are exact."""
        return 0.0

    def describe(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return {"kind": self.kind, "name": self.name, **asdict(self)}


@functools.lru_cache(maxsize=1)
def _on_device(problem: Problem) -> list[tuple[Tensor, ...]]:
    return [
        tuple(
            t.to(problem.device, problem.input_dtype if t.is_floating_point() else None)
            for t in problem.make_inputs(index)
        )
        for index in range(problem.input_sets)
    ]


def _randn(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=generator(seed)) * scale).bfloat16().float()


@dataclass(frozen=True)
class _Layer(Problem):
    M: int
    K: int
    N: int
    activation: str = "sigmoid"

    @property
    def rows(self) -> int:
        return self.M

    @property
    def name(self) -> str:
        return f"{self.M}x{self.K}x{self.N} {self.activation} {self.dtype}"

    def make_inputs(self, index: int) -> tuple[Tensor, ...]:
        """X [M, K], W [N, K], b [N], dA [M, N]."""
        w, b = _randn(self.N, self.K, seed=1, scale=self.K**-0.5), _randn(self.N, seed=2, scale=0.1)
        return _randn(self.M, self.K, seed=10 + index), w, b, _randn(self.M, self.N, seed=50 + index)


@dataclass(frozen=True)
class LinearProblem(_Layer):
    """A = f(X W^T + b), without a tape."""

    kind: ClassVar[str] = "linear_act"

    @property
    def flops(self) -> int:
        return 2 * self.M * self.K * self.N

    @property
    def bytes(self) -> int:
        return self.itemsize * (self.M * self.K + self.N * self.K + self.N + self.M * self.N)

    @property
    def reduction(self) -> int:
        return self.K

    def oracle(self, dtype: torch.dtype) -> Results:
        x, w, b, _ = (t.to(dtype) for t in self.inputs(GATE_CALLS - 1))
        return {"A": reference.linear_act(x, w, b, self.activation).double()}


@dataclass(frozen=True)
class LinearBackwardProblem(_Layer):
    """(dX, dW, db) of A = f(X W^T + b) for a given dA, the forward pass done before."""

    kind: ClassVar[str] = "linear_act_backward"

    @property
    def flops(self) -> int:
        return 4 * self.M * self.K * self.N

    @property
    def bytes(self) -> int:
        return self.itemsize * (2 * self.M * self.K + 2 * self.N * self.K + self.N + 3 * self.M * self.N)

    @property
    def reduction(self) -> int:
        return max(self.M, self.N)

    def oracle(self, dtype: torch.dtype) -> Results:
        x, w, b, da = (t.to(dtype) for t in self.inputs(GATE_CALLS - 1))
        dx, dw, db = reference.linear_act_backward(da, x, w, b, self.activation)
        return {"dX": dx.double(), "dW": dw.double(), "db": db.double()}


@dataclass(frozen=True)
class WgradProblem(_Layer):
    """DW = dZ^T X and db = sum dZ: the gradients of a layer's parameters."""

    kind: ClassVar[str] = "wgrad"
    activation: str = "identity"

    @property
    def flops(self) -> int:
        return 2 * self.M * self.K * self.N

    @property
    def bytes(self) -> int:
        return self.itemsize * (self.M * self.K + self.N * self.K + self.N + self.M * self.N)

    @property
    def reduction(self) -> int:
        return self.M

    def oracle(self, dtype: torch.dtype) -> Results:
        x, _, _, dz = (t.to(dtype) for t in self.inputs(GATE_CALLS - 1))
        dw, db = reference.linear_wgrad(dz, x)
        return {"dW": dw.double(), "db": db.double()}


@dataclass(frozen=True)
class CrossEntropyProblem(Problem):
    """Mean softmax cross-entropy of logits [M, C], and its gradient."""

    kind: ClassVar[str] = "cross_entropy"
    M: int
    C: int

    @property
    def rows(self) -> int:
        return self.M

    @property
    def name(self) -> str:
        return f"{self.M}x{self.C} {self.dtype}"

    @property
    def flops(self) -> int:
        return 0

    @property
    def bytes(self) -> int:
        return self.itemsize * 2 * self.M * self.C + 8 * self.M

    @property
    def reduction(self) -> int:
        return self.C

    def make_inputs(self, index: int) -> tuple[Tensor, ...]:
        """Z [M, C] and labels int64 [M]."""
        labels = torch.randint(0, self.C, (self.M,), generator=generator(index))
        return _randn(self.M, self.C, seed=10 + index, scale=2.0), labels

    def oracle(self, dtype: torch.dtype) -> Results:
        z, y = self.inputs(GATE_CALLS - 1)
        z = z.to(dtype).requires_grad_()
        loss = F.cross_entropy(z, y)
        (dz,) = torch.autograd.grad(loss, z)
        return {"loss": loss.detach().double(), "dZ": dz.double()}


@dataclass(frozen=True)
class HeadProblem(Problem):
    """Last layer, its loss and their backward pass down to the layer's input: (loss, dZ_L, dA_{L-1})."""

    kind: ClassVar[str] = "head"
    M: int
    K: int
    C: int

    @property
    def rows(self) -> int:
        return self.M

    @property
    def name(self) -> str:
        return f"{self.M}x{self.K}x{self.C} {self.dtype}"

    @property
    def flops(self) -> int:
        return 4 * self.M * self.K * self.C

    @property
    def bytes(self) -> int:
        return self.itemsize * (2 * self.M * self.K + self.C * self.K + self.C + self.M * self.C) + 8 * self.M

    @property
    def reduction(self) -> int:
        return max(self.K, self.C)

    def make_inputs(self, index: int) -> tuple[Tensor, ...]:
        """H [M, K], W [C, K], b [C], labels int64 [M]."""
        w, b = _randn(self.C, self.K, seed=1, scale=self.K**-0.5), _randn(self.C, seed=2, scale=0.1)
        labels = torch.randint(0, self.C, (self.M,), generator=generator(index))
        return _randn(self.M, self.K, seed=10 + index), w, b, labels

    def oracle(self, dtype: torch.dtype) -> Results:
        h, w, b, y = self.inputs(GATE_CALLS - 1)
        h = h.to(dtype).requires_grad_()
        z = reference.linear_act(h, w.to(dtype), b.to(dtype))
        loss = F.cross_entropy(z, y)
        dz, dh = torch.autograd.grad(loss, (z, h))
        return {"loss": loss.detach().double(), "dZ": dz.double(), "dH": dh.double()}


#: torch.optim's default decay of the second moment.
ADAM_BETA_2 = 0.999

#: Settings of torch.optim by the name of a problem's optimizer.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.01},
    "nesterov": {"lr": 0.01, "momentum": 0.9, "nesterov": True},
    "adamw": {"lr": 1e-3, "weight_decay": 0.01},
}


@dataclass(frozen=True)
class _Training(Problem):
    sizes: tuple[int, ...]
    batch: int
    activation: str = "sigmoid"
    optimizer: str = "sgd"
    bias: bool = True

    @property
    def input_dtype(self) -> torch.dtype:
        """float32 at least: to round its inputs belongs to a mixed-precision step."""
        return torch.promote_types(self.torch_dtype, torch.float32)

    def parameters(self) -> list[Tensor]:
        """W_1, b_1, W_2, b_2, ... (without biases W_1, W_2, ...): the starting values, float32 on the CPU."""
        out = []
        for i, (k, n) in enumerate(zip(self.sizes[:-1], self.sizes[1:], strict=True)):
            out += [_randn(n, k, seed=100 + i, scale=k**-0.5), *([torch.zeros(n)] if self.bias else [])]
        return out

    def make_inputs(self, index: int) -> tuple[Tensor, ...]:
        """X [M, K] in [0, 1) and labels int64 [M]."""
        g = generator(10 + index)
        x = torch.rand(self.batch, self.sizes[0], generator=g).bfloat16().float()
        return x, torch.randint(0, self.sizes[-1], (self.batch,), generator=g)

    @property
    def rows(self) -> int:
        return self.batch

    @property
    def shape_words(self) -> list[str]:
        """The network in words."""
        return ["-".join(map(str, self.sizes)), self.activation, *([] if self.bias else ["no bias"])]

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
        state = {"sgd": 0, "nesterov": 2, "adamw": 4}[self.optimizer]
        passes = 4 * self.weights - self.sizes[0] * self.sizes[1] + state * self.weights
        return self.itemsize * (passes + self.batch * (2 * self.sizes[0] + 6 * sum(self.sizes[1:])))

    @property
    def reduction(self) -> int:
        return max(self.batch, *self.sizes)

    @property
    def roundings(self) -> int:
        # A GEMM that accumulates onto the weight itself rounds it at every row of the batch.
        return GATE_CALLS * self.rows

    @property
    def conditioning(self) -> float:
        # Adam divides by sqrt(1 - beta_2^t), which optimizers that keep t on the device compute in float32. 1 - x with
        # x near 1 has the rounding of x, eps / 2, against 1 - beta_2 at the first step; the root halves it.
        return torch.finfo(torch.float32).eps / (4 * (1 - ADAM_BETA_2)) if self.optimizer == "adamw" else 0.0

    def judged(self, results: Results) -> Results:
        """What training has changed: the parameters less their starting values."""
        start = self.parameters()
        return {name: value - p for (name, value), p in zip(results.items(), start, strict=True)}

    def batches(self) -> Sequence[tuple[Tensor, Tensor]]:
        """The batches of the calls that are compared."""
        return [(x, y) for x, y in (self.inputs(i) for i in range(GATE_CALLS))]

    def oracle(self, dtype: torch.dtype) -> Results:
        wide = torch.promote_types(dtype, torch.float32)
        params = [p.to(wide, copy=True).requires_grad_() for p in self.parameters()]
        weights = params[::2] if self.bias else params
        biases = params[1::2] if self.bias else [None] * len(params)
        kind = torch.optim.AdamW if self.optimizer == "adamw" else torch.optim.SGD
        optimizer = kind(params, **OPTIMIZERS[self.optimizer])
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15, enabled=dtype == torch.float16)
        activations = [*[self.activation] * (len(self.sizes) - 2), "identity"]
        for x, y in self.batches():
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=wide != dtype):
                a = x.to(wide)
                for w, b, f in zip(weights, biases, activations, strict=True):
                    a = reference.activate(F.linear(a, w, b), f)
            scaler.scale(F.cross_entropy(a.to(wide), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        return {f"parameter {i}": p.detach().double() for i, p in enumerate(params)}


@dataclass(frozen=True)
class StepProblem(_Training):
    """One training step: forward, softmax cross-entropy, backward and update on a batch [M, sizes[0]]."""

    kind: ClassVar[str] = "step"

    @property
    def name(self) -> str:
        words = [*self.shape_words, f"batch {self.batch}", self.optimizer, self.dtype]
        return " ".join(words)


@dataclass(frozen=True)
class OnlineProblem(_Training):
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

    def make_inputs(self, index: int) -> tuple[Tensor, ...]:
        """X [samples, K] in [0, 1) and labels int64 [samples]."""
        g = generator(10 + index)
        x = torch.rand(self.samples, self.sizes[0], generator=g).bfloat16().float()
        return x, torch.randint(0, self.sizes[-1], (self.samples,), generator=g)

    def batches(self) -> Sequence[tuple[Tensor, Tensor]]:
        """Single samples."""
        sets = [self.inputs(i) for i in range(GATE_CALLS)]
        return [(x[j : j + 1], y[j : j + 1]) for x, y in sets for j in range(self.samples)]
