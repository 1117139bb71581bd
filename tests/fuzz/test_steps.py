"""The whole TrainStep against autograd and torch.optim in float64, and the value losses with their gradients.

The backend is the kernels where they run (a GPU, Triton's interpreter) and plain torch otherwise.

The rounding of one layer is an input error of the next layer, and the second step begins where the first step ended.
The budget of a step is therefore measured, beside a floor for one sum and one rounding. The float64 training runs again
with parameters and inputs off by up to one rounding of the products' dtype before every step. The allowed error of a
result is twice the error of these runs, or twice the error of torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import fastmlp
from fastmlp import reference
from fastmlp.base.losses import LOSSES, STEP_LOSSES
from tests.conftest import HAS_GPU, INTERPRETING, WITH_KERNELS, uninitialized_is_nan
from tests.fuzz.cases import Labels, Spec, dims, dtypes, fuzz, labels, specs
from tests.support.harness import EPS32, assert_within_budget
from tests.support.steps import Batch, Reference, converted, network, problem
from tests.support.torchs import TORCH_ACTIVATIONS

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    *WITH_KERNELS,
]
DEVICE = torch.device("cuda" if HAS_GPU and not INTERPRETING else "cpu")
BACKEND = "triton" if INTERPRETING or HAS_GPU else "torch"
PERTURBED_RUNS = 6

#: Where a gradient is nearly 0, AdamW's first steps are its sign. With a large eps they are continuous in the gradient.
#: Lion's always are the sign, and are left to the test of the kernel.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.3, "weight_decay": 0.02},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "nesterov": {"lr": 0.1, "momentum": 0.8, "nesterov": True},
    "clipping": {"lr": 0.5, "max_grad_norm": 0.05},
    "adamw": {"optimizer": "adamw", "lr": 0.01, "betas": (0.8, 0.95), "eps": 0.01, "weight_decay": 0.1},
    "adam": {"optimizer": "adam", "lr": 0.01, "betas": (0.8, 0.5), "eps": 0.01, "amsgrad": True, "maximize": True},
    "rmsprop": {"optimizer": "rmsprop", "lr": 0.01, "alpha": 0.9, "eps": 0.1, "momentum": 0.5, "centered": True},
}
# An activation that is not smooth moves by more than a rounding where Z is nearly 0. This is so rare that the perturbed
# runs may not show it.
SMOOTH = tuple(name for name, f in TORCH_ACTIVATIONS.items() if f.smooth)


@dataclass(frozen=True)
class Training:
    sizes: tuple[int, ...]
    activations: tuple[str, ...]
    bias: bool
    loss: str
    optimizer: str
    dtype: torch.dtype | None  #: dtype of the products; None: the parameters' float32
    batch: int
    rows: int  #: rows of the data set; the last batch of an epoch can be short
    pixels: bool
    epoch: bool  #: one epoch in random order instead of two single steps
    weighted: bool  #: sample weights, some of which are 0
    options: tuple[str, ...]  #: of the loss; "probabilities" are the targets'
    dropout: tuple[float, ...]  #: of each hidden layer
    seed: int

    def network(self) -> fastmlp.MLP:
        """The network to train, float64."""
        start = network(self.sizes, self.activations, bias=self.bias, seed=self.seed)
        torch.manual_seed(self.seed)
        start.dropout = self.dropout
        return start

    def loss_options(self) -> dict[str, Any]:
        """The arguments of TrainStep, tensors in float64."""
        g = torch.Generator().manual_seed(self.seed + 1)
        classes = (torch.rand(self.sizes[-1], generator=g) + 0.1).bfloat16().double()
        values = {"class_weight": classes, "pos_weight": classes, "label_smoothing": 0.25, "delta": 0.5}
        values["ignore_index"] = self.seed % self.sizes[-1] if self.seed % 2 and self.sizes[-1] > 4 else -100
        return {option: values[option] for option in self.options if option != "probabilities"}

    def data(self) -> Batch:
        """(X, Y), and sample weights if there are any; all rows of the data set."""
        x, y = problem(self.sizes, self.rows, loss=self.loss, uint8=self.pixels, seed=self.seed)
        g = torch.Generator().manual_seed(self.seed + 2)
        if "probabilities" in self.options:
            y = torch.rand(self.rows, self.sizes[-1], generator=g).bfloat16().double()
        elif "ignore_index" in self.options:
            y[1::3] = self.loss_options()["ignore_index"]
        if not self.weighted:
            return x, y
        weight = (torch.rand(self.rows, generator=g) + 0.1).bfloat16().double()
        if self.rows == self.batch > 1:  # a batch that weighs nothing has no mean
            weight[1::4] = 0.0
        return x, y, weight


@st.composite
def trainings(draw: st.DrawFn) -> Training:
    sizes = draw(st.integers(2, 4).flatmap(dims))
    batch = draw(st.sampled_from([1, 2, 7, 16, 33]))
    epoch = draw(st.booleans())
    # l1's gradient is a sign.
    loss = draw(st.sampled_from([loss for loss in STEP_LOSSES if loss != "l1"]))
    options = {option for option in LOSSES[STEP_LOSSES[loss]].options if draw(st.booleans())}
    more = draw(st.integers(0, batch))
    if "probabilities" in options or batch < 16 or 0 < more < 16:  # a batch of ignored rows alone has no mean
        options.discard("ignore_index")
    return Training(
        sizes=sizes,
        activations=tuple(draw(st.sampled_from(SMOOTH)) for _ in sizes[2:]),
        bias=draw(st.booleans()),
        loss=loss,
        optimizer=draw(st.sampled_from(sorted(OPTIMIZERS))),
        dtype=draw(st.sampled_from([None, torch.bfloat16, torch.float16])),
        batch=batch,
        rows=batch + more,
        pixels=draw(st.booleans()),
        epoch=epoch,
        weighted=draw(st.booleans()),
        options=tuple(sorted(options)),
        dropout=tuple(draw(st.sampled_from([0.0, 0.0, 0.25, 0.5])) for _ in sizes[2:]),
        seed=draw(st.integers(0, 99)),
    )


def trained(case: Training, start: fastmlp.MLP, data: Batch, order: Tensor) -> list[Tensor]:
    """[loss, parameter, ...] after fastmlp's own steps."""
    model = converted(start, torch.float32).to(DEVICE)
    x, y, *weights = ((t.float() if t.is_floating_point() else t).to(DEVICE) for t in data)
    weight, order = weights[0] if weights else None, order.to(DEVICE)
    options = {k: v.float().to(DEVICE) if isinstance(v, Tensor) else v for k, v in case.loss_options().items()}
    with fastmlp.use_backend(BACKEND), uninitialized_is_nan():
        step = fastmlp.TrainStep(model, loss=case.loss, dtype=case.dtype, **OPTIMIZERS[case.optimizer], **options)
        if case.epoch:
            step.epoch(x, y, case.batch, order, sample_weight=weight)
            loss = step.losses[-1].clone()
        else:
            for rows in batches(case, order):
                loss = step(x[rows], y[rows], None if weight is None else weight[rows]).clone()
    return [loss.cpu(), *(p.detach().cpu() for p in model.parameters())]


def batches(case: Training, order: Tensor) -> list[Tensor]:
    """The rows of every step: the batches of the epoch, or the first batch twice."""
    return list(order.split(case.batch)) if case.epoch else [order[: case.batch]] * 2


def by_torch(training: Reference, data: list[Batch], size: float = 0.0, seed: int = 0) -> list[Tensor]:
    """[loss, parameter, ...] after torch's own steps. ``size`` is the largest relative change before a step."""
    g = torch.Generator().manual_seed(seed)

    def jitter(t: Tensor) -> Tensor:
        return t * (1 + size * (2 * torch.rand(t.shape, generator=g, dtype=torch.float64) - 1))

    for x, *targets in data:
        if size:
            with torch.no_grad():
                for p in training.params.values():
                    p.copy_(jitter(p))
            x = jitter(x)
        training.backward(x, *targets)
        training.update()
    return [torch.tensor(training.losses[-1], dtype=torch.float64), *(p.detach() for p in training.params.values())]


@fuzz(8, trainings())
def test_train_step(case: Training):
    start = case.network()
    x, *targets = case.data()
    order = torch.randperm(case.rows, generator=torch.Generator().manual_seed(case.seed))
    got = trained(case, start, (x, *targets), order)
    check_trained(case, start, (x, *targets), order, OPTIMIZERS[case.optimizer], got)


def check_trained(
    case: Training,
    start: fastmlp.MLP,
    data: Batch,
    order: Tensor,
    settings: dict[str, Any],
    got: list[Tensor],
) -> None:
    """The loss of the last step and the parameters are within the budget of what torch trains."""
    x, *targets = data
    wide = x.double() / 255 if case.pixels else x
    options = case.loss_options()
    chosen = batches(case, order)
    in_double = [(wide[r], *(t[r] for t in targets)) for r in chosen]
    exact = by_torch(Reference(start, settings, case.loss, options=options), in_double)
    narrow = Reference(start, settings, case.loss, torch.float32, case.dtype, options=options)
    own = by_torch(narrow, [(x[r] if case.pixels else x[r].float(), *(t[r] for t in targets)) for r in chosen])
    eps = torch.finfo(case.dtype or torch.float32).eps
    moved = [
        by_torch(Reference(start, settings, case.loss, options=options), in_double, eps, seed)
        for seed in range(PERTURBED_RUNS)
    ]
    before = [p.detach() for p in start.parameters()]
    longest = max(*case.sizes, case.batch)
    names = ["loss", *(name for name, _ in start.named_parameters())]
    for i, (name, ours, want, torchs) in enumerate(zip(names, got, exact, own, strict=True)):
        far = max((run[i] - want).abs().max().item() for run in moved)
        error = (ours.double() - want).abs().max().item()
        # One rounding of the result of the products, which is the loss or a parameter's change.
        made = want if i == 0 else want - before[i - 1]
        floor = eps * made.abs().max().item() + EPS32 * longest**0.5 * max(1.0, want.abs().max().item())
        allowed = 2 * max((torchs.double() - want).abs().max().item(), far) + floor
        assert error <= allowed, f"{name}: error {error:.3e} is over {allowed:.3e}"


VALUE_LOSSES = {
    name: getattr(fastmlp.functional, loss.function)
    for name, loss in LOSSES.items()
    if name not in ("cross_entropy", "nllm")
}


@dataclass(frozen=True)
class Value:
    loss: str
    a: Spec
    y: Spec | Labels
    reduction: str
    target_learns: bool


@st.composite
def values(draw: st.DrawFn) -> Value:
    shape, dtype = draw(dims(2)), draw(dtypes)
    loss = draw(st.sampled_from(sorted(VALUE_LOSSES)))
    values_of_y = specs(shape, dtype, scales=(1.0, 0.1))
    labels_of_y = labels(shape[:1], shape[1], ignoring=False)
    return Value(
        loss=loss,
        a=draw(specs(shape, dtype, expanded=True, scales=(1.0, 0.1, 8.0))),
        y=draw(values_of_y | labels_of_y if loss == "softmax_squared_error" else values_of_y),
        reduction=draw(st.sampled_from(["none", "mean", "sum"])),
        target_learns=draw(st.booleans()),
    )


def formula(case: Value, a: Tensor, y: Tensor) -> Tensor:
    """The loss by the reference's formulas, on the tape."""
    if case.loss == "softmax_squared_error":
        y = y if y.is_floating_point() else torch.nn.functional.one_hot(y.long(), a.shape[1]).to(a.dtype)
        loss = reference.softmax_squared_error(a, y)
    else:
        loss = reference.elementwise_loss(a, y, case.loss)
    return {"none": loss, "mean": loss.mean(), "sum": loss.sum()}[case.reduction]


@fuzz(15, values())
def test_value_losses(case: Value):
    a, y = case.a.build().to(DEVICE), case.y.build().to(DEVICE)
    if LOSSES[case.loss].input == "probabilities":
        # A division by a smaller number overflows float16.
        a = torch.sigmoid(a.float()).clamp(0.01, 0.99).to(a.dtype)
    if case.loss in ("binary_cross_entropy", "bce_with_logits"):
        y = torch.sigmoid(y.float()).to(y.dtype)

    def run(function: Any, dtype: torch.dtype | None) -> list[Tensor | None]:
        ad = a.to(dtype or a.dtype).detach().requires_grad_()
        yd = (y.to(dtype or y.dtype) if y.is_floating_point() else y).detach()
        yd.requires_grad_(y.is_floating_point() and case.target_learns)
        loss = function(ad, yd)
        loss.sum().backward()
        return [loss.detach(), ad.grad, yd.grad]

    with fastmlp.use_backend(BACKEND), uninitialized_is_nan():
        got = run(lambda p, q: VALUE_LOSSES[case.loss](p, q, case.reduction), None)
    exact, own = (run(lambda p, q: formula(case, p, q), d) for d in (torch.float64, None))
    terms = a.numel() if case.reduction == "sum" else 1
    size = (1.0 + a.double().abs().max().item() + y.double().abs().max().item()) ** 2
    if case.loss == "softmax_squared_error":
        # Probabilities have size 1 for all logits; a row's sum runs over targets of any size.
        size = 1.0 if not y.is_floating_point() else (1.0 + y.double().abs().sum(1).max().item()) ** 2
    for name, ours, want, torchs in zip(("loss", "dA", "dY"), got, exact, own, strict=True):
        assert (ours is None) == (want is None), name
        if ours is None or want is None or torchs is None:
            continue
        assert ours.dtype == a.dtype
        reach = terms * size if name == "loss" else size
        assert_within_budget(
            ours.cpu(), want.cpu(), torchs.cpu(), reduction=a.numel() if name == "loss" else a.shape[1],
            magnitude=reach, what=name,
        )  # fmt: skip
