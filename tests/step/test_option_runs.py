"""100 steps on the kernels in float32, for every option of a TrainStep, against autograd and torch.optim.

The other files of this folder compare the same options on plain torch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

import fastmlp
from tests.conftest import INTERPRETING, UNSIMULATED
from tests.step.test_ema import DECAY, averaged, by_formula
from tests.step.test_ema import RULES as EMA_RULES
from tests.step.test_groups import RULES
from tests.step.test_loss_options import OPTIONS, WEIGHTED, data
from tests.support.harness import EPS32
from tests.support.steps import (
    Reference,
    assert_run_within_budget,
    converted,
    flat,
    float32_run,
    for_step,
    network,
    one_thread,  # noqa: F401
)
from tests.support.torchs import OPTIMIZERS

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

SIZES, BATCH = (5, 4, 5), 6
MOMENTUM = OPTIMIZERS["momentum"]
GROUPS = [{"params": "*.bias", "lr": 0.02, "weight_decay": 0.0}, {"params": "layers.1.*t", "weight_decay": 0.2}]
PLAIN = WEIGHTED["cross_entropy"]
DROPPING = [("sigmoid", "sgd", "cross_entropy"), ("gelu", "adamw", "all"), ("tanh", "momentum", "mse")]


class Case(NamedTuple):
    """What a run has that no other has."""

    settings: dict[str, Any]
    loss: str
    options: dict[str, Any]
    probabilities: bool
    weighted: bool = False
    dropout: float = 0.0
    activation: str = "sigmoid"


CASES = (
    {name: Case(settings, *PLAIN) for name, settings in OPTIMIZERS.items()}
    | {f"groups, {name}": Case({**rule, "param_groups": GROUPS}, *PLAIN) for name, rule in RULES.items()}
    | {name: Case(MOMENTUM, *option) for name, option in OPTIONS.items()}
    | {f"{name}, weighted": Case(MOMENTUM, *option, weighted=True) for name, option in WEIGHTED.items()}
    | {
        f"dropout, {activation}, {rule}, {name}": Case(
            OPTIMIZERS[rule], *WEIGHTED[name], weighted=True, dropout=0.4, activation=activation
        )
        for activation, rule, name in DROPPING
    }
)
#: A rule, and whether the average starts with a warm-up.
AVERAGES = {f"{rule}{', warm-up' * warmup}": (rule, warmup) for rule in EMA_RULES for warmup in (False, True)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """By day two options and one average."""
    of = {test_every_option: (CASES, ["all, weighted", "groups, adam"]), test_averages: (AVERAGES, ["adamw, warm-up"])}
    every, by_day = of[metafunc.function]
    metafunc.parametrize("case", list(every) if metafunc.config.getoption("--full") else by_day)


@pytest.fixture
def steps(request: pytest.FixtureRequest) -> int:
    """Two by day in the interpreter, which takes a tenth of a second per step."""
    return 100 if request.config.getoption("--full") or not INTERPRETING else 2


@UNSIMULATED
def test_every_option(unsimulated, case, steps):
    settings, loss, options, probabilities, weighted, dropout, activation = CASES[case]
    # From seed 0, an output comes so near to its target in step 60 that a rounding decides on the sign of its gradient.
    start = network(SIZES, activation, seed=1 if loss == "l1" else 0)
    start.dropout = dropout
    batches = data(loss, options, probabilities, weighted=weighted, steps=steps, sizes=SIZES, size=BATCH)
    with fastmlp.use_backend("triton"):
        *run, settled = float32_run(start, batches, settings, loss=loss, device=unsimulated, **options)
    assert settled == steps
    assert_run_within_budget(*run, steps, EPS32)
    assert (run[1] - flat(start)).norm() > 1e-3 * flat(start).norm(), "nothing was learned"


@UNSIMULATED
def test_averages(unsimulated, case, steps):
    """Of torch's parameters in float64 and in float32, by the formula."""
    rule, warmup = AVERAGES[case]
    settings, start = EMA_RULES[rule], network(SIZES)
    batches = data("cross_entropy", {}, False, steps=steps, sizes=SIZES, size=BATCH)
    with fastmlp.use_backend("triton"):
        step = fastmlp.TrainStep(
            converted(start, torch.float32).to(unsimulated), **settings, ema_decay=DECAY, ema_warmup=warmup
        )
    for x, y in batches:
        step(*(t.to(unsimulated) for t in for_step(x, y, torch.float32)))
    expected, own = (
        by_formula([flat(start), *(torchs.train([batch]).flat() for batch in batches)], torchs.master, warmup)
        for torchs in (Reference(start, settings, master=dtype) for dtype in (torch.float64, torch.float32))
    )
    assert_run_within_budget(averaged(step).cpu(), expected, own, steps, EPS32)
