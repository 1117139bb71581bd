"""The whole training step on a simulated GPU: how many launches it makes, and three steps of full size executed."""

from __future__ import annotations

import copy

import pytest
import torch

import fastmlp
from fastmlp import TrainStep, use_backend
from tests.conftest import INTERPRETING
from tests.support.harness import assert_within_budget

pytestmark = pytest.mark.skipif(INTERPRETING, reason="the simulated GPU runs compiled kernels")

TARGETS = [75, 80, 86, 89, 90, 100, 120, ("hip", "gfx90a"), ("hip", "gfx942"), ("hip", "gfx1100")]


def one_step(sizes, batch, target, dropout=0.0, **settings):
    """Names of the kernels of one recorded step."""
    from tests.ptxsim import SimulatedGPU

    images = torch.zeros(batch, sizes[0], dtype=torch.uint8)
    labels = torch.zeros(batch, dtype=torch.int64)
    with SimulatedGPU(target, execute=False) as gpu, use_backend("triton"):
        model = fastmlp.MLP(sizes, dropout=dropout)
        TrainStep(model, **{"lr": 0.1, **settings}).epoch(images, labels, batch)
    return [launch.name for launch in gpu.launches]


FIVE = ["_linear_fwd_kernel"] * 2 + ["_head_kernel", "_linear_dgrad_kernel", "_wgrad_update_kernel"]


def captured_step(*, batch=64, epoch=False, loss="cross_entropy", dropout=0.0, **settings):
    """Names of all nodes of one step's CUDA graph: kernels, and operations of torch."""
    from tests.support.cuda_graph import KernelNode, SimulatedCuda

    with SimulatedCuda(execute=False):
        step = TrainStep(fastmlp.MLP((64, 64, 64, 10), dropout=dropout), lr=0.1, loss=loss, **settings)
        x, y = torch.zeros(batch, 64), torch.zeros(batch, 10)
        if loss != "mse":
            y = torch.zeros(batch, dtype=torch.int64)
        for _ in range(2):
            step.epoch(x, y, batch) if epoch else step(x, y)
    (entry,) = step._engine.graphs._entries.values()
    return [node.launch.name if isinstance(node, KernelNode) else str(node.operation) for node in entry.graph.nodes]


@pytest.mark.launch
@pytest.mark.parametrize("layers", [1, 2, 3, 5])
@pytest.mark.parametrize("optimizer", [{}, {"momentum": 0.9, "nesterov": True}, {"optimizer": "adamw"}], ids=str)
def test_a_step_is_2l_minus_1_launches(layers, optimizer):
    sizes = (784, *[64] * (layers - 1), 10)
    assert one_step(sizes, 64, 80, **optimizer) == [
        *["_linear_fwd_kernel"] * (layers - 1),
        "_head_kernel",
        *["_linear_dgrad_kernel"] * max(0, layers - 2),
        "_wgrad_update_kernel",
    ]
    assert len(one_step(sizes, 64, 80, **optimizer)) <= max(2, 2 * layers - 1)


@pytest.mark.launch
def test_groups_and_averages_launch_nothing_more():
    options = {"ema_decay": 0.9, "ema_warmup": True, "param_groups": [{"params": "*.bias", "weight_decay": 0.1}]}
    for optimizer in ("sgd", "rmsprop", "lion", "adam"):
        assert captured_step(optimizer=optimizer, **options) == FIVE


@pytest.mark.launch
def test_dropout_launches_nothing_more():
    """Nothing of torch's either, which would draw numbers or count the passes."""
    assert captured_step(dropout=0.5) == captured_step(dropout=(0.0, 0.5), epoch=True) == FIVE


@pytest.mark.launch
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_five_launches_on_every_target(target):
    names = one_step((784, 512, 512, 10), 64, target)
    assert names == ["_linear_fwd_kernel"] * 2 + ["_head_kernel", "_linear_dgrad_kernel", "_wgrad_update_kernel"]


@pytest.mark.launch
def test_a_long_batch_costs_one_launch_more():
    names = one_step((64, 64, 64, 10), 16384, 80)
    assert len(names) == 6
    assert names[-2:] == ["_wgrad_update_kernel", "_reduce_update_kernel"]


@pytest.mark.launch
@pytest.mark.parametrize(("optimizer", "batch"), [("adamw", 64), ("sgd", 16384)])
@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({"dtype": torch.float16}, ["_before_update_kernel", "_reduce_update_kernel"]),
        (
            {"dtype": torch.float16, "max_grad_norm": 1.0},
            ["_reduce_update_kernel", "_before_update_kernel", "_reduce_update_kernel"],
        ),
        ({"max_grad_norm": 1.0}, ["_reduce_update_kernel", "_before_update_kernel", "_reduce_update_kernel"]),
    ],
    ids=["float16", "float16, clipped", "float32, clipped"],
)
def test_float16_costs_two_launches_more_and_clipping_three(settings, more, batch, optimizer):
    """No torch operation is among them: a captured step has as many nodes as kernels."""
    assert captured_step(optimizer=optimizer, batch=batch, **settings) == [*FIVE, *more]


@pytest.mark.launch
@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
@pytest.mark.parametrize("loss", ["mse", "softmax_squared_error"])
def test_other_losses_gather_and_scale_in_their_kernels(loss, dtype):
    names = captured_step(epoch=True, loss=loss, dtype=dtype)
    assert names[:3] == ["_linear_fwd_kernel"] * 3
    assert names[3] in ("_elementwise_loss_kernel", "_softmax_squared_error_kernel")
    assert names[4:7] == ["_linear_dgrad_kernel"] * 2 + ["_wgrad_update_kernel"]
    assert len(names) == (7 if dtype is None else 9)


@pytest.mark.launch
@pytest.mark.parametrize("weighted", [False, True], ids=["", "sample weights"])
@pytest.mark.parametrize("batch", [64, 2048, 2049])
@pytest.mark.parametrize("case", ["class weights", "probabilities, smoothing", "ignored", "huber"])
def test_options_of_losses_cost_no_launch_up_to_2048_rows(case, batch, weighted):
    """From 2,049 rows on the sum of the rows' weights costs one. Without weights of rows nothing does."""
    from tests.ptxsim import SimulatedGPU

    options = {
        "class weights": {"class_weight": torch.ones(10), "label_smoothing": 0.1},
        "probabilities, smoothing": {"label_smoothing": 0.1},
        "ignored": {"ignore_index": -100},
        "huber": {"loss": "huber", "delta": 0.5},
    }[case]
    labels = case in ("class weights", "ignored")
    y = torch.zeros(batch, dtype=torch.int64) if labels else torch.zeros(batch, 10)
    weight = torch.ones(batch) if weighted else None
    with SimulatedGPU(80, execute=False) as gpu, use_backend("triton"):
        step = TrainStep(fastmlp.MLP((64, 64, 64, 10)), lr=0.1, **options)
        step.epoch(torch.zeros(batch, 64), y, batch, sample_weight=weight)
    names = [launch.name for launch in gpu.launches if launch.name != "_reduce_update_kernel"]
    summed = [["_total_weight_kernel"] if batch > 2048 and (labels or weighted) else []][0]
    if case == "huber":
        middle = ["_linear_fwd_kernel", *summed, "_elementwise_loss_kernel", "_linear_dgrad_kernel"]
    else:
        middle = [*summed, "_head_kernel"]
    assert names == ["_linear_fwd_kernel"] * 2 + middle + ["_linear_dgrad_kernel", "_wgrad_update_kernel"]


@pytest.mark.launch
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_bias_gradients_come_from_the_producers_of_dz(loss):
    """With the head the update reads sums and, of all layers, only 16 bytes at a time; without, it reads dZ for db."""
    from tests.ptxsim import SimulatedGPU

    x = torch.zeros(64, 784)
    y = torch.zeros(64, dtype=torch.int64) if loss == "cross_entropy" else torch.zeros(64, 10)
    with SimulatedGPU(90, execute=False) as gpu, use_backend("triton"):
        TrainStep(fastmlp.MLP((784, 512, 512, 10)), lr=0.1, loss=loss)(x, y)
    arguments = gpu.launches[-1].arguments
    for of, factors, n in zip(arguments["sums"], arguments["operands"], (512, 512, 10), strict=True):
        if loss == "cross_entropy":
            assert of.ptr.dtype == torch.float32
            assert of.rows * 16 <= 64
            assert factors.stride_zm % 16 == 0
        else:
            assert of.ptr is factors.dz_ptr
            assert of.rows == 64
            assert factors.stride_zm == n


@pytest.mark.execute
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_three_steps_of_full_size(dtype):
    """784-512-512-10, batch 64, on an sm_80 that executes the compiled kernels, against float64."""
    from tests.ptxsim import SimulatedGPU

    torch.manual_seed(0)
    start = fastmlp.MLP((784, 512, 512, 10))
    images = torch.randint(0, 256, (192, 784), dtype=torch.uint8)
    labels = torch.randint(0, 10, (192,))
    order = torch.randperm(192)
    models = {name: copy.deepcopy(start) for name in ("kernels", "torch", "float64")}
    models["float64"].double()
    losses = {}
    for name, model in models.items():
        if name == "kernels":
            with SimulatedGPU(80) as gpu, use_backend("triton"):
                losses[name] = TrainStep(model, lr=0.1, momentum=0.9, dtype=dtype).epoch(images, labels, 64, order)
        else:
            step = TrainStep(model, lr=0.1, momentum=0.9, dtype=dtype if name == "torch" else None)
            losses[name] = step.epoch(images, labels, 64, order)
    assert len(gpu.launches) == 15
    for p, own, truth in zip(*(m.parameters() for m in models.values()), strict=True):
        assert_within_budget(p.detach(), truth.detach(), own.detach(), reduction=784)
    assert_within_budget(
        losses["kernels"].view(1), losses["float64"].double().view(1), losses["torch"].view(1), reduction=192
    )
