"""MyBasicNetwork and MyBetterNetwork of "Introduction to Neural Networks": 784-512-512-10, one image at a time.

The basic network has neither biases nor activations; the better one has biases and sigmoid hidden layers. Training is
one pass over the training images in order, with weights N(0, 1/inputs) and learning rate 0.02. The notebook reports
accuracies of about 73 % and 83 %. Every step is exact, by the recurrence of ``fastmlp.online``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..nn import MLP
from ..step import TrainStep
from ..train import evaluate
from .base import NOTEBOOK, Recorder, Settings, axes, curve, percent

SIZES, LR = (784, 512, 512, 10), 0.02
TOLERANCE, SEEDS, STEPS = 0.02, 3, 100
#: By recipe: hidden activation, whether there are biases, the notebook's accuracy, and the least of the quick form.
NETWORKS = {"basic": ("identity", False, 0.73, 0.55), "better": ("sigmoid", True, 0.83, 0.35)}


@torch.no_grad()
def gaussian_(model: MLP, seed: int) -> MLP:
    """Weights N(0, 1/inputs) and biases 0, as the notebook starts; returns ``model``."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model._linears():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / layer.in_features**0.5)
        if layer.bias is not None:
            layer.bias.zero_()
    return model


def as_the_document(model: MLP, images: Tensor, labels: Tensor) -> None:
    """The notebook's update_weights for each image in turn, in float64 and with its formulas written out.

    g3 = softmax(l3) - onehot,  g = (g W_{l+1}) * phi'(lhat_l) down to layer 1,  W_l -= lr g^T l_{l-1},  b_l -= lr g
    """
    weights, biases = [layer.weight.data for layer in model._linears()], [layer.bias for layer in model._linears()]
    for image, label in zip(images, labels.tolist(), strict=True):
        inputs, hats = [image.double().div(255).unsqueeze(0)], []
        for w, b, activation in zip(weights, biases, model.activations, strict=True):
            hats.append(inputs[-1] @ w.t() if b is None else inputs[-1] @ w.t() + b.data)
            inputs.append(reference.activate(hats[-1], activation))
        g = torch.softmax(hats[-1], 1)
        g[0, label] -= 1
        for i in range(len(weights) - 1, -1, -1):
            below = g @ weights[i]
            weights[i].sub_(LR * g.t() @ inputs[i])
            bias = biases[i]
            if bias is not None:
                bias.data.sub_(LR * g[0])
            if i:
                g = below * reference.activation_grad(hats[i - 1], model.activations[i - 1])


def _equality(recorder: Recorder, activation: str, bias: bool, images: Tensor, labels: Tensor) -> None:
    """Some steps in float64, by the recurrence and by the notebook's loop."""
    ours, plain = (gaussian_(MLP(SIZES, activation, bias, dtype=torch.float64), 0) for _ in range(2))
    images, labels = images[:STEPS], labels[:STEPS]
    TrainStep(ours, lr=LR).epoch(images, labels, 1)
    as_the_document(plain, images, labels)
    fast, slow = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (ours, plain))
    recorder.close(NOTEBOOK, f"{STEPS} images one by one: the parameters of its loop (float64)", fast, slow, 1e-10)


def run(settings: Settings, recorder: Recorder) -> None:
    """Equality with the notebook's loop, then one pass and its accuracy."""
    activation, bias, accuracy, quick_least = NETWORKS[recorder.name]
    train, test = settings.images()
    _equality(recorder, activation, bias, train.images, train.labels)
    accuracies, losses = [], torch.empty(0)
    seeds = 1 if settings.quick else SEEDS
    for seed in range(seeds):
        settings.progress(f"seed {seed + 1} of {seeds}")
        model = gaussian_(MLP(SIZES, activation, bias), seed)
        step = TrainStep(model, lr=LR)
        step.epoch(train.images, train.labels, 1)
        accuracies.append(evaluate(model, test)[1])
        losses = step.losses.clone()
    mean = sum(accuracies) / seeds
    if settings.quick:
        recorder.at_least(NOTEBOOK, f"one pass over {len(train):,} images learns", mean, quick_least)
    else:
        claim = f"one pass over 60,000 images: about {100 * accuracy:.0f} % (mean of {seeds} seeds)"
        text = f"{percent(mean)} ({', '.join(map(percent, accuracies))})"
        recorder.add(NOTEBOOK, claim, text, f"{100 * TOLERANCE:.0f} points", abs(mean - accuracy) <= TOLERANCE)

    def draw(figure: Any) -> None:
        ax = figure.subplots()
        count = curve(ax, losses)
        axes(ax, f"{activation} 784-512-512-10, one image per step", "training images", f"loss (mean of {count})")

    recorder.plots[recorder.name] = draw
