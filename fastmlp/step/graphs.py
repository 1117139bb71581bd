"""CUDA graphs of training steps: launched plainly at first, captured at the second use, replayed ever after.

The first use compiles and loads the kernels, which a capture does not allow. A key that is used once is never captured.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: The most graphs that are kept, and the least number of calls between two captures that each drop an older graph.
#: Sizes that keep changing are launched plainly, because a capture takes as long as dozens of plain steps.
_KEPT, _CALLS_PER_EVICTION = 16, 64


def can_capture(device: torch.device) -> bool:
    """Whether launches on ``device`` can be captured in a graph."""
    return device.type == "cuda"


def refuse_capture() -> None:
    """RuntimeError where the caller is capturing a graph."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured already, and graphs do not nest; build the step with "
            "TrainStep(..., cuda_graph=False) to have its launches captured by yours"
        )


@dataclass
class GraphEntry:
    """What belongs to a key: static tensors, filled before every use, and the graph once it is captured."""

    buffers: dict[str, Tensor] = field(default_factory=dict)
    graph: torch.cuda.CUDAGraph | None = None
    used: bool = False


class GraphCache:
    """Graphs of one device by key, the least recently used dropped for a new one. All share one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._entries: OrderedDict[tuple[Hashable, ...], GraphEntry] = OrderedDict()
        self._calls = self._last_eviction = 0
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def entry(self, key: tuple[Hashable, ...]) -> GraphEntry | None:
        """The entry of a key, new ones without buffers; None where launches should be plain, outside any graph.

        A key begins with the number of rows of a batch, and names all that chooses the kernels that a graph keeps.

        Raises:
            RuntimeError: the caller is capturing a graph.
        """
        refuse_capture()
        self._calls += 1
        entry = self._entries.get(key)
        if entry is None:
            if len(self._entries) >= _KEPT:
                if self._calls - self._last_eviction < _CALLS_PER_EVICTION:
                    return None
                self._entries.popitem(last=False)
                self._last_eviction = self._calls
            entry = self._entries[key] = GraphEntry()
        self._entries.move_to_end(key)
        return entry

    def run(self, entry: GraphEntry, launch: Callable[[], None]) -> None:
        """Launch, or replay: ``launch`` reads and writes the entry's buffers and other tensors that stay in place.

        Raises:
            RuntimeError: the launches cannot be captured; the message says why and how to go without.
        """
        if entry.used and entry.graph is None:
            entry.graph = self._capture(launch)
        entry.used = True
        if entry.graph is None:
            launch()
        else:
            entry.graph.replay()

    def drop(self, rows: int) -> None:
        """Forget the graphs of batches of so many rows, since their buffers are given up."""
        for key in [key for key in self._entries if key[0] == rows]:
            del self._entries[key]

    def _capture(self, launch: Callable[[], None]) -> torch.cuda.CUDAGraph:
        # Not torch's own stream for captures: that one is of the device which captured first.
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            # "thread_local": other threads may allocate meanwhile, as pin_memory and NCCL do.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                launch()
        except RuntimeError as error:
            raise RuntimeError(
                f"the training step could not be captured in a CUDA graph ({error}); build it with "
                "TrainStep(..., cuda_graph=False) to launch its kernels one by one"
            ) from error
        self._pool = graph.pool()
        return graph
