"""The fused operations of linear layers and cross-entropy in plain torch: the reference of tests and benchmarks.

Nothing here is fast, fused or clever. Each function is one formula, in the notation of the whole project (M batch,
K inputs, N outputs; X [M, K], W [N, K], b [N], Z and A [M, N]). The formulas use differentiable torch operations only,
so autograd can differentiate them once or twice. Tests call the functions in float64. ``fastmlp`` calls them in the
working dtype where torch must see every operation: for second derivatives and in the transforms of torch.func.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..activations import ACTIVATIONS, LEAKY_SLOPE


def pixels(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The input of the first layer: uint8 pixels become ``x / 255`` in ``dtype``, any other input is unchanged."""
    return x.to(dtype) / 255 if x.dtype == torch.uint8 else x


def activate(z: Tensor, activation: str) -> Tensor:
    """A = f(Z), elementwise."""
    match activation:
        case "identity":
            return z
        case "sigmoid":
            return torch.sigmoid(z)
        case "relu":
            return torch.relu(z)
        case "tanh":
            return torch.tanh(z)
        case "step":
            return z.masked_fill(z >= 0, 1.0).masked_fill(~(z >= 0), 0.0)  # its derivative is 0, not missing
        case "leaky_relu":
            return torch.nn.functional.leaky_relu(z, LEAKY_SLOPE)
        case "gelu":
            return torch.nn.functional.gelu(z)
        case "silu":
            return torch.nn.functional.silu(z)
    raise ValueError(f"unknown activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}")


def activation_grad(z: Tensor, activation: str) -> Tensor:
    """f'(Z), elementwise, from the pre-activation; torch's value at the kinks of relu and leaky_relu."""
    match activation:
        case "identity":
            return torch.ones_like(z)
        case "sigmoid":
            s = torch.sigmoid(z)
            return s * (1 - s)
        case "relu":
            return (z > 0).to(z.dtype)
        case "tanh":
            return 1 - torch.tanh(z) ** 2
        case "step":
            return torch.zeros_like(z)
        case "leaky_relu":
            return torch.where(z > 0, torch.ones_like(z), LEAKY_SLOPE)
        case "gelu":
            cdf = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
            return cdf + z * torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
        case "silu":
            s = torch.sigmoid(z)
            return s * (1 + z * (1 - s))
    raise ValueError(f"unknown activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}")


def activation_grad_from_output(a: Tensor, activation: str) -> Tensor:
    """f'(Z) from the output A, for the activations whose output determines it."""
    match activation:
        case "sigmoid":
            return a * (1 - a)
        case "tanh":
            return 1 - a**2
        case "relu":
            return (a > 0).to(a.dtype)
        case "leaky_relu":
            return torch.where(a > 0, torch.ones_like(a), LEAKY_SLOPE)
    raise ValueError(f"the derivative of {activation!r} is not a function of its output")


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "identity") -> Tensor:
    """A = f(X W^T + b). With W [E, N, K] and b [E, N] of an ensemble, X is [E, M, K] or [M, K], and A [E, M, N]."""
    x = pixels(x, weight.dtype)
    if weight.dim() == 2:
        return activate(torch.nn.functional.linear(x, weight, bias), activation)
    x = x if x.dim() == 3 else x.expand(weight.shape[0], -1, -1)
    z = torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
    return activate(z, activation)


def linear_dgrad(dz: Tensor, weight: Tensor) -> Tensor:
    """dX = dZ W."""
    return dz @ weight


def linear_wgrad(dz: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """DW = dZ^T X and db = sum over the batch of dZ."""
    return dz.mT @ pixels(x, dz.dtype), dz.sum(-2)


def linear_act_backward(
    da: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dW, db) of ``linear_act`` for the upstream gradient dA: dZ = dA * f'(Z), then the two products."""
    z = linear_act(x, weight, bias)
    dz = da * activation_grad(z, activation)
    return linear_dgrad(dz, weight), *linear_wgrad(dz, x)


def mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
    dropped: Callable[[Tensor, int], Tensor] | None = None,
) -> Tensor:
    """The whole network: A_l = f_l(A_{l-1} W_l^T + b_l), A_0 = X; returns A_L.

    ``dropped(A, layer)``, if there is dropout, is the output that goes on; layers count from 0.
    """
    a = pixels(x, weights[0].dtype)
    for layer, (w, b, activation) in enumerate(zip(weights, biases, activations, strict=True)):
        a = linear_act(a, w, b, activation)
        if dropped is not None:
            a = dropped(a, layer)
    return a


def mlp_backward(
    da: Tensor, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activations: Sequence[str]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(dX, [dW_l], [db_l]) of ``mlp`` for the upstream gradient dA of its output."""
    inputs = [pixels(x, weights[0].dtype)]
    for w, b, activation in zip(weights[:-1], biases[:-1], activations[:-1], strict=True):
        inputs.append(linear_act(inputs[-1], w, b, activation))
    dws: list[Tensor] = []
    dbs: list[Tensor] = []
    for a, w, b, activation in reversed(list(zip(inputs, weights, biases, activations, strict=True))):
        da, dw, db = linear_act_backward(da, a, w, b, activation)
        dws.insert(0, dw)
        dbs.insert(0, db)
    return da, dws, dbs


def _label_terms(z: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """(y, w_y, ignored) of labels: y is 0 where it is no class, w_y is 0 where ignored and NaN outside [0, C)."""
    target = target.long()
    ignored = target == ignore_index
    valid = (target >= 0) & (target < z.shape[1]) & ~ignored
    y = torch.where(valid, target, 0)
    w_y = torch.ones_like(y, dtype=z.dtype) if weight is None else weight[y].to(z.dtype)
    return y, torch.where(ignored, 0.0, torch.where(valid, w_y, math.nan)).to(z.dtype), ignored


def _per_class(weight: Tensor | None, z: Tensor) -> Tensor:
    """w as a tensor that broadcasts against Z [M, C, ...]."""
    w = torch.ones(z.shape[1], dtype=z.dtype, device=z.device) if weight is None else weight.to(z.dtype)
    return w.view(-1, *[1] * (z.dim() - 2))


def cross_entropy(
    z: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Softmax cross-entropy of logits Z [M, C] or [M, C, ...]; p = softmax(Z), w class weights, e smoothing.

    Labels y [M, ...]: loss_i = -(1-e) w_y log p_y - (e/C) sum_c w_c log p_c, 0 where y = ignore_index, NaN where y is
    outside [0, C); the mean divides by sum_i w_{y_i}. Probabilities t (floating-point, shaped as Z):
    loss_i = -sum_c ((1-e) t_c + e/C) w_c log p_c; the mean divides by the number of rows.
    """
    log_p = torch.log_softmax(z, 1)
    w = _per_class(weight, z)
    if target.is_floating_point():
        loss = -(((1 - smoothing) * target + smoothing / z.shape[1]) * w * log_p).sum(1)
        denominator: Tensor | int = loss.numel()
    else:
        y, w_y, ignored = _label_terms(z, target, weight, ignore_index)
        loss = -(1 - smoothing) * w_y * log_p.gather(1, y.unsqueeze(1)).squeeze(1)
        if smoothing:
            loss = loss - smoothing / z.shape[1] * (w * log_p).sum(1)
        loss = torch.where(ignored, 0.0, loss).to(z.dtype)
        denominator = w_y.sum()
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / denominator


def cross_entropy_backward(
    dloss: Tensor,
    z: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor | None]:
    """(dZ, dTarget or None) of ``cross_entropy`` for the upstream gradient of its result.

    With Q [M, C] the weighted target, Q = ((1-e) onehot(y) + e/C) w (rows of ignored labels 0) with the factor w_y
    on the first term, or ((1-e) t + e/C) w: dZ = g (p sum_c Q_c - Q), and for probabilities dt = -g (1-e) w log p.
    """
    log_p = torch.log_softmax(z, 1)
    w = _per_class(weight, z)
    if target.is_floating_point():
        q = ((1 - smoothing) * target + smoothing / z.shape[1]) * w
        g = dloss / (z.numel() // z.shape[1]) if reduction == "mean" else dloss
        g = g.unsqueeze(1) if reduction == "none" else g
        return g * (q.sum(1, keepdim=True) * log_p.exp() - q), -g * (1 - smoothing) * w * log_p
    y, w_y, ignored = _label_terms(z, target, weight, ignore_index)
    q = torch.zeros_like(z).scatter(1, y.unsqueeze(1), ((1 - smoothing) * w_y).unsqueeze(1))
    q = q + smoothing / z.shape[1] * w * (~ignored).to(z.dtype).unsqueeze(1)
    g = dloss / w_y.sum() if reduction == "mean" else dloss
    g = torch.where(ignored, 0.0, g).to(z.dtype).unsqueeze(1)
    return g * (q.sum(1, keepdim=True) * log_p.exp() - q), None


def head(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    z_prev: Tensor | None = None,
    activation: str = "identity",
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    smoothing: float = 0.0,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Last layer, loss and their backward pass: (loss of each row, dZ_L, dZ_{L-1}, logits).

    dZ_L = scale dloss/dZ_L and dZ_{L-1} = (dZ_L W) * f'(Z_{L-1}), where f is the activation below. Without Z_{L-1},
    the factor f' is left out.
    """
    z = linear_act(h, weight, bias)
    options = {"ignore_index": ignore_index, "smoothing": smoothing, "reduction": "none"}
    loss = cross_entropy(z, target, class_weight, **options)  # type: ignore[arg-type]
    dz, _ = cross_entropy_backward(torch.full_like(loss, scale), z, target, class_weight, **options)  # type: ignore[arg-type]
    da = linear_dgrad(dz, weight)
    return loss, dz, da if z_prev is None else da * activation_grad(z_prev, activation), z
