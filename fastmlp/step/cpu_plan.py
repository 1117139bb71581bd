"""How a whole training step runs on a CPU: by all threads or one, by the libraries chosen for each layer or by aten.

What a product takes on its own is not what it takes of a step. A call of oneDNN's looks its primitive up with code that
the operations before have pushed out of the caches, and it pushes out that of the operations after it. And what one
thread has just written, another one has to fetch, which in a small network takes longer than to multiply alone. So
where products are short, steps of a network of the same shape are timed, and the fastest way is taken:

    each    the products of each layer as ``fastmlp.cpu.few_rows`` chose them, all threads
    aten    every product by BLAS, all threads
    alone   every product by BLAS, every operation by the calling thread alone

Plain SGD with two threads of an AMD EPYC, in this order: 8 rows through 784-64-64-10 139, 124 and 115 us, 16 rows
through 784-512-512-10 504, 571 and 736 us. In hours when the two threads share no cache, 8 rows through 784-128-128-10
259, 311 and 153 us.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..base.losses import takes_classes
from ..cpu import gemm, threads
from ..nn import Linear
from .optimizers import Optimizer

__all__ = ["scratch_batch", "scratch_layers", "step_way"]

#: Multiplications of one pass through all layers from which on products are so long that each is best by itself.
_LONG = 1 << 25

#: A batch size and ways -> for each way a step of one scratch network.
Trials = Callable[[int, Sequence[gemm.Library]], dict[gemm.Library, Callable[[], object]]]


def step_way(
    layers: Sequence[Linear], rule: Optimizer, loss: str, dtype: torch.dtype, m: int, trials: Trials
) -> gemm.Library:
    """The fastest way, measured or known, for steps of ``m`` rows that compute in ``dtype``."""
    products = [m * layer.weight.numel() for layer in layers]
    with_threads = threads.available()
    if sum(products) >= _LONG or not (with_threads or gemm.worth_measuring(max(products))):
        return "each"
    ways: list[gemm.Library] = ["each", "aten", "alone"] if with_threads else ["each", "aten"]
    k, n = layers[0].in_features, layers[-1].out_features
    way = gemm.choose(_kind(layers, rule, loss), m, k, n, dtype, lambda rows: trials(rows, ways), 0)
    return way if way in ("aten", "alone") else "each"


def _kind(layers: Sequence[Linear], rule: Optimizer, loss: str) -> str:
    """What the time of a step hangs on, besides the batch size, the dtype and the threads."""
    sizes = [str(layer.out_features) for layer in layers]
    names = sorted({layer.activation for layer in layers})
    optimizer = f"{rule.name}{' momentum' if 'momentum_buffer' in rule.states else ''}"
    return f"step to {'-'.join(sizes)} {' '.join(names)} {loss} {optimizer}"


def scratch_layers(layers: Sequence[Linear]) -> list[Linear]:
    """Layers like these with parameters of their own, all of about 1/K; no random number is drawn."""
    copies = []
    for layer in layers:
        bias = layer.bias is not None
        copy = Linear(layer.in_features, layer.out_features, bias, layer.activation, "meta", layer.weight.dtype)
        copy.to_empty(device="cpu")
        for own, param in zip(copy.parameters(), layer.parameters(), strict=True):
            torch.nn.init.constant_(own, 1 / layer.in_features)
            own.requires_grad_(param.requires_grad)
        copies.append(copy)
    return copies


def scratch_batch(m: int, layers: Sequence[Linear], loss: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """X of ones, a target for ``loss``, and where its value goes."""
    c = layers[-1].out_features
    y = torch.zeros(m, dtype=torch.int64, device="cpu")
    if not takes_classes(loss):
        y = y.new_zeros((m, c), dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return y.new_ones((m, layers[0].in_features), dtype=dtype), y, y.new_empty((), dtype=wide)
