"""A kernel decoded from its PTX, and its launch on the CPU."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import (  # noqa: F401  they register their opcodes
    ops_async,
    ops_atomic,
    ops_control,
    ops_convert,
    ops_float,
    ops_integer,
    ops_logic,
    ops_matrix,
    ops_memory,
    ops_move,
    ops_warp,
)
from .context import EXIT
from .decoder import Decoder, operand_type
from .dtypes import BITS, UINT, f16, f32, f64, u8
from .global_memory import GlobalMemory, is_buffer
from .machine import LaunchState, run_lockstep, run_warpwise
from .ops_memory import state_space
from .parser import GBASE, PARAM_BASE, Instruction, Module
from .stats import Stats

MODES = ("lockstep", "warpwise")
_MAX_STEPS = {"lockstep": 2_000_000, "warpwise": 20_000_000}


@functools.lru_cache(maxsize=256)
def decoded(ptx: str, shared: int, num_warps: int, global_scratch_size: int, profile_scratch_size: int) -> PtxKernel:
    """The kernel of a PTX text, decoded once."""
    return PtxKernel(ptx, shared, num_warps, global_scratch_size, profile_scratch_size)


class PtxKernel:
    """One kernel, ready for launches.

    Args:
        ptx: the text of a module with a single `.entry`.
        shared_bytes: bytes of dynamic shared memory per program.
        num_warps: warps per program.
        global_scratch_size, profile_scratch_size: bytes per program in Triton's scratch buffers.

    Raises:
        NotImplementedError: an instruction is not modelled; the message names it.
    """

    def __init__(
        self,
        ptx: str,
        shared_bytes: int = 0,
        num_warps: int = 4,
        global_scratch_size: int = 0,
        profile_scratch_size: int = 0,
    ) -> None:
        mod = Module(ptx)
        self.name, self.num_warps = mod.name, num_warps
        self.local_size = mod.local_size
        self.params, self._param_addr, self._param_bytes = mod.params, mod.param_addr, mod.param_bytes
        dyn_base = -(-mod.shared_static // 128) * 128
        self.shared_bytes = dyn_base + shared_bytes
        self.global_scratch_size, self.profile_scratch_size = global_scratch_size, profile_scratch_size
        self._image = mod.gimage
        self._running: LaunchState | None = None
        self._noise_scale, self._noise_rng = 0.0, np.random.default_rng(0)

        decoder = Decoder(mod, dyn_base, self._noise, self._clock)
        for ins in mod.raw:
            decoder.decode(ins)
        end = Instruction(0, None, "(end of the function)")
        end.pc, end.kind, end.cls, end.op, end.mods = len(mod.raw), EXIT, "exit", "ret", []
        self.code = [*mod.raw, end]
        self.special_slots = decoder.special
        self._registers, self._param_slots = decoder.init, decoder.param_slots
        # One element of the shadow state stands for the smallest shared access.
        self.gran = min(
            [4]
            + [
                BITS[operand_type(ins)] // 8
                for ins in mod.raw
                if ins.op in ("ld", "st", "atom", "red") and state_space(ins) == "shared"
            ]
        )

    def launch(
        self,
        grid: int | Sequence[int],
        args: Mapping[str, Any] | Sequence[Any],
        mode: str = "lockstep",
        *,
        seed: int = 0,
        max_lanes: int = 8192,
        resident: int | None = None,
        interleave: bool = False,
        preempt: float = 0.0,
        races: bool | None = None,
        uninit: str = "raise",
        global_races: bool = False,
        strict_views: bool = True,
        stats: str = "full",
        approx_noise: float = 0.0,
        shuffle_atomics: bool | None = None,
        max_steps: int | None = None,
        spin_limit: int = 200,
        dependent: bool = False,
    ) -> Stats:
        """Execute the kernel over the grid; tensors and arrays in `args` are updated in place.

        Args:
            grid: programs in x, or in (x, y, z).
            args: the kernel parameters in PTX order, without Triton's two scratch pointers. A parameter is a torch CPU
                tensor, a numpy array, a number, or None for a null pointer. A mapping names the parameters in messages.
            mode: "lockstep" (fast) or "warpwise" (random order of warps, all checks).

        The other options are described in README.md.

        Raises:
            SimError: a fault of the kernel. The tensors hold everything that it stored before.
            ValueError: unknown option value, wrong number of arguments, tensor not on the CPU.
        """
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}: expected one of {MODES}")
        if uninit not in ("raise", "count", "off"):
            raise ValueError(f"uninit is {uninit!r}: expected 'raise', 'count' or 'off'")
        begun = time.time()
        sizes = tuple(int(x) for x in (grid if isinstance(grid, (tuple, list)) else (grid,)))
        sizes += (1,) * (3 - len(sizes))
        named = list(args.items()) if isinstance(args, Mapping) else [(f"arg{i}", a) for i, a in enumerate(args)]
        if len(self.params) - len(named) not in (0, 2):
            raise ValueError(
                f"{self.name} takes {len(self.params)} parameters (the last two are Triton's scratch pointers); "
                f"{len(named)} arguments given"
            )
        ncta = sizes[0] * sizes[1] * sizes[2]
        warpwise = mode == "warpwise"
        scratch = (self.global_scratch_size + self.profile_scratch_size) * ncta
        buffers = [(n, a) for n, a in named if is_buffer(a)]
        memory = GlobalMemory(self._image, buffers, scratch, strict_views)
        parameters = self._parameter_image(named, memory, ncta)
        launch = LaunchState(
            kernel=self,
            grid=sizes,
            registers=self._initial_registers(parameters),
            parameters=np.frombuffer(parameters, u8),
            global_memory=memory,
            rng=np.random.default_rng(seed),
            preempt=preempt if warpwise else 0.0,
            max_steps=max_steps or _MAX_STEPS[mode],
            spin_limit=spin_limit,
            races=warpwise if races is None else races,
            uninit=uninit,
            count_traffic=stats == "full",
            shuffle_atomics=warpwise if shuffle_atomics is None else shuffle_atomics,
            dependent=dependent,
            writers={} if global_races else None,
        )
        for ins in self.code:
            ins.count = 0
            if ins.global_counts is not None:
                ins.global_counts = [0, 0, 0, 0]
            if ins.shared_counts is not None:
                ins.shared_counts = [0, 0, 0]
        self._running = launch
        self._noise_scale, self._noise_rng = float(approx_noise), np.random.default_rng(seed)
        try:
            with np.errstate(all="ignore"):
                if warpwise:
                    run_warpwise(launch, resident or (ncta if interleave else 1))
                else:
                    run_lockstep(launch, resident or max(1, max_lanes // (32 * self.num_warps)))
        finally:
            self._running = None
            memory.write_back()
        result = launch.stats
        result.ctas, result.steps = ncta, launch.steps
        if launch.writers is not None:
            result.written = memory.written(launch.writers)
        result.collect(self.code)
        result.seconds = time.time() - begun
        return result

    def _parameter_image(self, named: list[tuple[str, Any]], memory: GlobalMemory, ncta: int) -> bytes:
        """The bytes of all parameters, laid out as in the parameters' address space."""
        values = [memory.addr[n] if is_buffer(a) else a for n, a in named]
        if len(values) < len(self.params):
            scratch = GBASE + memory.scratch if memory.scratch else 0
            values += [scratch, scratch + self.global_scratch_size * ncta if self.profile_scratch_size else 0]
        image = bytearray(self._param_bytes)
        for (name, ptype), value in zip(self.params, values, strict=True):
            raw = _parameter_bytes(value, BITS[ptype], ptype[0] == "f")
            start = self._param_addr[name] - PARAM_BASE
            image[start : start + len(raw)] = raw
        return bytes(image)

    def _initial_registers(self, parameters: bytes) -> list[np.ndarray]:
        registers = list(self._registers)
        for (address, register_bits, bits, signed), slot in self._param_slots.items():
            start = address - PARAM_BASE
            v = int.from_bytes(parameters[start : start + bits // 8], "little", signed=signed)
            registers[slot] = np.array([v & ((1 << register_bits) - 1)], UINT[register_bits])
        return registers

    def _noise(self, r: np.ndarray, error: float) -> np.ndarray:
        """An approximate float32 result, correctly rounded or perturbed by up to about its documented error."""
        if not self._noise_scale:
            return r
        u = self._noise_rng.uniform(-1, 1, np.shape(r))
        return (r.astype(f64) * (1 + self._noise_scale * error * u)).astype(f32)

    def _clock(self) -> int:
        return self._running.steps * 4


def _parameter_bytes(value: Any, bits: int, is_float: bool) -> bytes:
    """An argument as the bytes of its parameter; None is a null pointer."""
    if value is None:
        return bytes(bits // 8)
    if is_float or isinstance(value, (float, np.floating)):
        return np.array([value], {16: f16, 32: f32, 64: f64}[bits]).tobytes()
    return (int(value) & ((1 << bits) - 1)).to_bytes(bits // 8, "little")
