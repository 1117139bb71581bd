"""The PyTorch quickstart of "Introduction to Neural Networks": ReLU 784-512-512-10, SGD 1e-3, batch 64.

The network has biases and PyTorch's starting weights, the loss is cross-entropy, and the images are not shuffled. The
notebook reports one run; the recipe compares it with the mean over seeds. In the first two epochs the accuracy differs
by many points between seeds, since the network does not yet tell all classes apart. These two epochs are compared with
the range of the seeds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..nn import MLP
from ..step import TrainStep
from ..train import evaluate
from ..train.plots import BLUE, GRAY, ORANGE
from .base import NOTEBOOK, Recorder, Settings, axes, percent

SIZES, LR, BATCH, SEEDS = (784, 512, 512, 10), 1e-3, 64, 5
ACCURACIES = (0.486, 0.554, 0.615, 0.640, 0.651, 0.661)
"""The notebook's test accuracies after epochs 1 to 6."""
LOSSES = (2.163036, 1.900973, 1.528527, 1.254724, 1.087651, 0.980660)
"""The notebook's mean test losses after epochs 1 to 6."""
TOLERANCE, LOSS_TOLERANCE, SETTLED = 0.03, 0.03, 3
STEPS = 30


def model_of(seed: int) -> MLP:
    """The notebook's network with PyTorch's starting weights of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MLP(SIZES, "relu")


def as_the_script(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    """The notebook's own loop: torch modules, autograd and torch.optim.SGD, one pass over the images."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    loss_fn = nn.CrossEntropyLoss()
    dtype = next(model.parameters()).dtype
    for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        loss = loss_fn(model(x.to(dtype) / 255), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _equality(recorder: Recorder, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Some steps in float64, by fastmlp and by the script."""
    images, labels = images[: STEPS * BATCH], labels[: STEPS * BATCH]
    ours, twin = model_of(0).double(), model_of(0).double()
    start = nn.utils.parameters_to_vector(twin.parameters()).detach().clone()
    TrainStep(ours, lr=LR).epoch(images, labels, BATCH)
    as_the_script(twin.to_torch(), images, labels)  # shares the parameters
    fast, slow = (nn.utils.parameters_to_vector(m.parameters()) for m in (ours, twin))
    claim = f"{STEPS} steps change the parameters as its PyTorch script"
    recorder.close(NOTEBOOK, claim, fast - start, slow - start, 1e-13)


def run(settings: Settings, recorder: Recorder) -> None:
    """Equality with the script over some steps, then the six epochs of five seeds (quick: one epoch of one)."""
    train, test = settings.images()
    _equality(recorder, train.images, train.labels)
    if settings.quick:
        model, twin = model_of(0), model_of(0)
        TrainStep(model, lr=LR).epoch(train.images, train.labels, BATCH)
        as_the_script(twin.to_torch(), train.images, train.labels)
        ours, theirs = evaluate(model, test)[0], evaluate(twin, test)[0]
        claim = f"its test loss after an epoch of {len(train):,} images, {theirs:.6f}"
        recorder.close(NOTEBOOK, claim, ours, theirs, 1e-5)
        return

    accuracies, losses = torch.empty(SEEDS, len(ACCURACIES)), torch.empty(SEEDS, len(ACCURACIES))
    for seed in range(SEEDS):
        model = model_of(seed)
        step = TrainStep(model, lr=LR)
        for epoch in range(len(ACCURACIES)):
            settings.progress(f"seed {seed + 1} of {SEEDS}, epoch {epoch + 1} of {len(ACCURACIES)}")
            step.epoch(train.images, train.labels, BATCH)
            losses[seed, epoch], accuracies[seed, epoch] = evaluate(model, test)
    for epoch, (accuracy, loss) in enumerate(zip(ACCURACIES, LOSSES, strict=True)):
        mean, low, high = (accuracies[:, epoch].mean().item(), *(v.item() for v in accuracies[:, epoch].aminmax()))
        obtained = f"{percent(mean)} ({percent(low)} to {percent(high)})"
        claim = f"epoch {epoch + 1}: accuracy {percent(accuracy)} (mean of {SEEDS} seeds)"
        if epoch + 1 < SETTLED:
            good = low - TOLERANCE <= accuracy <= high + TOLERANCE
            recorder.add(NOTEBOOK, claim, obtained, "the range of the seeds, 3 points more", good)
        else:
            recorder.add(NOTEBOOK, claim, obtained, "3 points", abs(mean - accuracy) <= TOLERANCE)
        mean = losses[:, epoch].mean().item()
        good = abs(mean - loss) <= LOSS_TOLERANCE
        recorder.add(NOTEBOOK, f"epoch {epoch + 1}: test loss {loss}", f"{mean:.4f}", f"{LOSS_TOLERANCE}", good)

    def draw(figure: Any) -> None:
        epochs = range(1, len(ACCURACIES) + 1)
        left, right = figure.subplots(1, 2)
        for ax, ours, document in ((left, 100 * accuracies, [100 * a for a in ACCURACIES]), (right, losses, LOSSES)):
            for one in ours:
                ax.plot(epochs, one, color=GRAY, linewidth=0.8)
            ax.plot(epochs, ours.mean(0), "o-", color=BLUE, label=f"fastmlp, mean of {SEEDS} seeds")
            ax.plot(epochs, document, "s--", color=ORANGE, label="the notebook")
            ax.legend(frameon=False)
        axes(left, "ReLU 784-512-512-10, SGD 1e-3, batch 64", "epoch", "test accuracy (%)")
        axes(right, "", "epoch", "test loss")

    recorder.plots["quickstart"] = draw
