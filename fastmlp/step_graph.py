"""CUDA graphs of training steps: captured once, replayed for every further call with the same key."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

__all__ = ["GraphCache"]

_KEPT = 16


class GraphCache:
    """Captured launches by key. All graphs share one memory pool; the oldest makes room for a seventeenth."""

    def __init__(self) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._buffers: dict[Hashable, dict[str, Tensor]] = {}
        self._scalars: dict[Hashable, Tensor] = {}
        self._pool: Any = None

    def buffers(self, key: Hashable) -> dict[str, Tensor]:
        """Static tensors that belong to a graph: empty for a new key, the same dictionary ever after."""
        return self._buffers.setdefault(key, {})

    def scalar(self, key: Hashable, device: torch.device) -> Tensor:
        """A static 0-d float32 that belongs to a graph."""
        if key not in self._scalars:
            self._scalars[key] = torch.zeros((), device=device)
        return self._scalars[key]

    def replay(self, key: Hashable, launch: Callable[[], None], warm_up: Callable[[Callable[[], None]], None]) -> None:
        """Replay the graph of ``launch``, capturing it first where the key is new.

        ``warm_up(launch)`` must run the launches outside the capture without lasting effect: kernels are compiled
        and loaded then, which a capture does not allow.

        Raises:
            RuntimeError: the launches cannot be captured; the message says why and how to go without.
        """
        graph = self._graphs.get(key)
        if graph is None:
            while len(self._graphs) >= _KEPT:
                oldest = next(iter(self._graphs))
                del self._graphs[oldest]
                self._buffers.pop(oldest, None)
            graph = self._graphs[key] = self._capture(launch, warm_up)
        graph.replay()

    def _capture(
        self, launch: Callable[[], None], warm_up: Callable[[Callable[[], None]], None]
    ) -> torch.cuda.CUDAGraph:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph is being captured already, and graphs do not nest; build the step with "
                "TrainStep(..., cuda_graph=False) to have its launches captured by yours"
            )
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            warm_up(launch)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                launch()
        except RuntimeError as error:
            raise RuntimeError(
                f"the training step could not be captured in a CUDA graph ({error}); build it with "
                "TrainStep(..., cuda_graph=False) to launch its kernels one by one"
            ) from error
        self._pool = graph.pool()
        return graph
