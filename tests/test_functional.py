"""fastmlp/functional.py: shapes, dtypes, autocast, torch.func, torch.compile and every error."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import fastmlp
from fastmlp import reference
from fastmlp.activations import ACTIVATIONS
from fastmlp.functional import linear_act, mlp

# On the first use of forward mode torch scripts its decompositions, and warns of its own call of torch.jit.script.
FORWARD_MODE = pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True, params=["auto", "torch"])
def backend(request) -> Iterator[None]:
    """Small calls on a CPU are torch's own operations on the tape, or where it is asked for a node of fastmlp's."""
    with fastmlp.use_backend(request.param):
        yield


def layer(K: int = 5, N: int = 3, dtype=torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(weight, bias), both of which require grad."""
    g = torch.Generator().manual_seed(seed)
    w, b = torch.randn(N, K, generator=g), torch.randn(N, generator=g)
    return w.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """torch's own linear layer and activation, on the tape."""
    x = reference.pixels(x, weight.dtype)
    return reference.activate(torch.nn.functional.linear(x, weight, bias), activation)


def torchs_mlp(x: Tensor, weights, biases, activations) -> Tensor:
    """A whole network of torch's own layers and activations, on the tape."""
    for w, b, activation in zip(weights, biases, activations, strict=True):
        x = plain(x, w, b, activation)
    return x


@pytest.mark.parametrize("shape", [(5,), (1, 5), (4, 5), (2, 3, 5), (2, 1, 3, 5), (0, 5), (2, 0, 5)], ids=str)
@pytest.mark.parametrize("activation", ["identity", "sigmoid", "silu"])
def test_linear_act_keeps_leading_dimensions(shape, activation):
    w, b = layer()
    results = []
    for function in (linear_act, plain):
        x = torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).view(shape).requires_grad_()
        out = function(x, w, b, activation)
        assert out.shape == (*shape[:-1], 3)
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, w, b])))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("shape", "K", "N"), [((4, 0), 0, 3), ((2, 3, 0), 0, 3), ((0,), 0, 3), ((4, 5), 5, 0)], ids=str
)
def test_linear_act_without_features(shape, K, N):
    """Without inputs the result is the activation of the bias. Without outputs it is empty, with a zero gradient."""
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    w, b = torch.zeros(N, K, dtype=torch.float64, requires_grad=True), torch.ones(N, dtype=torch.float64)
    out = linear_act(x, w, b, "tanh")
    torch.testing.assert_close(out, torch.tanh(b).expand(*shape[:-1], N))
    dx, dw = torch.autograd.grad(out.sum(), [x, w])
    assert (dx.shape, dw.shape) == (x.shape, w.shape)
    assert not dx.any()


@pytest.mark.parametrize("needs_grad", [False, True])
def test_strided_arguments(needs_grad):
    """Transposed and sliced inputs, weights and biases."""
    x = torch.randn(10, 8).t()[::2].requires_grad_(needs_grad)
    w = torch.randn(10, 6).t()
    b = torch.randn(12)[::2]
    torch.testing.assert_close(linear_act(x, w, b, "relu"), plain(x, w, b, "relu"))
    cube = torch.randn(3, 10, 4).transpose(1, 2).requires_grad_(needs_grad)
    torch.testing.assert_close(linear_act(cube, w, b, "relu"), plain(cube, w, b, "relu"))
    image = torch.randn(4, 5, 2).transpose(1, 2).requires_grad_(needs_grad)
    torch.testing.assert_close(mlp(image, [w], [b], ["relu"]), plain(image.flatten(1), w, b, "relu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pixels_are_their_255th_part(dtype):
    w, b = layer(256, 3, dtype)
    x = torch.arange(256, dtype=torch.uint8).repeat(2, 1)
    w2, b2 = layer(3, 2, dtype, seed=1)
    for actual, expected in (
        (linear_act(x, w, b, "gelu"), linear_act(x.to(dtype) / 255, w, b, "gelu")),
        (
            mlp(x, [w, w2], [b, b2], ["relu", "identity"]),
            mlp(x.to(dtype) / 255, [w, w2], [b, b2], ["relu", "identity"]),
        ),
    ):
        torch.testing.assert_close(actual, expected)
        grads = [torch.autograd.grad(out.sum(), [w, b]) for out in (actual, expected)]
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want)
    assert linear_act(x.view(2, 16, 16), torch.ones(1, 16), None).shape == (2, 16, 1)


def test_pixels_are_left_alone():
    x = torch.full((2, 4), 200, dtype=torch.uint8)
    w = torch.ones(1, 4, requires_grad=True)
    linear_act(x, w, None, "relu").sum().backward()
    assert bool((x == 200).all())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_a_tape(guard, activation):
    w, b = layer()
    x = torch.randn(4, 5, dtype=torch.float64)
    taped = linear_act(x, w, b, activation), mlp(x, [w], [b], [activation])
    with guard():
        plain_results = linear_act(x, w, b, activation), mlp(x, [w], [b], [activation])
    for actual, expected in zip(plain_results, taped, strict=True):
        assert actual.grad_fn is None
        assert not actual.requires_grad
        assert actual.is_inference() == (guard is torch.inference_mode)
        assert torch.equal(actual, expected)


def test_the_arguments_are_left_alone():
    """No activation works in place on memory of the caller, with or without a bias."""
    for activation in ACTIVATIONS:
        x, w, b = torch.randn(4, 5), torch.randn(3, 5), torch.randn(3)
        before = [t.clone() for t in (x, w, b)]
        linear_act(x, w, b, activation)
        linear_act(x, torch.empty(3, 5).copy_(w), None, activation)
        assert all(torch.equal(t, old) for t, old in zip((x, w, b), before, strict=True))


class TestAutocast:
    """Under torch.autocast dtypes equal torch's, and results equal torch's within the rounding."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("activation", ["identity", "sigmoid", "gelu"])
    def test_results_and_gradients(self, activation, dtype):
        w, b = layer(dtype=torch.float32)
        w2, b2 = layer(3, 4, torch.float32, seed=1)
        leaves = [w, b, w2, b2]
        x = torch.randn(6, 5)
        results = []
        for network in (mlp, torchs_mlp):
            x = x.detach().clone().requires_grad_()
            with torch.autocast("cpu", dtype=dtype):
                out = network(x, (w, w2), (b, b2), (activation, "identity"))
            assert out.dtype == dtype
            results.append((out, *torch.autograd.grad(out.float().square().sum(), [x, *leaves])))
        eps = torch.finfo(dtype).eps
        for actual, expected in zip(*results, strict=True):
            assert actual.dtype == expected.dtype
            torch.testing.assert_close(actual, expected, rtol=8 * eps, atol=8 * eps * expected.abs().max().item())

    def test_linear_act(self):
        # No processor rounds small whole numbers, so the sums are the same with and without 16-bit products.
        w, b, x = (torch.randint(-3, 4, shape).float().requires_grad_() for shape in ((3, 5), (3,), (2, 3, 5)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = linear_act(x, w, b, "relu")
            expected = torch.relu(torch.nn.functional.linear(x, w, b))
            assert linear_act(x.half(), w, b).dtype == torch.bfloat16
            assert linear_act(torch.zeros(2, 5, dtype=torch.uint8), w, b).dtype == torch.bfloat16
            with torch.autocast("cpu", enabled=False):
                assert linear_act(x, w, b).dtype == torch.float32
        assert torch.equal(out, expected)
        grads = torch.autograd.grad(out.sum(), [x, w, b])
        assert [g.dtype for g in grads] == [torch.float32] * 3

    def test_float64_stays(self):
        w, b = layer(dtype=torch.float64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert linear_act(torch.randn(2, 5, dtype=torch.float64), w, b).dtype == torch.float64
            with pytest.raises(RuntimeError, match=r"same dtype, got torch.float64 and torch.bfloat16"):
                linear_act(torch.randn(2, 5, dtype=torch.float64), w.float(), b.float())


class TestTorchFunc:
    """The transforms of torch.func see plain operations, and all transforms work."""

    sizes = (5, 4, 3)

    def network(self, activation: str) -> tuple[fastmlp.MLP, dict[str, Tensor], Tensor]:
        torch.manual_seed(0)
        model = fastmlp.MLP(self.sizes, activation, dtype=torch.float64)
        return model, dict(model.named_parameters()), torch.randn(6, 5, dtype=torch.float64)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_per_sample_gradients(self, activation):
        model, params, x = self.network(activation)

        def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(model, params, (x.unsqueeze(0),)).square().sum()

        got = vmap(grad(loss), in_dims=(None, 0))(params, x)
        for i, row in enumerate(x):
            want = torch.autograd.grad(model(row.unsqueeze(0)).square().sum(), list(params.values()))
            for name, g in zip(params, want, strict=True):
                torch.testing.assert_close(got[name][i], g)

    @FORWARD_MODE
    @pytest.mark.parametrize("activation", ["sigmoid", "gelu"])
    def test_jacobians_and_hessians(self, activation):
        model, _, x = self.network(activation)
        want = torch.autograd.functional.jacobian(model, x)
        torch.testing.assert_close(jacrev(model)(x), want)
        torch.testing.assert_close(jacfwd(model)(x), want)
        tangent = torch.randn_like(x)
        torch.testing.assert_close(jvp(model, (x,), (tangent,))[1], (want * tangent).sum((2, 3)))
        value = lambda x: model(x).square().sum()  # noqa: E731
        torch.testing.assert_close(hessian(value)(x), torch.autograd.functional.hessian(value, x))

    def test_ensemble(self):
        """vmap runs over stacked parameters; the input is shared."""
        models = [fastmlp.MLP(self.sizes, dtype=torch.float64) for _ in range(3)]
        params, _ = torch.func.stack_module_state(models)
        x = torch.randn(6, 5, dtype=torch.float64)
        got = vmap(lambda p: functional_call(models[0], p, (x,)))(params)
        for actual, model in zip(got, models, strict=True):
            torch.testing.assert_close(actual, model(x))

    def test_linear_act(self):
        w, b = layer()
        x = torch.randn(6, 5, dtype=torch.float64)
        torch.testing.assert_close(vmap(lambda x: linear_act(x, w, b, "tanh"))(x), linear_act(x, w, b, "tanh"))
        single = lambda x: linear_act(x, w, b, "silu")  # noqa: E731
        torch.testing.assert_close(jacrev(single)(x[0]), torch.autograd.functional.jacobian(single, x[0]))

    @pytest.mark.skipif(not fastmlp.backend.triton_available(), reason="triton is not installed")
    def test_kernels_cannot_run_there(self):
        w, b = layer(dtype=torch.float32)
        expected = r"backend 'triton' cannot run inside a transform of torch.func.*use backend 'auto' or 'torch'"
        with fastmlp.use_backend("triton"), pytest.raises(RuntimeError, match=expected):
            vmap(lambda x: linear_act(x, w, b))(torch.randn(6, 5))


def test_meta_tensors_give_shapes():
    """Meta tensors give shapes without memory, as in torch."""
    model = fastmlp.MLP((784, 512, 10), device="meta")
    out = model(torch.empty(3, 28, 28, device="meta"))
    assert out.shape == (3, 10)
    assert out.device.type == "meta"
    out.sum().backward()
    assert model.layers[0].weight.grad.shape == (512, 784)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
class TestCompile:
    """torch.compile traces the operations on plain torch without a graph break."""

    @pytest.fixture(autouse=True)
    def fresh(self):
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_mlp(self, backend, activation):
        torch.manual_seed(0)
        model = fastmlp.MLP((6, 5, 4, 3), activation, dtype=torch.float64)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        results = []
        x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
        for network in (compiled, model):
            out = network(x)
            results.append((out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))

    def test_frozen_layers_pixels_and_hooks(self, backend):
        torch.manual_seed(0)
        model = fastmlp.MLP((6, 5, 4, 3), ["gelu", "tanh"])
        model.layers[0].requires_grad_(False)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        x = torch.randint(0, 256, (7, 2, 3), dtype=torch.uint8)
        grads = []
        for network in (compiled, model):
            model.zero_grad()
            network(x).square().sum().backward()
            grads.append([p.grad for p in model.parameters()])
        assert grads[0][:2] == [None, None]
        for actual, expected in zip(grads[0][2:], grads[1][2:], strict=True):
            torch.testing.assert_close(actual, expected)

    def test_second_derivatives_are_right_or_refused(self, backend):
        """AOTAutograd has no second derivatives and says so. Torch's own operations keep theirs."""
        model = fastmlp.MLP((6, 5, 3), dtype=torch.float64)
        x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
        results = []
        for network in (torch.compile(model, backend=backend), model):
            (dx,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
            if backend == "aot_eager" and network is not model:
                with pytest.raises(RuntimeError, match=r"double backward|does not require grad"):
                    torch.autograd.grad(dx.square().sum(), list(model.parameters()))
                return
            results.append(torch.autograd.grad(dx.square().sum(), list(model.parameters()), allow_unused=True))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)

    def test_linear_and_autocast(self, backend):
        module = fastmlp.Linear(6, 5, activation="silu")
        compiled = torch.compile(module, backend=backend, fullgraph=True)
        x = torch.randn(2, 3, 6)
        torch.testing.assert_close(compiled(x), module(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(compiled(x), module(x))


def test_tied_input_and_weight():
    """If one tensor is both input and weight, both gradients add up."""
    both = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    results = [torch.autograd.grad(f(both, both, None, "tanh").sum(), both)[0] for f in (linear_act, plain)]
    torch.testing.assert_close(*results)


GOOD_W, GOOD_B = torch.ones(3, 5), torch.ones(3)

LINEAR_ERRORS: dict[str, tuple[Callable[[], Tensor], type[Exception], str]] = {
    "activation": (
        lambda: linear_act(torch.ones(2, 5), GOOD_W, None, "softmin"),
        ValueError,
        r"unknown activation 'softmin'; expected one of identity, sigmoid, .*silu",
    ),
    "list as input": (
        lambda: linear_act([1.0], GOOD_W),
        TypeError,
        r"expected the input to be a torch.Tensor, got list; convert it with torch.as_tensor",
    ),
    "list as weight": (lambda: linear_act(torch.ones(2, 5), [1.0]), TypeError, "expected weight to be a torch.Tensor"),
    "number as bias": (
        lambda: linear_act(torch.ones(2, 5), GOOD_W, 1.0),
        TypeError,
        "expected bias to be .* got float",
    ),
    "0-d input": (
        lambda: linear_act(torch.ones(()), GOOD_W),
        RuntimeError,
        r"at least 1 dimension.*0-d tensor; reshape",
    ),
    "feature count": (
        lambda: linear_act(torch.ones(2, 4), GOOD_W),
        RuntimeError,
        r"expected an input with 5 features \(weight is \[3, 5\]\), got 4 from an input of shape \[2, 4\]; reshape the "
        r"input or build the layer with in_features=4",
    ),
    "1-d weight": (lambda: linear_act(torch.ones(2, 5), torch.ones(5)), RuntimeError, r"\[out_features, .*got \[5\]"),
    "3-d weight": (lambda: linear_act(torch.ones(2, 5), torch.ones(2, 3, 5)), RuntimeError, r"got \[2, 3, 5\]"),
    "bias shape": (
        lambda: linear_act(torch.ones(2, 5), GOOD_W, torch.ones(5)),
        RuntimeError,
        r"expected bias of shape \[3\], one value for each row of weight \[3, 5\], got \[5\]",
    ),
    "2-d bias": (lambda: linear_act(torch.ones(2, 5), GOOD_W, torch.ones(3, 1)), RuntimeError, r"got \[3, 1\]"),
    "input dtype": (
        lambda: linear_act(torch.ones(2, 5).double(), GOOD_W),
        RuntimeError,
        r"same dtype, got torch.float64 and torch.float32; convert the input with .to\(torch.float32\), or use "
        r"torch.autocast",
    ),
    "integer input": (
        lambda: linear_act(torch.ones(2, 5).long(), GOOD_W),
        RuntimeError,
        r"expected a floating-point input or uint8 pixels, got torch.int64; convert it with .to\(torch.float32\), or "
        r"with .to\(torch.uint8\) if the values are pixels",
    ),
    "int8 input": (
        lambda: linear_act(torch.ones(2, 5).to(torch.int8), GOOD_W),
        RuntimeError,
        "got torch.int8; convert",
    ),
    "bool input": (lambda: linear_act(torch.ones(2, 5) > 0, GOOD_W), RuntimeError, "uint8 pixels, got torch.bool"),
    "complex input": (lambda: linear_act(torch.ones(2, 5) + 0j, GOOD_W), RuntimeError, "got torch.complex64"),
    "integer weight": (
        lambda: linear_act(torch.ones(2, 5).byte(), GOOD_W.byte()),
        RuntimeError,
        r"expected a floating-point weight, got torch.uint8; convert it with .float\(\)",
    ),
    "bias dtype": (
        lambda: linear_act(torch.ones(2, 5), GOOD_W, GOOD_B.half()),
        RuntimeError,
        "expected bias and weight of the same dtype, got torch.float16 and torch.float32; convert",
    ),
    "input device": (
        lambda: linear_act(torch.ones(2, 5, device="meta"), GOOD_W),
        RuntimeError,
        r"the same device, but the input is on meta and weight on cpu; move one of them with .to\(device\)",
    ),
    "bias device": (
        lambda: linear_act(torch.ones(2, 5), GOOD_W, GOOD_B.to("meta")),
        RuntimeError,
        "weight is on cpu and bias on meta; move",
    ),
}


@pytest.mark.parametrize("case", LINEAR_ERRORS)
def test_linear_act_errors(case):
    call, kind, message = LINEAR_ERRORS[case]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    "case", ["list as input", "list as weight", "0-d input", "feature count", "3-d weight", "bias shape", "input dtype",
             "integer input", "bool input", "complex input", "bias dtype", "number as bias"]
)  # fmt: skip
def test_errors_have_torchs_type(case, monkeypatch):
    """The same mistake made with torch.nn.functional.linear."""
    monkeypatch.setitem(globals(), "linear_act", torch.nn.functional.linear)
    call, kind, _ = LINEAR_ERRORS[case]
    with pytest.raises(kind):
        call()


W2, B2 = torch.ones(2, 3), torch.ones(2)
TWO = ["relu", "identity"]
MLP_ERRORS: dict[str, tuple[Callable[[], Tensor], type[Exception], str]] = {
    "no layers": (
        lambda: mlp(torch.ones(2, 5), [], [], []),
        ValueError,
        "at least one of each, got 0 weights, 0 biases",
    ),
    "counts": (
        lambda: mlp(torch.ones(2, 5), [GOOD_W, W2], [GOOD_B], TWO),
        ValueError,
        "got 2 weights, 1 biases and 2 activations",
    ),
    "activation": (
        lambda: mlp(torch.ones(2, 5), [GOOD_W, W2], [GOOD_B, B2], ["relu", "softmin"]),
        ValueError,
        "unknown activation 'softmin'",
    ),
    "input type": (
        lambda: mlp([[1.0]], [GOOD_W], [GOOD_B], ["relu"]),
        TypeError,
        "expected the input to be .* got list",
    ),
    "1-d input": (
        lambda: mlp(torch.ones(5), [GOOD_W], [GOOD_B], ["relu"]),
        RuntimeError,
        r"of shape \[batch, 5\] or \[batch, ...\], got \[5\]; add a batch dimension with x.unsqueeze\(0\)",
    ),
    "features": (
        lambda: mlp(torch.ones(2, 2, 5), [GOOD_W], [GOOD_B], ["relu"]),
        RuntimeError,
        r"5 features \(weights\[0\] is \[3, 5\]\), got 10 from an input of shape \[2, 10\]",
    ),
    "chain": (
        lambda: mlp(torch.ones(2, 5), [GOOD_W, GOOD_W], [GOOD_B, GOOD_B], TWO),
        RuntimeError,
        r"expected weights\[1\] of shape \[out_features, 3\] to follow weights\[0\] of shape \[3, 5\], got \[3, 5\]",
    ),
    "dtypes": (
        lambda: mlp(torch.ones(2, 5), [GOOD_W, W2.half()], [GOOD_B, B2.half()], TWO),
        RuntimeError,
        r"one dtype on one device, got weights\[0\] in torch.float32 on cpu and weights\[1\] in torch.float16 on cpu",
    ),
    "devices": (
        lambda: mlp(torch.ones(2, 5), [GOOD_W, W2.to("meta")], [GOOD_B, None], TWO),
        RuntimeError,
        r"weights\[1\] in torch.float32 on meta",
    ),
    "bias": (
        lambda: mlp(torch.ones(2, 5), [GOOD_W, W2], [GOOD_B, GOOD_B], TWO),
        RuntimeError,
        r"expected biases\[1\] of shape \[2\], one value for each row of weights\[1\] \[2, 3\], got \[3\]",
    ),
    "input dtype": (
        lambda: mlp(torch.ones(2, 5).half(), [GOOD_W], [GOOD_B], ["relu"]),
        RuntimeError,
        r"expected input and weights\[0\] of the same dtype, got torch.float16 and torch.float32",
    ),
    "integer input": (
        lambda: mlp(torch.ones(2, 5).int(), [GOOD_W], [GOOD_B], ["relu"]),
        RuntimeError,
        "floating-point input or uint8 pixels, got torch.int32",
    ),
    "weight type": (
        lambda: mlp(torch.ones(2, 5), [GOOD_W, None], [GOOD_B, B2], TWO),
        TypeError,
        r"expected weights\[1\] to be a torch.Tensor, got NoneType",
    ),
}


def test_a_layer_and_a_network_of_one_layer_take_other_inputs():
    # Each remembers its calls, and what one takes the other need not take.
    x, w = torch.randn(4), torch.randn(3, 4)
    linear_act(x, w)
    linear_act(x.expand(2, 5, 4), w)
    with pytest.raises(RuntimeError, match=r"expected an input of shape \[batch, 4\]"):
        mlp(x, [w], [None], ["identity"])
    with pytest.raises(RuntimeError, match="expected an input with 4 features"):
        mlp(x.expand(2, 5, 4), [w], [None], ["identity"])
    x, w = torch.randn(2, 5, 4), torch.randn(3, 20)
    mlp(x, [w], [None], ["identity"])
    with pytest.raises(RuntimeError, match="expected an input with 20 features"):
        linear_act(x, w)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_sparse_inputs(layout):
    x, w, b = torch.eye(5)[:3], torch.randn(4, 5, requires_grad=True), torch.randn(4, requires_grad=True)
    sparse = x.to_sparse() if layout == torch.sparse_coo else x.to_sparse_csr()
    for call in (lambda x: linear_act(x, w, b, "tanh"), lambda x: mlp(x, [w, w.T[:4, :4]], [b, b], ["tanh", "relu"])):
        for _ in range(2):  # the second call is like the first one
            got, expected = call(sparse), call(x)
            torch.testing.assert_close(got, expected)
            grads = [torch.autograd.grad(out.sum(), (w, b)) for out in (got, expected)]
            torch.testing.assert_close(*grads)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_inputs():
    w, b = torch.randn(3, 5), torch.randn(3)
    parts = [torch.randn(2, 5), torch.randn(4, 5)]
    for _ in range(2):
        for call in (lambda x: linear_act(x, w, b), lambda x: mlp(x, [w], [b], ["tanh"])):
            with pytest.raises(RuntimeError, match=r"nested tensor; .*to_padded_tensor"):
                call(torch.nested.nested_tensor(parts))
        jagged = linear_act(torch.nested.nested_tensor(parts, layout=torch.jagged), w, b, "tanh")
        for got, part in zip(jagged.unbind(), parts, strict=True):
            torch.testing.assert_close(got, plain(part, w, b, "tanh"))


@pytest.mark.parametrize("case", MLP_ERRORS)
def test_mlp_errors(case):
    call, kind, message = MLP_ERRORS[case]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert type(caught.value) is kind


def test_errors_come_before_any_work(monkeypatch):
    """A bad last layer is found before the first one runs."""
    monkeypatch.setattr(fastmlp.ops.torch_ops, "linear_fwd", lambda *a, **k: pytest.fail("ran"))
    for call, kind, _ in (*LINEAR_ERRORS.values(), *MLP_ERRORS.values()):
        with pytest.raises(kind):
            call()
