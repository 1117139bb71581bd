"""The operators ``fastmlp::*``: torch's own checks of them, their derivatives, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmlp import reference
from fastmlp.activations import ACTIVATIONS, saved_for_grad
from fastmlp.library import OPERATORS
from fastmlp.ops import torch_losses

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    # torch's opcheck itself reads the gradients of arguments that are no leaves.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
OPS = torch.ops.fastmlp
M, K, N, E = 7, 9, 5, 2


def draw(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def probabilities(*shape: int) -> Tensor:
    return (torch.rand(shape) * 0.8 + 0.1).requires_grad_()


def labels(*shape: int) -> Tensor:
    return torch.randint(0, N, shape)


def saved_of(activation: str, *shape: int) -> Tensor | None:
    """A of f, or Z, as the forward pass would have saved it."""
    kind = saved_for_grad(activation)
    z = torch.randn(shape)
    return None if kind is None else (ACTIVATIONS[activation].new(z) if kind == "a" else z).requires_grad_()


def pixels() -> Tensor:
    return torch.arange(M * K, dtype=torch.uint8).view(M, K)


def backward_of_labels() -> tuple[Any, ...]:
    z, y, w = draw(M, N), labels(M), probabilities(N)
    _, statistics, denominator = OPS.cross_entropy_fwd(z.detach(), y, w.detach(), "mean", 1, 0.1, torch.float32)
    return draw(), z, y, w, statistics, denominator, 1, 0.1, True, False


def backward_of_probabilities() -> tuple[Any, ...]:
    z, y = draw(3, N, 4), probabilities(3, N, 4)
    _, statistics, _ = OPS.cross_entropy_fwd(z.detach(), y.detach(), None, "none", -100, 0.0, torch.float32)
    return draw(3, 4), z, y, None, statistics, None, -100, 0.0, True, True


#: By operator and what is special about them, arguments.
CASES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "linear_fwd saves Z": lambda: (draw(M, K), draw(N, K), draw(N), "gelu", True),
    "linear_fwd computes Z again": lambda: (draw(M, K), draw(K, N).t(), None, "silu", False),
    "linear_fwd pixels": lambda: (pixels(), draw(N, K), draw(N), "sigmoid", False),
    "linear_fwd no rows": lambda: (draw(0, K), draw(N, K), draw(N), "relu", False),
    "linear_dgrad": lambda: (draw(M, N), draw(N, K), None, "identity"),
    "linear_dgrad A": lambda: (draw(M, N), draw(N, K), saved_of("tanh", M, K), "tanh"),
    "linear_dgrad Z": lambda: (draw(M, N), draw(N, K), saved_of("silu", M, K), "silu"),
    "linear_wgrad": lambda: (draw(M, N), draw(M, K), True),
    "linear_wgrad pixels": lambda: (draw(M, N), pixels(), False),
    "linear_fwd members": lambda: (draw(E, M, K), draw(E, N, K), draw(E, N), "tanh", False),
    "linear_fwd members share X": lambda: (draw(M, K), draw(E, N, K), None, "gelu", True),
    "linear_dgrad members": lambda: (draw(E, M, N), draw(E, N, K), saved_of("tanh", E, M, K), "tanh"),
    "linear_wgrad members": lambda: (draw(E, M, N), draw(E, M, K), True),
    "linear_wgrad members share X": lambda: (draw(E, M, N), draw(M, K), False),
    "activation_bwd members": lambda: (draw(E, M, K), saved_of("silu", E, M, K), "silu"),
    "activation_bwd identity": lambda: (draw(M, K), None, "identity"),
    "activation_bwd step": lambda: (draw(M, K), None, "step"),
    "activation_bwd transposed": lambda: (draw(K, M).t(), saved_of("gelu", M, K), "gelu"),
    "cross_entropy_fwd": lambda: (draw(M, N), labels(M), None, "mean", 2, 0.0, torch.float32),
    "cross_entropy_fwd uint8": lambda: (
        *(draw(M, N), labels(M).to(torch.uint8), probabilities(N)),
        *("sum", -100, 0.1, torch.float32),
    ),
    "cross_entropy_fwd probabilities": lambda: (
        *(draw(3, N, 4), probabilities(3, N, 4), probabilities(N)),
        *("none", -100, 0.1, torch.float32),
    ),
    "cross_entropy_fwd no rows": lambda: (draw(0, N), labels(0), None, "sum", -100, 0.0, torch.float32),
    "cross_entropy_bwd": backward_of_labels,
    "cross_entropy_bwd probabilities": backward_of_probabilities,
    "loss_fwd": lambda: (probabilities(M, N), probabilities(M, N), "binary_cross_entropy", "mean"),
    "loss_fwd labels": lambda: (draw(M, N), labels(M), "softmax_squared_error", "none"),
    "loss_bwd": lambda: (draw(M, N), probabilities(M, N), probabilities(M, N), "nllm", "none", True, True),
    "dropout_keep": lambda: (torch.tensor([7, 3]), 1, M, 20, 0.3),
    "loss_bwd labels": lambda: (draw(), draw(M, N), labels(M), "softmax_squared_error", "sum", True, False),
}


def operator_of(case: str) -> Any:
    return OPERATORS[case.partition(" ")[0]]


@pytest.mark.covering
@pytest.mark.parametrize("case", CASES)
def test_opcheck(lane, case):
    """Schema, autograd registration, fake results and gradients under AOTAutograd with dynamic shapes."""
    torch.library.opcheck(operator_of(case), CASES[case]())


def test_every_operator_is_checked():
    assert {case.partition(" ")[0] for case in CASES} == set(OPERATORS)
    assert all(hasattr(OPS, name) for name in OPERATORS)


def formula_of(case: str) -> Callable[..., Any]:
    """The same as an operator, in differentiable torch."""

    def linear_fwd(x: Tensor, w: Tensor, b: Tensor | None, activation: str, save_z: bool) -> Any:
        z = reference.linear_act(x, w, b)
        return (reference.activate(z, activation), z) if save_z else reference.activate(z, activation)

    def derivative(saved: Tensor | None, activation: str) -> Any:
        kind = saved_for_grad(activation)
        f = reference.activation_grad_from_output if kind == "a" else reference.activation_grad
        return float(activation == "identity") if kind is None else f(saved, activation)

    def cross_entropy(z: Tensor, y: Tensor, w: Tensor, reduction: str, ignored: int, e: float, _: Any) -> Tensor:
        return reference.cross_entropy(z, y, w, reduction=reduction, ignore_index=ignored, smoothing=e)

    def cross_entropy_bwd(g: Tensor, z: Tensor, y: Tensor, w: Tensor, *rest: Any) -> Any:
        _, denominator, ignored, e, _, _ = rest
        reduction = "none" if g.dim() else "sum" if denominator is None else "mean"
        return reference.cross_entropy_backward(g, z, y, w, reduction=reduction, ignore_index=ignored, smoothing=e)

    return {
        "linear_fwd": linear_fwd,
        "linear_dgrad": lambda dz, w, saved, f: dz @ w * derivative(saved, f),
        "linear_wgrad": lambda dz, x, bias: reference.linear_wgrad(dz, x)[: 1 + bias],
        "activation_bwd": lambda da, saved, f: da * derivative(saved, f),
        "cross_entropy_fwd": cross_entropy,
        "cross_entropy_bwd": cross_entropy_bwd,
        "loss_fwd": torch_losses.by_formula,
        "loss_bwd": lambda g, a, y, loss, reduction, *want: torch_losses.loss_bwd(g, a, y, loss, reduction, want),
    }[case.partition(" ")[0]]


def differentiated(function: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    """The first derivatives of a sum of squares, and second derivatives."""
    inputs = [t for t in args if isinstance(t, Tensor) and t.requires_grad]
    found = function(*args)
    outputs = [t for t in (found if isinstance(found, tuple) else (found,)) if t is not None and t.requires_grad]
    first = torch.autograd.grad(
        sum((t.square().sum() for t in outputs), inputs[0].sum() * 0), inputs, create_graph=True
    )
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs, allow_unused=True)
    return [*first, *(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, second, strict=True))]


@pytest.mark.covering
@pytest.mark.parametrize("case", [case for case in CASES if case != "dropout_keep"])
def test_derivatives(lane, case):
    """First and second derivatives are those of the formula in float64."""
    args = CASES[case]()
    wide = tuple(
        t.detach().double().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in args
    )
    asked = tuple(
        t.requires_grad_(a.requires_grad) if isinstance(t, Tensor) and t.is_floating_point() else t
        for t, a in zip(wide, args, strict=True)
    )
    for got, expected in zip(
        differentiated(operator_of(case), args), differentiated(formula_of(case), asked), strict=True
    ):
        torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=2e-4)


#: Arguments that do not fit, with the error and what it says.
BAD: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "linear_fwd features": ((draw(4, 8), draw(3, 7), None, "relu", False), RuntimeError, "7 features"),
    "linear_fwd bias": ((draw(4, 8), draw(3, 8), draw(2), "relu", False), RuntimeError, r"bias of shape \[3\]"),
    "linear_fwd rank": ((draw(8), draw(3, 8), None, "relu", False), RuntimeError, "batch, in_features"),
    "linear_fwd dtype": ((draw(4, 8).double(), draw(3, 8).double(), None, "relu", False), RuntimeError, "float64"),
    "linear_fwd name": ((draw(4, 8), draw(3, 8), None, "softmin", False), ValueError, "softmin"),
    "linear_dgrad inner": ((draw(4, 8), draw(3, 8), None, "identity"), RuntimeError, r"dz of shape \[4, 3\]"),
    "linear_dgrad saved": ((draw(4, 3), draw(3, 8), draw(4, 7), "tanh"), RuntimeError, r"saved of shape \[4, 8\]"),
    "linear_dgrad no saved": ((draw(4, 3), draw(3, 8), None, "tanh"), RuntimeError, "needs saved"),
    "linear_wgrad rows": ((draw(4, 8), draw(3, 8), True), RuntimeError, r"x of shape \[4, 8\]"),
    "linear_wgrad dtype": ((draw(4, 8), draw(4, 8).half(), True), RuntimeError, "float16"),
    "activation_bwd saved": ((draw(4, 8), draw(4, 7), "relu"), RuntimeError, r"saved of shape \[4, 8\]"),
    "cross_entropy_fwd labels": ((draw(4, 5), labels(3), None, "mean", -100, 0.0, torch.float32), ValueError, "rows"),
    "cross_entropy_fwd weight": (
        *((draw(4, 5), labels(4), draw(4), "mean", -100, 0.0, torch.float32), RuntimeError),
        r"weight of shape \[5\]",
    ),
    "cross_entropy_bwd statistics": (
        *((draw(), draw(4, 5), labels(4), None, torch.ones(2, 3), None, -100, 0.0, True, False), RuntimeError),
        r"statistics of shape \[2, 4\]",
    ),
    "loss_fwd shape": ((draw(4, 5), draw(4, 4), "mse", "mean"), ValueError, "input's shape"),
    "loss_fwd name": ((draw(4, 5), draw(4, 5), "cross_entropy", "mean"), ValueError, "unknown loss"),
    "dropout_keep state": ((torch.tensor([7]), 0, 4, 5, 0.5), RuntimeError, r"int64 \[2\]"),
    "dropout_keep p": ((torch.tensor([7, 0]), 0, 4, 5, 1.0), ValueError, "below 1"),
    "loss_bwd gradient": ((draw(4), draw(4, 5), draw(4, 5), "mse", "mean", True, True), RuntimeError, "upstream"),
}


@pytest.mark.parametrize("traced", [False, True], ids=["called", "traced"])
@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit(case, traced):
    """No kernel is launched: the checks come first, also where only shapes are asked for."""
    args, error, message = BAD[case]
    if traced:
        args = tuple(t.detach().to("meta") if isinstance(t, Tensor) else t for t in args)
    with pytest.raises(error, match=message):
        operator_of(case)(*args)


@pytest.mark.parametrize("case", CASES)
def test_nothing_aliases_an_argument(case):
    """The results on the meta device, where an operator that returned its argument would return that tensor."""
    if case.startswith("cross_entropy_bwd"):
        pytest.skip("its arguments need the forward kernel; test_opcheck has it")
    args = tuple(t.detach().to("meta") if isinstance(t, Tensor) else t for t in CASES[case]())
    results = operator_of(case)(*args)
    given = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
    for t in results if isinstance(results, tuple) else (results,):
        assert t.untyped_storage()._cdata not in given
