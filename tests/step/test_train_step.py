"""TrainStep on plain torch against autograd and torch.optim: optimizers, activations, losses, shapes, inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmlp
from fastmlp.activations import ACTIVATIONS
from fastmlp.base.losses import STEP_LOSSES
from tests.support.steps import (
    LION_IN_SMALL_STEPS,
    Reference,
    assert_run_within_budget,
    batches,
    check_against_torch,
    check_float64,
    converted,
    flat,
    float32_run,
    for_step,
    network,
    one_thread,  # noqa: F401
    problem,
)
from tests.support.torchs import OPTIMIZERS

SIZES = (13, 17, 11, 5)
STEPS = 100


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(name):
    check_against_torch(network(SIZES), batches(*problem(SIZES, 70), 24, STEPS), OPTIMIZERS[name])


def test_roundings_of_lion_do_not_add_up():
    """Parameters that move by the bare learning rate are rounded to the same side at every step."""
    check_against_torch(*LION_IN_SMALL_STEPS)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, optimizer):
    check_against_torch(network(SIZES, activation), batches(*problem(SIZES, 70), 24, STEPS), OPTIMIZERS[optimizer])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_after_the_last_layer(activation):
    model = network(SIZES, ["tanh", "sigmoid", activation])
    data = batches(*problem(SIZES, 70), 24, 30)
    if activation == "step":  # nothing to learn from: its derivative is 0
        step = fastmlp.TrainStep(model, lr=0.3)
        before = flat(model)
        assert step(*data[0]).isfinite()
        assert torch.equal(flat(model), before)
    else:
        check_against_torch(model, data, OPTIMIZERS["sgd"])


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("loss", STEP_LOSSES)
def test_every_loss(loss, optimizer):
    data = batches(*problem(SIZES, 70, loss=loss), 24, STEPS)
    check_against_torch(network(SIZES), data, OPTIMIZERS[optimizer], loss=loss)


@pytest.mark.parametrize("loss", STEP_LOSSES)
def test_losses_of_large_outputs(loss):
    """Exponentials of logits of several hundred overflow when they are not taken with care."""
    x, y = problem((3, 4), 6, loss=loss)
    model = network((3, 4))
    with torch.no_grad():
        model.layers[0].bias.add_(300)
    check_against_torch(model, [(x, y)], {"lr": 10.0}, loss=loss)


@pytest.mark.parametrize("classes", [2, 10, 15, 16, 100])
def test_losses_of_long_batches(classes):
    """With few classes and many rows log-softmax runs along the columns."""
    x, y = problem((5, classes), 700)
    data = [(x[:rows], y[:rows]) for rows in (700, 512, 511, 700)]
    check_against_torch(network((5, classes)), data, {"lr": 1.0})


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    "sizes", [(7, 3), (1, 1, 2), (5, 1, 3), (13, 9, 10), (6, 7, 8, 9, 10, 4), (33, 65, 17, 2)], ids=str
)
def test_every_depth(sizes, bias, optimizer):
    """Eight networks with few parameters share the budget of float32, because a handful of roundings depend on luck."""
    runs = []
    for seed in range(8 if sum(sizes) <= 10 else 1):
        data = batches(*problem(sizes, 40, seed=seed + 1), 17, 30)
        start = check_float64(network(sizes, "tanh", bias=bias, seed=seed), data, OPTIMIZERS[optimizer])
        *run, steps = float32_run(start, data, OPTIMIZERS[optimizer])
        runs.append(run)
    assert_run_within_budget(*map(torch.cat, zip(*runs, strict=True)), steps, torch.finfo(torch.float32).eps)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=5).map(tuple),
    activation=st.sampled_from(tuple(ACTIVATIONS)),
    rows=st.integers(1, 70),
    bias=st.booleans(),
    loss=st.sampled_from(list(STEP_LOSSES)),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    uint8=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_network(sizes, activation, rows, bias, loss, optimizer, uint8):
    """Three steps in float64, where the same sums in another order are equal to 1e-10."""
    model = network(sizes, activation, bias=bias)
    data = batches(*problem(sizes, rows, loss=loss, uint8=uint8), rows, 3)
    expected = Reference(model, OPTIMIZERS[optimizer], loss).train(data)
    step = fastmlp.TrainStep(model, loss=loss, **OPTIMIZERS[optimizer])
    for x, y in data:
        step(x, y)
    assert (flat(model) - expected.flat()).norm() <= 1e-10 * expected.flat().norm()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_reference_network(optimizer):
    """784-512-512-10 on pixels."""
    sizes = (784, 512, 512, 10)
    data = batches(*problem(sizes, 96, uint8=True), 64, 4)
    # AdamW divides by the gradient. With its usual eps, luck in rounding the smallest gradients decides the error.
    settings = OPTIMIZERS[optimizer] | ({"eps": 1e-3} if optimizer == "adamw" else {})
    check_against_torch(network(sizes), data, settings)


FROZEN = {
    "a weight": ["layers.1.weight"],
    "a bias": ["layers.1.bias"],
    "all biases": ["layers.0.bias", "layers.1.bias", "layers.2.bias"],
    "all weights": ["layers.0.weight", "layers.1.weight", "layers.2.weight"],
    "the lowest layer": ["layers.0.weight", "layers.0.bias"],
    "all but the last": ["layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"],
    "the last layer": ["layers.2.weight", "layers.2.bias"],
    "all but one bias": [
        "layers.0.weight",
        "layers.0.bias",
        "layers.1.weight",
        "layers.2.weight",
        "layers.2.bias",
    ],
}


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov"])
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parameters(frozen, optimizer):
    model = network(SIZES)
    for name in FROZEN[frozen]:
        model.get_parameter(name).requires_grad_(False)
    before = {name: model.get_parameter(name).clone() for name in FROZEN[frozen]}
    check_against_torch(model, batches(*problem(SIZES, 70), 24, 30), OPTIMIZERS[optimizer])
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())


def test_pixels_are_divided_by_255():
    model = network(SIZES)
    twin = converted(model, torch.float64)
    x, y = problem(SIZES, 24, uint8=True)
    loss = fastmlp.TrainStep(model, lr=0.3)(x, y)
    expected = fastmlp.TrainStep(twin, lr=0.3)(x.double() / 255, y)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-12, atol=1e-14)


def test_strided_and_many_dimensional_inputs():
    """Columns of a larger tensor, a transposed tensor, an image of several dimensions, labels with gaps."""
    x, y = problem((12, 3), 24)
    results = []
    wide = torch.full((24, 20), float("nan"), dtype=torch.float64)
    wide[:, 3:15] = x
    spread = torch.zeros(24, 3, dtype=torch.int64)
    spread[:, 1] = y
    for batch, labels in (
        (x, y),
        (wide[:, 3:15], y),
        (x.t().contiguous().t(), spread[:, 1]),
        (x.view(24, 1, 3, 4), y),
        (x.view(24, 2, 6).transpose(1, 2).contiguous().transpose(1, 2), y),
    ):
        model = network((12, 7, 3))
        for _ in range(3):
            fastmlp.TrainStep(model, lr=0.3)(batch, labels)
        results.append(flat(model))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-12, atol=1e-14)


def test_changing_the_learning_rate():
    data = batches(*problem(SIZES, 70), 24, 10)
    for settings_ in (OPTIMIZERS["sgd"], OPTIMIZERS["momentum"], OPTIMIZERS["adamw"]):
        model = network(SIZES)
        reference = Reference(model, settings_)
        step = fastmlp.TrainStep(model, **settings_)
        for i, batch in enumerate(data):
            step.lr = reference.optimizer.param_groups[0]["lr"] = 0.2 / (1 + i)
            step(*batch)
            reference.train([batch])
        assert step.lr == 0.2 / 10
        assert (flat(model) - reference.flat()).norm() <= 1e-10 * reference.flat().norm()


def test_batch_sizes_may_change_at_every_step():
    """There are more batch sizes than kept buffers."""
    x, y = problem(SIZES, 70)
    data = [(x[:m], y[:m]) for m in (24, 1, 70, 24, 2, 3, 4, 5, 6, 7, 8, 9, 10, 24, 1, 69)]
    check_against_torch(network(SIZES), data, OPTIMIZERS["momentum"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_runs_are_bitwise_equal(name):
    results = []
    for _ in range(2):
        model = converted(network(SIZES), torch.float32)
        step = fastmlp.TrainStep(model, **OPTIMIZERS[name])
        losses = [step(*for_step(x, y, torch.float32)).clone() for x, y in batches(*problem(SIZES, 70), 24, 20)]
        results.append((flat(model), torch.stack(losses)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_the_models_own_memory_is_updated():
    """The parameters stay at their addresses, without gradients; the model's next forward pass sees the update."""
    model = converted(network(SIZES), torch.float32)
    addresses = [p.data_ptr() for p in model.parameters()]
    x, y = for_step(*problem(SIZES, 24), torch.float32)
    step = fastmlp.TrainStep(model, lr=0.3)
    first = step(x, y).item()
    assert first == pytest.approx(torch.nn.functional.cross_entropy(network(SIZES)(x.double()), y).item(), rel=1e-5)
    after = torch.nn.functional.cross_entropy(model(x), y).item()
    assert after < first
    assert step(x, y).item() == pytest.approx(after, rel=1e-5)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert all(p.grad is None and p.is_leaf and p.requires_grad for p in model.parameters())


def test_the_tape_notices_the_update():
    """A backward pass over weights that a step has changed since is an error, as with any change in place."""
    model = converted(network(SIZES), torch.float32)
    x, y = for_step(*problem(SIZES, 24), torch.float32)
    output = model(x.requires_grad_())
    fastmlp.TrainStep(model, lr=0.3)(x, y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("grad_mode", [True, False])
def test_inputs_on_the_tape_and_grad_mode_do_not_matter(grad_mode):
    model, twin = network(SIZES), network(SIZES)
    x, y = problem(SIZES, 24, loss="mse")
    with torch.set_grad_enabled(grad_mode):
        loss = fastmlp.TrainStep(model, lr=0.3, loss="mse")(x.clone().requires_grad_(), y.clone().requires_grad_())
    assert not loss.requires_grad
    fastmlp.TrainStep(twin, lr=0.3, loss="mse")(x, y)
    assert torch.equal(flat(model), flat(twin))


def test_a_model_made_from_torch_modules():
    plain = torch.nn.Sequential(torch.nn.Linear(13, 9), torch.nn.ReLU(), torch.nn.Linear(9, 5)).double()
    x, y = problem((13, 5), 24)
    before = torch.nn.functional.cross_entropy(plain(x), y).item()
    step = fastmlp.TrainStep(fastmlp.MLP.from_torch(plain), lr=0.3)
    assert step(x, y).item() == pytest.approx(before)
    assert torch.nn.functional.cross_entropy(plain(x), y).item() < before


def test_float32_at_full_size_for_many_rows():
    """4,096 rows: the error of the gradients' long sums stays within the budget."""
    sizes = (784, 128, 10)
    x, y = problem(sizes, 4096, uint8=True)
    model = network(sizes)
    expected = Reference(model, OPTIMIZERS["sgd"]).train([(x, y)] * 3)
    own = Reference(model, OPTIMIZERS["sgd"], master=torch.float32).train([(x, y)] * 3)
    narrow = converted(model, torch.float32)
    step = fastmlp.TrainStep(narrow, **OPTIMIZERS["sgd"])
    for _ in range(3):
        step(x, y)
    assert_run_within_budget(flat(narrow), expected.flat(), own.flat(), 3, torch.finfo(torch.float32).eps)
