"""The single operations in plain torch, written out so that torch.compile sees whole functions without a tape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.problems import Problem
from fastmlp.activations import ACTIVATIONS

__all__ = ["RESULTS", "activation_of", "formula"]

#: The names of the results of each kind, in the order in which contenders return them.
RESULTS: dict[str, tuple[str, ...]] = {
    "linear_act": ("A",),
    "linear_act_backward": ("dX", "dW", "db"),
    "wgrad": ("dW", "db"),
    "cross_entropy": ("loss", "dZ"),
    "head": ("loss", "dZ", "dH"),
}


def activation_of(problem: Problem) -> Callable[[Tensor], Tensor]:
    """The problem's activation as torch's function."""
    return ACTIVATIONS[getattr(problem, "activation", "identity")].new


def _cross_entropy(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(z.float() if z.dtype.itemsize == 2 else z, 1)
    loss = F.nll_loss(log_p, y)
    onehot = torch.zeros_like(log_p).scatter(1, y.view(-1, 1), 1.0)
    return loss, ((log_p.exp() - onehot) / z.shape[0]).to(z.dtype)


def _head(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss, dz = _cross_entropy(F.linear(h, w, b), y)
    return loss, dz, dz @ w


def formula(problem: Problem) -> Callable[..., Any]:
    """The operation as one function of the problem's inputs (for linear_act_backward of A, X, W, b, dA)."""
    f = activation_of(problem)
    name = getattr(problem, "activation", "identity")

    def linear_act(x: Tensor, w: Tensor, b: Tensor, da: Tensor) -> Tensor:
        return f(F.linear(x, w, b))

    def backward(a: Tensor, x: Tensor, w: Tensor, b: Tensor, da: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        match name:
            case "sigmoid":
                dz = da * a * (1 - a)
            case "relu":
                dz = da * (a > 0)
            case "tanh":
                dz = da * (1 - a * a)
            case "identity":
                dz = da
            case _:
                raise ValueError(f"the derivative of {name!r} is not a function of its output")
        return dz @ w, dz.t() @ x, dz.sum(0)

    def wgrad(x: Tensor, w: Tensor, b: Tensor, dz: Tensor) -> tuple[Tensor, Tensor]:
        return dz.t() @ x, dz.sum(0)

    functions: dict[str, Callable[..., Any]] = {
        "linear_act": linear_act,
        "linear_act_backward": backward,
        "wgrad": wgrad,
        "cross_entropy": _cross_entropy,
        "head": _head,
    }
    return functions[problem.kind]
