"""Which tensors fastmlp's autograd functions keep and compute, and how their nodes behave beside torch's own."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import allow_mutation_on_saved_tensors, save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import fastmlp
from fastmlp.functional import linear_act, mlp
from fastmlp.ops import Operations, torch_ops
from tests.autograd.test_linear import NAMES, close, run, tensors

pytestmark = pytest.mark.usefixtures("own_nodes")


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, tuple[int, ...]]]:
    """(operation, shape of its result) of every fused operation that runs, without elementwise ones that do no work."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    for name in (name for name in dir(Operations) if not name.startswith("_")):
        original = getattr(torch_ops, name)

        def spy(*args, _original=original, _name=name, **kwargs):
            result = _original(*args, **kwargs)
            first = result[0] if isinstance(result, tuple) else result
            if first is not args[0]:
                seen.append((_name, tuple(first.shape)))
            return result

        monkeypatch.setattr(torch_ops, name, spy)
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


class TestNoNeedlessWork:
    """needs_input_grad: gradients that are not needed are not computed, and their tensors are not kept."""

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
            # All but x require grad: each layer's input, which is A of the layer below, and W above the first.
            (NAMES[1:], ["sigmoid", "relu", "identity"], ["(3, 2)", "(3, 5)", "w1", "w2", "x"]),
            # gelu keeps Z for the derivative and A for the layer above.
            (NAMES[1:], ["gelu", "gelu", "identity"], ["(3, 2)", "(3, 2)", "(3, 5)", "(3, 5)", "w1", "w2", "x"]),
            # Only the last layer requires grad: its input.
            (("w2", "b2"), ["gelu", "gelu", "identity"], ["(3, 2)"]),
            # Only the last bias requires grad: nothing at all.
            (("b2",), ["gelu", "gelu", "identity"], []),
            # Only biases require grad: the tensors of their chain of derivatives, but no layer's input.
            (("b0", "b1", "b2"), ["sigmoid", "sigmoid", "identity"], ["(3, 2)", "(3, 5)", "w1", "w2"]),
            (("b0", "b1", "b2"), ["identity", "step", "identity"], ["w1", "w2"]),
            # A frozen middle layer keeps its W for the gradient of the layer below, but not its input.
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
        """Neither the node nor a tensor that it kept is part of a reference cycle."""
        made: list[StorageWeakRef] = []
        original = torch_ops.linear_fwd

        def spy(*args, **kwargs):
            a, z = original(*args, save_z=kwargs["save_z"])
            made.extend(StorageWeakRef(k.untyped_storage()) for k in (a, z) if k is not None)
            return a, z

        monkeypatch.setattr(torch_ops, "linear_fwd", spy)
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
    @pytest.mark.parametrize("features", [(512, 1), (1, 512), (1, 1), (4, 3)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("create_graph", [False, True])
    def test_a_gradient_has_the_strides_of_its_parameter(self, features, dtype, create_graph):
        """DistributedDataParallel wants them alike, dimensions of size 1 included."""
        k, n = features
        for rows in (1, 2, 40):
            for x in (torch.randn(rows, k, dtype=dtype), torch.randn(k, rows, dtype=dtype).t()):
                model = fastmlp.MLP((k, n, n), "relu", dtype=dtype)
                for out in (model(x).square().sum(), model(x).sum()):
                    grads = torch.autograd.grad(out, list(model.parameters()), create_graph=create_graph)
                    for p, g in zip(model.parameters(), grads, strict=True):
                        assert g.stride() == p.stride(), (rows, p.shape)

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
        """As in torch, biases may change, W_1 if x needs no gradient, and an output that no derivative reads."""
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

    @pytest.mark.parametrize("activation", ["sigmoid", "gelu", "step", "leaky_relu"])
    def test_saved_tensors_may_change_where_torch_keeps_copies(self, activation):
        plain, changed = tensors(), tensors()
        run(mlp, plain, [activation] * 3).square().sum().backward()
        with allow_mutation_on_saved_tensors():
            out = run(mlp, changed, [activation] * 3).square().sum()
            with torch.no_grad():
                for name in NAMES:
                    changed[name].mul_(2)
            out.backward()
        for name in NAMES:
            close(changed[name].grad, plain[name].grad)

    def test_activation_checkpointing(self):
        plain, recomputed = tensors(), tensors()
        run(mlp, plain, ["gelu", "relu", "identity"]).square().sum().backward()
        out = checkpoint(run, mlp, recomputed, ["gelu", "relu", "identity"], use_reentrant=False)
        out.square().sum().backward()
        for name in NAMES:
            assert torch.equal(recomputed[name].grad, plain[name].grad)

    def test_undefined_upstream_gradient(self):
        """A consumer that passes no gradient on leaves the gradients None, without zeros and without an error."""

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
