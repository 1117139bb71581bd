"""Options of cross-entropy in a TrainStep of an ensemble on the kernels: each member as the same MLP alone.

The head has the loss of few classes, and cross-entropy's own kernel that of many and of outputs with an activation.
In the interpreter both steps take the same tiles, so that they agree bit by bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastmlp
from fastmlp import MLP, MLPEnsemble, TrainStep
from tests.conftest import INTERPRETING, UNSIMULATED

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"), UNSIMULATED]

E, ROWS, BATCH = 2, 10, 5
NETWORKS: dict[str, tuple[tuple[int, ...], str | list[str]]] = {
    "head": ((5, 4, 6), "tanh"),
    "many classes": ((5, 70), "identity"),
    "last activation": ((5, 4, 6), ["gelu", "tanh"]),
}
ALL = {"class_weight": True, "label_smoothing": 0.1}
#: (network, options, whether targets are probabilities, sample weights: none, of all members or of each)
CASES: dict[str, tuple[str, dict[str, Any], bool, str]] = {
    "last activation": ("last activation", {**ALL, "ignore_index": 2}, False, "own"),
    "many probabilities": ("many classes", {}, True, "one"),
    "many classes": ("many classes", {**ALL, "ignore_index": 2}, False, "none"),
    "many classes, weights": ("many classes", {"ignore_index": -100}, False, "own"),
    "last activation, smoothing": ("last activation", {"label_smoothing": 0.2}, False, "none"),
    "last activation, probabilities": ("last activation", ALL, True, "one"),
    "head": ("head", {}, False, "own"),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """By day the first case on batches of each member and the second on batches of all."""
    grid = [(case, own) for case in CASES for own in (True, False)]
    chosen = grid if metafunc.config.getoption("--full") else [grid[0], grid[3]]
    ids = [f"{case}, {'own' if own else 'one'}" for case, own in chosen]
    metafunc.parametrize(("case", "own"), chosen, ids=ids)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def targets(classes: int, options: dict[str, Any], probabilities: bool) -> Tensor:
    if probabilities:
        return draw(E, ROWS, classes, seed=1).softmax(-1)
    y = torch.randint(0, classes, (E, ROWS), generator=torch.Generator().manual_seed(1))
    if "ignore_index" in options:
        y[:, ::5] = options["ignore_index"]
    return y


def test_members_are_single_models(unsimulated, case, own):
    """A step without one member, an accumulated gradient and an epoch, on batches of each member or of all."""
    name, options, probabilities, weighted = CASES[case]
    sizes, activation = NETWORKS[name]
    options = dict(options)
    if "class_weight" in options:
        options["class_weight"] = draw(sizes[-1], seed=3).abs() + 0.1
    x, y = draw(E, ROWS, sizes[0], seed=0), targets(sizes[-1], options, probabilities)
    s = draw(E, ROWS, seed=2).abs()
    order = torch.stack([torch.randperm(ROWS, generator=torch.Generator().manual_seed(e)) for e in range(E)])
    x, y, s, order = (t.to(unsimulated) for t in (x, y, s, order))
    if not own:
        x, y, order = x[0], y[0], order[0]
    if weighted == "one":
        s = s[0]
    dims = 2 if probabilities else 1
    torch.manual_seed(0)
    models = [MLP(sizes, activation).to(unsimulated) for _ in range(E)]
    ensemble = MLPEnsemble.stack(models)
    settings = {**options, "momentum": 0.9}
    settings["class_weight"] = None if "class_weight" not in options else options["class_weight"].to(unsimulated)

    def member(t: Tensor, e: int, dims: int) -> Tensor:
        return t[e] if t.dim() > dims else t

    def rows(t: Tensor, i: int, dims: int) -> Tensor:
        return t.narrow(-dims, i * BATCH, BATCH)

    def batch(i: int, e: int | None) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
        of = [(rows(x, i, 2), 2), (rows(y, i, dims), dims), (rows(s, i, 1), 1)]
        xs, ys, weight = (t if e is None else member(t, e, n) for t, n in of)
        return (xs, ys), {} if weighted == "none" else {"sample_weight": weight}

    def run(step: TrainStep, i: int, e: int | None) -> Tensor:
        args, given = batch(0, e)
        if i == 0:
            return step(*args, **given)
        if i == 1:
            step.gradients(*args, **given)
            args, given = batch(1, e)
            step.gradients(*args, accumulate=True, **given)
            step.update()
            return torch.zeros((), device=unsimulated)
        of = [(x, 2), (y, dims), (order, 1), (s, 1)]
        xs, ys, rows, weight = (t if e is None else member(t, e, n) for t, n in of)
        return step.epoch(xs, ys, BATCH, rows, **({} if weighted == "none" else {"sample_weight": weight}))

    with fastmlp.use_backend("triton"):
        step = TrainStep(ensemble, lr=[0.1, 0.05], **settings)
        alone = [TrainStep(model, lr=lr, **settings) for model, lr in zip(models, (0.1, 0.05), strict=True)]
        for i in range(3):
            step.active[1] = i != 0
            losses = run(step, i, None)
            for e in range(E):
                if step.active[e]:
                    check(losses if i == 1 else losses[e], run(alone[e], i, e))
                else:
                    assert losses[e].isnan()
    for single, trained in zip(models, ensemble.unstack(), strict=True):
        for a, b in zip(trained.parameters(), single.parameters(), strict=True):
            check(a.detach(), b.detach())


def check(got: Tensor, want: Tensor) -> None:
    assert want.isfinite().all()
    if INTERPRETING:
        assert torch.equal(got, want), (got - want).abs().max()
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
