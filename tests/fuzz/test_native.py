"""TrainStep as machine code of a CPU against autograd and torch.optim, with the cases of the steps on operators."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.conftest import HAS_GPU, INTERPRETING
from tests.fuzz.cases import fuzz
from tests.fuzz.test_ensembles import Members, check_ensemble, ensembles
from tests.fuzz.test_steps import OPTIMIZERS, Training, check_trained, trained, trainings

pytestmark = [
    pytest.mark.skipif(INTERPRETING or HAS_GPU, reason="plain torch is tested where no kernel runs"),
    pytest.mark.usefixtures("native_code"),
]


@fuzz(12, trainings())
def test_train_step_by_machine_code(case: Training):
    case = replace(case, dtype=None)
    start, data = case.network(), case.data()
    order = torch.randperm(case.rows, generator=torch.Generator().manual_seed(case.seed))
    got = trained(case, start, data, order)
    check_trained(case, start, data, order, OPTIMIZERS[case.optimizer], got)


@fuzz(4, ensembles())
def test_ensembles_by_machine_code(case: Members):
    check_ensemble(replace(case, training=replace(case.training, dtype=None)))
