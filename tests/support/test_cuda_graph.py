"""The stand-in for CUDA graphs refuses what a GPU refuses, and catches what a GPU would silently get wrong."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import INTERPRETING

if INTERPRETING:
    pytest.skip("the simulated GPU runs compiled kernels", allow_module_level=True)

from fastmlp import kernels
from tests.support.cuda_graph import SimulatedCuda

pytestmark = pytest.mark.execute


def captured(cuda, work):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def test_a_capture_executes_nothing_and_a_replay_all_of_it():
    x, total = torch.ones(3), torch.zeros(())
    with SimulatedCuda() as cuda:
        cuda.keep(lambda: [total])
        graph = captured(cuda, lambda: total.add_((x * 2).sum()))
        assert (total.item(), cuda.captures) == (0.0, [3])
        graph.replay()
        x.fill_(10.0)
        graph.replay()
    assert total.item() == 66.0


def test_kernels_are_recorded_with_their_addresses():
    # So much memory goes back to the system at once, and no other tensor is made in its place.
    x, w = torch.ones(1 << 24)[:80].view(4, 20), torch.ones(3, 20)
    a = torch.zeros(4, 3)
    with SimulatedCuda() as cuda:
        kernels.linear_fwd(x, w, None, "identity", a=a)
        a.zero_()
        graph = captured(cuda, lambda: kernels.linear_fwd(x, w, None, "identity", a=a))
        assert a.sum() == 0
        w.mul_(2)
        _memoryless = torch.ones(2, 2).to_sparse()  # which the search for the memory meets too
        x = torch.ones(4, 20)  # the graph goes on reading the old memory, which is gone
        with pytest.raises(RuntimeError, match="freed since its capture"):
            graph.replay()
        x = torch.ones(4, 20)
        graph = captured(cuda, lambda: kernels.linear_fwd(x, w, None, "identity", a=a))
        graph.replay()
    assert a.eq(40).all()


def test_what_python_computes_is_that_of_the_capture():
    factor, y = 2.0, torch.zeros(3)
    with SimulatedCuda():
        x = torch.ones(3)
        graph = captured(None, lambda: torch.mul(x, factor, out=y))
        factor = 3.0
        graph.replay()
    assert y.eq(2).all()


def test_what_is_written_is_poisoned_unless_it_is_declared():
    for declared in (False, True):
        with SimulatedCuda() as cuda:
            count, out = torch.zeros(()), torch.zeros(())
            if declared:
                cuda.keep(lambda: [count])  # noqa: B023
            graph = captured(cuda, lambda: out.copy_(count.add_(1)))  # noqa: B023
            graph.replay()
            graph.replay()
        assert out.isnan().item() != declared
        assert declared == (count.item() == 2)


def test_memory_of_the_pool_does_not_last():
    with SimulatedCuda() as cuda:
        kept, x = [], torch.ones(3)
        first = captured(cuda, lambda: kept.append(x + 1))
        first.replay()
        assert kept[0].eq(2).all()
        second = captured(cuda, lambda: kept.append(kept[0] + 1))
        first.memory.extend(second.memory)  # as graphs of one pool share it
        first.replay()
        assert kept[1].isnan().all()


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.copy_(torch.tensor([1.0, 2.0, 3.0])),
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.cuda.Stream().synchronize(),
        lambda x: torch.cuda.current_stream().wait_stream(torch.cuda.Stream()),
        lambda x: captured(None, lambda: None),
        lambda x: kernels.linear_fwd(x.expand(2, 3).contiguous(), torch.ones(5, 3), None, "silu"),
    ],
    ids=[
        *("item", "tolist", "bool", "cpu", "nonzero", "mask", "host", "synchronize", "stream", "foreign", "nested"),
        "unloaded",
    ],
)
def test_what_a_capture_refuses(work):
    x = torch.ones(3)
    with SimulatedCuda() as cuda:
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match=r"capturing|another stream"), torch.cuda.graph(graph):
            work(x)
        assert not torch.cuda.is_current_stream_capturing()
        with pytest.raises(RuntimeError, match="without a preceding successful capture"):
            graph.replay()
        captured(cuda, lambda: x.add_(1)).replay()
