"""Small launches of every kernel, of several programs each, for the tests that concern all kernels."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from fastmlp import kernels
from fastmlp.kernels.before_update import LossScaleState, before_update
from fastmlp.kernels.layout import SEGMENT, Layer, Layout
from fastmlp.kernels.row_weights import total_weight
from fastmlp.kernels.wgrad_update import wgrad_update

__all__ = ["LAUNCHES", "SINGLE_PROGRAM", "kernel_names"]

#: Kernels that are one program for every shape, because they finish the work of several programs of another kernel.
SINGLE_PROGRAM = frozenset({"_reduce_kernel", "_reduce_sum_kernel", "_before_update_kernel", "_total_weight_kernel"})


def kernel_names() -> set[str]:
    """The names of all kernels in fastmlp.kernels; device functions are not kernels."""
    names = set()
    for path in Path(kernels.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                names.add(node.name)
    return names


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _labels(shape: tuple[int, ...], classes: int) -> Tensor:
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(3))


def _linear_fwd(device: torch.device) -> list[Tensor | None]:
    x, w, b = _draw(40, 17), _draw(70, 17, seed=1), _draw(70, seed=2)
    return list(kernels.linear_fwd(x.to(device), w.to(device), b.to(device), "silu", save_z=True))


def _linear_dgrad(device: torch.device) -> list[Tensor | None]:
    dz, w, a = _draw(40, 17), _draw(17, 70, seed=1), _draw(40, 70, seed=2)
    return [kernels.linear_dgrad(dz.to(device), w.to(device), a.to(device), "tanh")]


def _linear_wgrad(device: torch.device) -> list[Tensor | None]:
    tiles = kernels.linear_wgrad(_draw(9, 40).to(device), _draw(9, 70, seed=1).to(device))
    split = kernels.linear_wgrad(_draw(70, 31).to(device), _draw(70, 31, seed=1).to(device))
    return [*tiles, *split]


def _activation_bwd(device: torch.device) -> list[Tensor | None]:
    return [kernels.activation_bwd(_draw(70, 33).to(device), _draw(70, 33, seed=1).to(device), "gelu")]


def _cross_entropy(device: torch.device) -> list[Tensor | None]:
    z, y = _draw(150, 10).to(device), _labels((150,), 10).to(device)
    return list(kernels.cross_entropy(z, y, smoothing=0.1, scale=0.5))


def _cross_entropy_two_passes(device: torch.device) -> list[Tensor | None]:
    z, y = _draw(5, 17, 40).to(device), _labels((5, 40), 17).to(device)
    loss, stats, denominator = kernels.cross_entropy_fwd(z, y, smoothing=0.1)
    dz, _ = kernels.cross_entropy_bwd(torch.ones(()).to(device), z, y, stats, smoothing=0.1, denominator=denominator)
    return [loss, stats, denominator, dz]


def _elementwise_loss(device: torch.device) -> list[Tensor | None]:
    a, y = _draw(70, 33).to(device), _draw(70, 33, seed=1).to(device)
    return [
        *kernels.elementwise_loss(a, y, "mse", scale=0.5),
        kernels.elementwise_loss_fwd(a, y, "bce_with_logits", scale=0.25),
        *kernels.elementwise_loss_bwd(torch.ones(()).to(device), a, y, "l1", want_dy=True),
    ]


def _softmax_squared_error(device: torch.device) -> list[Tensor | None]:
    z, y = _draw(150, 10).to(device), _labels((150,), 10).to(device)
    return [
        *kernels.softmax_squared_error(z, y, scale=0.5),
        kernels.softmax_squared_error_fwd(z, y, scale=0.25),
        *kernels.softmax_squared_error_bwd(torch.ones(150).to(device), z, y.float()[:, None].expand_as(z)),
    ]


def _head(device: torch.device) -> list[Tensor | None]:
    h, w, b = _draw(70, 70), _draw(10, 70, seed=1), _draw(10, seed=2)
    z = torch.full((70, 10), math.nan, device=device)
    y = _labels((70,), 10)
    h = h.to(device)
    return [*kernels.head(h, w.to(device), b.to(device), y.to(device), activation="tanh", saved=h, logits=z), z]


def _row_weights(device: torch.device) -> list[Tensor | None]:
    """The weight of a batch by every program of the head, and by a launch of its own."""
    h, w, y, sample = _draw(70, 70), _draw(10, 70, seed=1), _labels((70,), 10).to(device), _draw(70, seed=2).abs()
    summed, launched = torch.full((2,), math.nan, device=device).unbind()
    weights = {"sample_weight": sample.to(device), "ignore_index": 3}
    results = kernels.head(h.to(device), w.to(device), None, y, divisor=summed, want_dz_prev=False, **weights)
    total_weight(launched, 70, target=y, classes=10, **weights)
    return [*results, summed, launched]


def _wgrad_update(device: torch.device) -> list[Tensor | None]:
    """Several layers updated directly, and one whose batch is split over programs; the first layer gathers pixels."""
    results: list[Tensor | None] = []
    for m, sizes in ((20, (40, 33, 9, 5)), (70, (17, 20))):
        images = torch.randint(0, 256, (50, sizes[0]), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
        layers = [Layer(_draw(n, k).to(device), _draw(n, seed=1).to(device)) for k, n in pairwise(sizes)]
        layout = Layout(layers)
        states = torch.zeros(2, layout.total, device=device)
        loss = torch.full((), math.nan, device=device)
        wgrad_update(
            layout,
            [_draw(m, n, seed=2).to(device) for n in sizes[1:]],
            [images.to(device), *(_draw(m, k, seed=3).to(device) for k in sizes[1:-1])],
            "adamw",
            torch.tensor([0.99, 0.1, 1.0, 0.1, 0.999, 0.001, 1e-8, 0.0], device=device),
            states=states,
            rows=_labels((m,), 50).to(device),
            loss_rows=_draw(m).to(device),
            loss=loss,
        )
        results += [*layout.params, *states, loss]
    return results


def _late_update(device: torch.device) -> list[Tensor | None]:
    """Gradients of float16, of which some overflow, and the numbers that the update takes from all of them."""
    layout = Layout([Layer(_draw(20, 17).to(device), _draw(20, seed=1).to(device))])
    dz = _draw(70, 20, seed=2).half()
    dz[5, 7] = dz[60, 13] = math.inf
    integers = torch.zeros(3, dtype=torch.int32, device=device)
    partial, grads = torch.zeros(3, layout.total, device=device), torch.zeros(layout.total, device=device)
    squares, factor = torch.zeros(layout.total // SEGMENT, device=device), torch.zeros((), device=device)
    row, operands = torch.ones(8, device=device), ([dz.to(device)], [_draw(70, 17, seed=3).half().to(device)])
    wgrad_update(layout, *operands, "none", row, partial=partial, overflow=integers[0])
    flag = integers[0].clone()
    wgrad_update(layout, *operands, "none", row, grads=grads, squares=squares, overflow=integers[0])
    scale = torch.full((), 8.0, device=device)
    before_update(
        "sgd",
        row,
        factor,
        squares=torch.full_like(squares, 4.0),
        loss_scale=LossScaleState(scale, 1 / scale, integers[1], integers[0], integers[2], 2000, 2.0, 0.5, 1.0),
    )
    return [flag, factor, scale, integers]


def _dropout(device: torch.device) -> list[Tensor | None]:
    """Forward and backward pass of a layer with dropout, and the step's number after the update."""
    state = torch.tensor([3, 1 << 40]).to(device)
    drops = kernels.Dropout(state, 1, 0.25)
    x, w = _draw(40, 17).to(device), _draw(70, 17, seed=1).to(device)
    a, _ = kernels.linear_fwd(x, w, None, "sigmoid", dropout=drops)
    h, v = _draw(40, 70, seed=2).to(device), _draw(10, 70, seed=3).to(device)
    y = _labels((40,), 10).to(device)
    dz = kernels.head(a, v, None, y, activation="sigmoid", saved=a, dropout=drops)[2]
    below = kernels.linear_dgrad(dz, w.t().contiguous().t(), x, "tanh", dropout=drops)
    alone = kernels.activation_bwd(h, a, "sigmoid", dropout=drops)
    layout = Layout([Layer(w, None)])
    wgrad_update(layout, [dz], [x], "sgd", torch.ones(8, device=device), dropout_state=state)
    return [a, dz, below, alone, w, state]


LAUNCHES: dict[str, Callable[[torch.device], list[Tensor | None]]] = {
    "linear_fwd": _linear_fwd,
    "linear_dgrad": _linear_dgrad,
    "linear_wgrad": _linear_wgrad,
    "activation_bwd": _activation_bwd,
    "cross_entropy": _cross_entropy,
    "cross_entropy_two_passes": _cross_entropy_two_passes,
    "elementwise_loss": _elementwise_loss,
    "head": _head,
    "row_weights": _row_weights,
    "softmax_squared_error": _softmax_squared_error,
    "wgrad_update": _wgrad_update,
    "late_update": _late_update,
    "dropout": _dropout,
}
