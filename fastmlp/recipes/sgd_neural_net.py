"""SGD-NEURAL-NET of "Explanatory Notes for 6.390" (7.6.2): any depth, sizes, activations and loss.

The file has the notes' algorithm, line by line, on one data point at a time. In this project's row vectors, with
A^0 = x [1, m] and W^l [n_l, n_{l-1}] (the transpose of the notes' W):

    forward           Z^l = A^{l-1} (W^l)^T + b^l,   A^l = f^l(Z^l)
    final layer       dL/dA^L = the loss's derivative
    link layers       dL/dA^l = dL/dZ^{l+1} W^{l+1}                    notes: dZ^{l+1}/dA^l = W^{l+1}
    within a layer    dL/dZ^l = dL/dA^l * f'(Z^l)                      the diagonal matrix dA^l/dZ^l
                      dL/dZ^l = A * (dL/dA - sum_c dL/dA_c A_c)        softmax, whose Jacobian is not diagonal
    weight gradients  dL/dW^l = (dL/dZ^l)^T A^{l-1},  dL/db^l = dL/dZ^l      notes: dZ^l/dW^l = A^{l-1}
    step              W^l -= eta(t) dL/dW^l,  b^l -= eta(t) dL/db^l

Softmax with nllm and sigmoid with nll take dL/dZ^L = A^L - y directly (the notes' concept 50): the product of the two
factors loses its digits, or is 0 times infinity, where A^L is close to 0 or 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops, reference
from ..activations import saved_for_grad
from ..backend import Resolved, resolve
from ..base.arguments import check_tensor
from ..base.names import unknown
from ..nn import MLP

ACTIVATIONS = ("step", "relu", "sigmoid", "identity", "tanh", "softmax")
"""The notes' catalogue of activations (7.5.12)."""
ELEMENTWISE = {"square": "mse", "linear": "l1", "nll": "binary_cross_entropy", "nllm": "nllm"}
"""The notes' catalogue of losses (7.5.13), each the sum over the outputs, with their names in ``fastmlp.reference``."""
LOSSES = tuple(ELEMENTWISE)

_DIRECT = {("sigmoid", "nll"): "bce_with_logits", ("softmax", "nllm"): "cross_entropy"}
_CHECK_EVERY = 100


@dataclass(frozen=True)
class SGDResult:
    """What `sgd_neural_net` returns.

    Attributes:
        model: the network with its trained weights and biases.
        losses: [t], the loss of each step's data point before the step.
        stopped: whether the termination condition ended the training before the last step.
    """

    model: MLP
    losses: Tensor
    stopped: bool


def sgd_neural_net(
    x: Tensor,
    y: Tensor,
    sizes: Sequence[int],
    activations: Sequence[str],
    loss: str,
    *,
    steps: int,
    step_size: float | Callable[[int], float] = 0.01,
    stop: Callable[[int, float], bool] | None = None,
    seed: int = 0,
    init_std: float | None = None,
) -> SGDResult:
    """Train a network by stochastic gradient descent on random data points, as the notes' pseudocode does.

    Args:
        x: [n, m] data points, float32 or float64 (which is then the network's dtype), or uint8 pixels (float32).
        y: [n, n_L] targets; for one output [n] too; for nllm also int64 class numbers [n].
        sizes: (m, n_1, ..., n_L), at least two.
        activations: f^1, ..., f^L, each a name of `ACTIVATIONS`. A step layer passes no gradient on.
        loss: a name of `LOSSES`. nll needs outputs in (0, 1), that is sigmoid or softmax, and targets 0 or 1; nllm
            needs softmax and targets that are distributions, such as one-hot rows.
        steps: T, the largest number of steps.
        step_size: eta, or a function t -> eta(t) of the step t = 1, 2, ....
        stop: termination condition (t, loss of step t) -> bool, called after each step; None: there is none.
        seed: of the starting weights and of the data points.
        init_std: standard deviation of the Gaussian that weights and biases start from; default 1/sqrt(inputs) of each
            layer.

    Returns:
        The network, each step's loss, and whether ``stop`` ended it.

    Raises:
        ValueError: unknown names, numbers of layers that differ, pairs or targets that a loss has no value for, step
            sizes that are not positive and finite.
        TypeError: arguments that are not tensors.
        RuntimeError: shapes, dtypes or devices that do not fit.
        FloatingPointError: the loss is no longer finite.
    """
    x, y = _checked(x, y, sizes, activations, loss, steps)
    dtype = x.dtype if x.is_floating_point() else torch.float32
    model = MLP(sizes, activations, device=x.device, dtype=dtype)
    # 1-4: randomly initialize the weights and biases in every layer
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model._linears():
            std = layer.in_features**-0.5 if init_std is None else init_std
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    weights = [layer.weight.detach() for layer in model._linears()]
    biases: list[Tensor | None] = [layer.bias.detach() for layer in model._linears()]

    losses = torch.empty(steps, dtype=dtype, device=x.device)
    points = torch.randint(len(x), (steps,), generator=generator).tolist()
    t, stopped = 0, False
    # 6-8: while the termination condition is not met, get a random data point, keep track of the time t
    while t < steps and not stopped:
        i = points[t]
        t += 1
        # 10-35: forward pass and back-propagation
        value, dws, dbs = loss_and_gradients(weights, biases, activations, loss, x[i : i + 1], y[i : i + 1])
        losses[t - 1] = value
        # 37-42: step
        eta = _step_size(step_size, t)
        for w, b, dw, db in zip(weights, biases, dws, dbs, strict=True):
            w.sub_(dw, alpha=eta)
            assert b is not None
            b.sub_(db, alpha=eta)
        stopped = stop is not None and bool(stop(t, value.item()))
        if t % _CHECK_EVERY == 0 or t == steps or stopped:
            _check_finite(losses, t)
    # 44: return the final network
    return SGDResult(model, losses[:t].clone(), stopped)


@torch.no_grad()
def loss_and_gradients(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
    loss: str,
    x: Tensor,
    y: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(L, [dL/dW^l], [dL/db^l]) of the notes' forward pass and back-propagation.

    Args:
        weights, biases: L tensors [n_l, n_{l-1}] and [n_l] (or None: no bias is added, but its gradient is returned).
        activations, loss: as `sgd_neural_net`, which checks them.
        x: [B, m], or uint8 pixels.
        y: [B, n_L], of the weights' dtype. L is the sum over the B points.
    """
    backend = resolve(x, weights[0].dtype)
    direct = _DIRECT.get((activations[-1], loss))
    inputs, a = [], x
    for w, b, activation in zip(weights, biases, activations, strict=True):
        inputs.append(a)
        is_last = len(inputs) == len(weights)
        fused = "identity" if activation == "softmax" or (is_last and direct) else activation
        z, _ = ops.on(backend).linear_fwd(a, w, b, fused)
        a = torch.softmax(z, 1) if activation == "softmax" and not (is_last and direct) else z
    if direct == "cross_entropy":  # concept 50: dL/dZ^L = softmax(Z^L) - y, here for any y of sum 1
        value, dz = reference.cross_entropy(z, y, reduction="sum"), torch.softmax(z, 1).sub_(y)
    elif direct == "bce_with_logits":  # dL/dZ^L = sigmoid(Z^L) - y
        value = reference.elementwise_loss(z, y, direct).sum()
        dz = reference.elementwise_loss_grad(z, y, direct)
    else:
        value = reference.elementwise_loss(a, y, ELEMENTWISE[loss]).sum()
        dz = _within(reference.elementwise_loss_grad(a, y, ELEMENTWISE[loss]), a, activations[-1], backend)
    dws, dbs = [], []
    for layer in range(len(weights) - 1, -1, -1):
        dw, db = ops.on(backend).linear_wgrad(dz, inputs[layer])
        assert db is not None
        dws.append(dw)
        dbs.append(db)
        if layer:
            dz = _below(dz, weights[layer], inputs[layer], activations[layer - 1], backend)
    return value, dws[::-1], dbs[::-1]


def _below(dz: Tensor, weight: Tensor, a: Tensor, activation: str, backend: Resolved) -> Tensor:
    """From a layer's dL/dZ to that of the layer below, in one product where its activation is elementwise."""
    if activation == "softmax":
        return _within(ops.on(backend).linear_dgrad(dz, weight), a, activation, backend)
    saved = a if saved_for_grad(activation) else None
    return ops.on(backend).linear_dgrad(dz, weight, saved, activation)


def _within(da: Tensor, a: Tensor, activation: str, backend: Resolved) -> Tensor:
    """The gradient dL/dZ of a layer from dL/dA and its output A."""
    if activation == "softmax":
        return reference.softmax_backward(da, a)
    return ops.on(backend).activation_bwd(da, a if saved_for_grad(activation) else None, activation)


def _step_size(step_size: float | Callable[[int], float], t: int) -> float:
    eta = float(step_size(t) if callable(step_size) else step_size)
    if not (math.isfinite(eta) and eta > 0):
        raise ValueError(f"expected a positive, finite step size, got eta({t}) = {eta}")
    return eta


def _check_finite(losses: Tensor, t: int) -> None:
    recent = losses[max(0, t - _CHECK_EVERY) : t]
    if not bool(recent.isfinite().all()):
        first = t - len(recent) + 1 + int((~recent.isfinite()).nonzero()[0])
        raise FloatingPointError(
            f"the loss of step {first} is {losses[first - 1].item()}; use a smaller step_size or init_std"
        )


def _checked(
    x: Tensor, y: Tensor, sizes: Sequence[int], activations: Sequence[str], loss: str, steps: int
) -> tuple[Tensor, Tensor]:
    """X, and Y as [n, n_L] in x's dtype."""
    for name in activations:
        if name not in ACTIVATIONS:
            raise ValueError(unknown("activation", name, ACTIVATIONS))
    if loss not in LOSSES:
        raise ValueError(unknown("loss", loss, LOSSES))
    if isinstance(activations, str) or len(sizes) != len(activations) + 1 or not activations:
        raise ValueError(
            f"expected one activation for each layer, that is one less than sizes, got {len(sizes)} sizes and "
            f"activations {activations!r}"
        )
    if steps < 0:
        raise ValueError(f"expected at least 0 steps, got {steps}")
    check_tensor(x, "x")
    check_tensor(y, "y")
    if x.dim() != 2 or len(x) == 0 or x.shape[1] != sizes[0]:
        raise RuntimeError(f"expected x of shape [n, {sizes[0]}] with n of at least 1, got {list(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64, torch.uint8):
        raise RuntimeError(f"expected x in float32, float64 or uint8, got {x.dtype}; convert it with .float()")
    activation, outputs = activations[-1], sizes[-1]
    if loss == "nll" and activation not in ("sigmoid", "softmax"):
        raise ValueError(
            f"nll takes the logarithm of the outputs and of one minus them, and {activation} gives values that have "
            "none; use sigmoid as the last activation"
        )
    if loss == "nllm" and (activation != "softmax" or outputs < 2):
        raise ValueError(
            f"nllm is the NLL of a distribution over at least two classes, got {activation} and {outputs} as the last "
            "size; use softmax as the last activation, or sigmoid and nll for one output"
        )
    return x, _checked_targets(y, len(x), outputs, loss, x.dtype if x.is_floating_point() else torch.float32)


def _checked_targets(y: Tensor, count: int, outputs: int, loss: str, dtype: torch.dtype) -> Tensor:
    if loss == "nllm" and y.dtype == torch.int64 and y.shape == (count,):
        low, high = (int(v) for v in torch.aminmax(y))
        if low < 0 or high >= outputs:
            raise ValueError(f"expected class numbers from 0 to {outputs - 1}, got {low} to {high}")
        return torch.nn.functional.one_hot(y, outputs).to(dtype)
    if outputs == 1 and y.shape == (count,):
        y = y.unsqueeze(1)
    if y.shape != (count, outputs):
        raise RuntimeError(f"expected y of shape [{count}, {outputs}], got {list(y.shape)}")
    y = y.to(dtype)
    if not bool(y.isfinite().all()):
        raise ValueError("y has values that are not finite")
    if loss == "nll" and not bool(((y == 0) | (y == 1)).all()):
        bad = y[(y != 0) & (y != 1)][0].item()
        raise ValueError(f"nll is defined for targets 0 and 1, got {bad:g}; use square or linear for other values")
    if loss == "nllm" and not bool((y >= 0).all() and torch.allclose(y.sum(1), torch.ones_like(y[:, 0]))):
        raise ValueError("nllm is defined for targets that are distributions: each row at least 0, of sum 1")
    return y
