"""Contenders for the single operations on torch tensors: eager PyTorch, torch.compile, and fastmlp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastmlp
from bench.problems import Problem
from bench.rivals.compiled import mode_runs
from bench.rivals.formulas import RESULTS, activation_of, formula
from bench.rivals.protocol import OK, Availability, OpRun, Run, needs
from fastmlp import ops
from fastmlp.backend import resolve

__all__ = ["CompiledOperation", "EagerOperation", "FastMLPOperation"]

KINDS = frozenset(RESULTS)


class _TapeRun(OpRun):
    """Operations that autograd differentiates; the tape of a backward problem is recorded once per input set.

    Subclasses have the ``linear``, ``cross_entropy`` and ``wgrad`` that are timed.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem, RESULTS[problem.kind])
        self.kind = problem.kind
        self.activation = getattr(problem, "activation", "identity")
        if problem.kind == "linear_act_backward":
            self.tapes: list[tuple[Any, ...]] = []
            for x, w, b, da in self.sets:
                leaves = tuple(t.detach().requires_grad_() for t in (x, w, b))
                self.tapes.append((self.linear(leaves[0], leaves[1], leaves[2], self.activation), leaves, da))
        if problem.kind in ("cross_entropy", "head"):
            self.sets = [(s[0].detach().requires_grad_(), *s[1:]) for s in self.sets]

    def linear(self, x: Tensor, w: Tensor, b: Tensor, activation: str) -> Tensor:
        raise NotImplementedError

    def cross_entropy(self, z: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def wgrad(self, dz: Tensor, x: Tensor) -> object:
        raise NotImplementedError

    def compute(self, *inputs: Tensor) -> object:
        match self.kind:
            case "linear_act":
                with torch.no_grad():
                    return self.linear(inputs[0], inputs[1], inputs[2], self.activation)
            case "linear_act_backward":
                out, leaves, da = self.tapes[self.count % len(self.tapes)]
                return torch.autograd.grad(out, leaves, da, retain_graph=True)
            case "wgrad":
                return self.wgrad(inputs[3], inputs[0])
            case "cross_entropy":
                loss = self.cross_entropy(*inputs)
                return loss, *torch.autograd.grad(loss, inputs[0])
        h, w, b, y = inputs
        z = self.linear(h, w, b, "identity")
        loss = self.cross_entropy(z, y)
        return loss, *torch.autograd.grad(loss, (z, h))


class _EagerRun(_TapeRun):
    def __init__(self, problem: Problem) -> None:
        self.f = activation_of(problem)
        super().__init__(problem)

    def linear(self, x: Tensor, w: Tensor, b: Tensor, activation: str) -> Tensor:
        z = F.linear(x, w, b)
        return z if activation == "identity" else self.f(z)

    def cross_entropy(self, z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y)

    def wgrad(self, dz: Tensor, x: Tensor) -> object:
        return dz.t() @ x, dz.sum(0)


class EagerOperation:
    """nn.functional and autograd."""

    name = "eager"
    label = "PyTorch eager"
    kinds = KINDS
    notes = "torch.nn.functional; gradients by autograd, for linear_act_backward on a retained tape"

    def available(self, problem: Problem) -> Availability:
        return OK

    def build(self, problem: Problem) -> Run:
        return _EagerRun(problem)


class _FastRun(_TapeRun):
    def __init__(self, problem: Problem) -> None:
        self.fused_head = False
        super().__init__(problem)
        self.backend = resolve(self.sets[0][0])
        self.fused_head = self.backend == "triton" and problem.kind == "head"

    def linear(self, x: Tensor, w: Tensor, b: Tensor, activation: str) -> Tensor:
        return fastmlp.functional.linear_act(x, w, b, activation)

    def cross_entropy(self, z: Tensor, y: Tensor) -> Tensor:
        return fastmlp.functional.cross_entropy(z, y)

    def wgrad(self, dz: Tensor, x: Tensor) -> object:
        return ops.on(self.backend).linear_wgrad(dz, x)

    def compute(self, *inputs: Tensor) -> object:
        if not self.fused_head:
            return super().compute(*inputs)
        from fastmlp import kernels

        h, w, b, y = inputs
        loss, dz, dh = kernels.head(h.detach(), w, b, y, scale=1 / h.shape[0])
        return loss.mean(), dz, dh


class FastMLPOperation:
    """fastmlp.functional; on a GPU the head is its kernel."""

    name = "fastmlp"
    label = "fastmlp"
    kinds = KINDS
    notes = "fastmlp.functional and autograd; wgrad and, on a GPU, the head are the kernels themselves"

    def available(self, problem: Problem) -> Availability:
        return OK

    def build(self, problem: Problem) -> Run:
        return _FastRun(problem)


class _CompiledRun(OpRun):
    def __init__(self, problem: Problem, mode: str) -> None:
        super().__init__(problem, RESULTS[problem.kind])
        torch.compiler.reset()
        if problem.kind == "linear_act_backward":
            f = activation_of(problem)
            self.sets = [(f(F.linear(x, w, b)), x, w, b, da) for x, w, b, da in self.sets]
        self.function = torch.compile(formula(problem), mode=mode)

    def compute(self, *inputs: Tensor) -> object:
        with torch.no_grad():
            return self.function(*inputs)


class CompiledOperation:
    """The formulas compiled, without autograd's bookkeeping."""

    kinds = KINDS

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.name = f"compile_{mode.replace('-', '_')}"
        self.label = f"torch.compile ({mode})"
        self.notes = f"forward and hand-derived gradient as one function, mode={mode!r}, no tape"

    def available(self, problem: Problem) -> Availability:
        from_output = getattr(problem, "activation", "identity") in ("identity", "sigmoid", "relu", "tanh")
        return needs(
            *mode_runs(self.mode, problem),
            (problem.kind != "linear_act_backward" or from_output, "written for derivatives of the output"),
        )

    def build(self, problem: Problem) -> Run:
        return _CompiledRun(problem, self.mode)
