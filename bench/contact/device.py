"""All that only a GPU does (events, graphs, waiting, memory, nvidia-smi), and its stand-in for a rehearsal.

The stages call these few methods and nothing of torch.cuda, so that a rehearsal executes every line of the stages. In a
rehearsal the kernels run on the simulated GPU, a captured graph is the function itself, and every time is None.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.measure.timing import FLUSH_BYTES, chain
from bench.rivals.protocol import Run

__all__ = ["Device", "Gpu", "Rehearsal", "opened"]

Launch = Callable[[], object]


class Gpu:
    """The current GPU.

    Attributes:
        name: torch's name of the device.
        rehearsal: whether there is no GPU.
        sizes, batches: layers and batch sizes of the network that the stages train.
        repeats: how often a run is repeated that must agree bit by bit.
        batch_sizes: how many batch sizes are tried.
        calls: the number of calls in a mean time.
    """

    rehearsal = False
    name = "cuda"
    sizes: tuple[int, ...] = (784, 512, 512, 10)
    batches: tuple[int, ...] = (64, 512, 4096, 65536)
    repeats = 20
    batch_sizes = 40
    calls = 200

    def synchronize(self) -> None:
        """Wait for all launches."""
        torch.cuda.synchronize()

    def capture(self, launch: Launch) -> Launch:
        """A CUDA graph of ``launch``, which has run once before; returns its replay."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            launch()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        return graph.replay

    def chain(self, run: Launch, calls: int) -> float | None:
        """Microseconds per call of ``calls`` calls in a row."""
        for _ in range(3):
            run()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.synchronize()
        start.record()
        for _ in range(calls):
            run()
        stop.record()
        self.synchronize()
        return start.elapsed_time(stop) * 1e3 / calls

    def steps(self, run: Run, calls: int) -> float | None:
        """Microseconds per call of a contender, by the host's clock: torch's events do not see JAX's streams."""
        for _ in range(3):
            run()
        return 1e6 * chain(run, calls)

    def cold(self, run: Launch, calls: int) -> float | None:
        """Median microseconds of a call after the L2 cache was overwritten."""
        flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.name)
        run()
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
        for start, stop in events:
            flush.zero_()
            start.record()
            run()
            stop.record()
        self.synchronize()
        return statistics.median(start.elapsed_time(stop) for start, stop in events) * 1e3

    def host(self, run: Launch, calls: int) -> float | None:
        """Microseconds per call of the host alone; the device is idle before, and the clock does not wait for it."""
        for _ in range(3):
            run()
        self.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        seconds = time.perf_counter() - begin
        self.synchronize()
        return seconds * 1e6 / calls

    def allocated(self) -> int:
        """Bytes that torch's tensors occupy."""
        return torch.cuda.memory_allocated()

    def release(self) -> None:
        """Give cached memory back, so that the next allocation asks the driver."""
        torch.cuda.empty_cache()

    def pinned(self, count: int) -> torch.Tensor:
        """Page-locked host memory, whose allocation asks the driver too."""
        return torch.empty(count, pin_memory=True)

    def kernels(self, run: Launch) -> dict[str, tuple[int, float | None]]:
        """Kernel -> (launches, microseconds) of one call, by torch's profiler."""
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            run()
            self.synchronize()
        counts: Counter[str] = Counter()
        times: defaultdict[str, float] = defaultdict(float)
        for event in found.events() or ():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                counts[event.name] += 1
                times[event.name] += event.time_range.elapsed_us()
        return {name: (count, times[name]) for name, count in counts.items()}

    def properties(self) -> dict[str, Any]:
        """What the CUDA runtime says about the device."""
        about = torch.cuda.get_device_properties(0)
        return {
            "device": about.name,
            "capability": f"{about.major}.{about.minor}",
            "multiprocessors": about.multi_processor_count,
            "memory_GiB": round(about.total_memory / 2**30, 1),
            "l2_MiB": getattr(about, "L2_cache_size", 0) / 2**20,
            "devices": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
        }

    def query(self, fields: str) -> dict[str, str]:
        """nvidia-smi's value per field, without the fields that it does not know."""
        tool = shutil.which("nvidia-smi")
        if tool is None:
            return {}

        def ask(*names: str) -> list[str]:
            command = [tool or "", "-i", "0", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
            return [value.strip() for value in done.stdout.split(",")] if done.returncode == 0 else []

        names = fields.split()
        if len(values := ask(*names)) == len(names):
            return dict(zip(names, values, strict=True))
        return {name: values[0] for name in names if (values := ask(name))}


class Rehearsal(Gpu):
    """The stand-in for a GPU: small sizes, no times."""

    rehearsal = True
    name = "cpu"
    sizes = (20, 16, 16, 5)
    batches = (8, 16)
    repeats = 2
    batch_sizes = 3
    calls = 1

    def synchronize(self) -> None:
        """Nothing runs in the background."""

    def capture(self, launch: Launch) -> Launch:
        """The function itself."""
        launch()
        return launch

    def chain(self, run: Launch, calls: int) -> None:
        """One call."""
        run()

    steps = cold = host = chain

    def allocated(self) -> int:
        """Not counted."""
        return 0

    def release(self) -> None:
        """There is no cache."""

    def pinned(self, count: int) -> torch.Tensor:
        """Ordinary memory."""
        return torch.empty(count)

    def kernels(self, run: Launch) -> dict[str, tuple[int, float | None]]:
        """Kernel -> (launches, None), as the simulated GPU records them."""
        from triton.runtime import driver

        before = len(driver.active.launches)
        run()
        counts = Counter(launch.name for launch in driver.active.launches[before:])
        return {name: (count, None) for name, count in counts.items()}

    def properties(self) -> dict[str, Any]:
        """The simulated GPU's properties."""
        from fastmlp.kernels.device import current_device

        here = current_device()
        return {"device": "simulated", "capability": str(here.arch), "multiprocessors": here.multiprocessors}

    def query(self, fields: str) -> dict[str, str]:
        """Nothing to ask."""
        return {}


Device = Gpu


@contextmanager
def opened(*, rehearsal: bool) -> Iterator[Device]:
    """The device, ready for launches; a rehearsal runs every kernel on a simulated sm_80."""
    if not rehearsal:
        torch.cuda.init()
        yield Gpu()
        return
    import fastmlp
    from tests.ptxsim import SimulatedGPU

    torch.set_num_threads(1)
    with SimulatedGPU(80, stats="off"), fastmlp.use_backend("triton"):
        yield Rehearsal()
