"""The exact online recurrence against the plain loop that updates every weight after every sample."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fastmlp import online, reference
from fastmlp.activations import ACTIVATIONS
from fastmlp.online import online_epoch
from tests.support.steps import one_thread  # noqa: F401

COUNT = 75  # samples: no multiple of any block size below but 1
Network = tuple[list[Tensor], list[Tensor | None], list[str]]


@pytest.fixture(params=["in place", "deferred"])
def later_layers(request, monkeypatch):
    """The later layers of this small network take the path of small networks, or a path of large networks."""
    monkeypatch.setattr(online, "SMALL", 10**9 if request.param == "in place" else 0)


def network(sizes: Sequence[int], activations: Sequence[str], *, bias: bool = True, seed: int = 0) -> Network:
    g = torch.Generator().manual_seed(seed)
    weights, biases = [], []
    for n_in, n_out in itertools.pairwise(sizes):
        weights.append(torch.randn(n_out, n_in, generator=g, dtype=torch.float64) / n_in**0.5)
        biases.append(0.1 * torch.randn(n_out, generator=g, dtype=torch.float64) if bias else None)
    return weights, biases, list(activations)


def data(features: int, classes: int, count: int = COUNT) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    x = torch.randn(count, features, generator=g, dtype=torch.float64)
    return x, torch.randint(0, classes, (count,), generator=g)


def copied(net: Network, dtype: torch.dtype = torch.float64) -> Network:
    weights, biases, activations = net
    return (
        [w.to(dtype, copy=True) for w in weights],
        [None if b is None else b.to(dtype, copy=True) for b in biases],
        activations,
    )


def one_by_one(net: Network, x: Tensor, y: Tensor, lr: float | Sequence[float]) -> Tensor:
    """The definition: W_l -= lr dL/dW_l and b_l -= lr dL/db_l after every sample. Returns the mean loss."""
    weights, biases, activations = net
    losses = []
    for j in range(len(y)):
        rate = lr if isinstance(lr, float) else lr[j]
        a, t = reference.mlp(x[j : j + 1], weights, biases, activations), y[j : j + 1]
        losses.append(reference.cross_entropy(a, t))
        da, _ = reference.cross_entropy_backward(torch.ones((), dtype=a.dtype), a, t)
        _, dws, dbs = reference.mlp_backward(da, x[j : j + 1], weights, biases, activations)
        for w, dw in zip(weights, dws, strict=True):
            w -= rate * dw
        for b, db in zip(biases, dbs, strict=True):
            if b is not None:
                b -= rate * db
    return torch.stack(losses).mean()


def parameters(net: Network) -> Tensor:
    return torch.cat([p.flatten().double() for p in [*net[0], *net[1]] if p is not None])


def check(net: Network, x: Tensor, y: Tensor, *, blocks: Sequence[int], lr: float | Sequence[float] = 0.1) -> None:
    """float64 is right to 1e-10. float32 has at most twice the plain loop's error against float64, plus a floor."""
    expected, plain = copied(net), copied(net, torch.float32)
    loss = one_by_one(expected, x, y, lr)
    one_by_one(plain, x.float(), y, lr)
    own = (parameters(plain) - parameters(expected)).abs().max()
    floor = torch.finfo(torch.float32).eps * COUNT**0.5 * parameters(expected).abs().max()
    for block in blocks:
        actual, single = copied(net), copied(net, torch.float32)
        got = online_epoch(*actual, x, y, lr, block=block)
        assert (parameters(actual) - parameters(expected)).abs().max() < 1e-10
        assert got.item() == pytest.approx(loss.item(), rel=1e-12)
        online_epoch(*single, x.float(), y, lr, block=block)
        assert (parameters(single) - parameters(expected)).abs().max() <= 2 * own + floor
    if net[2][-1] != "step":
        assert (parameters(expected) - parameters(net)).abs().max() > 1e-3, "nothing was learned"


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("sizes", [(13, 5), (13, 9, 5), (13, 9, 11, 5), (6, 7, 8, 9, 4)], ids=str)
def test_equals_one_by_one(later_layers, sizes, bias):
    net = network(sizes, [*("sigmoid", "tanh", "silu")[: len(sizes) - 2], "identity"], bias=bias)
    check(net, *data(sizes[0], sizes[-1]), blocks=(1, 7, 32, 64, 100))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_in_every_place(later_layers, activation):
    check(network((13, 9, 11, 5), [activation] * 3), *data(13, 5), blocks=[16])
    check(network((13, 9, 11, 5), [activation, activation, "identity"], bias=False), *data(13, 5), blocks=[16])


def test_the_reference_network():
    """784-512-512-10 on pixels, with the kinds of layers that this network really takes."""
    g = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (COUNT, 784), generator=g, dtype=torch.uint8)
    labels = torch.randint(0, 10, (COUNT,), generator=g)
    net = network((784, 512, 512, 10), ["sigmoid", "sigmoid", "identity"])
    expected, actual = copied(net), copied(net)
    one_by_one(expected, pixels.double() / 255, labels, 0.02)
    online_epoch(*actual, pixels, labels, 0.02)
    assert (parameters(actual) - parameters(expected)).abs().max() < 1e-10


def test_one_step_size_for_every_step(later_layers):
    rates = [0.2 / (1 + j) for j in range(COUNT)]
    check(network((13, 9, 5), ["sigmoid", "identity"]), *data(13, 5), blocks=[8], lr=rates)


def test_order_may_leave_out_and_repeat_rows():
    x, y = data(13, 5)
    order = torch.tensor([3, 70, 3, 3, 0, 12, 70, 1, 2])
    net = network((13, 9, 5), ["relu", "identity"])
    expected, actual = copied(net), copied(net)
    one_by_one(expected, x[order], y[order], 0.1)
    online_epoch(*actual, x, y, 0.1, order=order, block=4)
    assert (parameters(actual) - parameters(expected)).abs().max() < 1e-10


def test_parameters_keep_their_memory_and_layout():
    x, y = data(13, 5)
    net = network((13, 9, 5), ["relu", "identity"])
    expected = copied(net)
    online_epoch(*expected, x, y, 0.1)
    strided = torch.zeros(13, 9, dtype=torch.float64).t()
    strided.copy_(net[0][0])
    online_epoch([strided, net[0][1]], net[1], net[2], x, y, 0.1)
    assert strided.stride() == (1, 9)
    assert torch.equal(strided, expected[0][0])


def test_module_parameters_off_the_tape():
    x, y = data(13, 5)
    net = network((13, 9, 5), ["relu", "identity"])
    weights = [torch.nn.Parameter(w.clone()) for w in net[0]]
    online_epoch(weights, net[1], net[2], x, y, 0.1)
    assert all(w.grad is None and w.grad_fn is None for w in weights)
    assert not torch.equal(weights[0], net[0][0])


def test_no_steps():
    x, y = data(13, 5)
    net = network((13, 9, 5), ["relu", "identity"])
    actual = copied(net)
    assert online_epoch(*actual, x[:0], y[:0], 0.1).isnan()
    assert torch.equal(parameters(actual), parameters(net))


def test_a_layer_that_is_used_twice():
    x, y = data(9, 9)
    weights, biases, activations = network((9, 9, 9), ["relu", "identity"])
    with pytest.raises(ValueError, match=r"weights\[0\] and weights\[1\] are one tensor"):
        online_epoch([weights[0]] * 2, biases, activations, x, y, 0.1)


def test_weights_between_each_other():
    """Strided views of one tensor lie apart."""
    x, y = data(9, 9)
    both = torch.randn(9, 18, dtype=torch.float64)
    weights, activations = [both[:, ::2], both[:, 1::2]], ["relu", "identity"]
    expected = [weight.clone() for weight in weights]
    online_epoch(expected, [None, None], activations, x, y, 0.1)
    online_epoch(weights, [None, None], activations, x, y, 0.1)
    assert all(map(torch.equal, weights, expected))


def test_two_runs_are_equal():
    x, y = data(13, 5)
    net = network((13, 9, 5), ["sigmoid", "identity"])
    runs = [copied(net, torch.float32) for _ in range(2)]
    for run in runs:
        online_epoch(*run, x.float(), y, 0.1)
    assert torch.equal(parameters(runs[0]), parameters(runs[1]))


FLAT = torch.zeros(145, dtype=torch.float64)
ERRORS = [
    ({"block": 0}, ValueError, "block"),
    ({"activations": ["relu"]}, ValueError, "as many weights"),
    ({"activations": ["relu", "softmax"]}, ValueError, "softmax"),
    ({"lr": [0.1, 0.2]}, ValueError, "one for each of the 75"),
    ({"labels": torch.full((COUNT,), 5)}, IndexError, "from 0 to 4"),
    ({"labels": torch.zeros(COUNT)}, RuntimeError, "integer labels"),
    ({"labels": torch.zeros(3, dtype=torch.int64)}, RuntimeError, r"\[3\]"),
    ({"images": torch.zeros(COUNT, 12, dtype=torch.float64)}, RuntimeError, "13 features"),
    ({"images": torch.zeros(COUNT, 13)}, RuntimeError, "same dtype"),
    ({"images": [[1.0]]}, TypeError, "images"),
    ({"order": torch.tensor([75])}, IndexError, "75"),
    ({"order": torch.tensor([0, -1])}, IndexError, "from -1 to 0"),
    ({"order": torch.tensor([0.5])}, RuntimeError, "int64"),
    ({"weights": [torch.zeros(9, 13).bfloat16(), torch.zeros(5, 9)]}, RuntimeError, "float32 or float64"),
    ({"weights": [torch.zeros(9, 13).double(), torch.zeros(5, 8).double()]}, RuntimeError, r"out_features, 9\]"),
    (
        {"weights": [FLAT[:117].view(9, 13), FLAT[100:145].view(5, 9)]},
        ValueError,
        r"weights\[0\] and weights\[1\] are one",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=lambda v: str(v)[:30])
def test_errors_leave_the_parameters_alone(change, error, message):
    x, y = data(13, 5)
    net = network((13, 9, 5), ["relu", "identity"])
    weights, biases, activations = copied(net)
    if "weights" in change:
        biases = [None, None]
    arguments = {"weights": weights, "biases": biases, "activations": activations, "images": x, "labels": y}
    with pytest.raises(error, match=message):
        online_epoch(**{**arguments, "lr": 0.1, **change})
    assert all(torch.equal(a, b) for a, b in zip(weights, net[0], strict=True))
