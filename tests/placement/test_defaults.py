"""The user's torch.set_default_device and torch.set_default_dtype change nothing."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import fastmlp
from fastmlp import TrainStep, data, functional
from fastmlp.online import online_epoch
from fastmlp.train import fit
from fastmlp.train.initial import initialize_
from tests.placement.test_step import OPTIMIZERS, PRECISIONS, ROWS, SIZES, batch, every_call
from tests.placement.test_tape import loss_and_backward
from tests.support.covering import in_turns
from tests.test_layout import sources

pytestmark = pytest.mark.placement


@contextmanager
def defaults(device: str | None, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """The defaults as a user may have set them at the start of a script."""
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


DEFAULTS = {
    "cuda": ("cuda", torch.float32),
    "the other GPU": ("cuda:0", torch.float32),
    "meta": ("meta", torch.float32),
    "float64": (None, torch.float64),
    "bfloat16": (None, torch.bfloat16),
}


def all_of_a_step(machine, optimizer, precision):
    parameters, products = PRECISIONS[precision]
    model = fastmlp.MLP(SIZES, device="cuda:1", dtype=parameters)
    step = TrainStep(model, dtype=products, **OPTIMIZERS[optimizer])
    every_call(machine, step, "cuda:1", torch.uint8)
    return list(machine.launches)


#: Every precision with every setting; the optimizers take turns.
STEPS = [
    pytest.param(optimizer, precision, DEFAULTS[name], id=f"{optimizer}-{precision}-{name}")
    for precision, name, optimizer in in_turns(
        itertools.product(["float32", "mixed float16"], DEFAULTS), ["nesterov", "adamw", "clipped"]
    )
]


@pytest.mark.parametrize(("optimizer", "precision", "setting"), STEPS)
def test_step(machine, optimizer, precision, setting):
    """The launches are the same, with tensors of the same dtypes."""
    expected = all_of_a_step(machine, optimizer, precision)
    machine.launches.clear()
    with defaults(*setting):
        actual = all_of_a_step(machine, optimizer, precision)
    assert actual == expected


@pytest.mark.parametrize("setting", DEFAULTS.values(), ids=DEFAULTS)
def test_float64_step(machine, setting):
    with defaults(*setting):
        step = TrainStep(fastmlp.MLP(SIZES, device="cuda:1", dtype=torch.float64), lr=0.1, momentum=0.9)
        every_call(machine, step, "cuda:1", torch.uint8)


@pytest.mark.parametrize("setting", DEFAULTS.values(), ids=DEFAULTS)
def test_tape(machine, setting):
    expected = loss_and_backward(machine, "cuda:1", torch.float32)
    with defaults(*setting):
        actual = loss_and_backward(machine, "cuda:1", torch.float32)
    assert actual == expected


@pytest.mark.parametrize("setting", DEFAULTS.values(), ids=DEFAULTS)
def test_data(machine, setting):
    with defaults(*setting):
        train, test = data.load_fashion_mnist(source="bundled")
        assert (train.images.device.type, test.labels.device.type) == ("cpu", "cpu")
        assert (train.images.dtype, train.labels.dtype) == (torch.uint8, torch.int64)
        assert train.images.any()
        assert int(train.labels.max()) == 9


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("setting", DEFAULTS.values(), ids=DEFAULTS)
def test_training(machine, setting, backend):
    with defaults(*setting), fastmlp.use_backend(backend):
        model = fastmlp.MLP(SIZES, device="cuda:1", dtype=torch.float32)
        images, labels = batch("cuda:1", torch.uint8, 3 * ROWS)
        dataset = data.ImageDataset(images, labels, "drawn", "train", "nowhere", tuple("abcde"))
        for engine in ("step", "autograd"):
            history = fit(model, dataset, dataset, epochs=1, batch_size=ROWS, lr=0.1, engine=engine)
            assert len(history.epochs) == 1


#: Every dtype with every setting; the optimizers take turns.
ON_A_CPU = [
    pytest.param(optimizer, dtype, DEFAULTS[name], id=f"{optimizer}-{dtype}-{name}")
    for dtype, name, optimizer in in_turns(
        itertools.product([torch.float32, torch.float64, torch.bfloat16, torch.float16], DEFAULTS), OPTIMIZERS
    )
]


@pytest.mark.parametrize(("optimizer", "dtype", "setting"), ON_A_CPU)
def test_a_step_on_a_cpu(machine, optimizer, dtype, setting):
    """The parameters are the same, bit for bit."""

    def trained() -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = fastmlp.MLP(SIZES, device="cpu", dtype=dtype)
        step = TrainStep(model, **OPTIMIZERS[optimizer])
        g = torch.Generator("cpu").manual_seed(1)
        for loss_rows in (ROWS, 2 * ROWS):
            x = torch.randint(0, 256, (loss_rows, SIZES[0]), dtype=torch.uint8, generator=g, device="cpu")
            y = torch.randint(0, SIZES[-1], (loss_rows,), generator=g, device="cpu")
            step(x, y)
            step.epoch(x, y, ROWS)
            step.gradients(x, y)
            step.update()
        step.load_state_dict(step.state_dict())
        loss = functional.cross_entropy(model(x), y)
        loss = loss + functional.softmax_squared_error(model(x), y)
        return [*(p.detach() for p in model.parameters()), loss.detach()]

    expected = trained()
    with defaults(*setting):
        actual = trained()
    for a, b in zip(actual, expected, strict=True):
        assert a.device.type == "cpu"
        assert torch.equal(a, b)


@pytest.mark.parametrize("setting", DEFAULTS.values(), ids=DEFAULTS)
def test_initial_weights_and_online_training_on_a_cpu(machine, setting):
    """The parameters are the same, bit for bit."""
    images = torch.randn(40, SIZES[0], generator=torch.Generator().manual_seed(2))
    labels = torch.arange(40) % SIZES[-1]

    def trained() -> list[torch.Tensor]:
        model = initialize_(fastmlp.MLP(SIZES, device="cpu", dtype=torch.float32), seed=1)
        weights, biases = ([getattr(layer, kind).detach() for layer in model.layers] for kind in ("weight", "bias"))
        return [*weights, *biases, online_epoch(weights, biases, model.activations, images, labels, 0.1)]

    expected = trained()
    with defaults(*setting):
        actual = trained()
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("setting", DEFAULTS.values(), ids=DEFAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_ensemble_on_a_cpu(machine, dtype, setting):
    """The parameters are the same, bit for bit."""

    def trained() -> list[torch.Tensor]:
        torch.manual_seed(0)
        ensemble = fastmlp.MLPEnsemble(SIZES, 3, device="cpu", dtype=dtype)
        step = TrainStep(ensemble, lr=[0.1, 0.2, 0.3], optimizer="adamw")
        g = torch.Generator("cpu").manual_seed(1)
        x = torch.rand(2 * ROWS, SIZES[0], generator=g, device="cpu", dtype=torch.float32).to(dtype)
        y = torch.randint(0, SIZES[-1], (2 * ROWS,), generator=g, device="cpu")
        step(x, y)
        step.active = [True, False, True]
        step.epoch(x, y, ROWS)
        step.gradients(x, y)
        step.update()
        step.load_state_dict(step.state_dict())
        step(x, y)
        return [p.detach() for p in ensemble.parameters()]

    expected = trained()
    with defaults(*setting):
        actual = trained()
    for a, b in zip(actual, expected, strict=True):
        assert a.device.type == "cpu"
        assert torch.equal(a, b)


#: The functions of torch that make a tensor on the default device, if no other is named.
FACTORIES = {"tensor", "as_tensor", "asarray", "scalar_tensor", "zeros", "ones", "empty", "full", "arange", "linspace"}
FACTORIES |= {"eye", "rand", "randn", "randint", "randperm"}


def test_every_new_tensor_names_its_device():
    """The recipes are scripts with a device of their own: the default."""
    found = []
    for name, source in sources().items():
        for node in ast.walk(ast.parse(source)):
            if name.startswith("recipes/") or not isinstance(node, ast.Call):
                continue
            function = ast.unparse(node.func)
            named = any(keyword.arg in ("device", None) for keyword in node.keywords)
            if function.startswith("torch.") and function[6:] in FACTORIES and not named:
                found.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
    assert found == []
