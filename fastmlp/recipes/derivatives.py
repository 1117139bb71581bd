"""The documents' catalogue of derivatives, each against differences of fourth order in float64.

Derivatives of vectors and matrices have the layout of the 6.390 notes: a row per input, a column per output
(definitions 26 to 35). fastmlp keeps rows of data instead (X [M, K], W [N, K]); docs/derivations.md has both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..activations import saved_for_grad
from ..functional import cross_entropy, linear_act, softmax
from ..ops import torch_ops
from ..train.plots import BLUE, ORANGE
from .base import BLOG, NOTEBOOK, NOTES, Recorder, Settings, axes, derivative
from .sgd_neural_net import loss_and_gradients
from .softmax_squared import jacobian

TOLERANCE = 1e-9
_ACTIVATIONS = {
    "step": "0",
    "relu": "step(z)",
    "sigmoid": "sigma(z) (1 - sigma(z))",
    "identity": "1",
    "tanh": "1 - tanh(z)^2",
}
_LOSSES = {
    "mse": ("square (a - y)^2: 2 (a - y)", (-1.3, 0.4), 2.0),
    "l1": ("linear |a - y|: sign(a - y)", (-1.3, 0.4), 2.0),
    "binary_cross_entropy": ("NLL: -(y/a - (1-y)/(1-a))", (0.4, 0.7), 1.0),
    "bce_with_logits": ("NLL of sigmoid(z): sigma(z) - y", (-2.0, 0.4), 1.0),
    "nllm": ("NLLM -sum y log a: -y/a", (0.4, 0.7), 1.0),
}


def _vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _slope(z: Tensor, activation: str) -> Tensor:
    """f'(z) as the backward pass has it: from what the forward pass keeps, dA = 1."""
    a = reference.activate(z, activation).unsqueeze(0)
    saved = a if saved_for_grad(activation) else None
    return torch_ops.activation_bwd(torch.ones_like(a), saved, activation)[0]


def _activations(recorder: Recorder) -> None:
    z = _vector(-2.5, -0.7, -0.02, 0.03, 0.9, 3.1)  # away from the kinks at 0, where there is no derivative
    for name, text in _ACTIVATIONS.items():
        numeric = derivative(partial(reference.activate, activation=name), z).diagonal()
        recorder.close(NOTES, f"d {name}/dz = {text}", _slope(z, name), numeric, TOLERANCE)
    e = torch.exp(-z)
    other = e / (1 + e) ** 2
    recorder.close(NOTEBOOK, "d sigma/dz = e^-z / (1 + e^-z)^2", other, _slope(z, "sigmoid"), 1e-15)
    recorder.close(NOTES, "d ReLU/dz is the step function", _slope(z, "relu"), reference.activate(z, "step"), 0.0)
    numeric = derivative(softmax, z)
    recorder.close(BLOG, "d softmax_i/dz_j = p_i (1 - p_i) or -p_i p_j", jacobian(softmax(z)), numeric, TOLERANCE)


def _losses(recorder: Recorder) -> None:
    for name, (text, values, y) in _LOSSES.items():
        a, target = _vector(*values), _vector(y, y)

        def loss(a: Tensor, name: str = name, target: Tensor = target) -> Tensor:
            return reference.elementwise_loss(a, target, name).sum()

        analytic = reference.elementwise_loss_grad(a, target, name)
        recorder.close(NOTES, f"dL/da of {text}", analytic, derivative(loss, a), TOLERANCE)
    z, label = _draw(1, 7).requires_grad_(), torch.tensor([3])
    (dz,) = torch.autograd.grad(cross_entropy(z, label), z)
    numeric = derivative(lambda z: torch.logsumexp(z, 1)[0] - z[0, 3], z.detach())
    recorder.close(NOTEBOOK, "dL/dl = softmax(l) - delta of -log softmax(l)_y", dz, numeric, TOLERANCE)
    expected = torch.softmax(z.detach(), 1) - torch.nn.functional.one_hot(label, 7)
    recorder.close(NOTEBOOK, "which is what the fused loss gives", dz, expected, 1e-15)


def _layer_identities(recorder: Recorder) -> None:
    """Z = W^T A + b in the notes' columns: W [m, n], A [m], Z [n]."""
    m, n = 4, 3
    w, a, b = _draw(m, n), _draw(m, seed=1), _draw(n, seed=2)
    recorder.close(NOTES, "dZ/dA = W (notation 46), m x n", derivative(lambda a: w.t() @ a + b, a), w, TOLERANCE)
    tensor = derivative(lambda w: w.t() @ a + b, w)  # [m, n, n]: dz_i/dW_jk
    expected = a.view(m, 1, 1) * torch.eye(n).double()
    recorder.close(NOTES, "dZ/dW is A on a diagonal of a 3-tensor (7.128)", tensor, expected, TOLERANCE)
    own = torch.stack([tensor[:, k, k] for k in range(n)], 1)
    recorder.close(NOTES, "and so condensed to A (notation 45)", own, a.unsqueeze(1).expand(m, n), TOLERANCE)
    off = max(tensor[:, k, i].abs().max().item() for k in range(n) for i in range(n) if i != k)
    recorder.close(NOTES, "a weight does not move another neuron (concept 43)", off, 0.0, TOLERANCE)
    recorder.close(NOTES, "dZ/db = 1", derivative(lambda b: w.t() @ a + b, b), torch.eye(n).double(), TOLERANCE)
    z = _draw(n, seed=3)
    for name in ("sigmoid", "tanh"):
        matrix = derivative(partial(reference.activate, activation=name), z)
        diagonal = torch.diag(reference.activation_grad(z, name))
        recorder.close(NOTES, f"dA/dZ is diagonal (notation 48), {name}", matrix, diagonal, TOLERANCE)
    matrix, expected = derivative(lambda z: z**2, _vector(1, 2, 3)), torch.diag(_vector(2, 4, 6))
    recorder.close(NOTES, "its example f(z) = z^2 at (1, 2, 3): diag(2, 4, 6)", matrix, expected, TOLERANCE)
    r, q = _draw(n, seed=4), _draw(n, seed=5)
    recorder.close(NOTES, "diag(r) q = r * q (concept 49)", torch.diag(r) @ q, r * q, 1e-15)


def _layer_kernels(recorder: Recorder) -> None:
    """The same identities as the operations compute them, on rows: X [M, K], W [N, K]."""
    x, w, dz = _draw(5, 4), _draw(3, 4, seed=1), _draw(5, 3, seed=2)
    dw, db = torch_ops.linear_wgrad(dz, x)
    numeric = derivative(lambda w: (dz * (x @ w.t())).sum(), w)
    recorder.close(NOTEBOOK, "dL/dW = l_prev^T dL/dl, a sum of outer products", dw, numeric, TOLERANCE)
    outer = sum((torch.outer(g, v) for g, v in zip(dz, x, strict=True)), torch.zeros(()))
    recorder.close(NOTEBOOK, "the same, one outer product per image", dw, outer, 1e-14)
    assert db is not None
    numeric = derivative(lambda b: (dz * (x @ w.t() + b)).sum(), _draw(3))
    recorder.close(NOTEBOOK, "dL/db = dL/dl", db, numeric, TOLERANCE)
    dx, numeric = torch_ops.linear_dgrad(dz, w), derivative(lambda x: (dz * (x @ w.t())).sum(), x)
    recorder.close(NOTEBOOK, "dL/dl_prev = dL/dl W^T", dx, numeric, TOLERANCE)
    a = torch.sigmoid(_draw(5, 4, seed=6))
    fused = torch_ops.linear_dgrad(dz, w, a, "sigmoid")
    recorder.close(NOTEBOOK, "with sigmoid below: (dL/dl W^T) * phi'", fused, (dz @ w) * a * (1 - a), 1e-14)


def _shapes(recorder: Recorder) -> None:
    """Definitions 26 to 37: the shape of each derivative, and what it approximates."""
    m, n = 3, 2
    big, v = _draw(n, m, seed=8), _draw(m, seed=7)

    def wave(v: Tensor) -> Tensor:
        return torch.sin(big @ v)

    cases: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, tuple[int, ...]]] = {
        "scalar/vector, definition 26: m x 1": (lambda v: torch.sin(v).sum(), v, (m,)),
        "vector/scalar, definition 28: 1 x n": (lambda s: torch.sin(s * _vector(1, 2)), _vector(0.3)[0], (n,)),
        "vector/vector, definition 30: m x n": (wave, v, (m, n)),
        "scalar/matrix, definition 35: the shape of M": (lambda a: torch.sin(a).sum(), big, (n, m)),
        "vector/matrix, 7.X.20: a 3-tensor": (lambda a: a @ v, big, (n, m, n)),
    }
    for text, (f, x, shape) in cases.items():
        found = tuple(derivative(f, x).shape)
        recorder.add(NOTES, text, str(found), str(shape), found == shape)
    d = derivative(lambda s: torch.outer(torch.sin(s * _vector(1, 2)), _vector(1, 2, 3)), _vector(0.3)[0])
    found = tuple(d.t().shape)  # the notes put the matrix's columns along the rows of the derivative
    recorder.add(NOTES, "matrix/scalar, definition 34: transposed shape", str(found), str((m, n)), found == (m, n))
    full = derivative(lambda a: a @ torch.ones(m, 4).double(), big)
    sizes, total = big.numel() * n * 4, full.numel()
    recorder.add(NOTES, "size(dB/dA) = size(B) size(A) (concept 21)", str(total), str(sizes), total == sizes)
    recorder.add(NOTES, "axes(dB/dA) = axes(B) + axes(A) (concept 37)", str(full.dim()), "4", full.dim() == 4)

    dv = 1e-4 * _vector(1, -2, 0.5)
    change, approximation = torch.sin(big @ (v + dv)) - torch.sin(big @ v), derivative(wave, v).t() @ dv
    recorder.close(NOTES, "dw = (dw/dv)^T dv for small steps (concept 22)", approximation, change, 1e-6)


def _chain_rules(recorder: Recorder) -> None:
    def inner(s: Tensor) -> Tensor:
        return torch.stack((torch.sin(s), s**2, torch.exp(s)))

    def outer(v: Tensor) -> Tensor:
        return v[0] * v[1] + torch.cos(v[2])

    s = _vector(0.7)[0]
    total = derivative(lambda s: outer(inner(s)), s)
    parts = (derivative(outer, inner(s)) * derivative(inner, s)).sum()
    recorder.close(NOTES, "df/ds = sum_i df/dx_i dx_i/ds (definition 20)", parts, total, TOLERANCE)

    w1, w2, x = _draw(4, 3), _draw(2, 4, seed=1), _draw(3, seed=2)

    def first(x: Tensor) -> Tensor:
        return torch.tanh(w1 @ x)

    def loss(a: Tensor) -> Tensor:
        return ((torch.sigmoid(w2 @ a) - 0.3) ** 2).sum()

    product = derivative(first, x) @ derivative(loss, first(x))
    numeric = derivative(lambda x: loss(first(x)), x)
    recorder.close(BLOG, "grad g(f(x)) = J grad g (rows of J: inputs)", product, numeric, TOLERANCE)

    weights, activations = [w1, w2], ("tanh", "sigmoid")
    y = torch.full((1, 2), 0.3).double()
    _, (dw1, dw2), _ = loss_and_gradients(weights, [None, None], activations, "square", x.unsqueeze(0), y)
    a1 = first(x)
    z2 = w2 @ a1
    a2 = torch.sigmoid(z2)
    dz2 = torch.diag(a2 * (1 - a2)) @ (2 * (a2 - y[0]))  # dA2/dZ2 dL/dA2
    dz1 = torch.diag(1 - a1**2) @ w2.t() @ dz2  # dA1/dZ1 dZ2/dA1 dL/dZ2: the notes' W is our W^T
    recorder.close(NOTES, "dL/dW2 = dZ2/dW2 (dL/dZ2)^T (notation 16)", dw2, torch.outer(a1, dz2).t(), 1e-15)
    recorder.close(NOTES, "dL/dW1 = dZ1/dW1 (dL/dZ1)^T (notation 16)", dw1, torch.outer(x, dz1).t(), 1e-15)

    w = _draw(2, 4, seed=3)
    c = linear_act(first(x).unsqueeze(0), w)[0]
    numeric = derivative(lambda a: w @ a, first(x))
    recorder.close(NOTEBOOK, "dl3/dl2 = W3: every node of layer 2 moves all of layer 3", numeric, w.t(), TOLERANCE)
    through = sum((w[k] * derivative(lambda c: (c**2).sum(), c)[k] for k in range(2)), torch.zeros(()))
    whole = derivative(lambda a: ((w @ a) ** 2).sum(), first(x))
    recorder.close(NOTEBOOK, "total derivative: the sum over all paths (appendix 2)", through, whole, TOLERANCE)


def _draw_activations(figure: Any) -> None:
    z = torch.linspace(-4, 4, 400, dtype=torch.float64)
    for ax, name in zip(figure.subplots(1, len(_ACTIVATIONS), sharex=True), _ACTIVATIONS, strict=True):
        ax.plot(z, reference.activate(z, name), color=BLUE, label="f")
        ax.plot(z, reference.activation_grad(z, name), color=ORANGE, linestyle="--", label="f'")
        ax.set_ylim(-1.2, 1.6)
        axes(ax, name, "z", "")
    ax.legend(frameon=False)


def run(settings: Settings, recorder: Recorder) -> None:
    """Activations, losses, identities of a layer, shapes, chain rules."""
    for part in (_activations, _losses, _layer_identities, _layer_kernels, _shapes, _chain_rules):
        part(recorder)
    recorder.plots["derivatives"] = _draw_activations
