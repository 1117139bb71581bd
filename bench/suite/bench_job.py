"""The whole job: each learner trains one epoch of the bundled subset, and must learn something."""

from __future__ import annotations

from typing import Any

import pytest

from bench.accuracy.learners import LEARNERS, Data, Learner
from bench.accuracy.run import load_data
from bench.suite.conftest import device

PARTS = 4


@pytest.fixture(scope="module")
def data() -> Data:
    """The bundled subset of FashionMNIST."""
    return load_data("bundled", device())


@pytest.mark.parametrize("learner", LEARNERS, ids=lambda learner: learner.name)
def test_job(benchmark: Any, about: dict[str, Any], data: Data, learner: Learner) -> None:
    available = learner.available(data.device)
    if not available.ok:
        pytest.skip(f"{learner.label}: {available.reason}")
    session = learner.build(data)
    session.warm_up()

    def start() -> None:
        session.reset(0)
        session.finish()

    def job() -> None:
        for part in range(PARTS):
            session.train(0, part, PARTS)
        session.finish()

    benchmark.group = "job: one epoch of the bundled subset"
    benchmark.extra_info |= {**about, "learner": learner.name, "settings": str(learner.settings)}
    benchmark.pedantic(job, setup=start, rounds=3)
    # The gate: after one epoch of 5,000 images every contender is far from the 10 % of chance.
    assert session.accuracy() > 0.4, f"{learner.label} did not learn"
