"""What "Explanatory Notes for 6.390" says of its algorithm, checked: gradients, special cases, training."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..train import evaluate
from ..train.plots import ORANGE
from .base import NOTES, Recorder, Settings, axes, curve, derivative, percent
from .sgd_neural_net import ACTIVATIONS, ELEMENTWISE, LOSSES, loss_and_gradients, sgd_neural_net

Network = tuple[list[Tensor], list[Tensor], tuple[str, ...]]
TOLERANCE = 1e-8
STEPS, LEAST_ACCURACY = 30_000, 0.80
QUICK_STEPS, QUICK_LEAST_ACCURACY = 3_000, 0.65


def valid_pairs() -> list[tuple[str, str]]:
    """Every pair (last activation, loss) for which the loss has a value."""
    allowed = {"nll": ("sigmoid", "softmax"), "nllm": ("softmax",)}
    return [(f, loss) for f, loss in itertools.product(ACTIVATIONS, LOSSES) if f in allowed.get(loss, ACTIVATIONS)]


def network(sizes: tuple[int, ...], activations: tuple[str, ...], seed: int = 0) -> Network:
    """Gaussian weights and biases in float64."""
    g = torch.Generator().manual_seed(seed)
    pairs = list(itertools.pairwise(sizes))
    weights = [torch.randn(n, m, generator=g, dtype=torch.float64) / m**0.5 for m, n in pairs]
    biases = [0.5 * torch.randn(n, generator=g, dtype=torch.float64) for _, n in pairs]
    return weights, biases, activations


def plain_loss(net: Network, loss: str, x: Tensor, y: Tensor) -> Tensor:
    """The forward pass and the loss alone, through A^L, without any code of the backward pass."""
    a = x
    for w, b, f in zip(*net, strict=True):
        z = a @ w.t() + b
        a = torch.softmax(z, 1) if f == "softmax" else reference.activate(z, f)
    return reference.elementwise_loss(a, y, ELEMENTWISE[loss]).sum()


def gradient_error(net: Network, loss: str, x: Tensor, y: Tensor) -> float:
    """The largest difference between back-propagation and differences of the loss, over all weights and biases."""
    weights, biases, activations = net
    _, dws, dbs = loss_and_gradients(weights, biases, activations, loss, x, y)
    parameters, worst = [*weights, *biases], 0.0
    for i, (parameter, analytic) in enumerate(zip(parameters, [*dws, *dbs], strict=True)):

        def of(p: Tensor, i: int = i) -> Tensor:
            changed = [*parameters[:i], p, *parameters[i + 1 :]]
            return plain_loss((changed[: len(weights)], changed[len(weights) :], activations), loss, x, y)

        worst = max(worst, (analytic - derivative(of, parameter)).abs().max().item())
    return worst


def target(loss: str, outputs: int) -> Tensor:
    """A target [1, outputs] that the loss is defined for."""
    if loss in ("square", "linear"):
        return torch.linspace(-0.7, 1.3, outputs, dtype=torch.float64).unsqueeze(0)
    y = torch.zeros(1, outputs, dtype=torch.float64)
    y[0, 0] = 1
    return y


def _gradients(recorder: Recorder) -> None:
    x = torch.tensor([[0.3, -1.2, 0.8]], dtype=torch.float64)
    for loss in LOSSES:
        last = [f for f, name in valid_pairs() if name == loss]
        worst, count = 0.0, 0
        for f, hidden in itertools.product(last, ACTIVATIONS):
            net = network((3, 4, 3, 2), (hidden, "tanh", f), seed=count)
            worst, count = max(worst, gradient_error(net, loss, x, target(loss, 2))), count + 1
        claim = f"{loss} after {', '.join(last)}: all dL/dW, dL/dW0 by differences ({count} networks)"
        recorder.close(NOTES, claim, worst, 0.0, TOLERANCE)
    worst = 0.0
    for depth in range(1, 6):
        net = network((3, *[2 + i for i in range(depth)]), ("sigmoid",) * depth, seed=depth)
        worst = max(worst, gradient_error(net, "square", x, target("square", depth + 1)))
    recorder.close(NOTES, "any number of layers: 1 to 5", worst, 0.0, TOLERANCE)


def _single_neuron(recorder: Recorder) -> None:
    """The LLC as a neuron: g = sigma(w^T x + w0), NLL, dL/dw = (g - y) x."""
    x, w, w0 = torch.tensor([[0.4, -1.1, 2.0]]).double(), torch.tensor([[0.2, 0.7, -0.3]]).double(), torch.tensor([0.1])
    net: Network = ([w], [w0.double()], ("sigmoid",))
    for y in (0.0, 1.0):
        hot = torch.tensor([[y]]).double()
        _, (dw,), (db,) = loss_and_gradients(*net, "nll", x, hot)
        g = torch.sigmoid(x @ w.t() + w0.double())[0]
        # (7.7) with the minus sign that the NLL has in (7.49): -(y/g - (1-y)/(1-g)) g (1-g) x.
        chain = -(y / g - (1 - y) / (1 - g)) * g * (1 - g)
        recorder.close(NOTES, f"single neuron, y = {y:.0f}: dL/dw is the chain rule (7.7)", dw, chain * x, 1e-15)
        recorder.close(NOTES, f"single neuron, y = {y:.0f}: dL/dw0 = g - y", db, g - y, 1e-15)
        recorder.close(NOTES, "and by differences", gradient_error(net, "nll", x, hot), 0.0, TOLERANCE)

    generator = torch.Generator().manual_seed(0)
    points = torch.randn(200, 2, generator=generator, dtype=torch.float64)
    side = points @ torch.tensor([2.0, -1.0]).double() + 0.3
    points, labels = points[side.abs() > 0.2], (side[side.abs() > 0.2] > 0).double()
    result = sgd_neural_net(points, labels, (2, 1), ("sigmoid",), "nll", steps=2_000, step_size=0.5)
    right = ((result.model(points)[:, 0] > 0.5) == (labels > 0.5)).double().mean().item()
    claim = "single neuron separates two linearly separable classes"
    recorder.add(NOTES, claim, percent(right), "100 %", right == 1.0)


def _two_neurons(recorder: Recorder) -> None:
    """Two neurons in a chain, one weight each: (7.17) with the factors of notation 12."""
    x, y = torch.tensor([[0.7]]).double(), torch.tensor([[0.2]]).double()
    net = network((1, 1, 1), ("tanh", "sigmoid"), seed=3)
    weights, biases, _ = net
    _, dws, dbs = loss_and_gradients(*net, "square", x, y)
    z1 = weights[0] * x + biases[0]
    a1 = torch.tanh(z1)
    z2 = weights[1] * a1 + biases[1]
    a2 = torch.sigmoid(z2)
    loss_unit, layer2, layer1 = 2 * (a2 - y), a2 * (1 - a2), 1 - a1**2
    recorder.close(NOTES, "two neurons: dL/dw2 is (7.11)", dws[1], loss_unit * layer2 * a1, 1e-15)
    expected = loss_unit * (layer2 * weights[1]) * (layer1 * x)
    recorder.close(NOTES, "two neurons: dL/dw1 is (7.17)", dws[0], expected, 1e-15)
    recorder.close(NOTES, "two neurons: dL/dw1_0", dbs[0], (loss_unit * layer2 * weights[1] * layer1)[0], 1e-15)
    recorder.close(NOTES, "and by differences", gradient_error(net, "square", x, y), 0.0, TOLERANCE)


def _direct(recorder: Recorder) -> None:
    """Concept 50: dL/dZ^L directly, compared with the product of two factors, and where the product fails."""
    z, y = torch.tensor([[0.5, -1.0, 2.0]]).double(), torch.tensor([[0.0, 1.0, 0.0]]).double()
    p, s = torch.softmax(z, 1), torch.sigmoid(z)
    factors = reference.softmax_backward(reference.elementwise_loss_grad(p, y, "nllm"), p)
    claim = "concept 50: softmax and NLLM, dL/dZ = A - Y is the product of factors"
    recorder.close(NOTES, claim, p - y, factors, 1e-14)
    factors = reference.elementwise_loss_grad(s, y, "binary_cross_entropy") * s * (1 - s)
    recorder.close(NOTES, "concept 50: sigmoid and NLL, dL/dZ = A - Y is the product of factors", s - y, factors, 1e-14)
    far = torch.tensor([[60.0, -60.0]])
    eye, zero = torch.eye(2), torch.zeros(2)
    value, _, (db,) = loss_and_gradients([eye], [zero], ("sigmoid",), "nll", far, torch.tensor([[0.0, 1.0]]))
    good = torch.equal(db, torch.tensor([1.0, -1.0])) and math.isclose(value.item(), 120.0)
    a = torch.sigmoid(far[0, 0])  # 1 in float32: the factors give 0 times a huge number
    lost = (reference.elementwise_loss_grad(a, torch.tensor(0.0), "binary_cross_entropy") * a * (1 - a)).item()
    obtained = f"{db[0].item():g} (factors: {lost:g})"
    recorder.add(NOTES, "concept 50: at z = 60 in float32 dL/dZ is still 1", obtained, "exact", good and lost == 0.0)


def _initialization(recorder: Recorder) -> None:
    """Concepts 1 and 51: with zero weights all hidden neurons stay alike, with Gaussian weights they do not."""
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]).double()
    y = torch.tensor([0.0, 1.0, 1.0, 0.0]).double()
    train = partial(sgd_neural_net, x, y, (2, 4, 1), ("tanh", "sigmoid"), "nll", step_size=0.3)
    zero = train(steps=500, init_std=0.0).model._linears()[0].weight
    spread = (zero - zero[0]).abs().max().item()
    claim = "concept 51: zero weights leave all hidden neurons alike"
    recorder.add(NOTES, claim, f"spread {spread:g}", "0", spread == 0)
    result = train(steps=6_000, seed=1, init_std=1.0)
    found = (result.model(x)[:, 0] > 0.5).double()
    right = (found == y).double().mean().item()
    recorder.add(NOTES, "Gaussian weights: 2-4-1 learns exclusive or", percent(right), "100 %", right == 1.0)

    reached = train(steps=6_000, seed=1, init_std=1.0, stop=lambda t, value: t >= 70)
    steps = len(reached.losses)
    recorder.add(NOTES, "the termination condition ends it", f"{steps} steps", "70", reached.stopped and steps == 70)
    same = torch.equal(reached.losses, result.losses[:70])
    recorder.add(NOTES, "one seed, one sequence of data points", "equal" if same else "different", "bitwise", same)


def _step_sizes(recorder: Recorder) -> None:
    """With eta(t) = 1/(2t), linear regression on one feature is the running mean."""
    y = torch.tensor([3.0, -1.0, 2.0, 0.5]).double()
    x = torch.zeros(4, 1).double()  # only the bias is left: b_t = b - (1/2t) 2 (b - y_i) is the mean of the y drawn
    result = sgd_neural_net(
        x, y, (1, 1), ("identity",), "square", steps=400, step_size=lambda t: 0.5 / t, seed=4, init_std=0.0
    )
    generator = torch.Generator().manual_seed(4)
    for size in ((1, 1), (1,)):
        torch.randn(size, generator=generator)
    drawn = y[torch.randint(4, (400,), generator=generator)]
    claim = "eta(t) = 1/(2t): the bias is the mean of the data drawn"
    recorder.close(NOTES, claim, result.model._linears()[0].bias, drawn.mean().view(1), 1e-12)


def _images(settings: Settings, recorder: Recorder) -> None:
    train, test = settings.images()
    steps = QUICK_STEPS if settings.quick else STEPS
    settings.progress(f"{steps:,} random images")
    sizes, activations = (784, 64, 32, 10), ("relu", "tanh", "softmax")

    def eta(t: int) -> float:
        return 0.02 / (1 + 9 * t / steps)  # with one image per step, only small last steps settle

    result = sgd_neural_net(train.images, train.labels, sizes, activations, "nllm", steps=steps, step_size=eta)
    _, accuracy = evaluate(result.model, test)
    least = QUICK_LEAST_ACCURACY if settings.quick else LEAST_ACCURACY
    claim = f"784-64-32-10, relu, tanh, softmax, NLLM, {steps:,} random images: learns (no number given)"
    recorder.at_least(NOTES, claim, accuracy, least)

    def draw(figure: Any) -> None:
        ax = figure.subplots()
        count = curve(ax, result.losses)
        axes(ax, "SGD-NEURAL-NET, " + "-".join(map(str, sizes)), "step", f"loss (mean of {count})")
        ax.axhline(math.log(10), color=ORANGE, linestyle="--", label="log 10: knows nothing")
        ax.legend(frameon=False)

    recorder.plots["sgd-neural-net"] = draw


def run(settings: Settings, recorder: Recorder) -> None:
    """Gradients of every pair, special cases, concept 50, initialization, step sizes, training on images."""
    for part in (_gradients, _single_neuron, _two_neurons, _direct, _initialization, _step_sizes):
        part(recorder)
    _images(settings, recorder)
