"""MLPEnsemble: each member is an MLP of its own, in values, gradients, transforms, compilers and errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from fastmlp import MLP, MLPEnsemble
from tests.support.steps import one_thread  # noqa: F401
from tests.support.torchs import TORCH_ACTIVATIONS

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
E, B, SIZES = 3, 5, (4, 6, 5, 2)


def models(activation: str | list[str] = "gelu", *, bias: bool = True, dtype: torch.dtype = torch.float64) -> list[MLP]:
    return [MLP(SIZES, activation, bias, dtype=dtype) for _ in range(E)]


def own(x: Tensor, e: int) -> Tensor:
    """A member's part of an input."""
    return x[e] if x.dim() == 3 else x


@pytest.fixture(params=["shared", "own"])
def x(request: pytest.FixtureRequest) -> Tensor:
    return torch.randn(*([E] if request.param == "own" else []), B, SIZES[0], dtype=torch.float64, requires_grad=True)


class TestValues:
    @pytest.mark.parametrize("activation", [*TORCH_ACTIVATIONS, "softmax"])
    @pytest.mark.parametrize("bias", [True, False])
    def test_each_member_is_its_mlp(self, x, activation, bias):
        single = models(activation, bias=bias)
        ensemble = MLPEnsemble.stack(single)
        out = ensemble(x)
        expected = torch.stack([model(own(x, e)) for e, model in enumerate(single)])
        assert out.shape == (E, B, SIZES[-1])
        torch.testing.assert_close(out, expected)
        g = torch.randn_like(out)
        actual = torch.autograd.grad(out, [x, *ensemble.parameters()], g)
        wanted = torch.autograd.grad(expected, [x, *(p for model in single for p in model.parameters())], g)
        count = len(list(ensemble.parameters()))
        torch.testing.assert_close(actual[0], wanted[0])
        for i in range(count):
            torch.testing.assert_close(actual[1 + i], torch.stack(wanted[1 + i :: count]))

    def test_one_node_of_the_tape(self, x):
        node = MLPEnsemble.stack(models())(x).grad_fn
        below = [type(n).__name__ for n, _ in node.next_functions if n is not None]
        assert set(below) <= {"AccumulateGrad", "ExpandBackward0"}

    def test_the_minimum_over_members(self, x):
        """As critics are trained."""
        single = models("relu")
        ensemble = MLPEnsemble.stack(single)
        loss = ensemble(x).min(0).values.mean()
        expected = torch.stack([model(own(x, e)) for e, model in enumerate(single)]).min(0).values.mean()
        torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected, x))

    @pytest.mark.parametrize("frozen", ["layers.0.weight", "layers.0.", "layers.2.weight", "layers.1.bias"])
    def test_frozen_parameters(self, x, frozen):
        single = models()
        for model in single:
            for name, p in model.named_parameters():
                p.requires_grad_(not name.startswith(frozen))
        ensemble = MLPEnsemble.stack(single)
        x = x.detach()
        ensemble(x).square().sum().backward()
        for e, model in enumerate(single):
            model(own(x, e)).square().sum().backward()
        for i, p in enumerate(ensemble.parameters()):
            grads = [list(model.parameters())[i].grad for model in single]
            assert (p.grad is None) == (grads[0] is None) == (not p.requires_grad)
            if p.grad is not None:
                torch.testing.assert_close(p.grad, torch.stack(grads))

    def test_pixels(self):
        single = models(dtype=torch.float32)
        pixels = torch.randint(0, 256, (E, B, SIZES[0]), dtype=torch.uint8)
        expected = torch.stack([model(pixels[e]) for e, model in enumerate(single)])
        torch.testing.assert_close(MLPEnsemble.stack(single)(pixels), expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_sixteen_bits_and_autocast(self, dtype):
        single = models("tanh", dtype=torch.float32)
        ensemble, x = MLPEnsemble.stack(single), torch.randn(B, SIZES[0])
        expected = torch.stack([model(x) for model in single])
        with torch.autocast("cpu", dtype):
            out = ensemble(x)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), expected, atol=0.03, rtol=0.03)
        out.sum().backward()
        narrow = MLPEnsemble.stack([model.to(dtype) for model in single])(x.to(dtype))
        torch.testing.assert_close(narrow, out, atol=0.03, rtol=0.03)

    def test_hooks_and_replaced_layers_are_called(self, x):
        ensemble = MLPEnsemble.stack(models("tanh"))
        expected = ensemble(x)
        seen = []
        handle = ensemble.layers[1].register_forward_hook(lambda module, args, out: seen.append(out.shape))
        torch.testing.assert_close(ensemble(x), expected)
        handle.remove()
        assert seen == [(E, B, SIZES[2])]
        layer = ensemble.layers[1]
        ensemble.layers[1] = torch.nn.Sequential(layer)
        torch.testing.assert_close(ensemble(x), expected)


class TestDerivatives:
    @pytest.mark.parametrize("activation", ["sigmoid", "gelu"])
    def test_second_derivatives(self, x, activation):
        ensemble = MLPEnsemble.stack(models(activation))
        names = [name for name, _ in ensemble.named_parameters()]

        def run(x: Tensor, *params: Tensor) -> Tensor:
            return torch.func.functional_call(ensemble, dict(zip(names, params, strict=True)), (x,))

        assert torch.autograd.gradgradcheck(run, (x, *ensemble.parameters()), fast_mode=True)

    def test_transforms(self, x):
        ensemble = MLPEnsemble.stack(models("silu"))
        batched = torch.randn(2, *x.shape, dtype=x.dtype)
        torch.testing.assert_close(torch.func.vmap(ensemble)(batched), torch.stack([ensemble(b) for b in batched]))
        x = x.detach()
        out, tangent = torch.func.jvp(ensemble, (x,), (torch.ones_like(x),))
        difference = (ensemble(x + 1e-6) - ensemble(x - 1e-6)) / 2e-6
        torch.testing.assert_close(tangent, difference, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(out, ensemble(x))

    def test_compiled_whole_and_exported_for_any_batch(self, x):
        ensemble = MLPEnsemble.stack(models("tanh"))
        out = ensemble(x)
        expected = torch.autograd.grad(out.square().sum(), [x, *ensemble.parameters()])
        compiled = torch.compile(ensemble, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(compiled, out)
        torch.testing.assert_close(torch.autograd.grad(compiled.square().sum(), [x, *ensemble.parameters()]), expected)
        x = x.detach()
        program = torch.export.export(ensemble, (x,), dynamic_shapes=({x.dim() - 2: torch.export.Dim("batch")},))
        torch.testing.assert_close(program.module()(x[..., :3, :]), ensemble(x[..., :3, :]))


class TestMembers:
    def test_initialized_like_mlps(self):
        torch.manual_seed(1)
        ensemble = MLPEnsemble(SIZES, E, "relu")
        torch.manual_seed(1)
        single = [MLP(SIZES, "relu") for _ in range(E)]
        for name, p in ensemble.named_parameters():
            assert torch.equal(p, torch.stack([model.get_parameter(name) for model in single]))

    def test_stack_and_unstack_copy(self):
        single = models(["gelu", "tanh"])
        single_names = [name for name, _ in single[0].named_parameters()]
        for model in single:
            model.layers[1].weight.requires_grad_(False)
        ensemble = MLPEnsemble.stack(single)
        assert [name for name, _ in ensemble.named_parameters()] == single_names
        assert not ensemble.layers[1].weight.requires_grad
        before = torch.get_rng_state()
        again = ensemble.unstack()
        assert torch.equal(torch.get_rng_state(), before)
        with torch.no_grad():
            for p in ensemble.parameters():
                p.zero_()
        for model, other in zip(single, again, strict=True):
            assert other.activations == model.activations
            for p, q in zip(model.parameters(), other.parameters(), strict=True):
                assert torch.equal(p, q)
                assert p.requires_grad == q.requires_grad
                assert q.any()

    def test_copies_pickles_and_state(self):
        ensemble = MLPEnsemble(SIZES, E, "relu")
        x = torch.randn(B, SIZES[0])
        for other in (copy.deepcopy(ensemble), pickle.loads(pickle.dumps(ensemble))):
            assert torch.equal(other(x), ensemble(x))
        other = MLPEnsemble(SIZES, E, "relu")
        other.load_state_dict(ensemble.state_dict())
        assert torch.equal(other(x), ensemble(x))
        assert "members=3" in repr(ensemble)


def with_hook() -> MLP:
    model = models()[0]
    model.layers[0].register_forward_hook(lambda *_: None)
    return model


class TestErrors:
    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda: MLPEnsemble(SIZES, 0), ValueError, "at least 1 member, got members=0"),
            (lambda: MLPEnsemble(SIZES, 2.0), TypeError, "members to be an int"),
            (lambda: MLPEnsemble(SIZES, True), TypeError, "members to be an int"),
            (lambda: MLPEnsemble((4,), 2), ValueError, "sizes"),
            (lambda: MLPEnsemble(SIZES, 2, "rely"), ValueError, "Did you mean 'relu'"),
            (lambda: MLPEnsemble.stack([]), ValueError, "at least one MLP"),
            (lambda: MLPEnsemble.stack(MLP(SIZES)), TypeError, "a list of fastmlp.MLP, got a MLP"),
            (lambda: MLPEnsemble.stack([MLP(SIZES), torch.nn.ReLU()]), TypeError, "of MLP, ReLU"),
            (lambda: MLPEnsemble.stack([MLP(SIZES), MLP((4, 2))]), ValueError, r"\(4, 2\) in models\[1\]"),
            (lambda: MLPEnsemble.stack([MLP(SIZES), MLP(SIZES, "relu")]), ValueError, "same activations"),
            (lambda: MLPEnsemble.stack([MLP(SIZES), MLP(SIZES, bias=False)]), ValueError, "same parameters"),
            (lambda: MLPEnsemble.stack([MLP(SIZES), *models("sigmoid")]), RuntimeError, "same dtype"),
            (lambda: MLPEnsemble.stack([MLP(SIZES), MLP(SIZES, device="meta")]), RuntimeError, "same device"),
            (lambda: MLPEnsemble.stack([with_hook()]), TypeError, r"models\[0\] has a replaced layer, a hook"),
        ],
    )
    def test_construction(self, make, error, message):
        with pytest.raises(error, match=message):
            make()

    @pytest.mark.parametrize(
        ("shape", "dtype", "message"),
        [
            ((E + 1, B, 4), torch.float32, r"\[3, batch, 4\], got \[4, 5, 4\]"),
            ((B,), torch.float32, r"\[batch, 4\], the same for all members"),
            ((E, 2, 2, 4), torch.float32, "flatten images"),
            ((B, 3), torch.float32, "4 features .*, got 3"),
            ((B, 4), torch.float64, "same dtype"),
        ],
    )
    def test_inputs(self, shape, dtype, message):
        with pytest.raises(RuntimeError, match=message):
            MLPEnsemble(SIZES, E)(torch.ones(shape, dtype=dtype))

    def test_parameters_that_do_not_fit(self):
        ensemble = MLPEnsemble(SIZES, E)
        ensemble.layers[0].bias = torch.nn.Parameter(torch.zeros(E + 1, 6))
        with pytest.raises(RuntimeError, match=r"biases\[0\] of shape \[3, out_features\] for 3 members, got \[4, 6\]"):
            ensemble(torch.ones(B, 4))
        ensemble = MLPEnsemble(SIZES, E)
        ensemble.layers[1].weight = torch.nn.Parameter(torch.zeros(E, 5, 7))
        with pytest.raises(RuntimeError, match=r"weights\[1\] of shape \[out_features, 6\]"):
            ensemble(torch.ones(B, 4))

    def test_an_empty_batch(self):
        out = MLPEnsemble(SIZES, E)(torch.ones(0, 4))
        assert out.shape == (E, 0, 2)
        out.sum().backward()
