"""fastmlp/autograd.py: gradients of the first and second order, and what the tape keeps and computes for them."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from fastmlp import ops, reference, torch_backend
from fastmlp.activations import ACTIVATIONS
from fastmlp.functional import linear_act, mlp

SIZES = (4, 5, 2, 3)
NAMES = ("x", "w0", "b0", "w1", "b1", "w2", "b2")


def tensors(sizes=SIZES, batch: int = 3, dtype=torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """x, w0, b0, ... of one network, all of which require grad."""
    g = torch.Generator().manual_seed(seed)
    out = {"x": torch.randn(batch, sizes[0], generator=g, dtype=torch.float64)}
    for layer, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        out[f"w{layer}"] = torch.randn(n_out, n_in, generator=g, dtype=torch.float64) / n_in**0.5
        out[f"b{layer}"] = torch.randn(n_out, generator=g, dtype=torch.float64)
    return {name: t.to(dtype).requires_grad_() for name, t in out.items()}


def run(network, t: dict[str, Tensor], activations) -> Tensor:
    """``network`` is fastmlp's mlp or the reference's."""
    layers = len(activations)
    weights, biases = [t[f"w{i}"] for i in range(layers)], [t.get(f"b{i}") for i in range(layers)]
    return network(t["x"], weights, biases, activations)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, tuple[int, ...]]]:
    """(operation, shape of its result) of every fused operation that runs; elementwise ones without work left out."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    for name in ops.__all__:
        original = getattr(ops, name)

        def spy(*args, _original=original, _name=name, **kwargs):
            result = _original(*args, **kwargs)
            first = result[0] if isinstance(result, tuple) else result
            if first is not args[0]:
                seen.append((_name, tuple(first.shape)))
            return result

        monkeypatch.setattr(ops, name, spy)
    return seen


def saved_by(function) -> list[Tensor]:
    """The tensors that the tape keeps when ``function`` runs."""
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        function()
    return kept


class TestGradcheck:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_linear_act(self, activation, bias):
        t = tensors((4, 3))
        inputs = (t["x"], t["w0"], t["b0"] if bias else None)
        assert gradcheck(lambda *a: linear_act(*a, activation), inputs)
        assert gradgradcheck(lambda *a: linear_act(*a, activation), inputs)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_mlp(self, activation):
        t = tensors()
        function = lambda *values: run(mlp, dict(zip(NAMES, values, strict=True)), [activation] * 3)  # noqa: E731
        assert gradcheck(function, tuple(t.values()))
        assert gradgradcheck(function, tuple(t.values()))

    def test_mlp_of_mixed_layers(self):
        t = tensors()
        del t["b1"]

        def function(x, w0, b0, w1, w2, b2):
            return mlp(x, (w0, w1, w2), (b0, None, b2), ("gelu", "tanh", "silu"))

        assert gradcheck(function, tuple(t.values()))
        assert gradgradcheck(function, tuple(t.values()))

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_pixels(self, activation):
        t = tensors()
        x = torch.randint(0, 256, (3, 4), dtype=torch.uint8)
        function = lambda *params: run(mlp, dict(zip(NAMES, (x, *params), strict=True)), [activation] * 3)  # noqa: E731
        params = [t[name] for name in NAMES[1:]]
        assert gradcheck(function, params)
        assert gradgradcheck(function, params)


@pytest.mark.parametrize("wanted", [c for r in (1, 2, 6) for c in itertools.combinations(NAMES, r)], ids="-".join)
@pytest.mark.parametrize("activation", ["sigmoid", "gelu", "identity"])
def test_any_subset_of_gradients(activation, wanted):
    """First derivatives, and the derivatives of their squared norm, when only some tensors require grad."""
    results = []
    for network in (mlp, reference.mlp):
        t = tensors()
        for name in NAMES:
            t[name].requires_grad_(name in wanted)
        leaves = [t[name] for name in wanted]
        out = run(network, t, [activation] * 3)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        again = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        results.append((out, *first, *again))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


@pytest.mark.parametrize("activation", ["tanh", "gelu", "silu", "sigmoid"])
def test_third_derivative(activation):
    results = []
    for network in (mlp, reference.mlp):
        t = tensors()
        value = run(network, t, [activation] * 3).square().sum()
        for order in range(3):
            grads = torch.autograd.grad(value, list(t.values()), create_graph=order < 2)
            value = sum(g.square().sum() for g in grads)
        results.append(grads)
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


@pytest.mark.parametrize("activation", ["sigmoid", "gelu"])
def test_tied_weights(activation):
    """One weight in two layers of one node: both contributions, in the second derivative too."""
    results = []
    for network in (mlp, reference.mlp):
        t = tensors((4, 4, 4))
        args = (t["x"], (t["w0"], t["w0"]), (t["b0"], t["b0"]), (activation, "identity"))
        leaves = [t["x"], t["w0"], t["b0"]]
        first = torch.autograd.grad(network(*args).square().sum(), leaves, create_graph=True)
        results.append((*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


def test_gradient_penalty_trains():
    """backward() through gradients: the parameters' .grad holds both parts of the loss."""
    grads = []
    for network in (mlp, reference.mlp):
        t = tensors()
        out = run(network, t, ["tanh", "gelu", "identity"])
        (dx,) = torch.autograd.grad(out.sum(), t["x"], create_graph=True)
        (out.square().mean() + (dx.norm(dim=1) - 1).square().mean()).backward()
        grads.append([p.grad for p in t.values()])
    for actual, expected in zip(*grads, strict=True):
        close(actual, expected)


class TestNoNeedlessWork:
    """needs_input_grad: what nobody asked for is neither computed nor kept."""

    def backward(self, calls, **frozen) -> list[tuple[str, tuple[int, ...]]]:
        t = tensors()
        for name in NAMES:
            t[name].requires_grad_(not frozen.get(name, False))
        out = run(mlp, t, ["sigmoid", "sigmoid", "identity"])
        assert [name for name, _ in calls] == ["linear_fwd"] * 3
        calls.clear()
        out.sum().backward()
        assert all((p.grad is None) == (not p.requires_grad) for p in t.values())
        return calls

    def test_everything(self, calls):
        assert self.backward(calls) == [
            ("linear_wgrad", (3, 2)),
            ("linear_dgrad", (3, 2)),
            ("linear_wgrad", (2, 5)),
            ("linear_dgrad", (3, 5)),
            ("linear_wgrad", (5, 4)),
            ("linear_dgrad", (3, 4)),
        ]

    def test_the_first_layers_dx_only_if_x_requires_grad(self, calls):
        assert ("linear_dgrad", (3, 4)) not in self.backward(calls, x=True)

    def test_frozen_lower_layers_cost_nothing(self, calls):
        assert self.backward(calls, x=True, w0=True, b0=True, w1=True, b1=True) == [("linear_wgrad", (3, 2))]

    def test_frozen_upper_layers_pass_the_gradient_on(self, calls):
        got = self.backward(calls, x=True, w1=True, b1=True, w2=True, b2=True)
        assert got == [("linear_dgrad", (3, 2)), ("linear_dgrad", (3, 5)), ("linear_wgrad", (5, 4))]

    def test_only_x(self, calls):
        got = self.backward(calls, **dict.fromkeys(NAMES[1:], True))
        assert got == [("linear_dgrad", (3, 2)), ("linear_dgrad", (3, 5)), ("linear_dgrad", (3, 4))]

    def test_only_biases_take_no_product_but_the_chain(self, calls):
        got = self.backward(calls, x=True, w0=True, w1=True, w2=True)
        assert got == [("linear_dgrad", (3, 2)), ("linear_dgrad", (3, 5))]

    def test_linear_act(self, calls):
        t = tensors((4, 3))
        for wanted, expected in {
            ("x",): ["activation_bwd", "linear_dgrad"],
            ("w0",): ["activation_bwd", "linear_wgrad"],
            ("b0",): ["activation_bwd"],
        }.items():
            for name, p in t.items():
                p.requires_grad_(name in wanted)
            out = linear_act(t["x"], t["w0"], t["b0"], "tanh")
            calls.clear()
            out.sum().backward()
            assert [name for name, _ in calls] == expected

    def test_frozen_inference_leaves_no_tape(self):
        t = tensors()
        for p in t.values():
            p.requires_grad_(False)
        assert saved_by(lambda: run(mlp, t, ["gelu"] * 3)) == []
        out = run(mlp, t, ["gelu"] * 3)
        assert out.grad_fn is None
        assert linear_act(t["x"], t["w0"], t["b0"], "silu").grad_fn is None

    def kept(self, wanted, activations) -> tuple[dict[str, Tensor], list[str]]:
        t = tensors()
        for name in NAMES:
            t[name].requires_grad_(name in wanted)
        kept = saved_by(lambda: run(mlp, t, activations))
        known = {p.data_ptr(): name for name, p in t.items()}
        return t, sorted(known.get(k.data_ptr(), f"{tuple(k.shape)}") for k in kept)

    @pytest.mark.parametrize(
        ("wanted", "activations", "expected"),
        [
            # Everything but x: each layer's input, W above the first, A of the layers with a derivative.
            (NAMES[1:], ["sigmoid", "relu", "identity"], ["(3, 2)", "(3, 2)", "(3, 5)", "(3, 5)", "w1", "w2", "x"]),
            # gelu: Z for the derivative and A for the layer above.
            (NAMES[1:], ["gelu", "gelu", "identity"], ["(3, 2)", "(3, 2)", "(3, 5)", "(3, 5)", "w1", "w2", "x"]),
            # Only the last layer: its input.
            (("w2", "b2"), ["gelu", "gelu", "identity"], ["(3, 2)"]),
            # Only the last bias: nothing at all.
            (("b2",), ["gelu", "gelu", "identity"], []),
            # Only biases: what their chain of derivatives needs, no layer's input.
            (("b0", "b1", "b2"), ["sigmoid", "sigmoid", "identity"], ["(3, 2)", "(3, 5)", "w1", "w2"]),
            (("b0", "b1", "b2"), ["identity", "step", "identity"], ["w1", "w2"]),
            # A frozen middle layer keeps its W for the gradient below it, not its input.
            (("w0", "w2"), ["identity", "identity", "identity"], ["(3, 2)", "w1", "w2", "x"]),
            (("x",), ["identity", "tanh", "silu"], ["(3, 2)", "(3, 3)", "w0", "w1", "w2"]),
        ],
    )
    def test_what_the_tape_keeps(self, wanted, activations, expected):
        assert self.kept(wanted, activations)[1] == expected

    @pytest.mark.parametrize(
        ("wanted", "activation", "expected"),
        [
            ("b0", "gelu", ["(3, 3)"]),
            ("b0", "identity", []),
            ("w0", "step", ["x"]),
            ("x", "sigmoid", ["(3, 3)", "w0"]),
        ],
    )
    def test_what_linear_act_keeps(self, wanted, activation, expected):
        t = tensors((4, 3))
        for name, p in t.items():
            p.requires_grad_(name == wanted)
        known = {p.data_ptr(): name for name, p in t.items()}
        kept = saved_by(lambda: linear_act(t["x"], t["w0"], t["b0"], activation))
        assert sorted(known.get(k.data_ptr(), f"{tuple(k.shape)}") for k in kept) == expected

    @pytest.mark.parametrize("activation", ["sigmoid", "gelu"])
    def test_memory_is_freed_without_the_garbage_collector(self, activation, monkeypatch):
        """Neither the node nor what it kept is part of a reference cycle."""
        made: list[StorageWeakRef] = []

        def spy(*args, **kwargs):
            a, z = torch_backend.linear_fwd(*args, save_z=kwargs["save_z"])
            made.extend(StorageWeakRef(k.untyped_storage()) for k in (a, z) if k is not None)
            return a, z

        monkeypatch.setattr(ops, "linear_fwd", spy)
        gc.collect()
        gc.disable()
        try:
            out = run(mlp, tensors(), [activation] * 3)
            alive = sum(not storage.expired() for storage in made)
            assert alive == (3 if activation == "sigmoid" else 6)
            del out
            assert all(storage.expired() for storage in made)
        finally:
            gc.enable()


class TestTapeSemantics:
    def test_retain_graph(self):
        t = tensors()
        out = run(mlp, t, ["sigmoid", "gelu", "identity"]).square().sum()
        first = torch.autograd.grad(out, list(t.values()), retain_graph=True)
        second = torch.autograd.grad(out, list(t.values()))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    @pytest.mark.parametrize("function", [lambda t: run(mlp, t, ["relu"] * 3), lambda t: linear_act(t["x"], t["w0"])])
    def test_second_backward_without_retain_graph(self, function):
        out = function(tensors()).sum()
        out.backward()
        with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
            out.backward()

    def test_accumulation(self):
        t = tensors()
        for _ in range(3):
            run(mlp, t, ["tanh", "gelu", "identity"]).sum().backward()
        once = tensors()
        run(mlp, once, ["tanh", "gelu", "identity"]).sum().backward()
        for name in NAMES:
            close(t[name].grad, 3 * once[name].grad)

    def test_gradients_are_nobodys_memory(self):
        """A gradient shares no storage with another one, with the upstream gradient or with a parameter."""
        t = tensors()
        upstream = torch.ones(3, 3, dtype=torch.float64)
        run(mlp, t, ["identity"] * 3).backward(upstream)
        storages = [s.untyped_storage().data_ptr() for p in t.values() for s in (p, p.grad)]
        assert len({*storages, upstream.untyped_storage().data_ptr()}) == len(storages) + 1
        assert bool((upstream == 1).all())

    @pytest.mark.parametrize("name", ["x", "w1", "w2"])
    def test_in_place_change_of_what_backward_needs(self, name):
        t = tensors()
        out = run(mlp, t, ["sigmoid", "gelu", "identity"])
        with torch.no_grad():
            t[name].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()

    def test_in_place_change_of_a_saved_output(self):
        out = linear_act(*tensors((4, 3)).values(), "sigmoid")
        out.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()

    def test_in_place_change_of_what_backward_does_not_need(self):
        """As torch: biases, W_1 when x needs no gradient, the output where its derivative does not read it."""
        t = tensors()
        t["x"].requires_grad_(False)
        out = run(mlp, t, ["sigmoid", "gelu", "identity"])
        expected = torch.autograd.grad(out.sum(), [t[n] for n in NAMES[1:]], retain_graph=True)
        with torch.no_grad():
            for name in ("w0", "b0", "b1", "b2"):
                t[name].zero_()
        out.add_(1)
        actual = torch.autograd.grad(out.sum(), [t[n] for n in NAMES[1:]])
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))

    def test_frozen_input_may_change_after_the_forward_pass(self):
        t = tensors()
        for name in ("x", "w0", "b0"):
            t[name].requires_grad_(False)
        out = run(mlp, t, ["sigmoid", "gelu", "identity"])
        t["x"].zero_()
        t["w0"].zero_()
        out.sum().backward()
        assert t["w1"].grad.abs().sum() > 0

    @pytest.mark.parametrize("activation", ["sigmoid", "gelu", "step"])
    def test_saved_tensors_hooks(self, activation):
        """Saved tensors may be moved and come back with other strides."""
        plain, hooked = tensors(), tensors()
        run(mlp, plain, [activation] * 3).square().sum().backward()
        with saved_tensors_hooks(lambda k: k.clone(), lambda k: k.t().contiguous().t() if k.dim() == 2 else k):
            run(mlp, hooked, [activation] * 3).square().sum().backward()
        with save_on_cpu():
            out = linear_act(hooked["x"], hooked["w0"], None, activation)
        (dw,) = torch.autograd.grad(out.sum(), hooked["w0"])
        for name in NAMES:
            close(hooked[name].grad, plain[name].grad)
        close(dw, torch.autograd.grad(linear_act(plain["x"], plain["w0"], None, activation).sum(), plain["w0"])[0])

    def test_activation_checkpointing(self):
        plain, recomputed = tensors(), tensors()
        run(mlp, plain, ["gelu", "relu", "identity"]).square().sum().backward()
        out = checkpoint(run, mlp, recomputed, ["gelu", "relu", "identity"], use_reentrant=False)
        out.square().sum().backward()
        for name in NAMES:
            assert torch.equal(recomputed[name].grad, plain[name].grad)

    def test_undefined_upstream_gradient(self):
        """A consumer that passes no gradient on gives none, not zeros and not an error."""

        class Stop(torch.autograd.Function):
            @staticmethod
            def forward(ctx, out):
                return out.clone()

            @staticmethod
            def backward(ctx, *grads):
                return None

        for network in (lambda t: run(mlp, t, ["sigmoid"] * 3), lambda t: linear_act(t["x"], t["w0"], t["b0"], "gelu")):
            t = tensors()
            Stop.apply(network(t)).sum().backward()
            assert [p.grad for p in t.values()] == [None] * len(NAMES)


UPSTREAM = {
    "sum": lambda out: out.sum(),
    "mean": lambda out: out.mean(),
    "transposed": lambda out: (out.t() * torch.arange(3.0 * 3, dtype=out.dtype).view(3, 3)).sum(),
    "one column": lambda out: out[:, 1].square().sum(),
    "every other row": lambda out: out[::2].square().sum(),
    "expanded": lambda out: out.sum(0).square().sum(),
    "diagonal": lambda out: out.diagonal().square().sum(),
    "flipped": lambda out: out.flip(1).cumsum(0).square().sum(),
}


@pytest.mark.parametrize("activation", ["identity", "relu", "step", "silu"])
@pytest.mark.parametrize("consumer", UPSTREAM)
def test_upstream_gradients_of_any_strides(consumer, activation):
    """Expanded, transposed and sliced gradients reach the node with strides of all kinds."""
    results = []
    for network in (mlp, reference.mlp):
        t = tensors()
        activations = ["tanh", "gelu", activation]
        out = run(network, t, activations)
        if activation == "step" and network is reference.mlp:
            results.append([torch.zeros_like(p) for p in t.values()])  # torch has no derivative, which is zero
        else:
            results.append(torch.autograd.grad(UPSTREAM[consumer](out), list(t.values())))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


@pytest.mark.parametrize("activation", ["identity", "leaky_relu", "step", "gelu"])
def test_upstream_gradients_of_linear_act(activation):
    for grad in (torch.ones(()).expand(3, 3), torch.randn(6, 6)[::2, 1::2], torch.randn(3, 3).t()):
        t = tensors((4, 3))
        upstream = grad.double()
        actual = torch.autograd.grad(linear_act(*t.values(), activation), list(t.values()), upstream)
        expected = reference.linear_act_backward(upstream, *t.values(), activation)
        for got, want in zip(actual, expected, strict=True):
            close(got, want)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("create_graph", [False, True])
def test_empty_batch(activation, create_graph):
    """An empty output, and gradients that are zeros of full size, as torch."""
    t = tensors(batch=0)
    out = run(mlp, t, [activation] * 3)
    assert out.shape == (0, 3)
    grads = torch.autograd.grad(out.sum(), list(t.values()), create_graph=create_graph)
    for p, g in zip(t.values(), grads, strict=True):
        assert g.shape == p.shape
        assert not g.any()


@pytest.mark.parametrize("activation", ["sigmoid", "gelu", "relu"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_backward_inside_autocast(activation, create_graph):
    """The gradients keep the dtype and the accuracy of their forward pass, which ran outside."""
    t = tensors(dtype=torch.float32)
    double = tensors()
    out = run(mlp, t, [activation] * 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grads = torch.autograd.grad(out, list(t.values()), torch.ones_like(out), create_graph=create_graph)
    expected = torch.autograd.grad(run(reference.mlp, double, [activation] * 3).sum(), list(double.values()))
    for actual, want in zip(grads, expected, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), want, rtol=1e-4, atol=1e-5)
    x, w = t["x"], t["w0"]
    out = linear_act(x, w, None, activation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (dx,) = torch.autograd.grad(out, x, torch.ones_like(out), create_graph=create_graph)
    assert dx.dtype == torch.float32
    want = reference.linear_act_backward(
        torch.ones(3, 5, dtype=torch.float64), x.double(), w.double(), None, activation
    )
    torch.testing.assert_close(dx.double(), want[0], rtol=1e-4, atol=1e-5)


def test_non_finite_values_pass_through():
    """NaN in the input, and infinities in the upstream gradient, spread as in torch."""
    t = tensors()
    with torch.no_grad():
        t["x"][1, 2] = float("nan")
    results = []
    for network in (mlp, reference.mlp):
        out = run(network, t, ["sigmoid", "tanh", "identity"])
        results.append((out, *torch.autograd.grad(out, list(t.values()), torch.full_like(out, float("inf")))))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True)
