"""Compilers, exporters and tracers see modules and losses: one graph, any batch size, no look at values."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

import fastmlp
from fastmlp import functional as fm
from fastmlp.base.losses import LOSSES
from tests.conftest import INTERPRETING

#: Their products of some rows are above the threshold of ``torch_products``, and their losses above that of rows.
SIZES, BATCHES = (784, 512, 10), (4, 8, 12, 20, 64, 128, 600, 1000, 3000)


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def on_kernels(lane) -> Iterator[None]:
    """The kernels run, and the compilers trace what they trace on a GPU."""
    before = fastmlp.get_backend()
    fastmlp.set_backend("triton")
    yield
    fastmlp.set_backend(before)


class Loss(nn.Module):
    """A loss of fastmlp.functional as a module."""

    def __init__(self, name: str, **options: object) -> None:
        super().__init__()
        self.name, self.options = name, options

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return getattr(fm, self.name)(x, y, **self.options)


def labels(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape) % 5


def loss_cases(b: int = 7) -> dict[str, tuple[Loss, Tensor, Tensor]]:
    x = torch.rand(b, 5)
    found = {loss.function: (Loss(loss.function), x, torch.rand(b, 5)) for loss in LOSSES.values()}
    return found | {
        "labels": (Loss("cross_entropy"), x, labels(b)),
        "smoothing": (Loss("cross_entropy", label_smoothing=0.1, reduction="none"), x, labels(b)),
        "uint8 positions": (Loss("cross_entropy"), torch.rand(b, 5, 3), labels(b, 3).to(torch.uint8)),
        "labels of squares": (Loss("softmax_squared_error"), x, labels(b)),
    }


def graphs(function: Callable[..., Tensor], batch: Callable[[int], tuple[Tensor, ...]], dynamic: bool | None) -> int:
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(function, backend=counter, dynamic=dynamic, fullgraph=True)
    for b in BATCHES:
        compiled(*batch(b))
    return counter.frame_count


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
def test_no_more_graphs_than_torch(dynamic):
    model = fastmlp.MLP(SIZES, "relu")
    loss, twin = fastmlp.CrossEntropyLoss(), model.to_torch()
    batch = lambda b: (torch.randn(b, SIZES[0]), labels(b))  # noqa: E731
    ours = graphs(lambda x, y: loss(model(x), y), batch, dynamic)
    assert ours == graphs(lambda x, y: F.cross_entropy(twin(x), y), batch, dynamic) == (1 if dynamic else 2)


@pytest.mark.parametrize("case", loss_cases())
def test_losses_compile_on_plain_torch(case):
    """At a batch size above the threshold of rows, with a gradient."""
    loss, x, y = loss_cases(300)[case]
    grads = []
    for function in (torch.compile(loss, backend="aot_eager", fullgraph=True), loss):
        z = x.clone().requires_grad_()
        grads.append((function(z, y), *torch.autograd.grad(function(z, y).sum(), z)))
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.usefixtures("on_kernels")
def test_losses_compile_on_kernels():
    """The losses are operators in one graph, with the values and gradients of the uncompiled ones."""
    for case in ("mse_loss", "smoothing", "labels of squares"):
        loss, x, y = loss_cases()[case]
        torch.compiler.reset()
        grads = []
        for function in (torch.compile(loss, backend="aot_eager", fullgraph=True), loss):
            z = x.clone().requires_grad_()
            value = function(z, y)
            grads.append((value, *torch.autograd.grad(value.sum(), z)))
        for actual, expected in zip(*grads, strict=True):
            assert torch.equal(actual, expected)


def exported(module: nn.Module, *args: Tensor, strict: bool = False) -> torch.export.ExportedProgram:
    dynamic = tuple({0: torch.export.Dim("b")} for _ in args)
    return torch.export.export(module, args, dynamic_shapes=dynamic, strict=strict)


@pytest.mark.parametrize("dim", ["named", "auto"])
def test_export_has_no_cap(dim):
    model = fastmlp.MLP(SIZES, "relu")
    b = torch.export.Dim("b") if dim == "named" else torch.export.Dim.AUTO
    program = torch.export.export(model, (torch.randn(4, SIZES[0]),), dynamic_shapes=({0: b},))
    (constraint,) = program.range_constraints.values()
    assert constraint.upper > 1 << 60
    for rows in (2, 700):
        x = torch.randn(rows, SIZES[0])
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("case", loss_cases())
def test_losses_are_exported(case):
    loss, x, y = loss_cases(4)[case]
    program = exported(loss, x, y).run_decompositions()
    assert all("fastmlp" not in str(node.target) for node in program.graph.nodes)
    _, x, y = loss_cases(300)[case]
    torch.testing.assert_close(program.module()(x, y), loss(x, y))


@pytest.mark.usefixtures("on_kernels")
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_programs_on_kernels_are_trained(strict):
    model = fastmlp.MLP((9, 6, 5), ["gelu"])
    program = exported(model, torch.randn(4, 9), strict=strict)
    assert sum(str(node.target) == "fastmlp.linear_fwd.default" for node in program.graph.nodes) == 2
    x, copy = torch.randn(7, 9), program.module()
    for network in (model, copy):
        network(x).square().sum().backward()
    for actual, expected in zip(copy.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("on_kernels")
def test_losses_on_kernels_are_exported():
    for loss, x, y in loss_cases(4).values():
        program = exported(loss, x, y)
        z, y = torch.cat([x, x]), torch.cat([y, y])
        z.requires_grad_()
        grads = [torch.autograd.grad(f(z, y).sum(), z)[0] for f in (program.module(), loss)]
        assert torch.equal(*grads)


@pytest.mark.skipif(not INTERPRETING, reason="one lane is enough for a process of its own")
@pytest.mark.usefixtures("on_kernels")
def test_saved_programs_need_one_import(tmp_path):
    path = tmp_path / "mlp.pt2"
    torch.export.save(exported(fastmlp.MLP((9, 6, 5)), torch.randn(4, 9)), path)
    code = f"import torch, fastmlp.library; print(torch.export.load({str(path)!r}).graph)"
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=300, capture_output=True, text=True)
    assert done.stdout.count("torch.ops.fastmlp.linear_fwd.default") == 2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors(device):
    """Nobody looks at their values, and no kernel is launched on them."""
    with FakeTensorMode():
        for activation in ("relu", "gelu", "step", "softmax"):
            x = torch.randn(300, 784, device=device)
            out = fastmlp.MLP(SIZES, activation, device=device)(x)
            assert (out.shape, out.device) == ((300, 10), x.device)
        for loss, x, y in loss_cases(300).values():
            assert loss(x.to(device), y.to(device)).device.type == device


def test_fake_tensors_backward():
    with FakeTensorMode():
        model, x = fastmlp.MLP(SIZES, "silu"), torch.randn(300, 784, requires_grad=True)
        model(x).sum().backward()
        assert x.grad.shape == x.shape
        for loss, z, y in loss_cases(300).values():
            loss(z.requires_grad_(), y).sum().backward()
            assert z.grad.shape == z.shape


def test_proxies_have_no_values():
    """make_fx with real tensors traces; a look at a label would be an error."""
    for loss, x, y in loss_cases().values():
        graph = make_fx(loss, tracing_mode="real")(x, y)
        torch.testing.assert_close(graph(x, y), loss(x, y))


def test_labels_are_checked_under_a_counter():
    with FlopCounterMode(display=False), pytest.raises(IndexError, match="target 9 at position 1"):
        fm.cross_entropy(torch.randn(3, 5), torch.tensor([0, 9, 1]), label_smoothing=0.1)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_wrapper_subclasses(backend):
    """A tensor class with operations of its own gets torch's operations, and their gradients."""
    model, x = fastmlp.MLP((12, 16, 5), "gelu"), torch.randn(4, 12)
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    for layer in model.layers:
        layer.weight = nn.Parameter(TwoTensor(layer.weight.data, layer.weight.data.clone()))
    with fastmlp.use_backend(backend):
        model(x).sum().backward()
        for loss, a, y in loss_cases().values():
            twice = [TwoTensor(t, t.clone()) if t.is_floating_point() else t for t in (a, y)]
            assert type(loss(*twice)) is TwoTensor
    assert type(model.layers[0].weight.grad) is TwoTensor
    torch.testing.assert_close(model.layers[0].weight.grad.a, expected[0])


@pytest.mark.usefixtures("on_kernels")
def test_wrapper_subclasses_beside_kernels():
    model = fastmlp.MLP((12, 16, 5), "relu")
    x = torch.randn(4, 12)
    expected = model.to_torch()(x)
    for layer in model.layers:
        layer.weight = nn.Parameter(TwoTensor(layer.weight.data, layer.weight.data.clone()))
    torch.testing.assert_close(model(x).a, expected)


def test_distributed_tensors():
    from torch import distributed
    from torch.distributed.tensor import DeviceMesh, Replicate, Shard, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        model, x = fastmlp.MLP((12, 16, 5), "relu"), torch.randn(4, 12)
        expected = torch.autograd.grad(model(x).sum(), model.layers[0].weight)[0]
        for layer in model.layers:
            for name in ("weight", "bias"):
                part = distribute_tensor(getattr(layer, name).data, mesh, [Shard(0)])
                setattr(layer, name, nn.Parameter(part))
        model(distribute_tensor(x, mesh, [Replicate()])).sum().backward()
        torch.testing.assert_close(model.layers[0].weight.grad.full_tensor(), expected)
    finally:
        distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracers_of_old():
    model, x = fastmlp.MLP((12, 16, 5), "gelu"), torch.randn(9, 12)
    for traced in (
        torch.jit.trace(model, torch.randn(4, 12)),
        torch.jit.script(model),
        torch.fx.symbolic_trace(model),
    ):
        torch.testing.assert_close(traced(x), model(x))
    loss = torch.fx.symbolic_trace(fastmlp.CrossEntropyLoss())
    torch.testing.assert_close(loss(x, labels(9)), F.cross_entropy(x, labels(9)))


def test_onnx():
    pytest.importorskip("onnxscript")
    model = fastmlp.MLP(SIZES, "gelu")
    b = torch.export.Dim("b")
    program = torch.onnx.export(model, (torch.randn(4, 784),), dynamo=True, dynamic_shapes=({0: b},), verbose=False)
    buffer = io.BytesIO()
    program.save(buffer)
    assert buffer.getvalue()


@pytest.mark.slow
def test_aot_inductor(request, tmp_path):
    if not request.config.getoption("full"):
        pytest.skip("compiling takes a minute: --full")
    model = fastmlp.MLP(SIZES, "relu")
    program = exported(model, torch.randn(4, SIZES[0]))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "mlp.pt2"))
    run = torch._inductor.aoti_load_package(package)
    for rows in (1, 700):
        x = torch.randn(rows, SIZES[0])
        torch.testing.assert_close(run(x), model(x))
