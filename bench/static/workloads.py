"""The launches of the report: every launcher, with the shapes of a training step of 784-512-512-10."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fastmlp import kernels
from fastmlp.kernels.before_update import LossScaleState, before_update
from fastmlp.kernels.configs import cdiv
from fastmlp.kernels.layout import SEGMENT, Layer, Layout
from fastmlp.kernels.optimizer import HYPER_COLUMNS
from fastmlp.kernels.wgrad_update import wgrad_update

from .gpus import MODES

__all__ = ["BATCHES", "HYPER_ROW", "SIZES", "WORKLOADS", "Workload", "draw", "float32_precision"]

SIZES = (784, 512, 512, 10)
#: Segments of all parameters in flat buffers.
_BLOCKS = sum(cdiv(n * k, SEGMENT) + cdiv(n, SEGMENT) for k, n in pairwise(SIZES))
BATCHES = (64, 4096)
#: The row of numbers that the update kernels read: SGD's learning rate, and no weight decay.
HYPER_ROW = (0.1, *[0.0] * (HYPER_COLUMNS - 1))


@dataclass(frozen=True)
class Workload:
    """One launcher's call.

    Attributes:
        name: the launcher's name, and what is special about the call.
        shape: the computation in words; M is the batch.
        run: launches it with a batch and a dtype.
        gemm: whether it multiplies matrices.
    """

    name: str
    shape: str
    run: Callable[[int, torch.dtype], object]
    gemm: bool = False


@contextmanager
def float32_precision(mode: str) -> Iterator[None]:
    """``torch.backends.cuda.matmul.fp32_precision`` has the value of a mode of ``gpus.MODES`` within the block."""
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    setting.fp32_precision = MODES[mode].precision
    try:
        yield
    finally:
        setting.fp32_precision = "none"  # torch.backends.fp32_precision decides again
        if setting.fp32_precision != before:
            setting.fp32_precision = before


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal random numbers, the same in every run."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(1000 * len(shape) + seed))
    return (values * scale).to(dtype)


def labels(m: int, classes: int = SIZES[-1]) -> Tensor:
    """Class numbers, the same in every run."""
    return torch.randint(0, classes, (m,), generator=torch.Generator().manual_seed(1))


def _pixels(rows: int) -> Tensor:
    return torch.randint(0, 256, (rows, SIZES[0]), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)


def _order(m: int) -> Tensor:
    return torch.randperm(m, generator=torch.Generator().manual_seed(3))


def _linear_fwd(m: int, dtype: torch.dtype) -> object:
    x, w, b = draw(m, 784, dtype=dtype), draw(512, 784, dtype=dtype, seed=7, scale=0.04), draw(512, dtype=dtype)
    return kernels.linear_fwd(x, w, b, "sigmoid")


def _linear_fwd_pixels(m: int, dtype: torch.dtype) -> object:
    w, b = draw(512, 784, dtype=dtype, seed=7, scale=0.04), draw(512, dtype=dtype)
    return kernels.linear_fwd(_pixels(m), w, b, "sigmoid", rows=_order(m))


def _linear_dgrad(m: int, dtype: torch.dtype) -> object:
    dz, w = draw(m, 512, dtype=dtype), draw(512, 512, dtype=dtype, seed=7, scale=0.04)
    return kernels.linear_dgrad(dz, w, torch.sigmoid(draw(m, 512, seed=1)).to(dtype), "sigmoid")


def _dropout() -> kernels.Dropout:
    return kernels.Dropout(torch.zeros(2, dtype=torch.int64), 0, 0.1)


def _linear_fwd_dropout(m: int, dtype: torch.dtype) -> object:
    x, w, b = draw(m, 784, dtype=dtype), draw(512, 784, dtype=dtype, seed=7, scale=0.04), draw(512, dtype=dtype)
    return kernels.linear_fwd(x, w, b, "sigmoid", dropout=_dropout())


def _linear_dgrad_dropout(m: int, dtype: torch.dtype) -> object:
    dz, w = draw(m, 512, dtype=dtype), draw(512, 512, dtype=dtype, seed=7, scale=0.04)
    saved = torch.sigmoid(draw(m, 512, seed=1)).to(dtype)
    return kernels.linear_dgrad(dz, w, saved, "sigmoid", dropout=_dropout())


def _linear_wgrad(m: int, dtype: torch.dtype) -> object:
    return kernels.linear_wgrad(draw(m, 512, dtype=dtype), draw(m, 784, dtype=dtype, seed=1))


def _head(m: int, dtype: torch.dtype) -> object:
    h = torch.sigmoid(draw(m, 512)).to(dtype)
    w, b = draw(10, 512, dtype=dtype, seed=7, scale=0.04), draw(10, dtype=dtype)
    return kernels.head(h, w, b, labels(m), activation="sigmoid", saved=h, scale=1 / m)


def _head_dropout(m: int, dtype: torch.dtype) -> object:
    h = torch.sigmoid(draw(m, 512)).to(dtype)
    w, b = draw(10, 512, dtype=dtype, seed=7, scale=0.04), draw(10, dtype=dtype)
    return kernels.head(h, w, b, labels(m), activation="sigmoid", saved=h, scale=1 / m, dropout=_dropout())


def _head_weighted(m: int, dtype: torch.dtype) -> object:
    """Every option of the loss; the weight of 4,096 rows takes a launch of its own."""
    h = torch.sigmoid(draw(m, 512)).to(dtype)
    w, b = draw(10, 512, dtype=dtype, seed=7, scale=0.04), draw(10, dtype=dtype)
    return kernels.head(
        h, w, b, labels(m), activation="sigmoid", saved=h, class_weight=draw(10).abs(), smoothing=0.1,
        ignore_index=3, sample_weight=draw(m).abs(), divisor=torch.zeros(()),
    )  # fmt: skip


def _wgrad_update(m: int, dtype: torch.dtype) -> object:
    """Plain SGD on float32 parameters; 16-bit products read copies of them, which the update writes too."""
    layers = []
    for k, n in pairwise(SIZES):
        w, b = draw(n, k, seed=7, scale=0.04), draw(n, scale=0.04)
        low = (None, None) if dtype == torch.float32 else (w.to(dtype), b.to(dtype))
        layers.append(Layer(w, b, *low))
    layout = Layout(layers)
    dzs = [draw(m, n, dtype=dtype, seed=i) for i, n in enumerate(SIZES[1:])]
    xs = [draw(m, k, dtype=dtype, seed=3 + i) for i, k in enumerate(SIZES[:-1])]
    wgrad_update(layout, dzs, xs, "sgd", torch.tensor(HYPER_ROW), loss_rows=draw(m).abs(), loss=torch.zeros(()))
    return layout


def _before_update(m: int, dtype: torch.dtype) -> object:
    """float16's loss scale, clipping and AdamW's count at once, the most there is; batch and dtype change nothing."""
    scale, factor, integers = torch.tensor(2.0**15), torch.zeros(()), torch.zeros(4, dtype=torch.int32)
    overflow, skip, good_steps, count = integers.unbind()
    return before_update(
        "adamw",
        torch.tensor(HYPER_ROW),
        factor,
        squares=draw(_BLOCKS).abs(),
        loss_scale=LossScaleState(scale, 1 / scale, good_steps, overflow, skip, 2000, 2.0, 0.5, 1.0),
        count=count,
        decays=torch.tensor((0.9, 0.999), dtype=torch.float64),
        counted_row=torch.zeros(HYPER_COLUMNS),
    )


def _activation_bwd(m: int, dtype: torch.dtype) -> object:
    return kernels.activation_bwd(draw(m, 512, dtype=dtype), torch.sigmoid(draw(m, 512, seed=1)).to(dtype), "sigmoid")


def _cross_entropy(m: int, dtype: torch.dtype) -> object:
    return kernels.cross_entropy(draw(m, 10, dtype=dtype), labels(m), scale=1 / m)


def _cross_entropy_weighted(m: int, dtype: torch.dtype) -> object:
    return kernels.cross_entropy(
        draw(m, 10, dtype=dtype), labels(m), weight=draw(10).abs(), smoothing=0.1, ignore_index=3,
        sample_weight=draw(m).abs(), divisor=torch.zeros(()),
    )  # fmt: skip


def _cross_entropy_fwd(m: int, dtype: torch.dtype) -> object:
    return kernels.cross_entropy_fwd(draw(m, 10, dtype=dtype), labels(m))


def _cross_entropy_bwd(m: int, dtype: torch.dtype) -> object:
    z = draw(m, 10)
    top = z.max(1).values
    stats = torch.stack((top, (z - top[:, None]).exp().sum(1)))
    upstream, denominator = torch.ones((), dtype=dtype), torch.tensor(float(m))
    return kernels.cross_entropy_bwd(upstream, z.to(dtype), labels(m), stats, denominator=denominator)


def _mse(m: int, dtype: torch.dtype) -> object:
    return kernels.elementwise_loss(draw(m, 10, dtype=dtype), draw(m, 10, dtype=dtype, seed=1), "mse", scale=1 / m)


def _mse_fwd(m: int, dtype: torch.dtype) -> object:
    return kernels.elementwise_loss_fwd(
        draw(m, 10, dtype=dtype), draw(m, 10, dtype=dtype, seed=1), "mse", scale=1 / (10 * m)
    )


def _huber(m: int, dtype: torch.dtype) -> object:
    return kernels.elementwise_loss(
        draw(m, 10, dtype=dtype), draw(m, 10, dtype=dtype, seed=1), "huber", delta=0.5, sample_weight=draw(m).abs(),
        divisor=torch.zeros(()),
    )  # fmt: skip


def _bce_bwd(m: int, dtype: torch.dtype) -> object:
    a, y = draw(m, 10, dtype=dtype), torch.sigmoid(draw(m, 10, seed=1)).to(dtype)
    return kernels.elementwise_loss_bwd(torch.ones((), dtype=dtype), a, y, "bce_with_logits", want_dy=False)


def _softmax_squared_error(m: int, dtype: torch.dtype) -> object:
    return kernels.softmax_squared_error(draw(m, 10, dtype=dtype), labels(m), scale=1 / m)


WORKLOADS = {
    w.name: w
    for w in (
        Workload("linear_fwd", "[M, 784] x [512, 784]^T, sigmoid", _linear_fwd, gemm=True),
        Workload("linear_fwd of pixels", "uint8 [M, 784] gathered by row", _linear_fwd_pixels, gemm=True),
        Workload("linear_dgrad", "[M, 512] x [512, 512], sigmoid'", _linear_dgrad, gemm=True),
        Workload("linear_fwd with dropout", "as linear_fwd, p = 0.1", _linear_fwd_dropout, gemm=True),
        Workload("linear_dgrad with dropout", "as linear_dgrad, p = 0.1", _linear_dgrad_dropout, gemm=True),
        Workload("linear_wgrad", "[M, 512]^T x [M, 784]", _linear_wgrad, gemm=True),
        Workload("head", "[M, 512] x [10, 512]^T, loss, dZ, dZ below", _head, gemm=True),
        Workload("head with dropout", "as head, p = 0.1", _head_dropout, gemm=True),
        Workload("head of weighted rows", "as head, weights of classes and rows, smoothing", _head_weighted, gemm=True),
        Workload("wgrad_update", "all layers of 784-512-512-10, SGD", _wgrad_update, gemm=True),
        Workload("before_update", "float16, clipped, AdamW, all layers of 784-512-512-10", _before_update),
        Workload("activation_bwd", "[M, 512], sigmoid", _activation_bwd),
        Workload("cross_entropy", "[M, 10], loss and dZ", _cross_entropy),
        Workload("cross_entropy of weighted rows", "weights of classes and rows, smoothing", _cross_entropy_weighted),
        Workload("cross_entropy_fwd", "[M, 10], mean", _cross_entropy_fwd),
        Workload("cross_entropy_bwd", "[M, 10], mean", _cross_entropy_bwd),
        Workload("elementwise_loss", "[M, 10], mse, loss and dA", _mse),
        Workload("elementwise_loss of weighted rows", "[M, 10], huber, weights of rows", _huber),
        Workload("elementwise_loss_fwd", "[M, 10], mse, mean", _mse_fwd),
        Workload("elementwise_loss_bwd", "[M, 10], bce_with_logits", _bce_bwd),
        Workload("softmax_squared_error", "[M, 10], loss and dZ", _softmax_squared_error),
    )
}
