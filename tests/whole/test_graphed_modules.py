"""A CUDA graph of the modules' forward pass, loss and backward pass gives the bits of plain launches, on new inputs.

The stand-in for CUDA graphs poisons what a graph writes before each replay, except the static inputs and parameters.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastmlp
from tests.conftest import INTERPRETING

if INTERPRETING:
    pytest.skip("the simulated GPU runs compiled kernels", allow_module_level=True)

from tests.support.cuda_graph import SimulatedCuda

pytestmark = [
    pytest.mark.execute,
    # The stand-in's recording asks the loss for its gradient.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

SIZES, ROWS = (20, 18, 5), 12


@pytest.fixture
def unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture on a GPU is no dispatch mode; the stand-in's recording passes for none."""
    monkeypatch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
    monkeypatch.setattr("fastmlp.autograd.cross_entropy._check_labels", lambda *_: None)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, SIZES[0], generator=g), torch.randint(0, SIZES[-1], (ROWS,), generator=g)


def test_a_graph_of_forward_loss_and_backward_replays_on_new_inputs(unwatched):
    torch.manual_seed(0)
    with SimulatedCuda() as cuda:
        model, loss_function = fastmlp.MLP(SIZES, "relu"), fastmlp.CrossEntropyLoss()
        parameters = list(model.parameters())

        def launches(x: Tensor, y: Tensor) -> list[Tensor]:
            loss = loss_function(model(x), y)
            return [loss, *torch.autograd.grad(loss, parameters)]

        plain = [[t.clone() for t in launches(*batch(seed))] for seed in range(3)]
        x, y = batch(0)
        cuda.keep(lambda: [x, y, *parameters])
        graph = torch.cuda.CUDAGraph()
        begun = len(cuda.launched)
        launches(x, y)
        with torch.cuda.graph(graph):
            results = launches(x, y)
        assert cuda.launched[begun:] == [node.launch.name for node in graph.nodes if hasattr(node, "launch")]
        for seed in (1, 2, 0):
            x.copy_(batch(seed)[0])
            y.copy_(batch(seed)[1])
            graph.replay()
            for got, expected in zip(results, plain[seed], strict=True):
                assert torch.equal(got, expected)
