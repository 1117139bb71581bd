"""A simulated GPU behind Triton's own JIT.

Inside `with SimulatedGPU(arch=80) as gpu:` Triton specialises and compiles every ordinary `kernel[grid](...)` on CPU
tensors for that architecture. Instead of going to a device, the launch is recorded in `gpu.launches` and executed by
`PtxKernel`. Everything of Triton but the driver is real: binder, specialisation, compiler and, on request, the
assembler. Nothing here executes the assembler's machine code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import driver

from .kernel import PtxKernel, decoded
from .stats import Stats


@dataclass(frozen=True)
class _Properties:
    max_shared_mem: int  # bytes that a program may use
    multiprocessor_count: int


# The values of NVIDIA are from the technical specifications in the CUDA programming guide, with the multiprocessors of
# T4, A100, A10, RTX 4090, H100, B200 and RTX 5090. The values of AMD are the LDS per work group and the compute units
# of MI210, MI300X, MI355X and (counted in work-group processors) RX 7900 XTX.
_PROPERTIES = {
    ("cuda", 75): _Properties(65536, 40),
    ("cuda", 80): _Properties(166912, 108),
    ("cuda", 86): _Properties(101376, 84),
    ("cuda", 89): _Properties(101376, 128),
    ("cuda", 90): _Properties(232448, 132),
    ("cuda", 100): _Properties(232448, 148),
    ("cuda", 120): _Properties(101376, 170),
    ("hip", "gfx90a"): _Properties(65536, 104),
    ("hip", "gfx942"): _Properties(65536, 304),
    ("hip", "gfx950"): _Properties(163840, 256),
    ("hip", "gfx1100"): _Properties(65536, 48),
}

#: Triton's version.
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])

# Triton keeps compiled kernels and the limit of shared memory by device number. Every target therefore has its own
# number, which no real GPU of the same process has.
FIRST_DEVICE = 1000
_device_numbers: dict[tuple[str, int | str], int] = {}


def _leave_out_assembler(
    backend: Any = None, stages: dict[str, Any] | None = None, *options: Any
) -> tuple[str, str] | None:
    """Triton's hook into its list of stages. Called without arguments, it returns its name for Triton's caches."""
    if stages is None:
        return "no machine code", "no machine code"
    stages["cubin" if "cubin" in stages else "hsaco"] = lambda source, metadata: b""
    return None


def flatten(name: str, value: Any, kind: Any) -> Iterator[tuple[str, Any]]:
    """The run-time parts of one argument with their names, in PTX order. Parts of a tuple are "name[0]", "name[1]".

    Args:
        kind: the argument in Triton's signature: a type, "constexpr" (compiled away), or a tuple of these.
    """
    if isinstance(kind, (tuple, list)):
        for i, (v, k) in enumerate(zip(value, kind, strict=True)):
            yield from flatten(f"{name}[{i}]", v, k)
    elif kind != "constexpr":
        yield name, value


def decode_compiled(compiled: CompiledKernel) -> PtxKernel:
    """The kernel that Triton compiled, ready to run here."""
    return _decode(compiled.metadata, compiled.asm["ptx"])


def _decode(m: Any, ptx: str) -> PtxKernel:
    return decoded(ptx, m.shared, m.num_warps, m.global_scratch_size, m.profile_scratch_size)


@dataclass
class Launch:
    """One kernel launch.

    Attributes:
        name: the kernel function.
        grid: programs in x, y, z.
        arch: the architecture that the kernel was compiled for: 80, "gfx942", ...
        shared: bytes of shared memory per program.
        num_warps, num_stages: as compiled.
        arguments: every argument by name, tensors as they were passed.
        constexprs: compiled-in values by name: the tl.constexpr arguments, and run-time arguments that Triton makes
            constant (None, and an int equal to 1). Parts of a tuple are "name[0]", "name[1]".
        asm: Triton's output by stage: "ttgir", "ptx", "amdgcn" and so on. The machine code, "cubin" or "hsaco", is
            empty unless it was asked for; before Triton 3.8 it is always there.
        stats: counts of the execution; None when the launch was only recorded.
        dependent: whether it may begin before the previous kernel has ended (Triton's option `launch_pdl`).
    """

    name: str
    grid: tuple[int, int, int]
    arch: int | str
    shared: int
    num_warps: int
    num_stages: int
    arguments: dict[str, Any] = field(repr=False)
    constexprs: dict[str, Any] = field(repr=False)
    asm: Mapping[str, str | bytes] = field(repr=False)
    stats: Stats | None = field(default=None, repr=False)
    dependent: bool = False


def _constexprs_by_name(src: ASTSource) -> dict[str, Any]:
    """The compiled-in arguments by name. Triton has them by position, and by position within tuples."""
    named = {}
    for (first, *inner), value in src.constants.items():
        named[src.fn.arg_names[first] + "".join(f"[{i}]" for i in inner)] = value
    return named


class Launcher:
    """The object that Triton calls to launch one compiled kernel.

    Triton's caches keep the launcher when the `with` block is over. A launcher therefore holds no SimulatedGPU; the
    SimulatedGPU in charge records the launch.
    """

    def __init__(self, compiled: CompiledKernel) -> None:
        self._metadata, self._asm = compiled.metadata, compiled.asm
        self._signature = dict(compiled.src.signature)
        self._constexprs = _constexprs_by_name(compiled.src)

    def __call__(
        self,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        stream: int,
        function: Any,
        packed_metadata: Any,
        launch_metadata: Any,
        enter_hook: Callable[[Any], None] | None,
        exit_hook: Callable[[Any], None] | None,
        *args: Any,
    ) -> None:
        m, gpu = self._metadata, driver.active
        if not isinstance(gpu, SimulatedGPU):
            raise RuntimeError(f"{m.name} was compiled for a simulated GPU: launch it within `with SimulatedGPU(...)`")
        record = Launch(
            name=m.name,
            grid=(grid_x, grid_y, grid_z),
            arch=m.target.arch,
            shared=m.shared,
            num_warps=m.num_warps,
            num_stages=m.num_stages,
            arguments=dict(zip(self._signature, args, strict=True)),
            constexprs=dict(self._constexprs),
            asm=self._asm,
            dependent=bool(getattr(m, "launch_pdl", False)),
        )
        if enter_hook is not None:
            enter_hook(launch_metadata)
        gpu.submit(record, self)
        if exit_hook is not None:
            exit_hook(launch_metadata)

    def parameters(self, record: Launch) -> dict[str, Any]:
        """The kernel's parameters by name; the parts of a tuple are separate parameters."""
        flat: dict[str, Any] = {}
        for name, kind in self._signature.items():
            flat.update(flatten(name, record.arguments[name], kind))
        return flat

    def execute(self, record: Launch, options: Mapping[str, Any]) -> Stats:
        kernel, parameters = _decode(self._metadata, self._asm["ptx"]), self.parameters(record)
        return kernel.launch(record.grid, parameters, dependent=record.dependent, **options)


class SimulatedGPU:
    """A GPU that Triton compiles for but that does not exist. Use it as a context manager, as often as you like.

    Args:
        arch: a compute capability (75, 80, 86, 89, 90, 100, 120), ("hip", "gfx942") and the like, or a GPUTarget.
        execute: whether launches are executed. False only records them and allows any target that Triton compiles for.
        assemble: whether machine code is made too, for reading; assembling takes a fifth of the compiler's time.
        multiprocessors: reported number of multiprocessors; by default the number of a well-known device of the
            architecture.
        launch_options: options of `PtxKernel.launch` for every launch: mode, seed, races and so on.

    Attributes:
        target: Triton's GPUTarget.
        launches: the launches made within the `with` blocks, in order.

    Raises:
        ValueError: execution is asked for on an architecture other than NVIDIA's.
        RuntimeError: Triton is in interpreter mode, where nothing is compiled or launched.
    """

    def __init__(
        self,
        arch: int | tuple[str, int | str] | GPUTarget = 80,
        execute: bool = True,
        assemble: bool = False,
        multiprocessors: int | None = None,
        **launch_options: Any,
    ) -> None:
        if isinstance(arch, int):
            arch = ("cuda", arch)
        if not isinstance(arch, GPUTarget):
            backend, name = arch
            arch = GPUTarget(backend, name, 64 if str(name).startswith("gfx9") else 32)
        if execute and arch.backend != "cuda":
            raise ValueError(f"{arch.backend} {arch.arch} cannot be executed, only recorded: pass execute=False")
        self.target, self.execute, self.assemble, self.launch_options = arch, execute, assemble, launch_options
        self.launches: list[Launch] = []
        known = _PROPERTIES.get((arch.backend, arch.arch), _Properties(65536, 108))
        self.max_shared_mem = known.max_shared_mem
        self.multiprocessor_count = multiprocessors or known.multiprocessor_count
        self._device = _device_numbers.setdefault((arch.backend, arch.arch), FIRST_DEVICE + len(_device_numbers))
        self._starting: CompiledKernel | None = None
        self._replaced: list[tuple[Any, Callable[[CompiledKernel], None], Any]] = []

    def __enter__(self) -> SimulatedGPU:
        if knobs.runtime.interpret:
            raise RuntimeError("TRITON_INTERPRET=1 is set, and interpreted kernels are not launched: unset it")
        original = CompiledKernel._init_handles
        self._replaced.append((driver._active, original, knobs.runtime.add_stages_inspection_hook))

        def init_handles(compiled: CompiledKernel) -> None:
            # launcher_cls is not given the compiled kernel, so remember which kernel is starting.
            self._starting = compiled
            try:
                original(compiled)
            finally:
                self._starting = None

        CompiledKernel._init_handles = init_handles
        # Before 3.8 Triton's caches do not keep kernels with different stages apart.
        leave_out = TRITON >= (3, 8) and not self.assemble
        knobs.runtime.add_stages_inspection_hook = _leave_out_assembler if leave_out else None
        driver.set_active(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        active, CompiledKernel._init_handles, knobs.runtime.add_stages_inspection_hook = self._replaced.pop()
        driver.set_active(active)

    def submit(self, launch: Launch, launcher: Launcher) -> None:
        """Execute (if asked to) and record a launch."""
        if self.execute:
            launch.stats = launcher.execute(launch, self.launch_options)
        self.launches.append(launch)

    # The interface of a driver that Triton uses.

    @property
    def utils(self) -> SimulatedGPU:
        return self

    def launcher_cls(self, src: ASTSource, metadata: Any) -> Launcher:
        return Launcher(self._starting)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self._device

    def set_current_device(self, device: int) -> None:
        if device != self._device:
            raise ValueError(f"there is only device {self._device}, not {device}")

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """No time passes on a simulated GPU, so all configurations of an autotuner take equally long."""

        def benchmark(call: Callable[[], None], quantiles: list[float] | None = None, **options: Any) -> list[float]:
            call()
            return [1.0] * len(quantiles or [0.5])

        return benchmark

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[None, None, int, int, int]:
        """(module, function, registers, spills, most threads per program); there is no module to unload."""
        return None, None, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": self.max_shared_mem,
            "multiprocessor_count": self.multiprocessor_count,
            "max_num_regs": 65536,
            "warpSize": self.target.warp_size,
        }
