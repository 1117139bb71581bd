"""Offsets beyond 2^31 elements need addresses of 64 bits, in each kernel and along every stride that it takes.

The operands are views with large strides. On a CPU their memory is reserved but hardly touched, so the strides take no
gigabytes. In the interpreter only the last programs of a launch run for outputs larger than 2^31 elements; a GPU writes
these outputs whole. The simulated GPU has no part in these tests, because it copies whole storages.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from fastmlp import reference
from fastmlp.kernels import (
    activation_bwd,
    cross_entropy,
    cross_entropy_bwd,
    cross_entropy_fwd,
    elementwise_loss,
    linear_dgrad,
    linear_fwd,
    linear_wgrad,
    softmax_squared_error,
)
from tests.conftest import HAS_GPU, INTERPRETING
from tests.support.harness import assert_within_budget

pytestmark = [
    pytest.mark.interpret if INTERPRETING else pytest.mark.gpu,
    pytest.mark.large,
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
#: A stride below 2^31, which a kernel is given in 32 bits. Twice this stride is above 2^31.
FAR = 2**30 + 8
HALF = torch.float16


@pytest.fixture
def device() -> Iterator[torch.device]:
    if INTERPRETING:
        from tests.support.interpreter import bounds_checked

        with bounds_checked():
            yield torch.device("cpu")
    elif HAS_GPU:
        yield torch.device("cuda")
    else:
        pytest.skip("needs Triton's interpreter or a GPU")


def reserve(elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take memory only where they are written (on the CPU)."""
    if device.type == "cuda":
        if elements * dtype.itemsize > 0.6 * torch.cuda.mem_get_info()[0]:
            pytest.skip(f"needs {elements * dtype.itemsize / 1e9:.0f} GB of free GPU memory")
        return torch.zeros(elements, dtype=dtype, device=device)
    # The memory lives as long as the tensor made of it.
    memory = mmap.mmap(-1, elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype)


def far(values: Tensor, dim: int, device: torch.device) -> Tensor:
    """A view equal to ``values`` whose stride along ``dim`` is FAR; the other dimensions are dense."""
    strides, step = [0] * values.dim(), 1
    for d in reversed([d for d in range(values.dim()) if d != dim]):
        strides[d], step = step, step * values.shape[d]
    strides[dim] = FAR
    assert (values.shape[dim] - 1) * FAR > 2**31
    storage = reserve((values.shape[dim] - 1) * FAR + step, values.dtype, device)
    return storage.as_strided(values.shape, strides).copy_(values)


def last_programs(count: int):
    """Run the last ``count`` programs of each launch only, where that is possible."""
    if not INTERPRETING:
        return nullcontext()
    from tests.support.interpreter import programs

    return programs(lambda name, total: range(total)[-count:])


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(got: Tensor, compute, *inputs: Tensor, reduction: int = 8) -> None:
    """Compare ``got`` with ``compute`` of the inputs in float64 and in their own dtype."""
    wide = [t.cpu().double() if t.is_floating_point() else t.cpu() for t in inputs]
    assert_within_budget(got.cpu(), compute(*wide), compute(*(t.cpu() for t in inputs)), reduction=reduction)


@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize("operand", ["x", "pixels", "weight"])
def test_linear_fwd_inputs(device, operand, dim):
    x, w, b = draw(3, 3), draw(3, 3, seed=1), draw(3, seed=2)
    if operand == "pixels":
        x = torch.tensor([[3, 200, 17], [255, 0, 1], [90, 91, 7]], dtype=torch.uint8)
    placed = (x.to(device), far(w, dim, device)) if operand == "weight" else (far(x, dim, device), w.to(device))
    a, _ = linear_fwd(*placed, b.to(device), "sigmoid")
    check(a, lambda x, w, b: reference.linear_act(x, w, b, "sigmoid"), x, w, b)


@pytest.mark.parametrize("kernel", ["fwd", "dgrad", "wgrad"])
def test_members(device, kernel):
    """From one member to the next it is as far as from one row to the next."""
    x, w = draw(3, 4, 5), draw(3, 5, 5, seed=1)
    if kernel == "fwd":
        got, _ = linear_fwd(far(x, 0, device), far(w, 0, device), None, "identity")
        check(got, lambda x, w: x @ w.mT, x, w)
    elif kernel == "dgrad":
        check(linear_dgrad(far(x, 0, device), far(w, 0, device)), lambda x, w: x @ w, x, w)
    else:
        dw, _ = linear_wgrad(far(x, 0, device), far(w[:, :4], 0, device))
        check(dw, lambda dz, x: dz.mT @ x, x, w[:, :4])


def test_linear_fwd_bias(device):
    x, w, b = draw(3, 3), draw(3, 3, seed=1), draw(3, seed=2)
    a, _ = linear_fwd(x.to(device), w.to(device), far(b, 0, device), "identity")
    check(a, reference.linear_act, x, w, b)


def test_linear_fwd_gathered_rows(device):
    x, w, rows = draw(3, 5), draw(4, 5, seed=1), torch.tensor([2, 0, 1, 2])
    a, _ = linear_fwd(far(x, 0, device), w.to(device), None, "identity", rows=rows.to(device))
    check(a, lambda x, w: reference.linear_act(x, w), x[rows], w)


def test_linear_fwd_outputs(device):
    M, N = 2**26 + 3, 33
    x, w = draw(1, 4), draw(N, 4, seed=1)
    a, z = (reserve(M * N, HALF, device).view(M, N) for _ in range(2))
    with last_programs(2):
        linear_fwd(x.to(device).expand(M, 4), w.to(device), None, "silu", save_z=True, a=a, z=z)
    check(a[-3:], lambda x, w: reference.linear_act(x.expand(3, 4), w, None, "silu"), x, w)
    check(z[-3:], lambda x, w: reference.linear_act(x.expand(3, 4), w), x, w)


@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize("operand", [0, 1], ids=["dz", "weight"])
def test_linear_dgrad_inputs(device, operand, dim):
    inputs = [draw(3, 3), draw(3, 3, seed=1)]
    placed = [far(t, dim, device) if i == operand else t.to(device) for i, t in enumerate(inputs)]
    check(linear_dgrad(*placed), reference.linear_dgrad, *inputs)


def test_linear_dgrad_outputs(device):
    M, K = 2**26 + 3, 33
    dz, w, a = draw(1, 4), draw(4, K, seed=1), draw(3, K, seed=2)
    saved, dx = (reserve(M * K, HALF, device).view(M, K) for _ in range(2))
    saved[-3:] = a
    with last_programs(2):
        linear_dgrad(dz.to(device).expand(M, 4), w.to(device), saved, "tanh", dx=dx)
    check(dx[-3:], lambda dz, w, a: (dz @ w) * (1 - a * a), dz, w, a)


@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize("operand", [0, 1], ids=["dz", "x"])
def test_linear_wgrad_inputs(device, operand, dim):
    inputs = [draw(3, 3), draw(3, 3, seed=1)]
    placed = [far(t, dim, device) if i == operand else t.to(device) for i, t in enumerate(inputs)]
    dw, db = linear_wgrad(*placed)
    check(dw, lambda dz, x: dz.t() @ x, *inputs)
    check(db, lambda dz, x: dz.sum(0), *inputs)


def test_linear_wgrad_gathered_rows(device):
    dz, x, rows = draw(4, 3), draw(3, 5, seed=1), torch.tensor([2, 0, 1, 2])
    dw, _ = linear_wgrad(dz.to(device), far(x, 0, device), rows=rows.to(device))
    check(dw, lambda dz, x: dz.t() @ x, dz, x[rows])


def test_linear_wgrad_outputs(device):
    N, K = 2**16 + 3, 2**15 + 5
    dz, x = draw(2, N), draw(2, K, seed=1)
    dw = reserve(N * K, HALF, device).view(N, K)
    with last_programs(1):
        linear_wgrad(dz.to(device), x.to(device), bias=False, dw=dw)
    check(dw[-3:, -5:], lambda dz, x: dz.t() @ x, dz[:, -3:], x[:, -5:])


@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_activation_bwd_upstream(device, dim):
    da, a = draw(3, 3), torch.sigmoid(draw(3, 3, seed=1))
    check(activation_bwd(far(da, dim, device), a.to(device), "sigmoid"), lambda da, a: da * (a * (1 - a)), da, a)


def test_activation_bwd_of_many_elements(device):
    M, N = 2**26 + 3, 33
    saved, dz = (reserve(M * N, HALF, device).view(M, N) for _ in range(2))
    da, a = draw(N), torch.sigmoid(draw(3, N, seed=1))
    saved[-3:] = a
    with last_programs(1):
        activation_bwd(da.to(device).expand(M, N), saved, "sigmoid", dz=dz)
    check(dz[-3:], lambda da, a: da * (a * (1 - a)), da.expand(3, N), a)


def loss_and_grad(z: Tensor, y: Tensor, w: Tensor | None = None, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    options = {"reduction": "none", "smoothing": smoothing}
    loss = reference.cross_entropy(z, y, w, **options)
    return loss, reference.cross_entropy_backward(torch.ones_like(loss), z, y, w, **options)[0]


@pytest.mark.parametrize("operand", ["z rows", "z columns", "labels", "probabilities", "weight"])
def test_cross_entropy_inputs(device, operand):
    z, y, w, t = draw(3, 3), torch.tensor([2, 0, 1], dtype=torch.uint8), draw(3).exp(), draw(3, 3, seed=2).softmax(1)
    target = t if operand == "probabilities" else y
    placed = {"z": z.to(device), "target": target.to(device), "w": w.to(device)}
    name, *rest = operand.split()
    key = {"labels": "target", "probabilities": "target", "weight": "w"}.get(name, name)
    placed[key] = far({"z": z, "target": target, "w": w}[key], int(rest == ["columns"]), device)
    zd, td, wd = placed.values()
    loss, dz = cross_entropy(zd, td, weight=wd, smoothing=0.25, dz=torch.empty_like(z, device=device))
    rows, stats, _ = cross_entropy_fwd(zd, td, weight=wd, smoothing=0.25, reduction="none", dtype=torch.float32)
    if operand != "z rows" and operand != "z columns":  # the backward pass allocates dZ with the strides of Z
        dz2, dt = cross_entropy_bwd(
            torch.ones(3).to(device), zd, td, stats, weight=wd, smoothing=0.25, want_dt=operand == "probabilities"
        )
        check(dz2, lambda z, t, w: loss_and_grad(z, t, w, 0.25)[1], z, target, w)
        if dt is not None:
            check(dt, lambda z, w: -0.75 * w * z.log_softmax(1), z, w)
    for got in (loss, rows):
        check(got, lambda z, t, w: loss_and_grad(z, t, w, 0.25)[0], z, target, w)
    check(dz, lambda z, t, w: loss_and_grad(z, t, w, 0.25)[1], z, target, w)


def test_cross_entropy_gathered_labels(device):
    z, y, rows = draw(4, 3), torch.tensor([2, 0, 1], dtype=torch.uint8), torch.tensor([2, 1, 0, 2])
    loss, _ = cross_entropy(z.to(device), far(y, 0, device), rows=rows.to(device))
    check(loss, lambda z, y: loss_and_grad(z, y)[0], z, y[rows])


@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_cross_entropy_gradient(device, dim):
    z, y = draw(3, 3), torch.tensor([2, 0, 1])
    dz = far(torch.zeros_like(z), dim, device)
    cross_entropy(z.to(device), y.to(device), dz=dz)
    check(dz, lambda z, y: loss_and_grad(z, y)[1], z, y)


@pytest.mark.parametrize("operand", ["logits", "labels", "upstream"])
def test_cross_entropy_positions(device, operand):
    """The stride from sample to sample of logits [N, C, S]."""
    z, y, g = draw(3, 2, 2), torch.tensor([[0, 1], [1, 1], [1, 0]], dtype=torch.uint8), draw(3, 2, seed=1)
    placed = {"logits": z, "labels": y, "upstream": g}
    placed = {k: far(v, 0, device) if k == operand else v.to(device) for k, v in placed.items()}
    zd, yd, gd = placed.values()
    loss, stats, _ = cross_entropy_fwd(zd, yd, reduction="none", dtype=torch.float32)
    check(loss, lambda z, y: loss_and_grad(z, y)[0], z, y)
    if operand != "logits":
        dz, _ = cross_entropy_bwd(gd, zd, yd, stats)
        check(dz, lambda z, y, g: loss_and_grad(z, y)[1] * g[:, None], z, y, g)


@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize("operand", [0, 1], ids=["a", "y"])
def test_elementwise_loss_inputs(device, operand, dim):
    inputs = [draw(3, 3), draw(3, 3, seed=1)]
    placed = [far(t, dim, device) if i == operand else t.to(device) for i, t in enumerate(inputs)]
    loss, da = elementwise_loss(*placed, "mse")
    check(loss, lambda a, y: (a - y) ** 2, *inputs)
    check(da, lambda a, y: 2 * (a - y), *inputs)


@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize("operand", [0, 1], ids=["z", "y"])
def test_softmax_squared_error_inputs(device, operand, dim):
    inputs = [draw(3, 3), draw(3, 3, seed=1)]
    placed = [far(t, dim, device) if i == operand else t.to(device) for i, t in enumerate(inputs)]
    loss, _ = softmax_squared_error(*placed)
    check(loss, lambda z, y: ((z.softmax(1) - y) ** 2).sum(1), *inputs)
