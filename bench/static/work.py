"""The work of a launch, from its arguments: FLOPs, and the bytes that must cross the device memory's bus once.

Bytes are compulsory traffic: every operand is read once and every result is written once, however often programs access
it. Traffic that the caches do not catch comes on top; ``execution`` has the bytes that the programs ask for. FLOPs of
matrix products are 2 M N K. Every other operation counts as one FLOP, also an exponential, logarithm or division.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fastmlp.activations import ACTIVATIONS
from tests.ptxsim import Launch

__all__ = ["WORK", "Work", "work_of"]


@dataclass(frozen=True)
class Work:
    """One launch, or one operation.

    Attributes:
        matrix_flops: FLOPs of matrix products; each product counts once, whatever computes it.
        vector_flops: FLOPs of everything else.
        read, written: compulsory bytes.
        outputs: elements of the result, by which counts are divided.
    """

    matrix_flops: int = 0
    vector_flops: int = 0
    read: int = 0
    written: int = 0
    outputs: int = 0

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    @property
    def flops(self) -> int:
        """FLOPs of both kinds."""
        return self.matrix_flops + self.vector_flops

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes if self.bytes else 0.0


Arguments = dict[str, Any]


def work_of(launch: Launch) -> Work:
    """The work of one launch of a kernel of ``fastmlp.kernels``; with members, of all of them.

    Raises:
        KeyError: a kernel that ``WORK`` does not know.
    """
    return WORK[launch.name](launch.arguments, launch.grid)


def touched(*tensors: Tensor | None) -> int:
    """Bytes of tensors; an expanded dimension counts once, and None has no bytes."""
    total = 0
    for t in tensors:
        if t is not None:
            n = t.element_size()
            for size, stride in zip(t.shape, t.stride(), strict=True):
                n *= size if stride or not size else 1
            total += n
    return total


def _rows_of(t: Tensor, rows: Tensor | None, *, labels: bool = False) -> int:
    """Bytes of a tensor, or of its gathered rows, which are single numbers for labels. Members may gather their own."""
    if rows is None:
        return touched(t)
    return rows.numel() * (1 if labels else t.shape[-1]) * t.element_size()


def _linear_fwd(a: Arguments, grid: tuple[int, ...]) -> Work:
    m, n, k = grid[2] * a["M"], a["N"], a["K"]
    return Work(
        matrix_flops=2 * m * n * k,
        vector_flops=(1 + ACTIVATIONS[a["ACTIVATION"]].operations[0]) * m * n,
        read=_rows_of(a["x_ptr"], a["rows_ptr"]) + touched(a["w_ptr"], a["b_ptr"], a["rows_ptr"]),
        written=touched(a["a_ptr"], a["z_ptr"]),
        outputs=m * n,
    )


def _sums(to: Tensor | None, m: int, n: int, block: int) -> int:
    """Bytes of the sums of the rows of [m, n], a row of float32 per block of rows."""
    return 0 if to is None else 4 * n * -(-m // block)


def _linear_dgrad(a: Arguments, grid: tuple[int, ...]) -> Work:
    m, n, k = grid[2] * a["M"], a["N"], a["K"]
    return Work(
        matrix_flops=2 * m * n * k,
        vector_flops=ACTIVATIONS[a["ACTIVATION"]].operations[1] * m * k,
        read=touched(a["dz_ptr"], a["w_ptr"], a["saved_ptr"]),
        written=touched(a["dx_ptr"]) + grid[2] * _sums(a["sums_ptr"], a["M"], k, a["BLOCK_M"]),
        outputs=m * k,
    )


def _linear_wgrad(a: Arguments, grid: tuple[int, ...]) -> Work:
    m, n, k = grid[2] * a["M"], a["N"], a["K"]
    results = grid[2] * (n * k + (n if a["HAS_BIAS"] else 0))
    # Each split of the batch writes a whole gradient of its own.
    return Work(
        matrix_flops=2 * m * n * k,
        vector_flops=m * n if a["HAS_BIAS"] else 0,
        read=touched(a["dz_ptr"], a["rows_ptr"]) + _rows_of(a["x_ptr"], a["rows_ptr"]),
        written=grid[1] * results * a["dw_ptr"].element_size(),
        outputs=results,
    )


def _wgrad_reduce(a: Arguments, grid: tuple[int, ...]) -> Work:
    splits, total = a["n_splits"], grid[2] * a["total"]
    return Work(
        vector_flops=(splits - 1) * total,
        read=splits * total * a["partial_ptr"].element_size(),
        written=touched(a["dw_ptr"], a["db_ptr"]),
        outputs=total,
    )


def _update(a: Arguments, params: int, low: int) -> Work:
    """The optimizer's work for ``params`` float32 parameters and ``low`` bytes of 16-bit copies to write."""
    states = len(a["states"])
    return Work(
        vector_flops={"sgd": 4, "momentum": 6, "nesterov": 8, "lion": 10, "rmsprop": 12, "adam": 14, "adamw": 14}[
            a["OPTIMIZER"].split()[0]
        ]
        * params,
        read=(1 + states) * 4 * params + touched(a["hyper_ptr"]),
        written=(1 + states) * 4 * params + low,
    )


def _plus(first: Work, second: Work, outputs: int) -> Work:
    return Work(
        first.matrix_flops + second.matrix_flops,
        first.vector_flops + second.vector_flops,
        first.read + second.read,
        first.written + second.written,
        outputs,
    )


def _wgrad_update(a: Arguments, grid: tuple[int, ...]) -> Work:
    m, operands, layers, members = a["M"], a["operands"], a["layers"], grid[2]
    weights = [members * layer.N * layer.K for layer in layers]
    biases = [members * layer.N if layer.b_segment >= 0 else 0 for layer in layers]
    loss_rows = a["loss_rows_ptr"]
    params = sum(weights) + sum(biases)
    # What adds up to db: dZ, which is read for dW anyway, or the sums of its rows.
    rows = [
        (of.rows * n, of.ptr.data_ptr() != factors.dz_ptr.data_ptr())
        for of, factors, n in zip(a["sums"], operands, biases, strict=True)
    ]
    gradient = Work(
        matrix_flops=2 * m * sum(weights),
        vector_flops=sum(count for count, _ in rows) + (0 if loss_rows is None else members * m),
        read=sum(members * m * layer.N * of.dz_ptr.element_size() for of, layer in zip(operands, layers, strict=True))
        + sum(4 * count for count, apart in rows if apart)
        + touched(a["rows_ptr"], loss_rows)
        + sum(_rows_of(of.x_ptr, None if i else a["rows_ptr"]) for i, of in enumerate(operands)),
        written=touched(a["loss_ptr"]),
        outputs=params,
    )
    if a["partial_ptr"] is None:
        copies = 2 * params if layers[0].low_w_ptr is not None else 0
        return _plus(gradient, _update(a, params, copies), params)
    return replace(gradient, written=gradient.written + grid[1] * 4 * params)


def _reduce_update(a: Arguments, grid: tuple[int, ...]) -> Work:
    splits, params = a["n_splits"], grid[2] * sum(of.numel for of in a["parameters"])
    reduction = Work(vector_flops=(splits - 1) * params, read=splits * 4 * params, outputs=params)
    if a["OPTIMIZER"] == "none":
        again = 4 * params if a["ACCUMULATE"] else 0
        stored = 0 if a["grad_ptr"] is None else 4 * params
        squares = a["squares_ptr"]
        return replace(
            reduction,
            vector_flops=reduction.vector_flops + (0 if squares is None else 2 * params),
            read=reduction.read + again,
            written=stored + touched(squares),
        )
    copies = touched(*(of.low_ptr for of in a["parameters"]))
    return _plus(reduction, _update(a, params, copies), params)


def _before_update(a: Arguments, grid: tuple[int, ...]) -> Work:
    state = a["loss_scale"]
    numbers = [] if state is None else [state.scale, state.inverse, state.good_steps, state.overflow]
    return Work(
        vector_flops=grid[2] * a["blocks"],
        read=touched(a["hyper_ptr"], a["squares_ptr"], a["count_ptr"], a["decays_ptr"], *numbers),
        written=touched(
            a["factor_ptr"], a["count_ptr"], a["row_ptr"], *numbers, *([] if state is None else [state.skip])
        ),
        outputs=1,
    )


def _total_weight(a: Arguments, grid: tuple[int, ...]) -> Work:
    m = a["M"]
    rows = sum(m * t.element_size() for t in (a["target_ptr"], a["rows_ptr"], a["sample_ptr"]) if t is not None)
    return Work(vector_flops=2 * m, read=rows + touched(a["w_ptr"]), written=touched(a["divisor_ptr"]), outputs=1)


def _head(a: Arguments, grid: tuple[int, ...]) -> Work:
    m, c, k = grid[2] * a["M"], a["C"], a["K"]
    h, saved, previous = a["h_ptr"], a["saved_ptr"], a["dz_prev_ptr"]
    other = saved if saved is not None and saved.data_ptr() != h.data_ptr() else None
    below = 0 if previous is None else ACTIVATIONS[a["ACTIVATION"]].operations[1] * m * k
    return Work(
        matrix_flops=2 * m * c * k * (1 if previous is None else 2),
        vector_flops=_SOFTMAX_LOSS_AND_GRAD * m * c + below,
        read=(_rows_of(h, a["rows_ptr"]) if a["GATHER_H"] else touched(h))
        + touched(other, *(a[n] for n in ("w_ptr", "b_ptr", "class_weight_ptr", "sample_ptr", "scale_ptr", "rows_ptr")))
        + _rows_of(a["target_ptr"], a["rows_ptr"], labels=True),
        written=touched(a["loss_ptr"], previous, a["z_ptr"], a["correct_ptr"])
        + m * c * a["dz_ptr"].element_size()
        + grid[2]
        * (_sums(a["sums_ptr"], a["M"], c, a["BLOCK_M"]) + _sums(a["prev_sums_ptr"], a["M"], k, a["BLOCK_M"])),
        outputs=m * c + (0 if previous is None else m * k),
    )


def _cross_entropy(a: Arguments, grid: tuple[int, ...]) -> Work:
    classes = a["z_ptr"].numel()
    return Work(
        vector_flops=(_SOFTMAX_LOSS if a["dz_ptr"] is None else _SOFTMAX_LOSS_AND_GRAD) * classes,
        read=touched(a["z_ptr"], a["w_ptr"], a["sample_ptr"], a["scale_ptr"], a["rows_ptr"])
        + _rows_of(a["target_ptr"], a["rows_ptr"], labels=not a["PROBS"]),
        written=touched(*(a[n] for n in ("loss_ptr", "stats_ptr", "denominator_ptr", "dz_ptr", "correct_ptr")))
        if a["partial_ptr"] is None
        else touched(a["stats_ptr"], a["partial_ptr"], a["dz_ptr"], a["correct_ptr"]),
        outputs=classes,
    )


def _reduce(a: Arguments, grid: tuple[int, ...]) -> Work:
    return Work(
        vector_flops=2 * a["count"],
        read=touched(a["partial_ptr"]),
        written=touched(a["loss_ptr"], a["denominator_ptr"]),
        outputs=1,
    )


def _cross_entropy_bwd(a: Arguments, grid: tuple[int, ...]) -> Work:
    classes = a["z_ptr"].numel()
    names = ("z_ptr", "target_ptr", "w_ptr", "stats_ptr", "g_ptr", "denominator_ptr")
    return Work(
        vector_flops=_SOFTMAX_GRAD * classes,
        read=touched(*(a[n] for n in names)),
        written=touched(a["dz_ptr"], a["dt_ptr"]),
        outputs=classes,
    )


def _softmax_squared_error(a: Arguments, grid: tuple[int, ...]) -> Work:
    classes = a["z_ptr"].numel()
    return Work(
        vector_flops=(_SOFTMAX_LOSS + 3 + (4 if a["dz_ptr"] is not None else 0)) * classes,
        read=touched(a["z_ptr"], a["rows_ptr"], a["g_ptr"]) + _rows_of(a["y_ptr"], a["rows_ptr"], labels=a["LABELS"]),
        written=touched(a["loss_ptr"], a["dz_ptr"], a["dy_ptr"]),
        outputs=classes,
    )


def _elementwise_loss(a: Arguments, grid: tuple[int, ...]) -> Work:
    results = [a[n] for n in ("loss_ptr", "partial_ptr", "da_ptr", "dy_ptr") if a[n] is not None]
    return Work(
        vector_flops=3 * len(results) * grid[2] * a["total"],
        read=touched(a["a_ptr"], a["rows_ptr"], a["g_ptr"], a["sample_ptr"]) + _rows_of(a["y_ptr"], a["rows_ptr"]),
        written=touched(*results),
        outputs=grid[2] * a["total"],
    )


def _reduce_sum(a: Arguments, grid: tuple[int, ...]) -> Work:
    return Work(vector_flops=a["count"], read=touched(a["partial_ptr"]), written=touched(a["out_ptr"]), outputs=1)


def _activation_bwd(a: Arguments, grid: tuple[int, ...]) -> Work:
    return Work(
        vector_flops=ACTIVATIONS[a["ACTIVATION"]].operations[1] * grid[2] * a["total"],
        read=touched(a["da_ptr"], a["saved_ptr"]),
        written=touched(a["dz_ptr"]),
        outputs=grid[2] * a["total"],
    )


# Maximum, shift, exponential, sum; then quotient, minus the target, scale.
_SOFTMAX_LOSS, _SOFTMAX_GRAD, _SOFTMAX_LOSS_AND_GRAD = 4, 5, 7

#: The work of every kernel by name: arguments and grid to Work.
WORK: dict[str, Callable[[Arguments, tuple[int, ...]], Work]] = {
    "_linear_fwd_kernel": _linear_fwd,
    "_linear_dgrad_kernel": _linear_dgrad,
    "_linear_wgrad_kernel": _linear_wgrad,
    "_wgrad_reduce_kernel": _wgrad_reduce,
    "_wgrad_update_kernel": _wgrad_update,
    "_reduce_update_kernel": _reduce_update,
    "_before_update_kernel": _before_update,
    "_head_kernel": _head,
    "_cross_entropy_kernel": _cross_entropy,
    "_reduce_kernel": _reduce,
    "_cross_entropy_bwd_kernel": _cross_entropy_bwd,
    "_softmax_squared_error_kernel": _softmax_squared_error,
    "_elementwise_loss_kernel": _elementwise_loss,
    "_reduce_sum_kernel": _reduce_sum,
    "_activation_bwd_kernel": _activation_bwd,
    "_total_weight_kernel": _total_weight,
}
