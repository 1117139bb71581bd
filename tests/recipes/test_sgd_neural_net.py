"""fastmlp.recipes.sgd_neural_net: the algorithm of "Explanatory Notes for 6.390", its arguments and its errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastmlp
from fastmlp.recipes.sgd_checks import gradient_error, network, target, valid_pairs
from fastmlp.recipes.sgd_neural_net import ACTIVATIONS, LOSSES, loss_and_gradients, sgd_neural_net
from tests.support.steps import one_thread  # noqa: F401

X = torch.tensor([[0.0, 0.5, -1.0], [1.0, -0.5, 0.25], [2.0, 1.5, 0.0], [-1.0, 1.0, 1.0]], dtype=torch.float64)
LABELS = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
ARGUMENTS = {"x": X, "y": LABELS, "sizes": (3, 4, 1), "activations": ("tanh", "sigmoid"), "loss": "nll", "steps": 20}


def train(**change):
    arguments = {**ARGUMENTS, **change}
    return sgd_neural_net(**arguments)


@pytest.mark.parametrize("hidden", ACTIVATIONS)
@pytest.mark.parametrize(("last", "loss"), valid_pairs())
def test_gradients_by_differences(last, loss, hidden):
    x = torch.tensor([[0.3, -1.2, 0.8]], dtype=torch.float64)
    assert gradient_error(network((3, 4, 2), (hidden, last), seed=5), loss, x, target(loss, 2)) < 1e-8


def test_a_batch_is_the_sum_of_its_points():
    weights, biases, activations = network((3, 4, 2), ("tanh", "softmax"))
    y = torch.eye(2, dtype=torch.float64)[[0, 1, 1, 0]]
    value, dws, dbs = loss_and_gradients(weights, biases, activations, "nllm", X, y)
    parts = [loss_and_gradients(weights, biases, activations, "nllm", X[i : i + 1], y[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(value, torch.stack([part[0] for part in parts]).sum())
    for layer in range(2):
        torch.testing.assert_close(dws[layer], torch.stack([part[1][layer] for part in parts]).sum(0))
        torch.testing.assert_close(dbs[layer], torch.stack([part[2][layer] for part in parts]).sum(0))


@pytest.mark.parametrize("loss", LOSSES)
def test_autograd_agrees(loss):
    """The same network and loss on the tape of fastmlp.MLP."""
    last = "softmax" if loss == "nllm" else "sigmoid"
    weights, biases, activations = network((3, 4, 2), ("relu", last))
    model = fastmlp.MLP((3, 4, 2), activations, dtype=torch.float64)
    with torch.no_grad():
        for layer, w, b in zip(model._linears(), weights, biases, strict=True):
            layer.weight.copy_(w)
            layer.bias.copy_(b)
    y = target(loss, 2)
    functions = {
        "square": fastmlp.functional.mse_loss,
        "linear": fastmlp.functional.l1_loss,
        "nll": fastmlp.functional.bce_loss,
        "nllm": fastmlp.functional.multiclass_nll,
    }
    functions[loss](model(X[:1]), y, reduction="sum").backward()
    _, dws, dbs = loss_and_gradients(weights, biases, activations, loss, X[:1], y)
    for layer, dw, db in zip(model._linears(), dws, dbs, strict=True):
        torch.testing.assert_close(layer.weight.grad, dw)
        torch.testing.assert_close(layer.bias.grad, db)


def test_one_step_by_hand():
    """x = 2, y = 1, identity, square loss: w -= eta 2 (w x + w0 - y) x."""
    x, y = torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    before = sgd_neural_net(x, y, (1, 1), ("identity",), "square", steps=0, seed=3)
    after = sgd_neural_net(x, y, (1, 1), ("identity",), "square", steps=1, seed=3, step_size=0.1)
    w, b = (p.item() for p in before.model.parameters())
    slope = 2 * (2 * w + b - 1)
    expected = [w - 0.1 * slope * 2, b - 0.1 * slope]
    assert [p.item() for p in after.model.parameters()] == pytest.approx(expected, rel=1e-12)
    assert after.losses.tolist() == pytest.approx([(2 * w + b - 1) ** 2])
    assert before.losses.shape == (0,)


class TestControls:
    def test_seeds(self):
        assert torch.equal(train(seed=1).losses, train(seed=1).losses)
        assert not torch.equal(train(seed=1).losses, train(seed=2).losses)

    def test_eta_of_t_counts_from_one(self):
        seen: list[int] = []

        def eta(t: int) -> float:
            seen.append(t)
            return 0.1

        assert torch.equal(train(step_size=eta).losses, train(step_size=0.1).losses)
        assert seen == list(range(1, 21))

    def test_termination(self):
        seen: list[tuple[int, float]] = []

        def stop(t: int, loss: float) -> bool:
            seen.append((t, loss))
            return t == 7

        result = train(stop=stop)
        assert result.stopped
        assert [t for t, _ in seen] == list(range(1, 8))
        assert [loss for _, loss in seen] == result.losses.tolist()
        assert not train().stopped

    def test_gaussian_starting_values(self):
        model = train(sizes=(3, 500, 1), steps=0, init_std=0.2).model
        for parameter in (model._linears()[0].weight, model._linears()[1].weight, model._linears()[0].bias):
            assert parameter.std().item() == pytest.approx(0.2, rel=0.15)
            assert abs(parameter.mean().item()) < 0.05
        weight = train(sizes=(3, 500, 1), steps=0).model._linears()[1].weight
        assert weight.std().item() == pytest.approx(500**-0.5, rel=0.15)

    def test_pixels_labels_and_dtypes(self):
        pixels = torch.randint(0, 256, (30, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(30) % 3
        result = sgd_neural_net(pixels, labels, (12, 5, 3), ("relu", "softmax"), "nllm", steps=10)
        assert next(result.model.parameters()).dtype == torch.float32
        one_hot = torch.nn.functional.one_hot(labels, 3)
        same = sgd_neural_net(pixels.float() / 255, one_hot, (12, 5, 3), ("relu", "softmax"), "nllm", steps=10)
        torch.testing.assert_close(result.losses, same.losses)
        assert train().losses.dtype == torch.float64

    def test_the_arguments_stay_as_they_are(self):
        x, y = X.clone(), LABELS.clone()
        train(x=x, y=y)
        assert torch.equal(x, X)
        assert torch.equal(y, LABELS)

    def test_step_layers_pass_nothing_on(self):
        start, end = train(activations=("step", "sigmoid"), steps=0), train(activations=("step", "sigmoid"))
        first = [result.model._linears()[0].weight for result in (start, end)]
        assert torch.equal(*first)
        assert not torch.equal(*(result.model._linears()[1].weight for result in (start, end)))


ERRORS: list[tuple[dict, type[Exception], str]] = [
    ({"activations": ("tanh", "gelu")}, ValueError, "'gelu'; expected one of step, relu"),
    ({"activations": "sigmoid"}, ValueError, "unknown activation 's'"),
    ({"activations": ("sigmoid",)}, ValueError, "one activation for each layer"),
    ({"loss": "hinge"}, ValueError, "'hinge'; expected one of square, linear, nll, nllm"),
    ({"loss": "nll", "activations": ("tanh", "relu")}, ValueError, "relu gives values that have none; use sigmoid"),
    ({"loss": "nll", "activations": ("tanh", "step")}, ValueError, "step gives values"),
    ({"loss": "nllm"}, ValueError, "at least two classes, got sigmoid and 1"),
    ({"loss": "nllm", "activations": ("tanh", "softmax")}, ValueError, "got softmax and 1"),
    ({"y": LABELS * 2}, ValueError, "targets 0 and 1, got 2"),
    ({"y": LABELS + 0.5}, ValueError, r"targets 0 and 1, got 0\.5"),
    ({"y": LABELS / 0, "loss": "square"}, ValueError, "not finite"),
    ({"y": torch.ones(4, 2)}, RuntimeError, r"y of shape \[4, 1\], got \[4, 2\]"),
    ({"x": X[:, :2]}, RuntimeError, r"x of shape \[n, 3\]"),
    ({"x": X[:0]}, RuntimeError, "at least 1"),
    ({"x": X.half()}, RuntimeError, "float32, float64 or uint8"),
    ({"x": X.tolist()}, TypeError, "expected x to be"),
    ({"steps": -1}, ValueError, "at least 0 steps"),
    ({"step_size": 0.0}, ValueError, r"eta\(1\) = 0\.0"),
    ({"step_size": lambda t: 1.0 if t < 5 else math.nan}, ValueError, r"eta\(5\) = nan"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=lambda value: str(value)[:40])
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        train(**change)


class TestMulticlassTargets:
    ARGUMENTS = ((3, 4, 2), ("tanh", "softmax"), "nllm")

    def test_distributions(self):
        y = torch.tensor([[0.25, 0.75]] * 4)
        assert sgd_neural_net(X, y, *self.ARGUMENTS, steps=3).losses.isfinite().all()

    @pytest.mark.parametrize("y", [torch.tensor([[0.5, 0.6]] * 4), torch.tensor([[-0.5, 1.5]] * 4)])
    def test_no_distributions(self, y: Tensor):
        with pytest.raises(ValueError, match="distributions"):
            sgd_neural_net(X, y, *self.ARGUMENTS, steps=3)

    def test_class_numbers(self):
        with pytest.raises(ValueError, match="class numbers from 0 to 1, got 0 to 2"):
            sgd_neural_net(X, torch.tensor([0, 1, 2, 0]), *self.ARGUMENTS, steps=3)


def test_a_diverging_loss_is_an_error():
    with pytest.raises(FloatingPointError, match=r"the loss of step \d+ is (inf|nan); use a smaller step_size"):
        train(loss="square", activations=("identity", "identity"), step_size=100.0, steps=2_000)


def test_on_the_kernels(lane):
    """The whole algorithm on the Triton backend, against plain torch."""
    x, y = X.float(), torch.tensor([0, 1, 1, 0])
    arguments = ((3, 4, 5, 2), ("tanh", "softmax", "softmax"), "nllm")
    with fastmlp.use_backend("triton"):
        ours = sgd_neural_net(x.to(lane), y.to(lane), *arguments, steps=4, step_size=0.3)
    plain = sgd_neural_net(x, y, *arguments, steps=4, step_size=0.3)
    torch.testing.assert_close(ours.losses.cpu(), plain.losses)
    for a, b in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a.detach().cpu(), b.detach())
