"""A step like the last one: it calls few functions of Python, and still looks at everything that may have changed."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastmlp
from fastmlp.step.optimizers import OPTIMIZERS
from tests.support.calls import python_calls

#: Functions of Python that a warm step may call, whatever the number of layers.
MOST_CALLS = 5


def warm(sizes=(4, 8, 3), **settings):
    torch.manual_seed(0)
    step = fastmlp.TrainStep(fastmlp.MLP(sizes, "tanh"), **{"lr": 0.1, **settings})
    x, y = torch.linspace(-1, 1, 5 * sizes[0]).view(5, sizes[0]), torch.arange(5) % sizes[-1]
    for _ in range(3):
        step(x, y)
    return step, x, y


@pytest.mark.usefixtures("native_code")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_calls_of_a_warm_step(optimizer):
    for sizes in ((4, 8, 3), (4, 5, 6, 7, 8, 3)):
        step, x, y = warm(sizes, optimizer=optimizer)
        step._next_loss()  # so that none of these steps allocates losses
        names = min((python_calls(lambda: step(x, y)) for _ in range(2)), key=len)  # noqa: B023
        assert len(names) <= MOST_CALLS, names


def gradients(step, x, y):
    step.gradients(x, y)


def ignored_labels(step, x, y):
    step.gradients(x, y.masked_fill(y == 0, -100))


def epoch(step, x, y):
    step.epoch(x, y, 2, lr_factors=[0.5, 2.0, 0.0])


def other_rows(step, x, y):
    step(x[:3], y[:3])


def pixels(step, x, y):
    step(x.mul(100).to(torch.uint8), y)


def columns(step, x, y):
    step(x.t().contiguous().t(), y)


def weighted(step, x, y):
    step(x, y, torch.linspace(0.1, 1, 5))


def ignored(step, x, y):
    step(x, y.masked_fill(y == 0, -100))


def no_class(step, x, y):
    with pytest.raises(IndexError, match="out of range"):
        step(x, y + 1)


def faked(step, x, y):
    with FakeTensorMode(), pytest.raises(RuntimeError, match="FakeTensorMode"):
        step(x, y)


def scheduled(step, x, y):
    step.lr = 0.3


def rebuilt(step, x, y):
    step.optimizer.param_groups[0]["momentum"] = 0.9


def dropped(step, x, y):
    step.model.dropout = 0.5


def dropped_once(step, x, y):
    step.model.dropout = 0.5
    step(x, y)
    step.model.eval()


def frozen(step, x, y):
    step.model.layers[0].weight.requires_grad_(False)


def other_activation(step, x, y):
    step.model.layers[0].activation = "relu"


def loaded(step, x, y):
    step.load_state_dict(step.state_dict())


BETWEEN = [
    gradients, ignored_labels, epoch, other_rows, pixels, columns, weighted, ignored, no_class, faked, scheduled,
    rebuilt, dropped, dropped_once, frozen, other_activation, loaded,
]  # fmt: skip


@pytest.mark.usefixtures("native_code")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("between", BETWEEN, ids=lambda f: f.__name__)
def test_a_step_that_repeats_the_last_one(between, optimizer):
    """It is the step that looks at everything, to the last bit, whatever happens between two of them."""
    if between is rebuilt and optimizer == "adamw":
        pytest.skip("adamw has no momentum")
    (step, x, y), (twin, *_) = (warm(optimizer=optimizer) for _ in range(2))
    for i in range(8):
        twin.state_dict()  # after another method a step looks at everything
        if i in (3, 5):
            torch.manual_seed(i)
            between(step, x, y)
            torch.manual_seed(i)
            between(twin, x, y)
            twin.state_dict()
        if i == 2 or (i == 7 and between not in (dropped, dropped_once)):
            assert step._again is not None
        assert twin._again is None
        versions = [p._version for p in step.model.parameters()]
        assert torch.equal(step(x, y), twin(x, y))
        rises = [q._version - p for p, q in zip(versions, step.model.parameters(), strict=True)]
        assert rises == [int(p.requires_grad) for p in step.model.parameters()]
    for p, q in zip(step.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.usefixtures("native_code")
def test_losses_have_memory_and_versions_of_their_own():
    step, x, y = warm()
    losses = [step(x, y) for _ in range(70)]
    values = torch.stack(losses).tolist()
    assert len({loss.data_ptr() for loss in losses}) == len(losses)
    assert not any(loss._is_view() or loss._version or loss.requires_grad for loss in losses)
    losses[40].add_(1.0)
    assert [loss._version for loss in losses] == [int(i == 40) for i in range(70)]
    assert torch.stack(losses).tolist() == [value + (i == 40) for i, value in enumerate(values)]
    assert values == sorted(values, reverse=True)


def test_the_first_setting_is_the_learning_rate():
    """The look at the settings takes it for granted."""
    for rule in OPTIMIZERS.values():
        assert rule(lr=0.1).settings[0] == "lr"
        assert next(iter(vars(rule(lr=0.1)))) == "lr"


BATCHES = {
    "features": (lambda x, y: (x[:, :3], y), RuntimeError, "4 features"),
    "input dtype": (lambda x, y: (x.long(), y), RuntimeError, "dtype"),
    "input layout": (lambda x, y: (x.to_sparse(), y), RuntimeError, "dense"),
    "rows": (lambda x, y: (x, y[:4]), ValueError, "as many targets"),
    "target dtype": (lambda x, y: (x, y.int()), RuntimeError, "int64"),
    "target shape": (lambda x, y: (x, y[:, None]), RuntimeError, "shape"),
    "class": (lambda x, y: (x, y + 1), IndexError, "out of range"),
    "no tensor": (lambda x, y: (x, y.tolist()), TypeError, "Tensor"),
    "no tensors": (lambda x, y: (x.tolist(), y), TypeError, "Tensor"),
}


@pytest.mark.parametrize("change", BATCHES, ids=str)
def test_a_batch_unlike_the_last_one(change):
    step, x, y = warm()
    before = [p.detach().clone() for p in step.model.parameters()]
    wrong, error, text = BATCHES[change]
    for _ in range(2):
        with pytest.raises(error, match=text):
            step(*wrong(x, y))
        assert all(map(torch.equal, step.model.parameters(), before))
    step(x, y)


def test_inference_mode_after_a_step_outside():
    step, x, y = warm()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        step(x, y)


@pytest.mark.parametrize("code", ["operators", "machine code"])
def test_inference_mode_after_steps_with_its_tensors(code, request):
    """Outside of the mode its tensors are alike to others inside of it, as torch's guards see them."""
    if code == "machine code":
        request.getfixturevalue("native_code")
    step, x, y = warm()
    with torch.inference_mode():
        inputs = x.clone(), y.clone()
    for _ in range(3):
        step(*inputs)
    before = [p.detach().clone() for p in step.model.parameters()]
    with torch.inference_mode():
        for call in (step, step.gradients, lambda x, y: step.epoch(x, y, 5)):
            with pytest.raises(RuntimeError, match="inference_mode"):
                call(x, y)
    assert all(map(torch.equal, step.model.parameters(), before))


def test_a_refused_step_in_inference_mode_after_a_change():
    """The engine is built anew, and later steps write to what belongs to it."""
    (step, x, y), (twin, *_) = (warm(momentum=0.9, ema_decay=0.9) for _ in range(2))
    for each in (step, twin):
        each.model.layers[0].weight.requires_grad_(False)
        each.optimizer.param_groups[0]["max_grad_norm"] = 1.0
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        step(x, y)
    for _ in range(3):
        assert torch.equal(step(x, y), twin(x, y))
    step.load_state_dict(step.state_dict())
    for p, q in zip(step.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("code", ["operators", "machine code"])
def test_nested_tensors(code, request):
    """torch's guards would end the process."""
    if code == "machine code":
        request.getfixturevalue("native_code")
    torch.manual_seed(0)
    step, x, y = fastmlp.TrainStep(fastmlp.MLP((4, 3)), loss="mse"), torch.randn(6, 4), torch.randn(6, 3)
    for _ in range(4):
        for batch in ((torch.nested.nested_tensor([x[:3], x[3:]]), y), (x, torch.nested.nested_tensor([y[:3], y[3:]]))):
            with pytest.raises(RuntimeError, match="nested tensor; use to_padded_tensor"):
                step(*batch)
        step(x, y)
        step(x, y)
        step(x, y)


@pytest.mark.parametrize("transform", ["functionalize", "grad", "vmap"])
def test_transforms(transform):
    step, x, y = warm()
    with pytest.raises(RuntimeError, match="call it outside of the transform"):
        getattr(torch.func, transform)(lambda x: step(x, y))(x[None] if transform == "vmap" else x)
    step(x, y)


@pytest.mark.usefixtures("native_code")
@pytest.mark.filterwarnings("ignore")
def test_versions_rise_in_compiled_functions():
    (step, x, y), (twin, *_) = warm(), warm()
    compiled = torch.compile(lambda x, y: step(x * 1, y) * 1, backend="aot_eager")
    for i in range(6):
        if i in (2, 3):
            step.state_dict()  # the next step looks at everything
        versions = [p._version for p in step.model.parameters()]
        assert torch.equal(compiled(x, y), twin(x, y))
        assert [p._version for p in step.model.parameters()] == [v + 1 for v in versions]


def test_a_batch_on_the_tape_stays_without_a_gradient():
    step, x, y = warm()
    loss = step(x.requires_grad_(), y)
    assert not loss.requires_grad
    assert x.grad is None


def test_a_setting_that_was_refused_and_taken_back():
    """The rules then are those of the step before, also where the groups had other values meanwhile."""
    (step, x, y), (twin, *_) = warm(momentum=0.9), warm(momentum=0.9)
    group = step.optimizer.param_groups[0]
    for name, value in (("lr", 0.5), ("momentum", 0.1)):
        before, group[name] = group[name], value
        handle = step.model.register_forward_hook(lambda *a: None)
        with pytest.raises(ValueError, match="hook"):
            step(x, y)
        handle.remove()
        group[name] = before
        assert step(x, y) == twin(x, y)


def test_a_setting_taken_and_taken_back():
    (step, x, y), (twin, *_) = warm(momentum=0.9), warm(momentum=0.9)
    for name, value in (("lr", 0.5), ("momentum", 0.1)):
        before = step.optimizer.param_groups[0][name]
        for now in (value, before, value, before):
            step.optimizer.param_groups[0][name] = now
            twin.optimizer.param_groups[0].update({name: now, "note": now})  # never like the last one
            assert step(x, y) == twin(x, y)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parameter_taken_away(name):
    step, x, y = warm()
    del step.model.layers[1]._parameters[name]
    with pytest.raises(RuntimeError, match="make a new TrainStep"):
        step(x, y)
