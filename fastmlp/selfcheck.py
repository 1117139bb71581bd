"""Each fused operation against ``fastmlp.reference`` in float64, on this machine: what ``fastmlp doctor`` runs.

One function a kernel, of the kernel's name, registered in `CHECKS`: it runs the operation on the backend it is given
and yields every result beside the oracle's and plain torch's. A result passes when its error is no more than twice
torch's own in the same dtype, plus a floor: one rounding to the dtype, and float32's rounding times the square root
of the reduction length, relative to the largest magnitude.

``python -m fastmlp.selfcheck --backend triton --device cuda`` prints the results as JSON, one list. ``fastmlp doctor``
runs that in processes of their own: in Triton's interpreter because TRITON_INTERPRET=1 must be set before triton is
imported, on a GPU because processes compile side by side.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from . import functional, ops, reference
from .activations import ACTIVATIONS, saved_for_grad
from .backend import KERNEL_DTYPES, Resolved, use_backend
from .base.losses import LOSSES
from .step.optimizers import SGD, AdamW, Optimizer

__all__ = ["CHECKS", "KERNELS_ONLY", "CheckResult", "Comparison", "Problem", "run_checks"]


@dataclass(frozen=True)
class Comparison:
    """One result of a kernel.

    Attributes:
        what: names the output, and the variant of the kernel.
        actual: the kernel's output.
        expected: the oracle's, float64.
        torch_result: plain torch's in the dtype of ``actual``.
        reduction: the number of products that are summed in an element.
    """

    what: str
    actual: Tensor
    expected: Tensor
    torch_result: Tensor
    reduction: int

    @property
    def error(self) -> float:
        """The largest absolute difference from the oracle; infinite if the shape is wrong, NaN where a value is."""
        if self.actual.shape != self.expected.shape:
            return math.inf
        return (self.actual.double() - self.expected).abs().max().item()

    @property
    def allowed(self) -> float:
        """The largest error that passes."""
        own = (self.torch_result.double() - self.expected).abs().max().item()
        rounding = torch.finfo(self.actual.dtype).eps + torch.finfo(torch.float32).eps * math.sqrt(self.reduction)
        return 2 * own + rounding * self.expected.abs().max().item()


@dataclass(frozen=True)
class Problem:
    """The operands of a layer: X [M, K], W [N, K], b [N], dZ [M, N], on a device and in a dtype, from a fixed seed."""

    M: int
    K: int
    N: int
    dtype: torch.dtype
    device: torch.device

    def normal(self, *shape: int, seed: int, scale: float = 1.0) -> Tensor:
        """Normally distributed values, the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(*shape, generator=generator) * scale).to(self.dtype).to(self.device)

    @property
    def x(self) -> Tensor:
        """X [M, K]."""
        return self.normal(self.M, self.K, seed=0)

    @property
    def pixels(self) -> Tensor:
        """X [M, K] as uint8."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, 256, (self.M, self.K), generator=generator, dtype=torch.uint8).to(self.device)

    @property
    def weight(self) -> Tensor:
        """W [N, K]."""
        return self.normal(self.N, self.K, seed=2, scale=self.K**-0.5)

    @property
    def bias(self) -> Tensor:
        """The bias b [N]."""
        return self.normal(self.N, seed=3)

    @property
    def dz(self) -> Tensor:
        """The gradient dZ [M, N]."""
        return self.normal(self.M, self.N, seed=4)

    def labels(self, classes: int) -> Tensor:
        """Labels [M], int64 in [0, classes)."""
        generator = torch.Generator().manual_seed(6)
        return torch.randint(0, classes, (self.M,), generator=generator).to(self.device)


#: Nearer to 0 than this, the rounding of Z in float32 decides on which side of its jump the step function is.
JUMP = 1e-5

Check = Callable[[Problem, Resolved], Iterator[Comparison]]


def _double(x: Tensor) -> Tensor:
    return x if x.dtype == torch.uint8 else x.double()


def linear_fwd(problem: Problem, backend: Resolved) -> Iterator[Comparison]:
    """A = f(X W^T + b) and Z for every activation, and for uint8 pixels."""
    w, b = problem.weight, problem.bias
    for x, activation in [(problem.pixels, "sigmoid"), *((problem.x, f) for f in ACTIVATIONS)]:
        save_z = saved_for_grad(activation) == "z"
        a, z = ops.on(backend).linear_fwd(x, w, b, activation, save_z=save_z)
        what = f"{activation}, uint8" if x.dtype == torch.uint8 else activation
        for name, actual, f in (("A", a, activation), ("Z", z, "identity")):
            if actual is not None:
                expected = reference.linear_act(_double(x), w.double(), b.double(), f)
                own = reference.linear_act(x, w, b, f)
                if f == "step":
                    at_jump = reference.linear_act(x.double(), w.double(), b.double()).abs() < JUMP
                    expected = torch.where(at_jump, actual.double(), expected)
                    own = expected.to(problem.dtype)
                yield Comparison(f"{name} ({what})", actual, expected, own, problem.K)


def _saved(problem: Problem, activation: str) -> tuple[Tensor | None, Tensor]:
    """What the derivative is computed from, and Z: of the layer below, so [M, K]."""
    z = problem.x
    keeps = saved_for_grad(activation)
    return None if keeps is None else (z if keeps == "z" else reference.activate(z, activation)), z


def linear_dgrad(problem: Problem, backend: Resolved) -> Iterator[Comparison]:
    """DX = (dZ W) * f' for every activation of the layer below."""
    dz, w = problem.dz, problem.weight
    for activation in ACTIVATIONS:
        saved, z = _saved(problem, activation)
        actual = ops.on(backend).linear_dgrad(dz, w, saved, activation)
        yield Comparison(
            f"dX ({activation})",
            actual,
            reference.linear_dgrad(dz.double(), w.double()) * reference.activation_grad(z.double(), activation),
            reference.linear_dgrad(dz, w) * reference.activation_grad(z, activation),
            problem.N,
        )


def linear_wgrad(problem: Problem, backend: Resolved) -> Iterator[Comparison]:
    """DW = dZ^T X and db, for floating-point inputs and uint8 pixels."""
    dz = problem.dz
    for x in (problem.x, problem.pixels):
        what = "uint8" if x.dtype == torch.uint8 else "float"
        dw, db = ops.on(backend).linear_wgrad(dz, x)
        assert db is not None
        (dw64, db64), (dw_torch, db_torch) = (
            reference.linear_wgrad(dz.double(), _double(x)),
            reference.linear_wgrad(dz, x),
        )
        yield Comparison(f"dW ({what})", dw, dw64, dw_torch, problem.M)
        yield Comparison(f"db ({what})", db, db64, db_torch, problem.M)


def activation_bwd(problem: Problem, backend: Resolved) -> Iterator[Comparison]:
    """DZ = dA * f' for every activation."""
    da = problem.normal(problem.M, problem.K, seed=5)
    for activation in ACTIVATIONS:
        saved, z = _saved(problem, activation)
        yield Comparison(
            f"dZ ({activation})",
            ops.on(backend).activation_bwd(da, saved, activation),
            da.double() * reference.activation_grad(z.double(), activation),
            da * reference.activation_grad(z, activation),
            1,
        )


def _loss_and_grad(
    what: str, ours: Callable[..., Tensor], torchs: Callable[..., Tensor], z: Tensor, reduction: int, backend: Resolved
) -> Iterator[Comparison]:
    """The losses without a reduction, and the gradient of their mean; ``torchs`` in float64 is the oracle."""

    def results(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = z.to(dtype).requires_grad_()
        (gradient,) = torch.autograd.grad(function(x, reduction="mean"), x)
        return function(x, reduction="none").detach(), gradient

    with use_backend(backend):
        actual = results(ours, z.dtype)
    oracle, own = results(torchs, torch.float64), results(torchs, z.dtype)
    for name, got, want, torch_result in zip(("loss", "gradient"), actual, oracle, own, strict=True):
        yield Comparison(f"{name} ({what})", got, want, torch_result, reduction)


def cross_entropy(problem: Problem, backend: Resolved) -> Iterator[Comparison]:
    """M rows of N classes, with and without label smoothing."""
    y = problem.labels(problem.N)
    for smoothing in (0.0, 0.1):
        ours = partial(functional.cross_entropy, target=y, label_smoothing=smoothing)
        torchs = partial(torch.nn.functional.cross_entropy, target=y, label_smoothing=smoothing)
        yield from _loss_and_grad(f"smoothing {smoothing:g}", ours, torchs, 3 * problem.dz, problem.N, backend)


def elementwise_loss(problem: Problem, backend: Resolved) -> Iterator[Comparison]:
    """The losses of values and of independent logits, M x N elements."""
    y = torch.rand(problem.M, problem.N, generator=torch.Generator().manual_seed(7))
    y = y.to(problem.dtype).to(problem.device)
    for loss in LOSSES.values():
        if loss.kernel != "elementwise_loss" or loss.input == "probabilities":
            continue

        def oracle(x: Tensor, reduction: str, torchs: Callable[..., Tensor] | None = loss.torch) -> Tensor:
            assert torchs is not None
            return torchs(x, y.to(x.dtype), reduction=reduction)

        ours = partial(getattr(functional, loss.function), target=y)
        yield from _loss_and_grad(loss.function, ours, oracle, problem.dz, 1, backend)


def softmax_squared_error(problem: Problem, backend: Resolved) -> Iterator[Comparison]:
    """|softmax(Z) - onehot|^2 of M rows of N classes."""
    y = torch.nn.functional.one_hot(problem.labels(problem.N), problem.N).to(problem.dtype)

    def oracle(z: Tensor, reduction: str) -> Tensor:
        rows = reference.softmax_squared_error(z, y.to(z.dtype))
        return rows if reduction == "none" else rows.mean()

    ours = partial(functional.softmax_squared_error, target=y)
    yield from _loss_and_grad("one-hot", ours, oracle, problem.dz, problem.N, backend)


def head(problem: Problem, backend: Resolved) -> Iterator[Comparison]:
    """Last layer, cross-entropy and their backward pass, above a sigmoid layer; of at most 128 classes."""
    from . import kernels
    from .kernels.head import MAX_CLASSES

    classes = min(problem.N, MAX_CLASSES)
    y, w, b = problem.labels(classes), problem.weight[:classes], problem.bias[:classes]
    h = torch.sigmoid(problem.x)
    actual = kernels.head(h, w, b, y, activation="sigmoid", saved=h, scale=1 / problem.M)

    def layer(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        loss, dz, da, _ = reference.head(h, w, b, y, scale=1 / problem.M)
        return loss, dz, da * reference.activation_grad_from_output(h, "sigmoid")

    oracle, own = layer(h.double(), w.double(), b.double()), layer(h, w, b)
    reductions = (problem.K, problem.K, problem.K + classes)
    for name, got, want, torch_result, terms in zip(
        ("loss", "dZ", "dZ below"), actual, oracle, own, reductions, strict=True
    ):
        assert got is not None
        yield Comparison(name, got, want, torch_result, terms)


def wgrad_update(problem: Problem, backend: Resolved) -> Iterator[Comparison]:
    """One layer's gradient and its update in float32, for every optimizer: the first step, from states of 0."""
    from .kernels.wgrad_update import Hyper, Layer, Layout
    from .kernels.wgrad_update import wgrad_update as launch

    rules: tuple[tuple[Optimizer, Callable[..., torch.optim.Optimizer]], ...] = (
        (SGD(0.1, 0.02), torch.optim.SGD),
        (SGD(0.1, 0.02, momentum=0.9, nesterov=True), torch.optim.SGD),
        # AdamW's first step is the gradient's sign unless eps is of the gradient's size.
        (AdamW(0.1, 0.02, eps=0.1), torch.optim.AdamW),
    )
    first = torch.ones(1, dtype=torch.float64)
    dz, x = problem.dz / problem.M**0.5, problem.x
    start = (problem.weight.float(), problem.bias.float())
    for rule, torchs in rules:
        settings = dataclasses.asdict(rule)
        del settings["max_grad_norm"]
        (row,) = rule.rows(first * rule.lr, first).to(problem.device)
        actual = [p.clone() for p in start]
        layout = Layout([Layer(*actual)])
        m_state, v_state = torch.zeros(2, layout.total, device=problem.device)
        launch(layout, [dz], [x], Hyper(**rule.kernel), row, m_state=m_state, v_state=v_state)
        found = []
        for dtype in (torch.float64, problem.dtype):
            params = [p.to(torch.promote_types(dtype, torch.float32), copy=True).requires_grad_() for p in start]
            for p, gradient in zip(params, reference.linear_wgrad(dz.to(dtype), x.to(dtype)), strict=True):
                p.grad = gradient.to(p.dtype)
            torchs(params, **settings).step()
            found.append([p.detach() for p in params])
        for what, got, want, own in zip(("W", "b"), actual, *found, strict=True):
            yield Comparison(f"{what} ({rule.kernel['optimizer']})", got, want, own, problem.M)


CHECKS: Mapping[str, Check] = {
    check.__name__: check
    for check in (
        linear_fwd,
        linear_dgrad,
        linear_wgrad,
        activation_bwd,
        cross_entropy,
        elementwise_loss,
        softmax_squared_error,
        head,
        wgrad_update,
    )
}
"""Every check by the name of its kernel."""

KERNELS_ONLY = frozenset({"head", "wgrad_update"})
"""The checks of kernels that have no counterpart on the torch backend."""

#: M, K, N: ragged against every tile, small enough for the interpreter.
SMALL = ((33, 70, 17),)
#: The reference workload's first layer, a ragged problem, and a batch of 1.
FULL = ((128, 784, 512), (130, 63, 17), (1, 512, 10))
#: Two thirds of the kernels of `FULL`, since Triton compiles other ones for a batch of 1.
SHORT = FULL[:2]
PROBLEMS = {"small": SMALL, "short": SHORT, "full": FULL}


@dataclass(frozen=True)
class CheckResult:
    """What came of one kernel in one dtype.

    Attributes:
        kernel: its name in `CHECKS`.
        backend: "triton" or "torch".
        device: where it ran.
        dtype: such as "float32".
        passed: whether every output was within its error budget.
        worst: the output that came closest to its budget or went furthest over it.
        error: that output's largest absolute error; None if it is not finite, or nothing came out.
        allowed: the budget of that output.
        message: why it failed; empty if it passed.
    """

    kernel: str
    backend: str
    device: str
    dtype: str
    passed: bool
    worst: str
    error: float | None
    allowed: float | None
    message: str


def run_checks(
    device: torch.device | str,
    backend: Resolved,
    dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES,
    sizes: tuple[tuple[int, int, int], ...] = FULL,
    kernels: Sequence[str] | None = None,
) -> list[CheckResult]:
    """Run checks in every dtype; a check that raises has failed.

    Args:
        device: where the operands are.
        backend: "triton" or "torch".
        dtypes: of the operands.
        sizes: (M, K, N) of the problems.
        kernels: names in `CHECKS`; by default all that the backend has.
    """
    device = torch.device(device)
    names = kernels or [name for name in CHECKS if backend == "triton" or name not in KERNELS_ONLY]
    return [_run(name, dtype, device, backend, sizes) for name in names for dtype in dtypes]


def _run(
    name: str, dtype: torch.dtype, device: torch.device, backend: Resolved, sizes: tuple[tuple[int, int, int], ...]
) -> CheckResult:
    def result(passed: bool, worst: str, error: float | None, allowed: float | None, message: str) -> CheckResult:
        kind = str(dtype).removeprefix("torch.")
        return CheckResult(name, backend, str(device), kind, passed, worst, error, allowed, message)

    worst, worst_ratio, error, allowed = "", -1.0, 0.0, 0.0
    try:
        for M, K, N in sizes:
            for comparison in CHECKS[name](Problem(M, K, N, dtype, device), backend):
                found, limit = comparison.error, comparison.allowed
                ratio = 0.0 if found == 0 else found / limit if math.isfinite(found) and limit > 0 else math.inf
                if ratio > worst_ratio:
                    worst, worst_ratio, error, allowed = f"{comparison.what} {M}x{K}x{N}", ratio, found, limit
    except Exception as problem:  # whatever a driver, a compiler or a kernel raises is the finding
        return result(False, worst, None, None, f"{type(problem).__name__}: {problem}")
    if worst_ratio <= 1:
        return result(True, worst, error, allowed, "")
    message = f"{worst}: error {error:.3g}, allowed {allowed:.3g}"
    return result(False, worst, error if math.isfinite(error) else None, allowed, message)


def main() -> None:
    """Print the results of `run_checks` as JSON."""
    parser = argparse.ArgumentParser(prog="python -m fastmlp.selfcheck")
    parser.add_argument("--backend", choices=("triton", "torch"), required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--problems", choices=PROBLEMS, default="full", help="small: for the interpreter")
    parser.add_argument("--kernels", nargs="+", choices=CHECKS)
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in KERNEL_DTYPES}
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=list(dtypes))
    args = parser.parse_args()
    chosen = tuple(dtypes[name] for name in args.dtypes)
    results = run_checks(args.device, args.backend, chosen, PROBLEMS[args.problems], args.kernels)
    print(json.dumps([dataclasses.asdict(result) for result in results]))


if __name__ == "__main__":
    main()
