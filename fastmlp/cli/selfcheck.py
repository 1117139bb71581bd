"""Each fused operation against ``fastmlp.reference`` in float64, on this machine: what ``fastmlp doctor`` runs.

`CHECKS` has one function per kernel, with the kernel's name. The function runs the operation on a backend and yields
every result beside those of the reference in float64 and in the operands' own dtype. A result passes when its error is
at most twice that of the reference in the same dtype, plus a floor. The floor is one rounding to the dtype plus
float32's rounding times the square root of the reduction length, both relative to the largest magnitude.

``python -m fastmlp.cli.selfcheck --backend triton --device cuda`` prints the results as a list in JSON. `fastmlp
doctor` runs it in processes of their own: for Triton's interpreter, since TRITON_INTERPRET=1 must be set before triton
is imported; on a GPU, since processes compile side by side.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import functional, ops, reference
from ..activations import ACTIVATIONS, saved_for_grad
from ..backend import KERNEL_DTYPES, Resolved, use_backend
from ..base.losses import LOSSES
from ..step.optimizers import SGD, AdamW, Optimizer

__all__ = ["CHECKS", "KERNELS_ONLY", "CheckResult", "Comparison", "Problem", "run_checks"]


@dataclass(frozen=True)
class Comparison:
    """One result of a kernel.

    Attributes:
        what: names the output, and the variant of the kernel.
        actual: the kernel's output.
        expected: the reference's, float64.
        torch_result: the reference's in the dtype of ``actual``.
        reduction: the number of products that are summed in an element.
    """

    what: str
    actual: Tensor
    expected: Tensor
    torch_result: Tensor
    reduction: int

    @property
    def error(self) -> float:
        """The largest absolute error; infinite if the shape is wrong, NaN if a value is NaN."""
        if self.actual.shape != self.expected.shape:
            return math.inf
        return (self.actual.double() - self.expected).abs().max().item()

    @property
    def allowed(self) -> float:
        """The largest error that passes."""
        own = (self.torch_result.double() - self.expected).abs().max().item()
        rounding = torch.finfo(self.actual.dtype).eps + torch.finfo(torch.float32).eps * math.sqrt(self.reduction)
        return 2 * own + rounding * self.expected.abs().max().item()


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Problem:
    """The operands of a layer: x [M, K], pixels [M, K] uint8, weight [N, K], bias [N], dz [M, N].

    Their values come from fixed seeds and are the same on every device.
    """

    def __init__(self, M: int, K: int, N: int, dtype: torch.dtype, device: torch.device) -> None:
        self.M, self.K, self.N, self.dtype, self.device = M, K, N, dtype, device
        self.x = self.normal(M, K, seed=0)
        self.pixels = torch.randint(0, 256, (M, K), generator=_seeded(1), dtype=torch.uint8, device="cpu").to(device)
        self.weight = self.normal(N, K, seed=2, scale=K**-0.5)
        self.bias = self.normal(N, seed=3)
        self.dz = self.normal(M, N, seed=4)

    def normal(self, *shape: int, seed: int, scale: float = 1.0) -> Tensor:
        """Normally distributed values in the problem's dtype."""
        return (torch.randn(*shape, generator=_seeded(seed), device="cpu") * scale).to(self.dtype).to(self.device)

    def labels(self, classes: int) -> Tensor:
        """Labels [M], int64 in [0, classes)."""
        return torch.randint(0, classes, (self.M,), generator=_seeded(6), device="cpu").to(self.device)


#: Nearer to 0 than this, the rounding of Z in float32 decides on which side of its jump the step function is.
JUMP = 1e-5

Check = Callable[[Problem, Resolved], Iterator[Comparison]]
Function = Callable[..., Tensor]


def _to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in ``dtype`` of floating-point values; labels and pixels as they are."""
    return x.to(dtype) if x.is_floating_point() else x


def _compare(
    names: Sequence[str],
    actual: Sequence[Tensor | None],
    formula: Callable[..., Iterable[Tensor]],
    operands: Sequence[Tensor],
    reductions: Sequence[int],
) -> Iterator[Comparison]:
    """Each output beside that of ``formula`` on the operands in float64, and on the operands as they are."""
    oracle, own = formula(*(_to(t, torch.float64) for t in operands)), formula(*operands)
    for name, got, want, torch_result, reduction in zip(names, actual, oracle, own, reductions, strict=True):
        assert got is not None
        yield Comparison(name, got, want, torch_result, reduction)


def linear_fwd(problem: Problem, backend: Resolved) -> Iterator[Comparison]:
    """A = f(X W^T + b) and Z for every activation, and for uint8 pixels."""
    w, b = problem.weight, problem.bias
    for x, activation in [(problem.pixels, "sigmoid"), *((problem.x, f) for f in ACTIVATIONS)]:
        a, z = ops.on(backend).linear_fwd(x, w, b, activation, save_z=saved_for_grad(activation) == "z")
        what = f"{activation}, uint8" if x.dtype == torch.uint8 else activation
        for name, actual, f in (("A", a, activation), ("Z", z, "identity")):
            if actual is None:
                continue
            expected = reference.linear_act(_to(x, torch.float64), w.double(), b.double(), f)
            own = reference.linear_act(x, w, b, f)
            if f == "step":
                at_jump = reference.linear_act(x.double(), w.double(), b.double()).abs() < JUMP
                expected = torch.where(at_jump, actual.double(), expected)
                own = expected.to(problem.dtype)
            yield Comparison(f"{name} ({what})", actual, expected, own, problem.K)


def _backward(
    problem: Problem, name: str, run: Function, formula: Function, operands: Sequence[Tensor], reduction: int
) -> Iterator[Comparison]:
    """For every activation: ``run`` from what the derivative is computed from, beside ``formula`` times f'(X)."""
    z = problem.x
    for activation in ACTIVATIONS:
        keeps = saved_for_grad(activation)
        saved = None if keeps is None else z if keeps == "z" else reference.activate(z, activation)

        def product(z: Tensor, *operands: Tensor, activation: str = activation) -> list[Tensor]:
            return [formula(*operands) * reference.activation_grad(z, activation)]

        what = f"{name} ({activation})"
        yield from _compare([what], [run(saved, activation)], product, (z, *operands), [reduction])


def linear_dgrad(problem: Problem, backend: Resolved) -> Iterator[Comparison]:
    """DX = (dZ W) * f' for every activation of the layer below."""
    operands = problem.dz, problem.weight
    run = partial(ops.on(backend).linear_dgrad, *operands)
    return _backward(problem, "dX", run, reference.linear_dgrad, operands, problem.N)


def activation_bwd(problem: Problem, backend: Resolved) -> Iterator[Comparison]:
    """DZ = dA * f' for every activation."""
    da = problem.normal(problem.M, problem.K, seed=5)
    return _backward(problem, "dZ", partial(ops.on(backend).activation_bwd, da), lambda da: da, [da], 1)


def linear_wgrad(problem: Problem, backend: Resolved) -> Iterator[Comparison]:
    """DW = dZ^T X and db, for floating-point inputs and uint8 pixels."""
    for x, what in ((problem.x, "float"), (problem.pixels, "uint8")):
        operands, terms = (problem.dz, x), [problem.M] * 2
        actual = ops.on(backend).linear_wgrad(*operands)
        yield from _compare([f"dW ({what})", f"db ({what})"], actual, reference.linear_wgrad, operands, terms)


def _loss(
    what: str, ours: Function, torchs: Function, z: Tensor, target: Tensor, reduction: int, backend: Resolved
) -> Iterator[Comparison]:
    """The losses without a reduction and the gradient of their mean, beside those of torch's function."""

    def results(function: Function, z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        z = z.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(function(z, target, reduction="mean"), z)
        return function(z, target, reduction="none").detach(), gradient

    with use_backend(backend):
        actual = results(ours, z, target)
    names = [f"loss ({what})", f"gradient ({what})"]
    yield from _compare(names, actual, partial(results, torchs), (z, target), [reduction] * 2)


def cross_entropy(problem: Problem, backend: Resolved) -> Iterator[Comparison]:
    """M rows of N classes, with and without label smoothing."""
    z, y = 3 * problem.dz, problem.labels(problem.N)
    for smoothing in (0.0, 0.1):
        ours, torchs = (partial(f, label_smoothing=smoothing) for f in (functional.cross_entropy, F.cross_entropy))
        yield from _loss(f"smoothing {smoothing:g}", ours, torchs, z, y, problem.N, backend)


def elementwise_loss(problem: Problem, backend: Resolved) -> Iterator[Comparison]:
    """The losses of values and of independent logits, M x N elements."""
    y = torch.rand(problem.M, problem.N, generator=_seeded(7), device="cpu").to(problem.dtype).to(problem.device)
    for loss in LOSSES.values():
        if loss.kernel == "elementwise_loss" and loss.input != "probabilities":
            assert loss.torch is not None
            ours = getattr(functional, loss.function)
            yield from _loss(loss.function, ours, loss.torch, problem.dz, y, 1, backend)


def softmax_squared_error(problem: Problem, backend: Resolved) -> Iterator[Comparison]:
    """|softmax(Z) - onehot|^2 of M rows of N classes."""
    y = F.one_hot(problem.labels(problem.N), problem.N).to(problem.dtype)

    def oracle(z: Tensor, y: Tensor, reduction: str) -> Tensor:
        rows = reference.softmax_squared_error(z, y)
        return rows if reduction == "none" else rows.mean()

    return _loss("one-hot", functional.softmax_squared_error, oracle, problem.dz, y, problem.N, backend)


def head(problem: Problem, backend: Resolved) -> Iterator[Comparison]:
    """Last layer, cross-entropy and their backward pass, above a sigmoid layer; of at most 128 classes."""
    from .. import kernels
    from ..kernels.head import MAX_CLASSES

    classes, scale = min(problem.N, MAX_CLASSES), 1 / problem.M
    y, w, b = problem.labels(classes), problem.weight[:classes], problem.bias[:classes]
    h = torch.sigmoid(problem.x)
    actual = kernels.head(h, w, b, y, activation="sigmoid", saved=h, scale=scale)

    def layer(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        loss, dz, da, _ = reference.head(h, w, b, y, scale=scale)
        return loss, dz, da * reference.activation_grad_from_output(h, "sigmoid")

    reductions = (problem.K, problem.K, problem.K + classes)
    return _compare(("loss", "dZ", "dZ below"), actual, layer, (h, w, b), reductions)


def wgrad_update(problem: Problem, backend: Resolved) -> Iterator[Comparison]:
    """One layer's gradient and its update in float32, for every optimizer: the first step, from states of 0."""
    from ..kernels.layout import Layer, Layout
    from ..kernels.wgrad_update import wgrad_update as launch

    rules: tuple[tuple[Optimizer, Callable[..., torch.optim.Optimizer]], ...] = (
        (SGD(0.1, 0.02), torch.optim.SGD),
        (SGD(0.1, 0.02, momentum=0.9, nesterov=True), torch.optim.SGD),
        # AdamW's first step is the gradient's sign unless eps is of the gradient's size.
        (AdamW(0.1, 0.02, eps=0.1), torch.optim.AdamW),
    )
    first = torch.ones(1, dtype=torch.float64, device="cpu")
    dz, x = problem.dz / problem.M**0.5, problem.x
    start = (problem.weight.float(), problem.bias.float())
    for rule, torchs in rules:
        settings = dataclasses.asdict(rule)
        for of_step in ("max_grad_norm", "ema_decay", "ema_warmup"):
            del settings[of_step]
        (row,) = rule.rows(first * rule.lr, first).to(problem.device)
        actual = [p.clone() for p in start]
        layout = Layout([Layer(*actual)])
        states = torch.zeros(len(rule.states), layout.total, device=problem.device)
        launch(layout, [dz], [x], rule.kernel, row, states=states)
        make = partial(torchs, **settings)

        def update(dz: Tensor, x: Tensor, make: Callable[..., torch.optim.Optimizer] = make) -> list[Tensor]:
            params = [p.to(torch.promote_types(dz.dtype, torch.float32), copy=True).requires_grad_() for p in start]
            for p, gradient in zip(params, reference.linear_wgrad(dz, x), strict=True):
                p.grad = gradient.to(p.dtype)
            make(params).step()
            return [p.detach() for p in params]

        name = rule.kernel
        yield from _compare([f"W ({name})", f"b ({name})"], actual, update, (dz, x), [problem.M] * 2)


_BOTH = (
    *(linear_fwd, linear_dgrad, linear_wgrad, activation_bwd),
    *(cross_entropy, elementwise_loss, softmax_squared_error),
)
_KERNELS_ONLY = (head, wgrad_update)
CHECKS: Mapping[str, Check] = {check.__name__: check for check in (*_BOTH, *_KERNELS_ONLY)}
"""Every check by the name of its kernel."""
KERNELS_ONLY = frozenset(check.__name__ for check in _KERNELS_ONLY)
"""The checks of kernels that have no counterpart on the torch backend."""

#: M, K, N: ragged against every tile, small enough for the interpreter.
SMALL = ((33, 70, 17),)
#: The reference workload's first layer, a ragged problem, and a batch of 1.
FULL = ((128, 784, 512), (130, 63, 17), (1, 512, 10))
#: `FULL` without the batch of 1, for which Triton compiles a third of the kernels.
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
    result = partial(CheckResult, name, backend, str(device), str(dtype).removeprefix("torch."))
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
    passed = worst_ratio <= 1
    message = "" if passed else f"{worst}: error {error:.3g}, allowed {allowed:.3g}"
    return result(passed, worst, error if math.isfinite(error) else None, allowed, message)


def main() -> None:
    """Print the results of `run_checks` as JSON."""
    parser = argparse.ArgumentParser(prog="python -m fastmlp.cli.selfcheck")
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
