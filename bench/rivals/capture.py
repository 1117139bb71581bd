"""A training step captured in one CUDA graph, and replayed on batches in the graph's own tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Replay", "capture"]

_WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Replay:
    """A step on the content of ``x`` and ``y``: ``run`` replays it and returns the loss."""

    x: Tensor
    y: Tensor
    run: Callable[[], object]

    def __call__(self, x: Tensor, y: Tensor) -> object:
        """One step on a batch, which is copied."""
        self.x.copy_(x)
        self.y.copy_(y)
        return self.run()

    def gathered(self, x: Tensor, y: Tensor, rows: Tensor) -> object:
        """One step on some rows of X and Y, which are gathered without a copy in between."""
        torch.index_select(x, 0, rows, out=self.x)
        torch.index_select(y, 0, rows, out=self.y)
        return self.run()


def capture(
    step: Callable[[Tensor, Tensor], object],
    example: tuple[Tensor, Tensor],
    params: Sequence[Tensor],
    state: Callable[[], Iterable[Tensor]],
) -> Replay:
    """Capture forward, loss, backward and update.

    Args:
        step: takes a batch (X, Y), works on the device only, and returns the loss.
        example: a batch of the shapes to come.
        params: what the step trains. They have their old values after the capture.
        state: returns the optimizer's tensors after a step; all of them begin at 0.
    """
    x, y = (t.clone() for t in example)
    saved = [p.detach().clone() for p in params]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_STEPS):
            step(x, y)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(x, y)
    with torch.no_grad():  # in the memory that the graph knows
        for p, value in zip(params, saved, strict=True):
            p.copy_(value)
        for value in state():
            value.zero_()

    def run() -> object:
        graph.replay()
        return loss

    return Replay(x, y, run)
