"""torch.cuda's devices, streams and CUDA graphs where there is no GPU.

Inside ``with StandIn() as cuda:``, the attributes of torch.cuda that a training step uses are those of ``cuda``. A
subclass says what a capture records and what a replay does: ``tests.support.cuda_graph`` executes on the simulated GPU,
and ``tests.placement.machine`` watches fake tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import pytest
import torch

__all__ = ["Device", "Event", "Graph", "StandIn", "Stream", "needs_values"]


def needs_values(operation: Any, args: Sequence[Any]) -> bool:
    """Whether the host must wait for values on the device: for a number, or for the shape of the result."""
    if operation is torch.ops.aten.index.Tensor:  # of masks only
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return bool(tags & set(operation.tags))


class Stream:
    """A queue of work on a device; work is done as soon as it is queued."""

    def __init__(self, cuda: StandIn, device: Any = None, priority: int = 0) -> None:
        self._cuda, self.device_index = cuda, cuda.index(device)

    @property
    def device(self) -> torch.device:
        return torch.device(self._cuda.device_type, self.device_index)

    def wait_stream(self, other: Stream) -> None:
        self._cuda.refuse_in_capture(other, "waiting for a stream that is not being captured")

    def wait_event(self, event: Event) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event(self._cuda)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self._cuda.wait("torch.cuda.Stream.synchronize")


class Event:
    def __init__(self, cuda: StandIn, **settings: Any) -> None:
        self._cuda = cuda

    def record(self, stream: Stream | None = None) -> None: ...

    def wait(self, stream: Stream | None = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self._cuda.wait("torch.cuda.Event.synchronize")

    def elapsed_time(self, end: Event) -> float:
        return 1.0


class Graph:
    """torch.cuda.CUDAGraph: ``nodes`` is what the capture recorded, ``memory`` what was allocated during it."""

    def __init__(self, cuda: StandIn, keep_graph: bool = False) -> None:
        self._cuda, self._pool = cuda, None
        self.nodes: list[Any] = []
        self.memory: list[Any] = []
        self.captured, self.replays = False, 0

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        if self._cuda.capturing is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        if self._cuda.current_stream() is self._cuda.default_stream():
            raise RuntimeError("CUDA graphs must be captured on a non-default stream")
        self._pool = pool or self._cuda.graph_pool_handle()
        self._cuda.capturing, self._cuda.capture_stream = self, self._cuda.current_stream()
        self._cuda.capture_modes.append(capture_error_mode)
        self._cuda.begin_capture(self)

    def capture_end(self) -> None:
        self._cuda.capturing = self._cuda.capture_stream = None
        self._cuda.end_capture(self)
        self.captured = True
        self._cuda.captures.append(len(self.nodes))

    def replay(self) -> None:
        if self._cuda.capturing is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        if not self.captured:
            raise RuntimeError("called CUDAGraph::replay without a preceding successful capture")
        self.replays += 1
        self._cuda.replays += 1
        self._cuda.replay(self)

    def pool(self) -> Any:
        return self._pool

    def reset(self) -> None:
        self.nodes, self.memory, self.captured = [], [], False


class _GraphContext:
    """torch.cuda.graph: it captures on the caller's stream, or on a stream that the first capture without one made."""

    def __init__(
        self,
        cuda: StandIn,
        cuda_graph: Graph,
        pool: Any = None,
        stream: Stream | None = None,
        capture_error_mode: str = "global",
    ) -> None:
        if stream is None:
            cuda.first_capture_stream = stream = cuda.first_capture_stream or Stream(cuda)
        self._cuda, self._graph, self._mode = cuda, cuda_graph, capture_error_mode
        self._pool, self._stream = pool, cuda.stream(stream)

    def __enter__(self) -> None:
        if self._cuda.capturing is not None:  # torch synchronizes here
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        self._stream.__enter__()
        self._graph.capture_begin(pool=self._pool, capture_error_mode=self._mode)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._graph.capture_end()
        self._stream.__exit__(kind, error, trace)
        if kind is not None:
            self._graph.reset()


class Device:
    """torch.cuda.device, which may be entered again after it was left."""

    def __init__(self, cuda: StandIn, device: Any) -> None:
        self._cuda, self._index = cuda, cuda.index(device)

    def __enter__(self) -> None:
        self._before, self._cuda.current = self._cuda.current, self._index

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cuda.current = self._before


class StandIn:
    """A machine with ``devices`` GPUs, as torch.cuda shows it.

    Attributes:
        current: the current device.
        capturing: the graph that is being captured, or None; ``capture_stream`` is its stream.
        captures: the number of nodes of every graph captured so far.
        capture_modes: the ``capture_error_mode`` of every capture begun.
        replays: how many there were.
    """

    device_type = "cuda"

    def __init__(self, devices: int = 2) -> None:
        self.devices, self.current = devices, 0
        self.capturing: Graph | None = None
        self.capture_stream: Stream | None = None
        self.first_capture_stream: Stream | None = None
        self.captures: list[int] = []
        self.capture_modes: list[str] = []
        self.replays = 0
        self._default = [Stream(self, i) for i in range(devices)]
        self._streams = list(self._default)
        self._pools = itertools.count(1)
        self._stack = ExitStack()

    def patches(self) -> dict[str, Any]:
        """The attributes of torch.cuda that are replaced."""

        def of_this(kind: Any) -> Any:
            return lambda *args, **kwargs: kind(self, *args, **kwargs)

        names = "current_device set_device device_count stream current_stream default_stream set_stream"
        names += " graph_pool_handle is_current_stream_capturing synchronize empty_cache"
        return {
            **{name: getattr(self, name) for name in names.split()},
            "Stream": of_this(Stream),
            "Event": of_this(Event),
            "device": of_this(Device),
            "CUDAGraph": of_this(Graph),
            "graph": of_this(_GraphContext),
        }

    def __enter__(self) -> Any:
        patch = self._stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in self.patches().items():
            patch.setattr(torch.cuda, name, value)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    # What a subclass says.

    def begin_capture(self, graph: Graph) -> None: ...

    def end_capture(self, graph: Graph) -> None: ...

    def replay(self, graph: Graph) -> None: ...

    def wait(self, what: str) -> None:
        """The host waits for a device."""
        if self.capturing is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")

    def refuse_in_capture(self, stream: Stream, what: str) -> None:
        if self.capturing is not None and stream is not self.capture_stream:
            raise RuntimeError(f"CUDA error: dependency created on uncaptured work in another stream ({what})")

    # torch.cuda's functions.

    def index(self, device: Any) -> int:
        """The number of a device given as torch.cuda's functions take it."""
        if isinstance(device, str):
            device = torch.device(device)
        if isinstance(device, torch.device):
            if device.type != self.device_type:
                raise ValueError(f"expected a {self.device_type} device, got {device}")
            device = device.index
        device = self.current if device is None else device
        if not 0 <= device < self.devices:
            raise RuntimeError(f"CUDA error: invalid device ordinal {device}")
        return device

    def current_device(self) -> int:
        return self.current

    def set_device(self, device: Any) -> None:
        self.current = self.index(device)

    def device_count(self) -> int:
        return self.devices

    def default_stream(self, device: Any = None) -> Stream:
        return self._default[self.index(device)]

    def current_stream(self, device: Any = None) -> Stream:
        return self._streams[self.index(device)]

    def set_stream(self, stream: Stream) -> None:
        self._streams[stream.device_index], self.current = stream, stream.device_index

    @contextmanager
    def stream(self, stream: Stream | None) -> Iterator[None]:
        if stream is None:
            yield
            return
        device, before = self.current, self._streams[stream.device_index]
        self.set_stream(stream)
        try:
            yield
        finally:
            self._streams[stream.device_index], self.current = before, device

    def graph_pool_handle(self) -> tuple[int, int]:
        return 0, next(self._pools)

    def is_current_stream_capturing(self) -> bool:
        return self.capturing is not None and self.current_stream() is self.capture_stream

    def synchronize(self, device: Any = None) -> None:
        self.wait("torch.cuda.synchronize")

    def empty_cache(self) -> None:
        self.refuse_in_capture(self.default_stream(), "torch.cuda.empty_cache")
