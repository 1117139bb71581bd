"""A step of an ensemble is the launches of one model's step, in lanes that execute nothing or little."""

from __future__ import annotations

import pytest
import torch

import fastmlp
from fastmlp import TrainStep, use_backend
from tests.conftest import INTERPRETING

if INTERPRETING:
    pytest.skip("the simulated GPU runs compiled kernels", allow_module_level=True)

from tests.ptxsim import SimulatedGPU
from tests.support.cuda_graph import KernelNode, SimulatedCuda

SIZES = (64, 64, 64, 10)
FIVE = ["_linear_fwd_kernel"] * 2 + ["_head_kernel", "_linear_dgrad_kernel", "_wgrad_update_kernel"]


@pytest.mark.launch
@pytest.mark.parametrize("members", [1, 10, 1000])
@pytest.mark.parametrize("settings", [{}, {"optimizer": "adamw"}], ids=["sgd", "adamw"])
def test_a_step_is_2l_minus_1_launches(members, settings):
    """Whatever the number of members and of rates; each launch has a z axis of all members."""
    rates = [0.1 / (e + 1) for e in range(members)]
    with SimulatedGPU(90, execute=False) as gpu, use_backend("triton"):
        step = TrainStep(fastmlp.MLPEnsemble(SIZES, members), lr=rates, **settings)
        step(torch.zeros(64, SIZES[0]), torch.zeros(64, dtype=torch.int64))
    assert [launch.name for launch in gpu.launches] == FIVE
    assert {launch.grid[2] for launch in gpu.launches} == {members}


@pytest.mark.launch
@pytest.mark.parametrize(("rows", "more"), [(64, []), (2049, ["_total_weight_kernel"])])
def test_options_of_the_loss_cost_no_launch(rows, more):
    """More classes than the head takes; weights of many rows are added by one launch for all members."""
    with SimulatedGPU(90, execute=False) as gpu, use_backend("triton"):
        model = fastmlp.MLPEnsemble((*SIZES[:-1], 100), 10)
        step = TrainStep(model, lr=0.1, label_smoothing=0.1, class_weight=torch.ones(100), ignore_index=3)
        y, weight = torch.zeros(10, rows, dtype=torch.int64), torch.ones(10, rows)
        step(torch.zeros(rows, SIZES[0]), y, sample_weight=weight)
    names = ["_linear_fwd_kernel"] * 3 + [*more, "_cross_entropy_kernel"] + ["_linear_dgrad_kernel"] * 2
    assert [launch.name for launch in gpu.launches][: len(names) + 1] == [*names, "_wgrad_update_kernel"]
    assert {launch.grid[2] for launch in gpu.launches} == {10}


@pytest.mark.launch
@pytest.mark.parametrize("members", [1, 10, 1000])
def test_a_module_launches_each_kernel_once(members):
    """The forward pass of all members, and their losses' backward pass."""
    with SimulatedGPU(90, execute=False) as gpu, use_backend("triton"):
        model = fastmlp.MLPEnsemble(SIZES, members)
        model(torch.zeros(64, SIZES[0])).square().sum().backward()
    names = [launch.name for launch in gpu.launches]
    assert names == ["_linear_fwd_kernel"] * 3 + ["_linear_dgrad_kernel"] * 2 + ["_wgrad_update_kernel"]
    assert {launch.grid[2] for launch in gpu.launches} == {members}


@pytest.mark.launch
@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({"optimizer": "adamw"}, []),
        ({"optimizer": "adamw", "max_grad_norm": 1.0}, ["_reduce_update_kernel", "_before_update_kernel"]),
        ({"optimizer": "adamw", "dtype": torch.float16}, ["_before_update_kernel"]),
    ],
    ids=["plain", "clipped", "float16"],
)
def test_a_captured_step(settings, more):
    """A graph has these kernels and no operation of torch: rates, flags and counts are read on the device."""
    with SimulatedCuda(execute=False):
        step = TrainStep(fastmlp.MLPEnsemble(SIZES, 10), lr=0.1, **settings)
        for _ in range(2):
            step(torch.zeros(64, SIZES[0]), torch.zeros(64, dtype=torch.int64))
    (entry,) = step._engine.graphs._entries.values()
    names = [node.launch.name if isinstance(node, KernelNode) else str(node) for node in entry.graph.nodes]
    assert names == [*FIVE, *more, *(["_reduce_update_kernel"] if more else [])]


def flagged(*, cuda_graph):
    """Losses, parameters and state after steps and epochs between which rates, flags and sample weights change."""
    torch.manual_seed(0)
    with SimulatedCuda() as cuda:
        model = fastmlp.MLPEnsemble((20, 18, 5), 2)
        step = cuda.keep_state(TrainStep(model, lr=[0.1, 0.01], optimizer="adamw", cuda_graph=cuda_graph))
        x, y = torch.randn(24, 20), torch.randint(0, 5, (24,))
        results = []
        for flags in ([True, True], [True, False], [True, False], [False, True], [True, True]):
            step.active = torch.tensor(flags)
            results.append(step(x[:12], y[:12], torch.rand(2, 12)).clone())
            step.lr = [rate * 0.5 for rate in step.lr]
        for flags in ([True, True], [False, True], [True, True]):
            step.active = torch.tensor(flags)
            results.append(step.epoch(x, y, 12).clone())
        results += [p.detach().clone() for p in model.parameters()]
        results += list(step.state_dict().values())
    return results, cuda


@pytest.mark.execute
def test_one_graph_serves_all_rates_and_flags():
    """Replays give the bits of plain launches; a member that pauses resumes with its own number of updates."""
    expected, plain = flagged(cuda_graph=False)
    actual, cuda = flagged(cuda_graph=True)
    assert not plain.captures
    assert len(cuda.captures) == 2
    assert cuda.replays >= 5
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
