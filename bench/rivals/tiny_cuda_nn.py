"""tiny-cuda-nn through its PyTorch bindings: fully fused (or CUTLASS) MLPs in float16, without biases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.problems import Problem, Results
from bench.rivals.protocol import Availability, Run, installed, needs
from bench.rivals.training import TrainingProblem, TrainingRun, loss_module, optimizer_of

__all__ = ["TinyCudaNN"]

_ACTIVATIONS = {"relu": "ReLU", "sigmoid": "Sigmoid", "tanh": "Tanh"}
_FUSED_WIDTHS = (16, 32, 64, 128)
_ROWS = 16  # rows and columns of its matrices are multiples of this


def _padded(n: int) -> int:
    return -(-n // _ROWS) * _ROWS


class _TinyRun(TrainingRun):
    def __init__(self, problem: TrainingProblem) -> None:
        super().__init__(problem)
        import tinycudann

        width = problem.sizes[1]
        self.network: Any = tinycudann.Network(
            problem.sizes[0],
            problem.sizes[-1],
            {
                "otype": "FullyFusedMLP" if width in _FUSED_WIDTHS else "CutlassMLP",
                "activation": _ACTIVATIONS[problem.activation],
                "output_activation": "None",
                "n_neurons": width,
                "n_hidden_layers": len(problem.sizes) - 2,
            },
        )
        # One flat float32 parameter: the layers' [out, in] matrices one after the other, padded with zeros.
        parts, self.views = [], []
        at = 0
        for w in problem.parameters():
            n, k = w.shape
            matrix = torch.zeros(_padded(n), _padded(k))
            matrix[:n, :k] = w
            parts.append(matrix.flatten())
            self.views.append((at, matrix.shape, w.shape))
            at += matrix.numel()
        with torch.no_grad():
            self.network.params.copy_(torch.cat(parts))
        self.loss = loss_module(problem)
        self.optimizer = optimizer_of(problem, self.network.parameters(), fused=True)

    def step(self, x: Tensor, y: Tensor) -> object:
        loss = self.loss(self.network(x).float(), y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss

    def results(self) -> Results:
        """The matrices without their padding."""
        flat = self.network.params.detach().double().cpu()
        out = {}
        for i, (at, shape, (n, k)) in enumerate(self.views):
            out[f"parameter {i}"] = flat[at : at + shape.numel()].view(shape)[:n, :k].clone()
        return out


class TinyCudaNN:
    """Takes part in problems without biases, which its networks do not have."""

    name = "tiny_cuda_nn"
    label = "tiny-cuda-nn"
    kinds = frozenset({"step"})
    notes = "tcnn.Network: FullyFusedMLP up to 128 columns, else CutlassMLP; its own loss scale; fused torch.optim"

    def available(self, problem: Problem) -> Availability:
        sizes = getattr(problem, "sizes", ())
        return needs(
            installed("tinycudann"),
            (problem.device.startswith("cuda"), "needs a GPU"),
            (problem.dtype == "float16", "computes in float16"),
            (not getattr(problem, "bias", True), "its networks have no biases"),
            (len(sizes) > 2 and len(set(sizes[1:-1])) == 1, "its hidden layers all have one width"),
            (getattr(problem, "activation", "") in _ACTIVATIONS, "lacks the activation"),
        )

    def build(self, problem: Problem) -> Run:
        return _TinyRun(problem)  # type: ignore[arg-type]
