"""Linear regression by outer products, of the backpropagation blog post: dL/dW = 2 (W x - y) x^T.

The model is y = W x with the loss L = |W x - y|^2. The blog post's numbers: W is 2x3 of ones, x = (-1, 1, 1),
y = (1, 2), and W -= 0.1 dL/dW ten times, in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..functional import linear_act, mse_loss
from ..train.plots import BLUE
from .base import BLOG, Recorder, Settings, axes, derivative

PRINTED = ("1.0", "0.16000000000000011", "6.871947673606854e-08")
"""What the blog post prints: the first loss, the second and, after dots, the tenth."""
LR, STEPS = 0.1, 10


def losses_of_the_document() -> list[float]:
    """The blog post's loop in numpy, for the seven numbers that it leaves out."""
    w, x, y = np.ones((2, 3)), np.array([-1, 1, 1]), np.array([1, 2])
    losses = []
    for _ in range(STEPS):
        error = w @ x - y
        losses.append(float((error**2).sum()))
        w -= LR * np.outer(2 * error, x)
    return losses


def train() -> tuple[list[float], Tensor, Tensor]:
    """(losses, first gradient, last W) of the same descent through fastmlp's layer and loss."""
    w = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    x, y = torch.tensor([[-1.0, 1.0, 1.0]], dtype=torch.float64), torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    losses, gradients = [], []
    for _ in range(STEPS):
        loss = mse_loss(linear_act(x, w), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, w)
        losses.append(loss.item())
        gradients.append(gradient)
        with torch.no_grad():
            w -= LR * gradient
    return losses, gradients[0], w.detach()


def run(settings: Settings, recorder: Recorder) -> None:
    """Compare the ten losses, and the gradient with the outer product and with differences."""
    losses, gradient, w = train()
    for number, (loss, printed) in enumerate(zip(losses[:2], PRINTED, strict=False), 1):
        recorder.add(BLOG, f"loss {number} prints {printed}", repr(loss), "every digit", repr(loss) == printed)
    ours, document = (torch.tensor(v, dtype=torch.float64) for v in (losses, losses_of_the_document()))
    recorder.close(BLOG, f"loss {STEPS} is {PRINTED[-1]}", ours[-1], float(PRINTED[-1]), 1e-12, relative=True)
    recorder.close(BLOG, "losses 1 to 10 are those of its numpy loop", ours, document, 1e-12, relative=True)
    expected = 0.16 ** torch.arange(STEPS, dtype=torch.float64)
    claim = "each loss is (1 - 0.2 |x|^2)^2 = 0.16 of the one before"
    recorder.close(BLOG, claim, ours, expected, 1e-11, relative=True)

    x, y = torch.tensor([-1.0, 1.0, 1.0]).double(), torch.tensor([1.0, 2.0]).double()
    start = torch.ones(2, 3, dtype=torch.float64)
    recorder.close(BLOG, "dL/dW = 2 (W x - y) x^T", gradient, torch.outer(2 * (start @ x - y), x), 0.0)
    numeric = derivative(lambda w: ((w @ x - y) ** 2).sum(), start)
    recorder.close(BLOG, "dL/dW by differences", gradient, numeric, 1e-10)
    recorder.close(BLOG, "W x reaches y", w @ x, y, 1e-3)

    def draw(figure: Any) -> None:
        ax = figure.subplots()
        ax.semilogy(range(1, STEPS + 1), losses, "o-", color=BLUE)
        axes(ax, "Linear regression by outer products", "step", "squared error")

    recorder.plots["outer-product"] = draw
