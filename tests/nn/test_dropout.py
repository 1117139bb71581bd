"""Dropout of modules and functions: masks, derivatives, modes, states, conversion, tracing and errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import fastmlp
from fastmlp import MLP, MLPEnsemble, functional, reference
from fastmlp.activations import ACTIVATIONS
from tests.support.harness import assert_within_budget

SIZES, RATES, MEMBERS = (5, 20, 13, 3), (0.3, 0.5), 3
#: f' from A, and from Z.
SMOOTH = ("tanh", "gelu")


def new_model(activation: str = "tanh", *, members: int = 0, dtype: torch.dtype = torch.float64, seed: int = 0) -> MLP:
    torch.manual_seed(seed)
    if members:
        return MLPEnsemble(SIZES, members, activation, dtype=dtype, dropout=RATES)
    return MLP(SIZES, activation, dtype=dtype, dropout=RATES)


def by_formula(model: MLP, x: Tensor, step: int) -> Tensor:
    """The pass of this number in plain torch, with the masks computed again."""
    seed, rates = int(model.dropout_state[0]), (*model._rates(), 0.0)

    def dropped(a: Tensor, layer: int) -> Tensor:
        if not (p := rates[layer]):
            return a
        rows = a.numel() // a.shape[-1]
        keep = reference.keep_mask(seed, step, layer, rows, a.shape[-1], p).view(a.shape)
        return reference.dropout.dropout(a, keep, p)

    weights, biases = [layer.weight for layer in model.layers], [layer.bias for layer in model.layers]
    return reference.mlp(x, weights, biases, model.activations, dropped)


def inputs(rows: int = 9, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, SIZES[0], generator=torch.Generator().manual_seed(1), dtype=dtype).requires_grad_()


@pytest.mark.parametrize("members", [0, MEMBERS])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_passes_and_gradients_are_the_formulas(activation, members):
    """Three passes, whose masks differ."""
    model, x = new_model(activation, members=members), inputs()
    outputs = []
    for step in range(3):
        actual, expected = model(x), by_formula(model, x, step)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
        wanted = [x, *model.parameters()]
        ours, theirs = (torch.autograd.grad(a.square().sum(), wanted) for a in (actual, expected))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
        outputs.append(actual)
    assert model.dropout_state[1] == 3
    if activation != "step":
        assert not torch.equal(outputs[0], outputs[1])
        assert not torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu", "gelu"])
def test_gradients_are_within_the_budget(activation, dtype):
    exact, x = new_model(activation), inputs(64)
    with torch.no_grad():
        for t in (x, *exact.parameters()):
            t.copy_(t.bfloat16())
    truth = torch.autograd.grad(by_formula(exact, x, 0).square().sum(), [*exact.parameters()])
    model = copy.deepcopy(exact).to(dtype)
    own = torch.autograd.grad(by_formula(model, x.detach().to(dtype), 0).square().sum(), [*model.parameters()])
    ours = torch.autograd.grad(model(x.detach().to(dtype)).square().sum(), [*model.parameters()])
    for actual, expected, torchs in zip(ours, truth, own, strict=True):
        assert_within_budget(actual, expected, torchs, reduction=64)


@pytest.mark.parametrize("activation", SMOOTH)
def test_second_derivatives(activation):
    model, x = new_model(activation), inputs(2)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        state = model.dropout_state.clone()
        return functional.mlp(x, parameters[::2], parameters[1::2], model.activations, None, RATES, state)

    arguments = (x, *(p.detach().requires_grad_() for p in model.parameters()))
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_forward_mode_and_batched_gradients():
    model, x = new_model(), inputs()
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(model(forward_ad.make_dual(x.detach(), tangent)))
    y = by_formula(model, x, 0)
    every = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
    jacobian = torch.autograd.grad(y, x, every, is_grads_batched=True)[0]
    torch.testing.assert_close(dual.primal, y)
    torch.testing.assert_close(dual.tangent.flatten(), (jacobian * tangent).flatten(1).sum(1))
    batched = torch.autograd.grad(model(x), x, every, is_grads_batched=True)[0]
    again = torch.autograd.grad(by_formula(model, x, 1), x, every, is_grads_batched=True)[0]
    torch.testing.assert_close(batched, again)


def test_evaluation_mode_is_a_model_without_dropout():
    model, plain = new_model(), new_model()
    plain.dropout = 0.0
    assert "dropout_state" not in plain.state_dict()
    assert list(plain.state_dict()) == list(MLP(SIZES).state_dict())
    x = inputs()
    assert torch.equal(model.eval()(x), plain(x))
    assert model.dropout_state[1] == 0
    assert not torch.equal(model.train()(x), plain(x))


def test_layers_called_one_by_one_have_the_same_masks():
    """A hook makes the model call its layers; a softmax in a hidden layer begins another node."""
    for activation in ("tanh", ("tanh", "softmax")):
        torch.manual_seed(0)
        model, x = MLP(SIZES, activation, dtype=torch.float64, dropout=RATES), inputs()
        hooked = copy.deepcopy(model)
        hooked.layers[0].register_forward_hook(lambda *_: None)
        torch.testing.assert_close(hooked(x), model(x), rtol=1e-12, atol=1e-14)
        assert torch.equal(hooked.dropout_state, model.dropout_state)


def test_the_same_seed_gives_the_same_masks():
    x = inputs()
    one, two, other = new_model(seed=4), new_model(seed=4), new_model(seed=5)
    assert torch.equal(one.dropout_state, two.dropout_state)
    assert not torch.equal(one.dropout_state, other.dropout_state)
    assert torch.equal(one(x), two(x))
    assert torch.equal(one(x), two(x))
    torch.manual_seed(4)
    plain = MLP(SIZES, "tanh", dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), new_model(seed=4).parameters(), strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_go_on_with_the_masks(copied):
    model, x = new_model(), inputs()
    model(x)
    other = copied(model)
    assert other.dropout == RATES
    assert torch.equal(other(x), model(x))


def test_a_state_dict_has_the_masks(tmp_path):
    model, x = new_model(), inputs()
    model(x)
    fastmlp.save_checkpoint(tmp_path / "m", model, {"sizes": SIZES})
    state, config = fastmlp.load_checkpoint(tmp_path / "m")
    assert config["dropout"] == list(RATES)
    other = MLP(config["sizes"], "tanh", dtype=torch.float64, dropout=config["dropout"])
    other.load_state_dict(state)
    assert torch.equal(other(x), model(x))
    plain = MLP(SIZES)
    fastmlp.save_checkpoint(tmp_path / "p", plain, {"sizes": SIZES})
    assert "dropout" not in fastmlp.load_checkpoint(tmp_path / "p")[1]


def test_dropout_may_be_assigned():
    model, x = new_model(), inputs()
    seed = model.dropout_state[0].item()
    model.dropout = 0.9
    torch.testing.assert_close(model(x), by_formula(model, x, 0))
    model.dropout = (0.0, 0.5)
    torch.testing.assert_close(model(x), by_formula(model, x, 1))
    assert model.dropout_state.tolist() == [seed, 2]
    model.dropout = 0
    assert torch.equal(model(x), model.eval()(x))
    assert repr(model).count("dropout") == 0
    model.dropout = 0.25
    assert "dropout=0.25" in repr(model)


def test_a_probability_for_all_layers_holds_for_layers_that_come_later():
    model = MLP((4, 6, 3), dropout=0.5)
    model.layers.insert(1, fastmlp.nn.layers.Affine(6, 6, activation="relu"))
    assert model(torch.randn(2, 4)).shape == (2, 3)
    model = MLP((4, 6, 6, 3), dropout=(0.5, 0.5))
    del model.layers[1]
    with pytest.raises(ValueError, match="or 1 of them"):
        model(torch.randn(2, 4))


def test_frozen_layers_drop_too():
    model, x = new_model(), inputs().detach()
    model.layers[0].requires_grad_(False)
    y, expected = model(x), by_formula(model, x, 0)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-14)
    trained = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(*(torch.autograd.grad(t.sum(), trained) for t in (y, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(model(x), by_formula(model, x, 1), rtol=1e-12, atol=1e-14)


def test_conversion():
    module = nn.Sequential(
        nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4), nn.Dropout(0.0)
    )
    model = MLP.from_torch(module)
    assert model.dropout == (0.2, 0.0)
    assert model.training
    assert not MLP.from_torch(module.eval()).training
    back = model.to_torch()
    assert [type(m) for m in back][1:4] == [nn.Linear, nn.ReLU, nn.Dropout]
    assert back[3].p == 0.2
    assert sum(isinstance(m, nn.Dropout) for m in back) == 1
    assert MLP.from_torch(back).dropout == MLP.from_torch(model).dropout == (0.2, 0.0)
    assert not model.eval().to_torch().training
    assert MLP.from_torch(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))).dropout == 0.0


def test_stack_and_unstack():
    ensemble = MLPEnsemble.stack([new_model(seed=s) for s in range(3)])
    assert ensemble.dropout == RATES
    assert [model.dropout for model in ensemble.unstack()] == [RATES] * 3
    other = new_model()
    other.dropout = 0.1
    with pytest.raises(ValueError, match=r"same dropout, got \(0.3, 0.5\) in models\[0\] and \(0.1, 0.1\)"):
        MLPEnsemble.stack([new_model(), other])


def test_members_have_masks_of_their_own():
    ensemble = new_model("relu", members=MEMBERS)
    with torch.no_grad():
        for p in ensemble.parameters():
            p.copy_(p[:1].expand_as(p))
    outputs = ensemble(inputs())
    assert not any(torch.equal(outputs[i], outputs[j]) for i in range(MEMBERS) for j in range(i))


@pytest.mark.parametrize("members", [0, MEMBERS])
def test_compiled_and_exported(members):
    model = new_model(members=members, dtype=torch.float32)
    state = model.dropout_state.clone()
    x = inputs(dtype=torch.float32).detach()

    def run(call: nn.Module) -> list[Tensor]:
        model.dropout_state.copy_(state)
        model.zero_grad()
        outputs = [call(x), call(x)]
        sum(y.square().sum() for y in outputs).backward()
        assert model.dropout_state[1] == 2
        return [*(y.detach() for y in outputs), *(p.grad.clone() for p in model.parameters())]

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for a, b in zip(run(compiled), run(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    model.dropout_state.copy_(state)
    program = torch.export.export(model, (x,)).module()
    assert torch.allclose(program(x), by_formula(model, x, 0), atol=1e-6)
    assert torch.allclose(program(x), by_formula(model, x, 1), atol=1e-6)
    quiet = torch.export.export(model.eval(), (x,)).module()
    torch.testing.assert_close(quiet(x), model(x))


@pytest.mark.parametrize(
    ("dropout", "error", "message"),
    [
        (1.0, ValueError, "has to be between 0 and 1, but got 1.0; give"),
        (-0.1, ValueError, "but got -0.1"),
        (float("nan"), ValueError, "but got nan"),
        ((0.5, 2), ValueError, "but got 2"),
        ((0.5,), ValueError, "or 2 of them, one for each hidden layer, got 1"),
        ("0.5", TypeError, "got '0.5' of type str"),
        (True, TypeError, "of type bool"),
        (None, TypeError, "of type NoneType"),
    ],
)
def test_probabilities_that_are_none(dropout, error, message):
    with pytest.raises(error, match=message):
        MLP(SIZES, dropout=dropout)
    with pytest.raises(error, match=message):
        MLPEnsemble(SIZES, 2, dropout=dropout)


def test_states_that_are_none():
    w, x = torch.randn(4, 4), torch.randn(2, 4)
    arguments = x, [w, w], [None, None], ["relu", "identity"], None, 0.5
    with pytest.raises(ValueError, match="needs a dropout_state"):
        functional.mlp(*arguments)
    for state in (torch.zeros(2), torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64, device="meta")):
        with pytest.raises(RuntimeError, match=r"expected dropout_state to be int64 \[2\] on cpu"):
            functional.mlp(*arguments, state)
    assert torch.equal(functional.mlp(*arguments[:5], 0.0), functional.mlp(*arguments[:4]))


def test_transforms_and_recomputation_are_refused():
    model, x = new_model(), inputs()
    with pytest.raises(RuntimeError, match=r"model.eval\(\)"):
        torch.func.vmap(model)(x[None])
    for reentrant in (False, True):
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
        with pytest.raises(RuntimeError, match="inside a backward pass"):
            y.sum().backward()
    assert model.dropout_state[1] == 2
    torch.func.vmap(model.eval())(x[None])


def test_a_pass_that_fails_is_not_counted():
    model = new_model()
    with pytest.raises(RuntimeError, match="features"):
        model(torch.randn(2, 7, dtype=torch.float64))
    assert model.dropout_state[1] == 0
