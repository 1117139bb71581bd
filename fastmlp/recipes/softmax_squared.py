"""Softmax and squared error on images, of the backpropagation blog post: p = softmax(W x), L = |p - y|^2.

The network is 784-10 without biases. The gradient through the softmax is fused: dZ = 2 p * (d - sum_c p_c d_c) with
d = p - y. The Jacobian dp_i/dz_j, which is p_i (1 - p_i) for i = j and else -p_i p_j, is written out here to compare.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import linear_act, softmax, softmax_squared_error
from ..nn import MLP
from ..step import TrainStep
from ..train import evaluate
from .base import BLOG, Recorder, Settings, axes, curve, derivative, percent

LR, BATCH = 0.5, 64
EPOCHS, LEAST_ACCURACY = 8, 0.80
QUICK_EPOCHS, QUICK_LEAST_ACCURACY = 3, 0.70


def jacobian(p: Tensor) -> Tensor:
    """J[..., i, j] = dp_i/dz_j = p_i ([i = j] - p_j), as the blog post derives it case by case; p [..., C]."""
    return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)


def explicit_gradient(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """dL/dW [10, 784] of one image [784] and one-hot label [10], through the Jacobian as a matrix."""
    p = torch.softmax(w @ x, 0)
    return torch.outer(jacobian(p).t() @ (2 * (p - y)), x)


def run(settings: Settings, recorder: Recorder) -> None:
    """The Jacobian by differences, the fused gradient against it, then training."""
    train, test = settings.images()
    x = train.images[:8].double() / 255
    labels = train.labels[:8]
    one_hot = torch.nn.functional.one_hot(labels, 10).double()
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(10, 784, generator=generator, dtype=torch.float64).div_(28).requires_grad_()

    z = (x @ w.detach().t())[0]
    p = softmax(z)
    recorder.close(BLOG, "softmax sums to 1", p.sum(), 1.0, 1e-15)
    numeric = derivative(softmax, z)  # rows inputs, columns outputs; J is symmetric
    recorder.close(BLOG, "dS_i/dx_j = S_i (1 - S_i) or -S_i S_j by differences", jacobian(p), numeric, 1e-10)

    loss = softmax_squared_error(linear_act(x, w), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, w)
    expected = sum((explicit_gradient(w.detach(), a, b) for a, b in zip(x, one_hot, strict=True)), torch.zeros(()))
    recorder.close(BLOG, "fused dL/dW is that through the explicit Jacobian", gradient, expected, 1e-13)
    numeric = derivative(lambda z: ((torch.softmax(z, 0) - one_hot[0]) ** 2).sum(), z)
    z = z.requires_grad_()
    (dz,) = torch.autograd.grad(softmax_squared_error(z, labels[0]), z)
    recorder.close(BLOG, "dL/dz = 2 J^T (S - y) by differences", dz, numeric, 1e-10)

    model = MLP((784, 10), bias=False, dtype=torch.float64)
    with torch.no_grad():
        model._linears()[0].weight.copy_(w)
    plain = w.detach().clone()
    step = TrainStep(model, lr=LR, loss="softmax_squared_error")
    for image, hot in zip(train.images[:50], torch.nn.functional.one_hot(train.labels[:50], 10).double(), strict=True):
        plain -= LR * explicit_gradient(plain, image.double() / 255, hot)
    for i in range(50):
        step(train.images[i : i + 1], train.labels[i : i + 1])
    claim = "50 training steps are those through the explicit Jacobian"
    recorder.close(BLOG, claim, model._linears()[0].weight, plain, 1e-12)

    torch.manual_seed(0)
    model = MLP((784, 10), bias=False)
    step = TrainStep(model, lr=LR, loss="softmax_squared_error")
    losses: list[Tensor] = []
    for epoch in range(QUICK_EPOCHS if settings.quick else EPOCHS):
        settings.progress(f"epoch {epoch + 1}")
        order = torch.randperm(len(train), generator=generator)
        step.epoch(train.images, train.labels, BATCH, order)
        losses.append(step.losses.clone())
    _, accuracy = evaluate(model, test)
    least = QUICK_LEAST_ACCURACY if settings.quick else LEAST_ACCURACY
    claim = f"784-10 learns (no number given): {len(losses)} epochs, lr {LR}, batch {BATCH}"
    recorder.at_least(BLOG, claim, accuracy, least)

    def draw(figure: Any) -> None:
        ax = figure.subplots()
        curve(ax, torch.cat(losses), BATCH)
        axes(ax, f"softmax(Wx), squared error: {percent(accuracy)}", "training images", "loss")

    recorder.plots["softmax-squared"] = draw
