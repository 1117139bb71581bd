"""Softmax cross-entropy with the arguments and results of torch's, loss and gradient derived by hand.

``cross_entropy`` is the function, ``SoftmaxCrossEntropy`` the node on the tape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import _reduction
from torch.nn import functional as F

from .. import ops, reference
from ..backend import Runs, alone, get_backend, has_values, on_tape, runs
from ..base.arguments import check_classes, check_cross_entropy, check_tensor
from ..base.compat import is_autocast_enabled
from ..base.signature import MOST, Signature, signature
from ..ops import torch_losses, triton_ops
from ..ops.torch_losses import Settings
from .transforms import differentiable, launches_alone, transformed

#: The message of an error for a label that is no class.
_NO_CLASS = (
    "target {bad}{at} is out of bounds: expected labels from 0 to {last} for {classes} classes, or "
    "ignore_index={ignore_index}; relabel it, or give the last layer more outputs"
)


#: The settings of calls on the kernels alone that passed all checks, by what was checked.
_checked: dict[tuple[object, ...], Settings] = {}


def _batched(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Z as [M, C] or [N, C, S], with a target of the shape that goes with it, from [C], [N, C] or [N, C, d1, ...]."""
    if z.dim() == 2:
        return z, target
    if z.dim() == 1:
        return z.unsqueeze(0), target.view(z.unsqueeze(0).shape if target.is_floating_point() else 1)
    return z.flatten(2), target.flatten(2 if target.is_floating_point() else 1)


class SoftmaxCrossEntropy(Function):
    """Loss of logits [C], [N, C] or [N, C, d1, ...]: ``apply(z, target, weight, settings, backend, known)``.

    Differentiable in z and, if they are probabilities, in the target.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        target: Tensor,
        weight: Tensor | None,
        settings: Settings,
        backend: Runs,
        known: Signature | None = None,
    ) -> Tensor:
        """Keep Z, the target and log p (torch) or max and sum of exponentials of each row (kernels)."""
        if known is not None:
            loss, kept, denominator = triton_ops.cross_entropy_fwd(z, target, weight, settings, known)
        else:
            loss, kept, denominator = ops.on(backend).cross_entropy_fwd(*_batched(z, target), weight, settings)
        ctx.save_for_backward(z, target, weight, kept, denominator)
        ctx.settings, ctx.backend = settings, backend
        return loss if known is not None else _unbatched(loss, z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """DZ = g (p sum_c Q - Q) with Q the weighted target."""
        (dloss,) = grads
        z, target, weight, kept, denominator = ctx.saved_tensors
        need_z, need_t = ctx.needs_input_grad[:2]
        s: Settings = ctx.settings
        dz: Tensor | None
        alone = ctx.backend == "triton" and launches_alone(dloss)
        if alone and z.dim() == 2:
            rows = (z, target, weight, kept, denominator)
            return *triton_ops.cross_entropy_bwd(dloss, rows, s, (need_z, need_t)), None, None, None, None
        if not alone and differentiable(dloss):
            dz, dt = _differentiable_backward(dloss, z, target, weight, s)
            return dz if need_z else None, dt if need_t else None, None, None, None, None
        rows = (*_batched(z, target), weight, kept, denominator)
        backward = ops.on(ctx.backend).cross_entropy_bwd
        dz, dt = backward(_upstream(dloss, z, s), rows, s, (need_z, need_t))
        if z.dim() != 2:
            dz, dt = None if dz is None else dz.view(z.shape), None if dt is None else dt.view(target.shape)
        return dz, dt, None, None, None, None


def _unbatched(loss: Tensor, z: Tensor) -> Tensor:
    """Losses of all rows in the shape of the labels."""
    if loss.dim() == 0 or z.dim() == 2:
        return loss
    return loss.view(()) if z.dim() == 1 else loss.view(z.shape[:1] + z.shape[2:])


def _upstream(dloss: Tensor, z: Tensor, s: Settings) -> Tensor:
    """The upstream gradient with one value per row of ``_batched``, or 0-d."""
    if s.reduction != "none" or z.dim() == 2:
        return dloss
    return dloss.unsqueeze(0) if z.dim() == 1 else dloss.reshape(z.shape[0], -1)


def _differentiable_backward(
    dloss: Tensor, z: Tensor, target: Tensor, weight: Tensor | None, s: Settings
) -> tuple[Tensor, Tensor | None]:
    """The same gradients as expressions on the tape, for create_graph=True."""
    z3, target3 = _batched(z, target)
    dz, dt = reference.cross_entropy_backward(
        _upstream(dloss, z, s).to(s.compute_dtype),
        z3.to(s.compute_dtype),
        target3.to(s.compute_dtype) if target.is_floating_point() else target3,
        weight,
        ignore_index=s.ignore_index,
        smoothing=s.smoothing,
        reduction=s.reduction,
    )
    return dz.to(z.dtype).view(z.shape), None if dt is None else dt.to(target.dtype).view(target.shape)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Softmax cross-entropy of logits and labels or class probabilities: torch.nn.functional.cross_entropy, fused.

    Args:
        input: logits [C], [N, C] or [N, C, d1, ...] in float32, float16, bfloat16 or float64; not modified.
        target: labels, int64 or uint8, [] for logits [C], else [N] or [N, d1, ...]; or class probabilities,
            floating-point, shaped as the input.
        weight: [C], a factor for each class, in the input's dtype. Default 1.
        size_average, reduce: deprecated, as in torch.
        ignore_index: rows with this label have loss and gradient 0 and do not count in the mean; labels only.
        reduction: "mean" (default; divided by the sum of the rows' weights, for probabilities by the number of rows),
            "sum" or "none".
        label_smoothing: e in [0, 1]; the target becomes (1 - e) target + e/C. Default 0.

    Returns:
        A 0-d tensor, or for "none" one value per row, in the input's dtype (float32 under torch.autocast). float16 and
        bfloat16 are computed in float32.

    Differentiable in input and probabilities, twice with ``create_graph=True``. torch.nn.functional.cross_entropy
    itself runs inside the transforms of torch.func, where torch.compile or torch.export traces plain torch, on fake
    tensors and subclasses of Tensor, for empty inputs, where probabilities have a class weight that requires grad, and
    where it is as fast: for labels on a CPU, unless there are many rows of few classes.

    On a CPU a label outside [0, C) that is not ignore_index raises IndexError. On a GPU labels are not checked, because
    a check would wait for the device. There the loss and the gradient of such a row are NaN, and so are the mean and
    the sum. Nothing outside the row is read or written. A compiler that traces has no labels to check.

    Raises:
        TypeError: arguments that are not tensors, ignore_index that is no int, label_smoothing that is no number.
        ValueError: unknown reduction; another number of labels than of rows.
        RuntimeError: shapes, dtypes or devices that do not fit, label_smoothing outside [0, 1].
        NotImplementedError: logits that are not floating-point.
        IndexError: a label out of range (CPU).
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    check_tensor(input, "the input")
    check_tensor(target, "the target")
    if get_backend() != "triton" and torch_losses.torch_is_as_fast(input, target, label_smoothing):
        return _torchs(input, target, weight, ignore_index, reduction, label_smoothing)
    key = None
    # Equal keys must be of equal types, since 1, 1.0 and True are equal.
    plain = type(reduction) is str and type(ignore_index) is int and type(label_smoothing) is float
    if plain and alone(input, target, weight) == "triton" and not _learns(weight):
        known = signature((input, target, weight))
        key = (known, reduction, ignore_index, label_smoothing)
        found = _checked.get(key)
        if found is not None:
            if target.is_cpu and not target.is_floating_point():
                _check_labels(input, target, ignore_index)
            return _on_tape(input, target, weight, found, "triton", known if input.dim() == 2 else None)
    check_cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
    probabilities = target.is_floating_point()
    dtype = _result_dtype(input, target, weight)
    backend = runs(dtype, input, target, weight)
    empty = backend != "operators" and input.numel() == 0  # the operators take any batch size, so nobody needs to ask
    torchs = transformed(input, target, weight) or _learns(weight) or empty
    on_cpu = not probabilities and target.device.type == "cpu"
    nll = on_cpu and backend == "torch" and label_smoothing == 0 and input.dim() == 2
    if on_cpu and not (nll or torchs) and has_values(target):
        _check_labels(input, target, ignore_index)
    settings = Settings(reduction, ignore_index, float(label_smoothing), dtype, nll)
    if torchs or backend == "formula":
        return _torchs(input, target, weight, ignore_index, reduction, label_smoothing)
    if key is not None and backend == "triton":
        if len(_checked) >= MOST:
            _checked.clear()
        _checked[key] = settings
    try:
        return _on_tape(input, target, weight, settings, backend)
    except IndexError:  # from nll_loss's own check; ours names the label
        _check_labels(input, target, ignore_index)
        raise


def _learns(weight: Tensor | None) -> bool:
    return weight is not None and weight.requires_grad and torch.is_grad_enabled()


def _on_tape(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    settings: Settings,
    backend: Runs,
    known: Signature | None = None,
) -> Tensor:
    """``cross_entropy`` of what was checked, with the signature of the three tensors if it is known."""
    if torch.is_grad_enabled() and (input.requires_grad or target.requires_grad) and on_tape(backend):
        return SoftmaxCrossEntropy.apply(input, target, weight, settings, backend, known)
    return _unbatched(ops.on(backend).cross_entropy_fwd(*_batched(input, target), weight, settings)[0], input)


def _torchs(input: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
    """torch's own cross-entropy. torch checks its arguments itself; our errors say more about them."""
    ignore_index, reduction, label_smoothing = options
    if target.dtype == torch.uint8:
        target = target.long()  # torch has such labels for two dimensions only, and not in transforms and compilers
    try:
        return F.cross_entropy(
            input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
    except Exception:
        check_cross_entropy(input, target, weight, *options)
        if target.is_cpu and not target.is_floating_point() and has_values(target):
            _check_labels(input, target, ignore_index)
        raise


def _result_dtype(input: Tensor, target: Tensor, weight: Tensor | None) -> torch.dtype:
    """The input's dtype; probabilities promote it as torch's arithmetic does; autocast widens to float32."""
    dtype = input.dtype
    if target.is_floating_point():
        dtype = torch.promote_types(dtype, target.dtype)
        dtype = dtype if weight is None else torch.promote_types(dtype, weight.dtype)
    return torch.float32 if dtype != torch.float64 and is_autocast_enabled(input.device.type) else dtype


def _check_labels(input: Tensor, target: Tensor, ignore_index: int) -> None:
    """IndexError for a label that is no class and not ignored; looks at the values."""
    classes = input.shape[min(1, input.dim() - 1)]
    check_classes(target, classes, _NO_CLASS, ignore_index=ignore_index)
