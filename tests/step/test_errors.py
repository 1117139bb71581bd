"""Wrong input to TrainStep raises the errors that torch raises, and changes nothing.

A message says what came, what was expected and what to do.
"""

from __future__ import annotations

import math

import pytest
import torch

import fastmlp
from fastmlp.base.losses import STEP_LOSSES
from tests.support.steps import (
    converted,
    flat,
    network,
    one_thread,  # noqa: F401
    problem,
)
from tests.support.torchs import OPTIMIZERS

SIZES = (13, 17, 11, 5)


def _number(value: object) -> str:
    """Names of cases without the tensors, because values and addresses of tensors differ between processes."""
    return value if isinstance(value, str) else value.__name__ if isinstance(value, type) else ""


SETTINGS = [
    ({"optimizer": "adamq"}, ValueError, "rmsprop, lion, or train with autograd and another optimizer"),
    (
        {"loss": "nll"},
        ValueError,
        "unknown loss 'nll'; expected one of cross_entropy, mse.*or train with autograd and another loss",
    ),
    ({"lr": -1.0}, ValueError, "learning rate of at least 0, got lr=-1.0"),
    ({"lr": math.nan}, ValueError, "learning rate of at least 0, got lr=nan"),
    ({"lr": "0.1"}, TypeError, "lr to be a number, got '0.1' of type str"),
    ({"momentum": 1.0}, ValueError, r"momentum in \[0, 1\), got 1.0"),
    ({"momentum": -0.1}, ValueError, "momentum"),
    ({"momentum": None}, TypeError, "momentum to be a number, got None"),
    ({"weight_decay": -0.1}, ValueError, "weight_decay of at least 0, got -0.1"),
    ({"nesterov": True}, ValueError, "nesterov=True needs optimizer='sgd' and a momentum above 0"),
    ({"nesterov": True, "optimizer": "adamw"}, ValueError, "nesterov=True needs"),
    ({"momentum": 0.9, "optimizer": "adamw"}, ValueError, "not a setting of optimizer 'adamw', but of sgd, rmsprop"),
    ({"amsgrad": True}, ValueError, "amsgrad=True is not a setting of optimizer 'sgd', but of adam, adamw"),
    (
        {"centered": True},
        ValueError,
        "centered=True is not a setting of optimizer 'sgd', but of rmsprop; leave it out, or choose another optimizer; "
        "'sgd' has lr, .*momentum, nesterov",
    ),
    ({"alpha": 1.0, "optimizer": "rmsprop"}, ValueError, r"alpha in \[0, 1\), got 1.0"),
    ({"alpha": 0.9, "optimizer": "lion"}, ValueError, "alpha=0.9 is not a setting of optimizer 'lion', but of rmsprop"),
    ({"maximize": None}, TypeError, "maximize to be a bool, got None"),
    ({"betas": (0.9, 1.0)}, ValueError, r"betas in \[0, 1\), got \(0.9, 1.0\)"),
    ({"betas": (0.9,)}, ValueError, "got 1 values"),
    ({"betas": ("a", 0.9)}, TypeError, "beta1 to be a number, got 'a'"),
    ({"eps": -1e-8}, ValueError, "eps of at least 0, got -1e-08"),
    ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm above 0 or None, got 0.0"),
    ({"max_grad_norm": math.nan}, ValueError, "max_grad_norm above 0 or None, got nan"),
    ({"dtype": torch.int64}, TypeError, "float32, float64, float16 or bfloat16, got torch.int64"),
    ({"dtype": torch.float8_e4m3fn}, TypeError, "got torch.float8_e4m3fn"),
    ({"dtype": torch.complex64}, TypeError, "got torch.complex64"),
    ({"dtype": "bfloat16"}, TypeError, "torch.dtype such as torch.bfloat16, got 'bfloat16'"),
]


#: Arguments that no TrainStep has.
FOREIGN = [
    ({"dampening": 0.1}, "dampening=0.1 is a setting of torch.optim.SGD, and not of fastmlp's 'sgd', which has lr, "),
    ({"dampening": 0.1}, "leave dampening out, or train with autograd and torch.optim.SGD$"),
    ({"capturable": True, "optimizer": "adamw"}, "setting of torch.optim.AdamW, .*, betas, eps, amsgrad; leave"),
    ({"foreach": None, "optimizer": "lion"}, r"torch.optim.Adam, .* and not of fastmlp's 'lion', .* one of these$"),
    ({"rho": 0.9}, "torch.optim.Adadelta, and not of fastmlp's 'sgd', .* with autograd and torch.optim.Adadelta$"),
    ({"wieght_decay": 0.1}, "unexpected keyword argument 'wieght_decay'; .* Did you mean 'weight_decay'"),
    ({"label_smothing": 0.1}, "unexpected keyword argument 'label_smothing'; .* Did you mean 'label_smoothing'"),
    ({"reduction": "sum"}, "unexpected keyword argument 'reduction'; expected one of "),
    ({"params": []}, "unexpected keyword argument 'params'; expected one of "),
]


@pytest.mark.parametrize(("settings", "message"), FOREIGN, ids=_number)
def test_arguments_that_no_step_has(settings, message):
    """Of a step of an MLP or of an ensemble, and of a training with either engine."""
    model = network(SIZES)
    x, y = problem(SIZES, 4)
    for call in (
        lambda **of: fastmlp.TrainStep(model, **of),
        lambda **of: fastmlp.TrainStep(fastmlp.MLPEnsemble.stack([model, model]), **of),
        lambda **of: fastmlp.fit(model, (x, y), **of),
        lambda **of: fastmlp.fit(model, (x, y), engine="autograd", **of),
    ):
        with pytest.raises(TypeError, match=message):
            call(lr=0.1, **settings)


def test_an_unknown_optimizer_comes_before_unknown_arguments():
    with pytest.raises(TypeError, match="pass optimizer='sgd' with its settings"):
        fastmlp.TrainStep(network(SIZES), optimizer=torch.optim.SGD, dampening=0.1)


@pytest.mark.parametrize(("settings", "error", "message"), SETTINGS, ids=_number)
def test_settings(settings, error, message):
    with pytest.raises(error, match=message):
        fastmlp.TrainStep(network(SIZES), **{"lr": 0.1, **settings})


def test_the_learning_rate_attribute():
    step = fastmlp.TrainStep(network(SIZES), lr=0.1)
    for value in (-1.0, math.nan):
        with pytest.raises(ValueError, match=f"got lr={value}"):
            step.lr = value
    assert step.lr == 0.1


class TestModels:
    """Models that a TrainStep cannot train."""

    def test_another_module(self):
        with pytest.raises(TypeError, match=r"trains a fastmlp.MLP, got Linear.*MLP\.from_torch"):
            fastmlp.TrainStep(torch.nn.Linear(3, 2), lr=0.1)

    def test_nothing_to_train(self):
        with pytest.raises(ValueError, match="nothing to train"):
            fastmlp.TrainStep(network(SIZES).requires_grad_(False), lr=0.1)

    def test_hooks(self):
        model = network(SIZES)
        model.layers[1].register_forward_hook(lambda *a: None)
        with pytest.raises(ValueError, match=r"layers\.1 has hooks.*train with autograd"):
            fastmlp.TrainStep(model, lr=0.1)

    def test_another_class_of_layer(self):
        model = network(SIZES)
        model.layers[0] = torch.nn.Linear(13, 17, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"layers\.0 has hooks, another class"):
            fastmlp.TrainStep(model, lr=0.1)

    def test_shared_parameters(self):
        model = network((4, 4, 4))
        model.layers[1].weight = model.layers[0].weight
        with pytest.raises(ValueError, match=r"layers\.0\.weight and layers\.1\.weight are one parameter"):
            fastmlp.TrainStep(model, lr=0.1)

    def test_parameters_inside_of_others(self):
        model = network((4, 4, 4))
        model.layers[1].bias.data = model.layers[0].weight.data.view(-1)[5:9]
        with pytest.raises(ValueError, match=r"layers\.0\.weight and layers\.1\.bias .* lie in the same memory"):
            fastmlp.TrainStep(model, lr=0.1)

    def test_parameters_side_by_side(self):
        model = network((4, 4, 4))
        flat = torch.randn(40, dtype=torch.float64)
        for p, part in zip(model.parameters(), flat.split([16, 4, 16, 4]), strict=True):
            p.data = part.view(p.shape)
        before = flat.clone()
        fastmlp.TrainStep(model, lr=0.1)(torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2]))
        assert (flat != before).any()

    def test_strided_parameters(self):
        model = network(SIZES)
        model.layers[0].weight.data = model.layers[0].weight.data.t().contiguous().t()
        with pytest.raises(RuntimeError, match=r"contiguous, got strides \(1, 17\); assign"):
            fastmlp.TrainStep(model, lr=0.1)

    def test_parameters_of_two_dtypes(self):
        model = network(SIZES)
        model.layers[2].float()
        with pytest.raises(RuntimeError, match=r"layers\.2\.weight in torch.float32 and layers\.0\.weight in"):
            fastmlp.TrainStep(model, lr=0.1)

    def test_parameters_on_two_devices(self):
        model = network(SIZES)
        model.layers[2].to("meta")
        with pytest.raises(RuntimeError, match=r"layers\.2\.weight on meta"):
            fastmlp.TrainStep(model, lr=0.1)


X, Y = problem(SIZES, 24)
VALUES = torch.rand(24, 5, dtype=torch.float64)
CALLS = [
    ({"x": X.numpy()}, TypeError, "the input to be a torch.Tensor, got ndarray"),
    ({"y": Y.tolist()}, TypeError, "the target to be a torch.Tensor, got list"),
    ({"x": X[0]}, RuntimeError, r"got \[13\]; add a batch dimension with x.unsqueeze\(0\)"),
    ({"x": X[:, :12]}, RuntimeError, r"13 features, got 12; reshape the input or build the model with sizes\[0\]=12"),
    ({"x": X.view(24, 13, 1, 1).expand(24, 13, 2, 1)}, RuntimeError, "13 features, got 26"),
    ({"x": X.float()}, RuntimeError, r"dtype torch.float64 or uint8 pixels, got torch.float32; .*\.to\(torch.float64"),
    ({"x": X.long()}, RuntimeError, "got torch.int64"),
    ({"x": X > 0}, RuntimeError, "got torch.bool"),
    ({"x": X[:23]}, ValueError, r"as many targets as inputs, got inputs \[23, 13\] and targets \[24\]"),
    ({"y": Y[0]}, ValueError, r"as many targets as inputs, got inputs \[24, 13\] and targets \[\]"),
    ({"y": Y[:, None]}, RuntimeError, r"class numbers of shape \[24\], got \[24, 1\]"),
    ({"y": Y.int()}, RuntimeError, r"int64, got torch.int32; convert them with .long\(\)"),
    ({"y": Y.double()}, RuntimeError, "int64, got torch.float64"),
    ({"y": Y.index_fill(0, torch.tensor([7]), 5)}, IndexError, "class number 5 is out of range.*classes 0 to 4"),
    ({"y": Y.index_fill(0, torch.tensor([7]), -1)}, IndexError, "class number -1 is out of range"),
    ({"y": Y.index_fill(0, torch.tensor([7]), -101)}, IndexError, "class number -101"),
    (
        {"y": Y.index_fill(0, torch.tensor([7]), torch.iinfo(torch.int64).min)},
        IndexError,
        "class number -9223372036854",
    ),
    (
        {"loss": "softmax_squared_error", "y": Y.index_fill(0, torch.tensor([7]), 5)},
        IndexError,
        "class number 5 is out",
    ),
    ({"loss": "softmax_squared_error", "y": Y.index_fill(0, torch.tensor([7]), -1)}, IndexError, "class number -1 is"),
    ({"loss": "softmax_squared_error", "y": Y.index_fill(0, torch.tensor([7]), -100)}, IndexError, "class number -100"),
    ({"x": X.to("meta")}, RuntimeError, "the parameters is on cpu and the input on meta"),
    ({"y": Y.to("meta")}, RuntimeError, "the target on meta"),
    ({"loss": "mse", "y": VALUES[:, :4]}, RuntimeError, r"shape \[24, 5\] for mse, got \[24, 4\]"),
    ({"loss": "l1", "y": Y}, RuntimeError, r"shape \[24, 5\] for l1, got \[24\]"),
    ({"loss": "bce", "y": VALUES.round().long()}, RuntimeError, "floating-point targets for bce, got torch.int64"),
]


@pytest.mark.parametrize("call", ["step", "gradients", "epoch"])
@pytest.mark.parametrize(("arguments", "error", "message"), CALLS, ids=_number)
def test_batches(arguments, error, message, call):
    arguments = dict(arguments)
    model = network(SIZES)
    step = fastmlp.TrainStep(model, lr=0.3, loss=arguments.pop("loss", "cross_entropy"))
    x, y = arguments.pop("x", X), arguments.pop("y", Y)
    with pytest.raises(error, match=message):
        {"step": step, "gradients": step.gradients, "epoch": lambda x, y: step.epoch(x, y, 16)}[call](x, y)
    assert torch.equal(flat(model), flat(network(SIZES)))


def test_gradients_outlive_a_batch_that_is_refused():
    model, twin = network(SIZES), network(SIZES)
    step, other = fastmlp.TrainStep(model, lr=0.3), fastmlp.TrainStep(twin, lr=0.3)
    step.gradients(X, Y)
    for call in (step, step.gradients):
        with pytest.raises(IndexError, match="class number 9"):
            call(X, Y.index_fill(0, torch.tensor([7]), 9))
    step.update()
    other.gradients(X, Y)
    other.update()
    assert torch.equal(flat(model), flat(twin))
    assert not torch.equal(flat(model), flat(network(SIZES)))


EPOCHS = [
    ({"batch_size": 0}, ValueError, "batch_size of at least 1, a whole number, got 0"),
    ({"batch_size": 1.5}, ValueError, "got 1.5"),
    ({"order": [0, 1]}, TypeError, "order to be a torch.Tensor, got list"),
    ({"order": torch.zeros(3)}, RuntimeError, r"order to be int64 \[n\], got torch.float32 \[3\]"),
    ({"order": torch.zeros(3, 1, dtype=torch.int64)}, RuntimeError, r"got torch.int64 \[3, 1\]"),
    ({"order": torch.tensor([0, 24])}, IndexError, "rows from 0 to 24, but the data has rows 0 to 23"),
    ({"order": torch.tensor([0, -1])}, IndexError, "rows from -1 to 0"),
    ({"order": torch.zeros(3, dtype=torch.int64, device="meta")}, RuntimeError, "order on meta"),
    ({"lr_factors": [1.0]}, ValueError, "expected 2 lr_factors, one for each step, got 1"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), EPOCHS, ids=_number)
def test_epochs(arguments, error, message):
    model = network(SIZES)
    step = fastmlp.TrainStep(model, lr=0.3)
    with pytest.raises(error, match=message):
        step.epoch(X, Y, **{"batch_size": 16, **arguments})
    assert torch.equal(flat(model), flat(network(SIZES)))


class TestStaleParameters:
    """A TrainStep holds the model's own memory. It must not go on with memory that the model no longer uses."""

    def test_conversion(self):
        model = network(SIZES)
        step = fastmlp.TrainStep(model, lr=0.3)
        model.float()
        for call in (step, step.gradients):
            with pytest.raises(RuntimeError, match=r"replaced or moved.*make a new TrainStep"):
                call(X.float(), Y)

    def test_assignment(self):
        model = network(SIZES)
        step = fastmlp.TrainStep(model, lr=0.3)
        model.layers[1].bias = torch.nn.Parameter(torch.zeros(11, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="a bias of the model was replaced"):
            step(X, Y)

    def test_update(self):
        model = network(SIZES)
        step = fastmlp.TrainStep(model, lr=0.3)
        step.gradients(X, Y)
        model.layers[0].weight.data = model.layers[0].weight.data.clone()
        with pytest.raises(RuntimeError, match="a weight of the model was replaced"):
            step.update()

    def test_changes_in_place_are_fine(self):
        model = network(SIZES)
        step = fastmlp.TrainStep(model, lr=0.3)
        first = step(X, Y).item()
        model.load_state_dict(network(SIZES).state_dict())
        assert step(X, Y).item() == first


def test_update_without_gradients():
    model = network(SIZES)
    step = fastmlp.TrainStep(model, lr=0.3, weight_decay=0.1)
    for call in (lambda: None, lambda: step(X, Y), lambda: (step.gradients(X, Y), step.update())):
        call()
        with pytest.raises(RuntimeError, match=r"no gradients to apply; call gradients\(x, y\) before"):
            step.update()


def test_inference_mode():
    step = fastmlp.TrainStep(network(SIZES), lr=0.3)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="leave it, or use"):
        step(X, Y)


@pytest.mark.parametrize("loss", STEP_LOSSES)
def test_an_empty_batch(loss):
    """The mean loss of an empty batch is NaN as in torch; nothing is trained, and there is no gradient."""
    x, y = problem(SIZES, 24, loss=loss)
    model = network(SIZES)
    step = fastmlp.TrainStep(model, lr=0.3, momentum=0.9, weight_decay=0.1, loss=loss)
    assert step(x[:0], y[:0]).isnan()
    assert torch.equal(flat(model), flat(network(SIZES)))
    with pytest.raises(ValueError, match="at least one row"):
        step.gradients(x[:0], y[:0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nan_goes_where_torch_lets_it_go(name):
    """NaN goes into the loss and every parameter that it reaches. No exception is raised, as the host does not look."""
    model = converted(network(SIZES), torch.float32)
    x = X.float().clone()
    x[3, 4] = math.nan
    assert fastmlp.TrainStep(model, **OPTIMIZERS[name])(x, Y).isnan()
    assert flat(model).isnan().any()


def test_a_diverging_run_gives_nan_or_infinity_not_an_exception():
    model = converted(network(SIZES, "relu"), torch.float32)
    step = fastmlp.TrainStep(model, lr=1e30)
    for _ in range(5):
        loss = step(X.float(), Y)
    assert not loss.isfinite()


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = fastmlp.MLP((3, 2))
    with pytest.raises(RuntimeError, match=r"the model was made in torch.inference_mode\(\)"):
        fastmlp.TrainStep(model, lr=0.1)
