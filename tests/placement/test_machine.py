"""The fake machine finds the faults that it is meant to find."""

from __future__ import annotations

import pytest
import torch

from fastmlp import kernels

pytestmark = pytest.mark.placement


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: x.cpu(),
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: torch.empty(3).copy_(x),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: x.copy_(torch.ones(3), non_blocking=True),
        lambda x: x.copy_(torch.ones(3).pin_memory()),
        lambda x: torch.tensor([1.0], device="cuda:1"),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.cuda.current_stream().synchronize(),
    ],
)
def test_waits(machine, work):
    x = torch.ones(3, device="cuda:1")
    with pytest.raises(AssertionError, match="the host waits"), machine.hot("cuda:1", host=True):
        work(x)


def test_what_is_no_wait(machine):
    x = torch.ones(3, device="cuda:1")
    pinned = torch.ones(3).pin_memory()
    assert pinned.is_pinned()
    assert torch.zeros(3, pin_memory=True).is_pinned()
    with machine.hot("cuda:1"):
        x.copy_(pinned, non_blocking=True)
        y = pinned.to("cuda:1", non_blocking=True)
        z = torch.where(x > 0, x * 2 + y, 1.0)
        z[torch.arange(2, device="cuda:1")] = 3.0
        assert torch.full((), 2.0, device="cuda:1").device == x.device
    assert x.sum().item() == 1.0, "item() gives some number where waiting is allowed"


def test_tensors_on_the_wrong_device(machine):
    x = torch.ones(3, device="cuda:1")
    for device in ("cpu", "cuda:0"):
        with pytest.raises(AssertionError, match="where everything should be"), machine.hot("cuda:1"):
            torch.zeros(3, device=device)
        with pytest.raises(RuntimeError, match=r"same device|two devices"):
            x + torch.ones(3, device=device)
    with machine.hot("cuda:1", host=True):
        torch.zeros(3)


def test_launches_on_the_wrong_device(machine):
    x, w = torch.ones(3, 4, device="cuda:1"), torch.ones(2, 4, device="cuda:1")
    with pytest.raises(AssertionError, match="launched on cuda:0 with tensors on cuda:1"):
        kernels.linear_fwd(x, w, None, "relu")
    with torch.cuda.device(1):
        kernels.linear_fwd(x, w, None, "relu")
    assert [(launch.name, launch.device) for launch in machine.launches] == [("_linear_fwd_kernel", 1)]


def test_a_capture_belongs_to_one_device(machine):
    x = torch.ones(3, device="cuda:1")
    with pytest.raises(AssertionError, match="while another device captures"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x * 2
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream("cuda:1")):
        x * 2
    assert machine.current == 0


def test_addresses_and_bytes(machine):
    before = machine.held()
    x = torch.ones(4, 3, device="cuda:0", dtype=torch.float16)
    y = torch.ones(4, 3, device="cuda:0")
    assert x.data_ptr() != y.data_ptr()
    assert x[1].data_ptr() == x.data_ptr() + 6
    assert machine.held() == before + 24 + 48
    view = x[1]
    del x, y
    assert machine.held() == before + 24
    del view
    assert machine.held() == before


def test_backward(machine):
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor, y):
            return x * factor, None, y * factor

        @staticmethod
        def backward(ctx, dx, _, dy):
            current.append(torch.cuda.current_device())
            return dx * 2, None, dy * 2

    current: list[int] = []
    x, y = (torch.ones(n, device="cuda:1", requires_grad=True) for n in (3, 4))
    a, _, b = Twice.apply(x, 2, y)
    (a.sum() * b.sum() + x.sum()).backward()
    assert (x.grad.shape, y.grad.shape) == (x.shape, y.shape)
    assert (current, machine.current) == ([1], 0)
    (dx,) = torch.autograd.grad((x * x).sum(), x, create_graph=True)
    assert torch.autograd.grad(dx.sum(), x)[0].device == x.device
