"""TrainStep of ensembles on the kernels against a TrainStep of each member alone, in the same kernels.

In the interpreter both take the same tiles, so they agree bit by bit. On a GPU they may take others, whose sums are in
another order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import fastmlp
from fastmlp import TrainStep
from fastmlp.base.losses import STEP_LOSSES
from tests.conftest import HAS_GPU, INTERPRETING, UNSIMULATED, uninitialized_is_nan
from tests.fuzz.cases import activations, dims, fuzz
from tests.support.steps import problem

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.skipif(not (INTERPRETING or HAS_GPU), reason="needs Triton's interpreter or a GPU"),
    UNSIMULATED,
]
DEVICE = torch.device("cuda" if HAS_GPU and not INTERPRETING else "cpu")

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.3, "weight_decay": 0.02},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "nesterov clipped": {"lr": 0.1, "momentum": 0.8, "nesterov": True, "max_grad_norm": 0.05},
    "adamw": {"optimizer": "adamw", "lr": 0.01, "betas": (0.8, 0.95), "eps": 0.01, "weight_decay": 0.1},
    "adamw clipped": {"optimizer": "adamw", "lr": 0.01, "eps": 0.01, "max_grad_norm": 0.05},
}
#: Settings that a member may have for itself.
_OWN = ("lr", "weight_decay", "momentum")


@dataclass(frozen=True)
class Ensemble:
    sizes: tuple[int, ...]
    activations: tuple[str, ...]
    bias: bool
    frozen: bool  #: whether the first layer is, of several
    last: str  #: the activation behind the last layer, without which cross-entropy is the head's
    loss: str
    class_weight: bool
    label_smoothing: float
    ignores: bool
    probabilities: bool
    weighted: str  #: sample weights: "none", "one" for all members, or of "each"
    optimizer: str
    dtype: torch.dtype | None
    batch: int
    masks: tuple[tuple[bool, ...], ...]  #: of each step, which members are trained
    own_x: bool
    own_y: bool
    own_settings: bool
    pixels: bool
    way: str  #: "steps", "gradients" or "epochs"
    seed: int

    @property
    def members(self) -> int:
        return len(self.masks[0])


@st.composite
def ensembles(draw: st.DrawFn) -> Ensemble:
    sizes, members = draw(st.integers(2, 4).flatmap(dims)), draw(st.sampled_from([1, 2, 3]))
    mask = st.tuples(*[st.booleans()] * members)
    return Ensemble(
        sizes=sizes,
        activations=tuple(draw(activations) for _ in sizes[2:]),
        bias=draw(st.booleans()),
        frozen=draw(st.booleans()),
        last=draw(st.sampled_from(["identity", "identity", "tanh"])),
        loss=draw(st.sampled_from(["cross_entropy", *STEP_LOSSES])),
        class_weight=draw(st.booleans()),
        label_smoothing=draw(st.sampled_from([0.0, 0.1])),
        ignores=draw(st.booleans()),
        probabilities=draw(st.booleans()),
        weighted=draw(st.sampled_from(["none", "one", "each"])),
        optimizer=draw(st.sampled_from(sorted(OPTIMIZERS))),
        dtype=draw(st.sampled_from([None, torch.bfloat16, torch.float16])),
        batch=draw(st.sampled_from([1, 2, 7, 16, 33])),
        masks=tuple(draw(mask) for _ in range(draw(st.integers(1, 3)))),
        own_x=draw(st.booleans()),
        own_y=draw(st.booleans()),
        own_settings=draw(st.booleans()),
        pixels=draw(st.booleans()),
        way=draw(st.sampled_from(["steps", "gradients", "epochs"])),
        seed=draw(st.integers(0, 99)),
    )


def each_setting(case: Ensemble) -> list[dict[str, Any]]:
    """The settings of every member."""
    drawn = torch.rand(case.members, len(_OWN), generator=torch.Generator().manual_seed(case.seed)).tolist()
    settings = []
    for factors in drawn:
        own = dict(OPTIMIZERS[case.optimizer])
        if case.own_settings:
            own |= {name: own[name] * (0.5 + f / 2) for name, f in zip(_OWN, factors, strict=True) if name in own}
        settings.append(own)
    return settings


def loss_options(case: Ensemble) -> dict[str, Any]:
    """Those that the drawn loss has."""
    if case.loss != "cross_entropy":
        return {}
    options: dict[str, Any] = {"label_smoothing": case.label_smoothing}
    if case.class_weight:
        weight = torch.rand(case.sizes[-1], generator=torch.Generator().manual_seed(case.seed)) + 0.1
        options["class_weight"] = weight.to(DEVICE)
    if case.ignores and not case.probabilities:
        options["ignore_index"] = -100
    return options


def data(case: Ensemble) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, y, order, sample weights) with an axis of members."""
    probabilities = case.loss == "cross_entropy" and case.probabilities
    loss, count = "mse" if probabilities else case.loss, 2 * case.batch + 1
    drawn = [problem(case.sizes, count, loss=loss, uint8=case.pixels, seed=case.seed + e) for e in range(case.members)]
    x, y = (torch.stack(of).to(DEVICE) for of in zip(*drawn, strict=True))
    if "ignore_index" in loss_options(case):
        y[:, 1::3] = -100
    g = torch.Generator().manual_seed(case.seed)
    order = torch.stack([torch.randperm(count, generator=g) for _ in range(case.members)])
    x, y = (t if not t.is_floating_point() else t.float() for t in (x, y))
    return x, y, order.to(DEVICE), (torch.rand(case.members, count, generator=g) + 0.1).to(DEVICE)


def advance(case: Ensemble, step: TrainStep, x: Tensor, y: Tensor, order: Tensor, weight: Tensor, i: int) -> Tensor:
    """One step or epoch; the losses."""
    given = {} if case.weighted == "none" else {"sample_weight": weight}
    if case.way == "epochs":
        return step.epoch(x, y, case.batch, order, **given)
    of = (x, 3), (y, y_dims(case) + 1), (weight, 2)
    x, y, weight = ((t[:, : case.batch] if t.dim() == dims else t[: case.batch]) for t, dims in of)
    given = dict.fromkeys(given, weight)
    if case.way == "steps":
        return step(x, y, **given).clone()
    step.gradients(x, y, **given)
    step.gradients(x, y, accumulate=True, **given)
    step.update()
    return torch.zeros(())


def y_dims(case: Ensemble) -> int:
    if case.loss == "cross_entropy":
        return 2 if case.probabilities else 1
    return 1 if case.loss == "softmax_squared_error" else 2


@fuzz(3, ensembles())
def test_members_are_single_models(case: Ensemble):
    torch.manual_seed(case.seed)
    each, (x, y, order, weight) = each_setting(case), data(case)
    members = [fastmlp.MLP(case.sizes, [*case.activations, case.last], case.bias) for _ in range(case.members)]
    model = fastmlp.MLPEnsemble.stack(members).to(DEVICE)
    singles = [member.to(DEVICE) for member in members]
    if case.frozen and len(case.sizes) > 2:
        for network in (model, *singles):
            network.layers[0].requires_grad_(False)
    settings = each[0] | {name: [own[name] for own in each] for name in _OWN if name in each[0]}
    options = {"loss": case.loss, "dtype": case.dtype, **loss_options(case)}
    with fastmlp.use_backend("triton"), uninitialized_is_nan():
        together = TrainStep(model, **settings, **options)
        alone = [TrainStep(single, **own, **options) for single, own in zip(singles, each, strict=True)]
        for i, mask in enumerate(case.masks):
            together.active = torch.tensor(mask, device=DEVICE)
            own_weight = case.weighted == "each"
            batch = (x if case.own_x else x[0], y if case.own_y else y[0], order, weight if own_weight else weight[0])
            losses = advance(case, together, *batch, i)
            for e, step in enumerate(alone):
                if mask[e]:
                    of = (
                        x[e if case.own_x else 0],
                        y[e if case.own_y else 0],
                        order[e],
                        weight[e if own_weight else 0],
                    )
                    want = advance(case, step, *of, i)
                    if case.way != "gradients":
                        check(losses[e], want, "loss", case)
                elif case.way != "gradients":
                    assert losses[e].isnan()
        for e, single in enumerate(singles):
            for (name, ours), theirs in zip(single.named_parameters(), model.parameters(), strict=True):
                check(theirs[e], ours, f"{name} of member {e}", case)


def check(got: Tensor, want: Tensor, what: str, case: Ensemble) -> None:
    got, want = got.detach(), want.detach()
    if INTERPRETING:
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}")
    else:
        coarse = 1e-3 if case.dtype is None else 0.1
        torch.testing.assert_close(got, want, rtol=coarse, atol=coarse, equal_nan=True, msg=lambda m: f"{what}: {m}")
