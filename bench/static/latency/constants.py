"""The constants of the latency model: a value for each GPU, the range of what was published, and where.

None of them was measured by this project. ``Chip`` has them by GPU under the names that the model uses.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..gpus import GPUS

__all__ = ["CHIPS", "CONSTANTS", "SHORT_NAMES", "Chip", "Constant", "chip_of"]

#: The order of the values of a constant.
_GPUS = ("A100 SXM 80 GB", "H100 SXM", "H200 SXM", "RTX 4090", "MI300X")
#: What the command line calls them.
SHORT_NAMES = {"A100": _GPUS[0], "H100": _GPUS[1], "H200": _GPUS[2], "4090": _GPUS[3], "MI300X": _GPUS[4]}

_BENCHES = "T. Gruber et al., gpu-benches, https://github.com/te42kyfo/gpu-benches"
_STUDY = '"CUDA Performance Study - NVIDIA H100 SXM5" (GitHub, all numbers at 1.98 GHz)'
_GUIDE = "CUDA C++ Programming Guide, Throughput of Native Arithmetic Instructions"
_HOPPER = (
    '"Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking", '
    "https://arxiv.org/abs/2402.13499"
)
_XLA = "XLA's table of measured products on an H100, openxla/xla xla/service/gpu/model/matmul_interpolator_data.h"
_CHEESE = "https://chipsandcheese.com/p"


@dataclass(frozen=True)
class Constant:
    """One constant.

    Attributes:
        name: the attribute of ``Chip``.
        unit: of the values.
        values: one for each GPU in the order of ``CHIPS``.
        range: the range of published or plausible values; empty where there is no doubt.
        source: titles and addresses.
        meaning: what the model takes it for.
    """

    name: str
    unit: str
    values: tuple[float, float, float, float, float]
    range: str
    source: str
    meaning: str


CONSTANTS = (
    Constant(
        "multiprocessors", "", (108, 132, 132, 128, 304), "", "the vendors' data sheets",
        "multiprocessors (compute units on AMD) that programs are dealt to",
    ),
    Constant(
        "lanes", "", (32, 32, 32, 32, 64), "", "the vendors' instruction sets", "lanes of a warp (wave)",
    ),
    Constant(
        "clock", "GHz", (1.41, 1.755, 1.755, 2.52, 2.1), "H100: 1.4 (power limit) to 1.98",
        f"the vendors' boost clocks; H100: {_CHEESE}/nvidias-h100-funny-l2-and-tons-of-bandwidth",
        "turns cycles into time",
    ),
    Constant(
        "matrix_16", "FLOP/cycle", (2048, 4096, 4096, 512, 2048), "",
        "the rates of `gpus.py` / clock / multiprocessors",
        "16-bit matrix FLOPs of a multiprocessor per cycle, accumulated in float32",
    ),
    Constant(
        "matrix_tf32", "FLOP/cycle", (1024, 2048, 2048, 256, 256), "",
        "the rates of `gpus.py` / clock / multiprocessors",
        "tf32 matrix FLOPs per cycle (float32 on MI300X)",
    ),
    Constant(
        "synchronous", "share", (1.0, 0.62, 0.62, 1.0, 1.0), "H100: 0.55 to 0.67", _HOPPER,
        "the share of the matrix rate that mma.sync reaches; wgmma reaches all of it",
    ),
    Constant(
        "fma", "FLOP/cycle", (128, 256, 256, 256, 256), "MI300X: 128 unless two are packed",
        _GUIDE + "; CDNA 3 white paper",
        "float32 FLOPs outside of the matrix units per cycle",
    ),
    Constant(
        "sustained", "share", (0.87, 0.80, 0.80, 0.90, 0.55), "H100: 0.65 to 0.82; MI300X: 0.45 to 0.65",
        f"H100: {_XLA}, 780 TFLOP/s of 949 at the model's clock; others: S. Bekman, Machine Learning Engineering, "
        "Maximum Achievable Matmul FLOPS, https://github.com/stas00/ml-engineering",
        "the share of the 16-bit matrix rate that the best kernels sustain, because power limits the clock",
    ),
    Constant(
        "sustained_tf32", "share", (0.87, 0.67, 0.67, 0.90, 0.60), "H100: 0.60 to 0.68",
        f"H100: {_XLA}, 321 TFLOP/s of 474; {_STUDY}: cuBLAS 320; others: as for 16 bits",
        "the same for tf32 (float32 on MI300X)",
    ),
    Constant(
        "hbm_share", "share", (0.85, 0.85, 0.81, 0.87, 0.75), "0.78 to 0.93",
        f"{_BENCHES}: gpu-small-kernels and gpu-l2-cache beyond the cache (A100 1,740 GB/s, H200 3,890, L40 770)",
        "the share of the published memory bandwidth that kernels get",
    ),
    Constant(
        "l2_bandwidth", "TB/s", (5.4, 8.6, 8.6, 4.7, 12.0), "A100: 4 to 5.4; H100: 3.6 to 9.7; MI300X: 10 to 17",
        f"{_BENCHES}: gpu-l2-cache (A100 5.4; H100 PCIe 6.9, 114 multiprocessors; H200 9.7 at 1.98 GHz; L40 5.2); "
        f"{_STUDY}: 3.6 for a copy; "
        f"{_CHEESE}/testing-amds-giant-mi300x",
        "bytes from the L2 cache to all multiprocessors (Infinity Cache on MI300X)",
    ),
    Constant(
        "l2_port", "B/cycle", (64, 64, 64, 64, 64), "35 to 64", "NVIDIA A100 white paper; CDNA 3 white paper",
        "bytes from the L2 cache to one multiprocessor",
    ),
    Constant(
        "l2_bytes", "MB", (40, 50, 50, 72, 256), "", "the vendors' data sheets; MI300X: its Infinity Cache",
        "the cache between multiprocessors and memory",
    ),
    Constant(
        "l2_share", "share", (0.65, 0.7, 0.7, 0.85, 0.8), "0.5 to 0.9",
        f"{_BENCHES}: gpu-small-kernels, where bandwidth falls (A100 26 MB, H200 34 MB, L40 80 MB of 96)",
        "the share of that cache that a step's tensors can use",
    ),
    Constant(
        "l2_latency", "cycles", (260, 265, 265, 276, 550), "H100: 200 (near) to 475 (far half); MI300X L2 to 800",
        f"{_BENCHES}: gpu-latency (H100 PCIe 265, 475 beyond 25 MB; L40 276); {_STUDY}: 260; {_HOPPER}; "
        f"{_CHEESE}/testing-amds-giant-mi300x",
        "from a load's issue to its data in the L2 cache",
    ),
    Constant(
        "hbm_latency", "cycles", (500, 620, 620, 630, 1500), "H100: 480 to 660; A100: 466 to 570",
        f"{_BENCHES}: gpu-latency (H100 PCIe 650, L40 631); {_STUDY}: 570; {_HOPPER}; "
        f"{_CHEESE}/testing-amds-giant-mi300x",
        "from a load's issue to its data in device memory",
    ),
    Constant(
        "shared_latency", "cycles", (29, 29, 29, 30, 64), "23 to 34; MI300X: 50 to 128",
        f"{_STUDY}: 28.6; {_HOPPER}", "from LDS or LDSM to the data",
    ),
    Constant(
        "barrier", "cycles", (20, 20, 20, 20, 40), "15 to 40", "Z. Jia et al., https://arxiv.org/abs/1804.06826",
        "bar.sync when all warps have arrived",
    ),
    Constant(
        "wgmma_drain", "cycles", (0, 32, 32, 0, 0), "18 to 64", _HOPPER,
        "from the last wgmma's turn on the matrix units to its result",
    ),
    Constant(
        "float_cycles", "cycles", (2, 1, 1, 1, 4), "", _GUIDE + "; MI300X: CDNA 3 instruction set guide",
        "a scheduler's float32 unit for one instruction of a warp",
    ),
    Constant(
        "integer_cycles", "cycles", (2, 2, 2, 2, 4), "H100: 0.5 to 2", _GUIDE + f"; {_STUDY}",
        "the same for integers, logic, moves, conversions",
    ),
    Constant(
        "special_cycles", "cycles", (8, 8, 8, 8, 16), "", _GUIDE + f"; {_STUDY}",
        "the same for exponentials and reciprocals",
    ),
    Constant(
        "special_latency", "cycles", (40, 40, 40, 40, 60), "23 to 54", f"{_STUDY}: 54 for __expf; {_HOPPER}",
        "results that come through a barrier of the scoreboard: exponentials, shuffles, conversions",
    ),
    Constant(
        "library_share", "share", (0.85, 0.80, 0.80, 0.85, 0.70), "0.65 to 0.95",
        f"fitted by hand to {_XLA}; MI300X: assumed",
        "the share of the matrix rate that a library's product reaches inside one program's loop",
    ),
    Constant(
        "library_fma_share", "share", (0.93, 0.78, 0.78, 0.80, 0.75), "H100: 0.53 to 0.87",
        f"{_STUDY}: cuBLAS float32 35.5 TFLOP/s of 66.9; others: assumed",
        "the same for float32 products outside of the matrix units",
    ),
    Constant(
        "library_ends", "cycles", (2500, 2500, 2500, 2500, 3500), "1,500 to 4,000", f"fitted by hand to {_XLA}",
        "what a library's program does before and after its loop",
    ),
    Constant(
        "plain_kernel", "cycles", (800, 800, 800, 800, 1600), "500 to 1,500",
        "this model's count of fastmlp's own elementwise kernels",
        "an elementwise kernel without the time of its bytes",
    ),
    Constant(
        "gap", "us", (0.9, 1.2, 1.2, 0.7, 1.7), "A100: 0.8 to 1.2; H100: 0.9 to 1.7; 4090: 0.5 to 1.0; MI300X: 1 to 3",
        f"{_BENCHES}: gpu-small-kernels in a graph, less the kernel itself (a node of 64 kB: A100 1.4, H200 2.2, L40 "
        "1.0, MI210 2.0); an empty pair: 0.96 on an H100, https://github.com/pegainfer-project/pegainfer/issues/569; "
        "0.58 on an RTX 5070 Ti, https://github.com/ahrefs/ocannl/issues/488",
        "from the end of a kernel to the first instruction of the next one in the same graph",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Chip:
    """The constants of one GPU. ``CONSTANTS`` explains them; ``bandwidth`` is that of ``gpus.py``."""

    name: str
    target: str
    bandwidth: float
    multiprocessors: float
    lanes: float
    clock: float
    matrix_16: float
    matrix_tf32: float
    synchronous: float
    fma: float
    sustained: float
    sustained_tf32: float
    hbm_share: float
    l2_bandwidth: float
    l2_port: float
    l2_bytes: float
    l2_share: float
    l2_latency: float
    hbm_latency: float
    shared_latency: float
    barrier: float
    wgmma_drain: float
    float_cycles: float
    integer_cycles: float
    special_cycles: float
    special_latency: float
    library_share: float
    library_fma_share: float
    library_ends: float
    plain_kernel: float
    gap: float

    def microseconds(self, cycles: float) -> float:
        """Cycles at the GPU's clock."""
        return cycles / self.clock / 1e3

    @property
    def l2_usable(self) -> float:
        """Bytes of the cache that a step's tensors can use."""
        return self.l2_bytes * 1e6 * self.l2_share


CHIPS = {
    name: Chip(name, GPUS[name].target, GPUS[name].bandwidth, **{c.name: c.values[i] for c in CONSTANTS})
    for i, name in enumerate(_GPUS)
}


def chip_of(device: str) -> Chip | None:
    """The GPU that a driver calls ``device``, or None if the model has no constants for it.

    The model knows boards, not families: a PCIe or NVL board has other clocks, memory and multiprocessors.
    """
    words = device.upper().replace("-", " ").split()
    if "H100" in words and not {"PCIE", "NVL"} & set(words):
        return CHIPS["H100 SXM"]
    if "H200" in words and "NVL" not in words:
        return CHIPS["H200 SXM"]
    if "A100" in words and "PCIE" not in words and "80GB" in words:
        return CHIPS["A100 SXM 80 GB"]
    if "4090" in words and not {"D", "LAPTOP"} & set(words):
        return CHIPS["RTX 4090"]
    return CHIPS["MI300X"] if "MI300X" in words else None
