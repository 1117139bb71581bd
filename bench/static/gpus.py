"""Published rates of the GPUs that rooflines are drawn for, and the roofline.

Rates are dense (without structured sparsity) and at the boost clock; bandwidth is that of the device memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

from .work import Work

__all__ = ["GPUS", "MODES", "Gpu", "Mode", "Roofline", "roofline", "total_roofline"]


@dataclass(frozen=True)
class Mode:
    """How products are computed.

    Attributes:
        dtype: torch's name of the operands' dtype.
        rate: the name of the GPU's rate at which the products run.
        products: computed products per mathematical product.
        precision: the value that ``torch.backends.cuda.matmul.fp32_precision`` must have.
    """

    dtype: str
    rate: str
    products: int
    precision: str = "ieee"


MODES = {
    # tf32x3: each operand as the sum of two tf32 numbers, and three of the four products
    "float32": Mode("float32", "tf32", 3),
    "tf32": Mode("float32", "tf32", 1, "tf32"),
    "bfloat16": Mode("bfloat16", "bf16", 1),
    "float16": Mode("float16", "bf16", 1),
    # torch's default for float32: no matrix units
    "float32 on FMA": Mode("float32", "fp32", 1),
}


@dataclass(frozen=True)
class Gpu:
    """One model of GPU.

    Attributes:
        target: the target that kernels are compiled for.
        bandwidth: bytes per second.
        rates: FLOP/s by name: "fp32" outside of the matrix units, "tf32" and "bf16" (which is also fp16's) on them.
            Where "tf32" is missing, the kernels multiply float32 as it is, at "fp32_matrix".
        source: where the numbers were published.
    """

    target: str
    bandwidth: float
    rates: dict[str, float]
    source: str


GPUS = {
    "A100 SXM 80 GB": Gpu(
        "sm_80",
        2.039e12,
        {"fp32": 19.5e12, "tf32": 156e12, "bf16": 312e12},
        "NVIDIA A100 Tensor Core GPU datasheet",
    ),
    "H100 SXM": Gpu(
        "sm_90",
        3.35e12,
        {"fp32": 66.9e12, "tf32": 494.7e12, "bf16": 989.4e12},
        "NVIDIA H100 Tensor Core GPU Architecture whitepaper; bandwidth: H100 datasheet",
    ),
    "H200 SXM": Gpu(
        "sm_90",
        4.8e12,
        {"fp32": 66.9e12, "tf32": 494.7e12, "bf16": 989.4e12},
        "NVIDIA H200 Tensor Core GPU datasheet (rates: half of those it gives with sparsity)",
    ),
    "RTX 4090": Gpu(
        "sm_89",
        1.008e12,
        {"fp32": 82.6e12, "tf32": 82.6e12, "bf16": 165.2e12},
        "NVIDIA Ada GPU Architecture whitepaper, appendix A (16-bit products accumulated in float32)",
    ),
    "MI300X": Gpu(
        "gfx942",
        5.3e12,
        {"fp32": 163.4e12, "fp32_matrix": 163.4e12, "bf16": 1307.4e12},
        "AMD Instinct MI300X data sheet",
    ),
}


@dataclass(frozen=True)
class Roofline:
    """The least seconds of some work, and what bounds them: "memory", "matrix" or "vector"."""

    seconds: float
    bound: str


def roofline(work: Work, gpu: Gpu, mode: Mode) -> Roofline:
    """max(bytes / bandwidth, matrix FLOPs / rate, other FLOPs / rate): no launch overhead, no latency, no cache."""
    rate, products = gpu.rates.get(mode.rate), mode.products
    if rate is None:  # no tf32 path on this target: one float32 product is one product
        rate, products = gpu.rates["fp32_matrix"], 1
    times = {
        "memory": work.bytes / gpu.bandwidth,
        # Products of float32 may run outside of the matrix units where that is faster.
        "matrix": work.matrix_flops * min(products / rate, 1 / gpu.rates["fp32"] if mode.products == 3 else inf),
        "vector": work.vector_flops / gpu.rates["fp32"],
    }
    bound = max(times, key=lambda name: times[name])
    return Roofline(times[bound], bound)


def total_roofline(works: Iterable[Work], gpu: Gpu, mode: Mode) -> float:
    """Seconds of kernels that run one after another: the sum of their rooflines."""
    return sum(roofline(work, gpu, mode).seconds for work in works)
