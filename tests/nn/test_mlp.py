"""fastmlp/nn/mlp.py: Linear and MLP beside torch's own modules."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastmlp
from fastmlp import functional, reference
from fastmlp.activations import ACTIVATIONS
from fastmlp.ops import torch_ops
from tests.support.harness import assert_within_budget
from tests.support.torchs import TORCH_ACTIVATIONS

pytestmark = pytest.mark.usefixtures("own_nodes")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SIZES = (12, 9, 7, 4)


def sequential(model: fastmlp.MLP, dtype: torch.dtype | None = None) -> nn.Sequential:
    """Torch's modules with copies of the parameters."""
    modules: list[nn.Module] = [nn.Flatten()]
    for layer in model.layers:
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=layer.weight.dtype)
        linear.load_state_dict(layer.state_dict())
        modules += [linear, TORCH_ACTIVATIONS[layer.activation].module()]
    return nn.Sequential(*modules).to(dtype)


def gradients(network: nn.Module, x: Tensor) -> list[Tensor]:
    """(output, dX unless x is integer, dW_1, db_1, ...) for the loss sum(out * fixed)."""
    x = x.detach().clone()
    if x.is_floating_point():
        x.requires_grad_()
    network.zero_grad()
    out = network(x)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out.dtype)
    out.backward(upstream)
    return [out.detach(), *([x.grad] if x.requires_grad else []), *(p.grad for p in network.parameters())]


def assert_as_torch(model: fastmlp.MLP, x: Tensor) -> None:
    """Output and all gradients against float64, within twice the error of torch in the same dtype."""
    x_torch = reference.pixels(x, model.layers[0].weight.dtype)
    actual = gradients(model, x)
    own = gradients(sequential(model), x_torch)
    exact = gradients(sequential(model, torch.float64), reference.pixels(x, torch.float64).double())
    if not x.is_floating_point():
        del own[1], exact[1]
    reduction = x.shape[0] + max(model.sizes)
    for i, (got, want, torchs) in enumerate(zip(actual, exact, own, strict=True)):
        assert got.dtype == torchs.dtype
        assert_within_budget(got, want, torchs, reduction=reduction, what=f"tensor {i}")


class TestAgreementWithTorch:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_forward_and_gradients(self, activation, dtype):
        torch.manual_seed(0)
        model = fastmlp.MLP(SIZES, activation, dtype=dtype)
        assert_as_torch(model, torch.randn(17, 12).to(dtype))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_mixed_activations_without_biases_on_images(self, dtype):
        torch.manual_seed(0)
        model = fastmlp.MLP(SIZES, ["gelu", "leaky_relu", "tanh"], bias=False, dtype=dtype)
        assert [name for name, _ in model.named_parameters()] == [f"layers.{i}.weight" for i in range(3)]
        assert_as_torch(model, torch.randn(5, 3, 4).to(dtype))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_pixels(self, dtype):
        torch.manual_seed(0)
        model = fastmlp.MLP(SIZES, "relu", dtype=dtype)
        assert_as_torch(model, torch.randint(0, 256, (17, 3, 4), dtype=torch.uint8))

    @pytest.mark.parametrize("batch", [1, 2, 130])
    def test_batches(self, batch):
        torch.manual_seed(0)
        assert_as_torch(fastmlp.MLP(SIZES, "silu"), torch.randn(batch, 12))

    def test_one_layer_and_many(self):
        torch.manual_seed(0)
        assert_as_torch(fastmlp.MLP((12, 3)), torch.randn(6, 12))
        assert_as_torch(fastmlp.MLP((12, 3), ["sigmoid"]), torch.randn(6, 12))
        assert_as_torch(fastmlp.MLP((12, *[5] * 10, 1), "tanh"), torch.randn(6, 12))
        assert_as_torch(fastmlp.MLP((1, 1, 1), "tanh"), torch.randn(6, 1))

    def test_the_reference_workload(self):
        torch.manual_seed(0)
        model = fastmlp.MLP((784, 512, 512, 10))
        assert_as_torch(model, torch.randint(0, 256, (64, 28, 28), dtype=torch.uint8))

    def test_empty_batch(self):
        model = fastmlp.MLP(SIZES)
        out, dx, *params = gradients(model, torch.zeros(0, 12))
        assert out.shape == (0, 4)
        assert dx.shape == (0, 12)
        assert [p.shape for p in params] == [p.shape for p in model.parameters()]
        assert not any(p.any() for p in params)

    def test_training_follows_torch(self):
        """Twenty steps of SGD in float64 end at the same parameters."""
        torch.manual_seed(0)
        model = fastmlp.MLP(SIZES, "tanh", dtype=torch.float64)
        other = sequential(model)
        x, y = torch.randn(32, 12, dtype=torch.float64), torch.randint(0, 4, (32,))
        for network in (model, other):
            optimizer = torch.optim.SGD(network.parameters(), lr=0.5, momentum=0.9)
            for _ in range(20):
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(x), y).backward()
                optimizer.step()
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)


class TestLinear:
    def test_is_like_a_torch_linear_and_none(self):
        """A tool that replaces an nn.Linear by an affine map would drop the activation."""
        layer = fastmlp.Linear(5, 3, activation="gelu")
        assert not isinstance(layer, nn.Linear)
        assert (layer.in_features, layer.out_features) == (5, 3)
        assert repr(layer) == "Linear(in_features=5, out_features=3, bias=True, activation='gelu')"
        assert list(layer.state_dict()) == ["weight", "bias"]
        assert fastmlp.Linear(5, 3, bias=False).bias is None
        assert fastmlp.Linear(5, 3).activation == "identity"
        assert fastmlp.Linear(5, 3, device="meta", dtype=torch.float16).weight.dtype == torch.float16

    def test_initialized_as_torchs(self):
        torch.manual_seed(3)
        ours = fastmlp.Linear(5, 3, activation="relu")
        torch.manual_seed(3)
        theirs = nn.Linear(5, 3)
        assert torch.equal(ours.weight, theirs.weight)
        assert torch.equal(ours.bias, theirs.bias)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_forward(self, activation):
        layer = fastmlp.Linear(5, 3, activation=activation, dtype=torch.float64)
        x = torch.randn(2, 4, 5, dtype=torch.float64)
        z = nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), reference.activate(z, activation))

    def test_unknown_activation(self):
        with pytest.raises(ValueError, match="unknown activation 'Relu'; expected one of identity"):
            fastmlp.Linear(5, 3, activation="Relu")

    @pytest.mark.parametrize(("args", "kind"), [((-1, 3), RuntimeError), ((2.5, 3), TypeError)])
    def test_sizes_as_torch(self, args, kind):
        with pytest.raises(kind) as ours:
            fastmlp.Linear(*args)
        with pytest.raises(kind) as theirs:
            nn.Linear(*args)
        assert str(ours.value) == str(theirs.value)


class TestConstruction:
    def test_layout(self):
        model = fastmlp.MLP((784, 512, 10), "relu")
        assert isinstance(model.layers, nn.ModuleList)
        assert all(isinstance(layer, nn.Linear) for layer in model.layers)
        assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == {
            "layers.0.weight": (512, 784),
            "layers.0.bias": (512,),
            "layers.1.weight": (10, 512),
            "layers.1.bias": (10,),
        }
        assert model.sizes == (784, 512, 10)
        assert model.activations == ("relu", "identity")
        assert "sizes=(784, 512, 10)" in repr(model)

    def test_defaults(self):
        assert fastmlp.MLP((3, 3, 3)).activations == ("sigmoid", "identity")

    @pytest.mark.parametrize(
        ("activation", "expected"),
        [
            ("tanh", ("tanh", "tanh", "identity")),
            (["tanh", "relu"], ("tanh", "relu", "identity")),
            (("tanh", "relu", "step"), ("tanh", "relu", "step")),
        ],
    )
    def test_activations(self, activation, expected):
        assert fastmlp.MLP(SIZES, activation).activations == expected

    @pytest.mark.parametrize("sizes", [[12, 9, 4], torch.Size((12, 9, 4)), np.array([12, 9, 4]), iter((12, 9, 4))])
    def test_sizes_are_any_sequence_of_ints(self, sizes):
        model = fastmlp.MLP(sizes)
        assert model.sizes == (12, 9, 4)
        assert all(type(n) is int for n in model.sizes)

    def test_initialized_as_torchs(self):
        torch.manual_seed(7)
        ours = fastmlp.MLP(SIZES)
        torch.manual_seed(7)
        theirs = [nn.Linear(a, b) for a, b in itertools.pairwise(SIZES)]
        for layer, linear in zip(ours.layers, theirs, strict=True):
            assert torch.equal(layer.weight, linear.weight)
            assert torch.equal(layer.bias, linear.bias)

    def test_device_and_dtype(self):
        model = fastmlp.MLP(SIZES, device="meta", dtype=torch.bfloat16)
        assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
        assert {p.dtype for p in fastmlp.MLP(SIZES).double().parameters()} == {torch.float64}

    @pytest.mark.parametrize(
        ("sizes", "kind", "got"),
        [
            (784, TypeError, "got 784 of type int; give a sequence"),
            (None, TypeError, "got None of type NoneType"),
            ((784, 10.0), TypeError, r"got \(784, 10.0\), in which 10.0 is of type float"),
            ((784, "10"), TypeError, "in which '10' is of type str"),
            ("78", TypeError, "in which '7' is of type str"),
            ((784, True), TypeError, "in which True is of type bool"),
            ((784, None), TypeError, "in which None is of type NoneType"),
            ((), ValueError, r"got \(\)"),
            ((784,), ValueError, r"got \(784,\)"),
            ((784, 0, 10), ValueError, r"got \(784, 0, 10\)"),
            ((784, -512, 10), ValueError, r"got \(784, -512, 10\)"),
        ],
        ids=str,
    )
    def test_bad_sizes(self, sizes, kind, got):
        with pytest.raises(kind, match=r"expected sizes to be at least two positive ints such as .*" + got):
            fastmlp.MLP(sizes)

    @pytest.mark.parametrize(
        ("activation", "message"),
        [
            ("softmin", r"unknown activation 'softmin'; expected one of identity, sigmoid"),
            (["relu", "swish"], "unknown activation 'swish'"),
            (None, "unknown activation None"),
            (torch.relu, "unknown activation <built-in method relu"),
            (["relu"], r"expected 2 activations \(one a hidden layer\) or 3 \(one a layer\), got 1: \('relu',\)"),
            (["relu"] * 4, "got 4: "),
        ],
        ids=["softmin", "swish", "None", "function", "too few", "too many"],
    )
    def test_bad_activations(self, activation, message):
        with pytest.raises(ValueError, match=message):
            fastmlp.MLP(SIZES, activation)


class TestInput:
    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (torch.ones(12), r"expected an input of shape \[batch, 12\] or \[batch, ...\], got \[12\]; add a batch"),
            (torch.ones(()), r"got \[\]"),
            (torch.ones(5, 13), r"expected an input with 12 features .* got 13"),
            (torch.ones(5, 2, 12), r"got 24 from an input of shape \[5, 24\]"),
            (torch.ones(5, 12).double(), r"same dtype, got torch.float64 and torch.float32; convert"),
            (torch.ones(5, 12).bfloat16(), "got torch.bfloat16 and torch.float32"),
            (torch.ones(5, 12).long(), "floating-point input or uint8 pixels, got torch.int64"),
            (torch.ones(5, 12) > 0, "got torch.bool"),
            (torch.ones(5, 12, device="meta"), "the input is on meta and weights"),
        ],
        ids=lambda v: f"{v.dtype} {tuple(v.shape)} {v.device}" if isinstance(v, Tensor) else "",
    )
    @pytest.mark.parametrize("hooked", [False, True])
    def test_errors(self, x, message, hooked):
        """With a hook on a layer the layers run one by one; the messages differ only in the names of parameters."""
        model = fastmlp.MLP(SIZES)
        if hooked:
            model.layers[1].register_forward_hook(lambda *args: None)
            message = message.replace("weights", "weight")
        with pytest.raises(RuntimeError, match=message):
            model(x)

    def test_not_a_tensor(self):
        with pytest.raises(TypeError, match=r"expected the input to be a torch.Tensor, got ndarray"):
            fastmlp.MLP(SIZES)(np.ones((5, 12), dtype=np.float32))


@pytest.fixture
def nodes(monkeypatch) -> list[str]:
    """The functions that the modules call: "mlp" for the whole network, "linear_act" for a layer."""
    seen: list[str] = []
    for name in ("mlp", "linear_act"):
        original = getattr(functional, name)
        monkeypatch.setattr(
            functional, name, lambda *a, _original=original, _name=name: seen.append(_name) or _original(*a)
        )
    return seen


class TestLayersThatAreMore:
    """Hooks, parametrizations, pruning and replaced layers keep their meaning inside an MLP."""

    def model(self, **kwargs) -> tuple[fastmlp.MLP, Tensor]:
        torch.manual_seed(0)
        return fastmlp.MLP(SIZES, ["tanh", "gelu"], dtype=torch.float64, **kwargs), torch.randn(
            5, 3, 4, dtype=torch.float64
        )

    def assert_equal_to(self, expected: list[Tensor], model: nn.Module, x: Tensor) -> None:
        for actual, want in zip(gradients(model, x), expected, strict=True):
            torch.testing.assert_close(actual, want)

    def test_one_node_without_hooks(self, nodes):
        model, x = self.model()
        model.register_forward_hook(lambda *args: None)  # on the whole network: nothing changes
        model(x)
        assert nodes == ["mlp"]

    def test_forward_hook(self, nodes):
        model, x = self.model()
        expected = gradients(model, x)
        seen = []
        handle = model.layers[1].register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
        self.assert_equal_to(expected, model, x)
        assert [(a.shape, o.shape) for a, o in seen] == [((5, 9), (5, 7))]
        handle.remove()
        nodes.clear()
        model(x)
        assert nodes == ["mlp"]

    def test_forward_hook_that_replaces_the_output(self):
        model, x = self.model()
        model.layers[1].register_forward_hook(lambda module, args, out: out * 0)
        torch.testing.assert_close(model(x), model.layers[2].bias.expand(5, 4))

    def test_forward_pre_hook(self):
        model, x = self.model()
        model.layers[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        hooked = model(x)
        plain, _ = self.model()
        torch.testing.assert_close(hooked, plain(x * 2))

    def test_hooks_with_kwargs(self):
        model, x = self.model()
        seen = []
        model.layers[0].register_forward_hook(lambda m, args, kwargs, out: seen.append(kwargs), with_kwargs=True)
        model(x)
        assert seen == [{}]

    def test_backward_hooks(self):
        model, x = self.model()
        expected = gradients(model, x)
        seen = []
        model.layers[1].register_full_backward_hook(lambda m, dx, da: seen.append((dx[0].shape, da[0].shape)))
        model.layers[2].register_full_backward_pre_hook(lambda m, da: seen.append(da[0].shape))
        self.assert_equal_to(expected, model, x)
        assert seen == [(5, 4), ((5, 9), (5, 7))]

    def test_hook_on_every_module(self, nodes):
        model, x = self.model()
        seen = []
        handle = nn.modules.module.register_module_forward_hook(lambda m, *args: seen.append(type(m).__name__))
        try:
            model(x)
        finally:
            handle.remove()
        assert seen == ["Affine"] * 3 + ["MLP"]
        nodes.clear()
        model(x)
        assert nodes == ["mlp"]

    def test_tensor_hooks_on_parameters(self, nodes):
        model, x = self.model()
        seen = []
        model.layers[0].weight.register_hook(lambda g: seen.append(g.shape))
        model.layers[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
        model(x).sum().backward()
        assert seen == [(9, 12), (9, 12)]
        assert nodes == ["mlp"]

    def test_weight_norm(self, nodes):
        model, x = self.model()
        expected = gradients(model, x)
        parametrizations.weight_norm(model.layers[0])
        got = gradients(model, x)
        torch.testing.assert_close(got[0], expected[0])
        torch.testing.assert_close(got[1], expected[1])
        assert nodes[-1] == "mlp"
        assert model.layers[0].parametrizations.weight.original0.grad.shape == (9, 1)
        parametrize.remove_parametrizations(model.layers[0], "weight")
        torch.testing.assert_close(model(x), expected[0])

    def test_pruning(self):
        model, x = self.model()
        prune.l1_unstructured(model.layers[1], "weight", amount=0.5)
        pruned = gradients(model, x)
        assert not model.layers[1].weight_orig.grad[model.layers[1].weight_mask == 0].any()
        prune.remove(model.layers[1], "weight")
        assert int((model.layers[1].weight == 0).sum()) == round(0.5 * 63)
        torch.testing.assert_close(model(x), pruned[0])

    @pytest.mark.parametrize("replacement", ["nn.Linear", "nn.Sequential", "subclass", "instance"])
    def test_replaced_layer(self, replacement, nodes):
        """Another module in place of a layer is called as it is, and the layer's activation follows it."""
        model, x = self.model()
        old = model.layers[1]
        if replacement == "nn.Linear":
            model.layers[1] = nn.Linear(9, 7, dtype=torch.float64)
            middle = model.layers[1]
        elif replacement == "nn.Sequential":
            model.layers[1] = nn.Sequential(nn.Dropout(0.0), old)
            middle = old
        elif replacement == "subclass":

            class Doubled(fastmlp.Linear):
                def forward(self, input: Tensor) -> Tensor:
                    return 2 * super().forward(input)

            model.layers[1] = Doubled(9, 7, activation="relu", dtype=torch.float64)
            middle = model.layers[1]
        else:
            old.forward = lambda input: 3 * nn.Linear.forward(old, input)
            middle = old
        out = model(x)
        assert "mlp" not in nodes
        a = middle(torch.tanh(model.layers[0](x.flatten(1))))
        a = a if replacement == "subclass" else nn.functional.gelu(a)  # a fastmlp.Linear has its own
        torch.testing.assert_close(out, model.layers[2](a))

    def test_a_parametrization_is_computed_once(self):
        """To ask whether a layer only computes computes nothing: power iterations change their state."""

        class Counted(nn.Module):
            calls = 0

            def forward(self, weight: Tensor) -> Tensor:
                Counted.calls += 1
                return weight

        model, x = self.model()
        torch.nn.utils.parametrize.register_parametrization(model.layers[0], "weight", Counted())
        for hook in (False, True):
            if hook:
                model.layers[1].register_forward_hook(lambda *a: None)
            Counted.calls = 0
            model(x)
            assert Counted.calls == 1
        with pytest.raises(ValueError, match="parametrization"):
            fastmlp.TrainStep(model)
        assert Counted.calls == 1

    def test_replaced_forward_of_the_class(self, monkeypatch):
        """Somebody may patch the class of the layers; the calls of models and steps follow."""
        model, x = self.model()
        step = fastmlp.TrainStep(model)
        forward = type(model.layers[0]).forward
        monkeypatch.setattr(type(model.layers[0]), "forward", lambda self, input: 2 * forward(self, input))
        a = x.flatten(1)
        for layer, f in zip(model.layers, (torch.tanh, nn.functional.gelu, lambda z: z), strict=True):
            a = f(2 * nn.functional.linear(a, layer.weight, layer.bias))
        torch.testing.assert_close(model(x), a)
        for refuses in (fastmlp.TrainStep, lambda model: step(x, torch.zeros(len(x), dtype=torch.int64))):
            with pytest.raises(ValueError, match="forward of its own"):
                refuses(model)

    def test_tied_layers(self):
        """If one layer is used twice, its gradients add up."""
        torch.manual_seed(0)
        model = fastmlp.MLP((6, 6, 6), "tanh", dtype=torch.float64)
        model.layers[1].weight = model.layers[0].weight
        x = torch.randn(5, 6, dtype=torch.float64)
        w, b0, b1 = model.layers[0].weight, model.layers[0].bias, model.layers[1].bias
        expected = torch.autograd.grad(reference.mlp(x, [w, w], [b0, b1], ["tanh", "identity"]).sum(), [w, b0, b1])
        model(x).sum().backward()
        for p, want in zip((w, b0, b1), expected, strict=True):
            torch.testing.assert_close(p.grad, want)

    @pytest.mark.parametrize("frozen", [(), (0,), (0, 1), (1,), (0, 1, 2)], ids=str)
    def test_frozen_layers(self, frozen, monkeypatch):
        model, x = self.model()
        expected = gradients(model, x)[2:]
        for i in frozen:
            model.layers[i].requires_grad_(False)
        model.zero_grad()
        wgrads = []
        original = torch_ops.linear_wgrad
        spy = lambda dz, x, **k: wgrads.append(x.shape[1]) or original(dz, x, **k)  # noqa: E731
        monkeypatch.setattr(torch_ops, "linear_wgrad", spy)
        out = model(x)
        if len(frozen) == 3:
            assert out.grad_fn is None
            return
        out.backward(torch.linspace(-1, 1, 20, dtype=torch.float64).view(5, 4))
        assert wgrads == [SIZES[i] for i in (2, 1, 0) if i not in frozen]
        for i, (p, want) in enumerate(zip(model.parameters(), expected, strict=True)):
            if i // 2 in frozen:
                assert p.grad is None
            else:
                torch.testing.assert_close(p.grad, want)
