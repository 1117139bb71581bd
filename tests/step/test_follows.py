"""A TrainStep does what its model and its settings say at the call, or raises an error: never what they said before.

The oracle is always the model itself, with autograd and torch.optim.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import fastmlp
from fastmlp.step.binding import Binding
from tests.support.steps import one_thread  # noqa: F401

SETTINGS = {
    "sgd": {},
    "momentum and decay": {"momentum": 0.9, "weight_decay": 0.1},
    "adamw": {"optimizer": "adamw"},
    "bfloat16 products": {"dtype": torch.bfloat16, "momentum": 0.9},
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 4, generator=generator), torch.randint(3, (16,), generator=generator)


def made(activation: str = "tanh", **settings: object) -> tuple[fastmlp.MLP, fastmlp.TrainStep]:
    torch.manual_seed(0)
    model = fastmlp.MLP([4, 8, 3], activation)
    return model, fastmlp.TrainStep(model, **{"lr": 0.1, **settings})


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    return F.cross_entropy(model(x).float(), y).item()


def refuses(step: fastmlp.TrainStep, *batch: torch.Tensor, match: str) -> None:
    """Every call refuses, and changes nothing."""
    before = [p.detach().clone() for p in step.model.parameters()]
    for call in (step, step.gradients, lambda x, y: step.epoch(x, y, 4)):
        with pytest.raises((ValueError, RuntimeError), match=match):
            call(*batch)
    for p, q in zip(step.model.parameters(), before, strict=True):
        assert torch.equal(p, q)


class TestFreezing:
    """A parameter may be frozen and thawed between steps."""

    @every_setting
    def test_frozen_later(self, batch, settings):
        model, step = made(**settings)
        step(*batch)
        weight, frozen = model.layers[0].weight, model.layers[0].weight.requires_grad_(False).clone()
        bias = model.layers[0].bias.detach().clone()
        for _ in range(2):
            step(*batch)
        assert torch.equal(weight, frozen)
        assert not torch.equal(model.layers[0].bias, bias)
        assert "layers.0.weight" not in step.gradients(*batch)

    @pytest.mark.parametrize("settings", [{}, {"momentum": 0.9, "weight_decay": 0.1}, {"max_grad_norm": 0.1}])
    def test_frozen_and_thawed_as_torch_optim_does(self, batch, settings):
        """This includes the momentum, which a frozen parameter keeps for later."""
        model, step = made(**settings)
        twin = copy.deepcopy(model).to_torch()
        clip = settings.pop("max_grad_norm", None)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, **settings)
        for thawed in (True, False, True):
            for net in (model, twin):
                next(iter(net.parameters())).requires_grad_(thawed)
            for _ in range(2):
                step(*batch)
                optimizer.zero_grad()
                F.cross_entropy(twin(batch[0]), batch[1]).backward()
                if clip:
                    nn.utils.clip_grad_norm_(twin.parameters(), clip)
                optimizer.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)

    def test_what_adamw_cannot_count(self, batch):
        model, step = made(optimizer="adamw")
        model.layers[0].weight.requires_grad_(False)
        step(*batch)
        model.layers[0].weight.requires_grad_(True)
        refuses(step, *batch, match=r"layers.0.weight cannot be thawed after 1 updates.*make a new TrainStep")
        model.layers[0].weight.requires_grad_(False)
        step(*batch)

    def test_all_frozen(self, batch):
        model, step = made()
        model.requires_grad_(False)
        refuses(step, *batch, match="nothing to train")

    def test_gradients_do_not_wait_for_an_update_meanwhile(self, batch):
        model, step = made()
        step.gradients(*batch)
        model.layers[0].requires_grad_(False)
        with pytest.raises(RuntimeError, match="no gradients to apply"):
            step.update()


class TestValues:
    """What anybody writes into a parameter is what the next step reads."""

    @pytest.mark.parametrize(
        ("params", "products"),
        [
            (torch.bfloat16, None),
            (torch.float32, torch.bfloat16),
            (torch.float16, None),
            (torch.float32, torch.float16),
            (torch.bfloat16, torch.float32),
        ],
        ids=str,
    )
    def test_an_edit_that_raises_no_version(self, batch, params, products):
        x, y = batch
        model = fastmlp.MLP([4, 8, 3], "tanh", dtype=params)
        step = fastmlp.TrainStep(model, lr=0.0, dtype=products)
        x = x.to(products or params)
        step(x, y)
        model.layers[0].weight.data.zero_()
        model.layers[1].bias.data[1] = 2.0
        loss = step(x, y).item()
        assert model.layers[0].weight.abs().max() == 0
        assert model.layers[1].bias[1] == 2.0
        assert loss == pytest.approx(loss_of(model, x.to(params), y), abs=2e-2)

    def test_small_updates_add_up_although_nobody_sees_them(self, batch):
        """The master keeps digits that the parameter does not have, until somebody writes to the parameter."""
        x, y = batch
        model = fastmlp.MLP([4, 8, 3], "tanh", dtype=torch.bfloat16)
        step, x = fastmlp.TrainStep(model, lr=1e-4), x.bfloat16()
        before = model.layers[1].bias.detach().clone()
        for _ in range(400):
            step(x, y)
        assert not torch.equal(model.layers[1].bias, before)

    def test_a_fused_optimizer_of_torch_between(self, batch):
        x, y = batch
        model = fastmlp.MLP([4, 8, 3], "tanh")
        step = fastmlp.TrainStep(model, lr=0.0, dtype=torch.bfloat16)
        step(x, y)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        assert step(x, y).item() == pytest.approx(loss_of(model, x, y), abs=2e-2)

    def test_two_steps_on_one_model(self, batch):
        model = fastmlp.MLP([4, 8, 3], "tanh")
        first = fastmlp.TrainStep(model, lr=0.5, momentum=0.9, dtype=torch.bfloat16)
        second = fastmlp.TrainStep(model, lr=0.0, dtype=torch.bfloat16)
        for _ in range(5):
            first(*batch)
            assert second(*batch).item() == pytest.approx(loss_of(model, *batch), abs=2e-2)

    @pytest.mark.parametrize("call", ["step", "epoch", "update"])
    @every_setting
    def test_autograd_finds_what_it_saved_changed(self, batch, settings, call):
        model, step = made(**settings)
        step(*batch)
        out = model(batch[0])
        if call == "update":
            step.gradients(*batch)
            step.update()
        elif call == "epoch":
            step.epoch(*batch, 4)
        else:
            step(*batch)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


class TestModules:
    """What a call of the model would run besides the layers' formula is refused."""

    HOOKS = (
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    )

    @pytest.mark.parametrize("name", HOOKS)
    @pytest.mark.parametrize("where", ["layer", "model"])
    def test_hooks_of_modules(self, batch, where, name):
        model, step = made()
        handle = getattr(model.layers[0] if where == "layer" else model, name)(lambda *a: None)
        refuses(step, *batch, match="hook")
        with pytest.raises(ValueError, match="hook"):
            fastmlp.TrainStep(model)
        handle.remove()
        step(*batch)

    @pytest.mark.parametrize("name", ["register_hook", "register_post_accumulate_grad_hook"])
    def test_hooks_of_parameters(self, batch, name):
        model, step = made()
        for _ in range(2):  # the second hook goes into a table that is there already
            handle = getattr(model.layers[1].bias, name)(lambda *a: None)
            refuses(step, *batch, match="hook")
            with pytest.raises(ValueError, match="hook"):
                fastmlp.TrainStep(model)
            handle.remove()
            step(*batch)

    @pytest.mark.parametrize("name", ["register_hook", "register_prehook"])
    def test_hooks_of_the_node_that_accumulates_a_gradient(self, batch, name):
        model, step = made()
        node = get_gradient_edge(model.layers[1].weight).node
        handle = getattr(node, name)(lambda *a: None)
        refuses(step, *batch, match="hook")
        with pytest.raises(ValueError, match="hook"):
            fastmlp.TrainStep(model)
        handle.remove()
        step(*batch)

    def test_steps_look_for_hooks_only_after_somebody_added_one(self, batch, monkeypatch):
        """A look adds hooks of its own to nodes, and no step takes them for hooks of others."""
        steps = [made()[1] for _ in range(2)]
        steps[0].model.register_forward_hook(lambda *a: None).remove()
        for step in steps:
            step(*batch)
        monkeypatch.setattr(Binding, "_has_hooks", lambda self: pytest.fail("looked"))
        for step in (*steps, *steps):
            step(*batch)

    def test_hooks_of_every_module(self, batch):
        _, step = made()
        handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
        try:
            refuses(step, *batch, match="hook")
        finally:
            handle.remove()
        step(*batch)

    def test_hooks_of_the_optimizer(self, batch):
        _, step = made()
        handle = step.optimizer.register_step_post_hook(lambda *a: None)
        refuses(step, *batch, match="step.optimizer has a hook")
        handle.remove()
        step(*batch)

    def test_a_forward_of_its_own(self, batch):
        class Scaled(fastmlp.MLP):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return 3 * super().forward(x)

        with pytest.raises(ValueError, match="Scaled has a forward of its own"):
            fastmlp.TrainStep(Scaled([4, 8, 3]))
        for where in ("model", "layer"):
            model, step = made()
            target = model if where == "model" else model.layers[0]
            target.forward = lambda x: x
            refuses(step, *batch, match="forward of its own")
            del target.forward
            step(*batch)

    def test_a_patched_class(self, batch, monkeypatch):
        _, step = made()
        monkeypatch.setattr(fastmlp.MLP, "forward", lambda self, x: x)
        refuses(step, *batch, match="forward of its own")

    def test_another_activation(self, batch):
        model, step = made("relu", momentum=0.9)
        step(*batch)
        momentum = step.state_dict()["layers.0.weight.momentum_buffer"]
        model.layers[0].activation = "tanh"
        expected = loss_of(model, *batch)
        assert torch.equal(step.state_dict()["layers.0.weight.momentum_buffer"], momentum)
        assert step(*batch).item() == pytest.approx(expected, abs=1e-5)
        model.layers[1].activation = "softmax"
        refuses(step, *batch, match="softmax as its activation")

    def test_layers_replaced_added_and_taken_away(self, batch):
        def replaced(model):
            model.layers[0] = fastmlp.Linear(4, 8, activation="tanh")

        changes = (replaced, lambda m: m.layers.append(fastmlp.Linear(3, 3)), lambda m: m.layers.pop(1))
        for change in changes:
            model, step = made()
            change(model)
            refuses(step, *batch, match="make a new TrainStep")

    def test_tables_in_place_of_torchs(self, batch):
        """Some libraries put tables of their own into modules, and their parameters into these later."""

        class Table(dict):
            pass

        model, step = made()
        step(*batch)
        for module in model.modules():
            module._parameters, module._modules = Table(module._parameters), Table(module._modules)
        loss = loss_of(model, *batch)
        assert step(*batch).item() == pytest.approx(loss, rel=1e-5)
        model.layers[0]._parameters["weight"] = nn.Parameter(torch.zeros(8, 4))
        refuses(step, *batch, match="make a new TrainStep")
        model, step = made()
        model._modules = Table(layers=fastmlp.MLP([4, 8, 3], "tanh").layers)
        refuses(step, *batch, match="make a new TrainStep")

    def test_a_parameter_with_another_view_of_its_memory(self, batch):
        model = fastmlp.MLP([4, 4, 3], "tanh")
        step = fastmlp.TrainStep(model, lr=0.1)
        weight = model.layers[0].weight
        weight.data = weight.data.t()
        refuses(step, *batch, match="contiguous")
        weight.data = weight.data.t()
        step(*batch)
        model.layers[1].weight.data = model.layers[1].weight.data[:2]
        model.layers[1].bias.data = model.layers[1].bias.data[:2]
        refuses(step, *batch, match="make a new TrainStep")

    def test_computed_weights(self, batch):
        def pruned(layer):
            prune.l1_unstructured(layer, "weight", 0.5)

        for change in (parametrizations.weight_norm, pruned):
            model, step = made()
            change(model.layers[0])
            refuses(step, *batch, match="make a new TrainStep")
            with pytest.raises(ValueError, match=r"layers\.0 has"):
                fastmlp.TrainStep(model)

    def test_computed_and_added_biases(self, batch):
        model, step = made()
        parametrize.register_parametrization(model.layers[0], "bias", nn.Identity())
        refuses(step, *batch, match="make a new TrainStep")
        with pytest.raises(ValueError, match=r"layers\.0 has"):
            fastmlp.TrainStep(model)
        model = fastmlp.MLP([4, 8, 3], bias=False)
        step = fastmlp.TrainStep(model)
        model.layers[0].bias = nn.Parameter(torch.ones(8))
        refuses(step, *batch, match="make a new TrainStep")

    def test_another_class_and_a_call_of_its_own(self, batch):
        class Other(type(fastmlp.MLP([4, 3]).layers[0])):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x

        class Called(fastmlp.MLP):
            def __call__(self, x: torch.Tensor) -> torch.Tensor:
                return 3 * super().__call__(x)

        model, step = made()
        model.layers[0].__class__ = Other
        refuses(step, *batch, match="forward of its own")
        with pytest.raises(ValueError, match="__call__ of its own"):
            fastmlp.TrainStep(Called([4, 3]))

    def test_parameters_in_one_memory(self):
        model = fastmlp.MLP([4, 4, 4])
        model.layers[1].weight.data = model.layers[0].weight.data
        with pytest.raises(ValueError, match="same memory"):
            fastmlp.TrainStep(model)

    def test_another_parameter_of_a_layer(self, batch):
        model, _ = made()
        model.layers[0].scale = nn.Parameter(torch.ones(1))
        fastmlp.TrainStep(model)(*batch)
        assert model.layers[0].scale == 1

    def test_harmless_changes(self, batch):
        model, step = made()
        model.eval()
        model.note = model.layers[0].note = model.layers[0].weight.note = "harmless"
        model.extra = nn.Linear(2, 2)
        engine, expected = step._engine, loss_of(model, *batch)
        assert step(*batch).item() == pytest.approx(expected, abs=1e-6)
        assert step._engine is engine


class TestGradients:
    """Gradients that wait for an update."""

    def test_lost_gradients_are_not_added_to(self, batch):
        model, step = made()
        step.gradients(*batch)
        model.layers[0].bias.requires_grad_(False)
        with pytest.raises(RuntimeError, match="were lost"):
            step.gradients(*batch, accumulate=True)
        step.gradients(*batch)
        step.gradients(*batch, accumulate=True)
        model.layers[0].bias.requires_grad_(True)
        step(*batch)  # ends the gradients before it, also lost ones
        step.gradients(*batch, accumulate=True)

    def test_zero_grad(self, batch):
        _, step = made()
        expected = {name: grad.clone() for name, grad in step.gradients(*batch).items()}
        step.optimizer.zero_grad()
        for name, grad in step.gradients(*batch, accumulate=True).items():
            assert torch.equal(grad, expected[name])


class TestLosses:
    """Each loss is a tensor of its own."""

    def test_kept(self, batch):
        _, step = made(lr=0.05)
        values = [float(loss) for loss in [step(*batch) for _ in range(1200)]]
        assert values[0] > values[-1]
        assert len(set(values)) > 1000

    def test_summed(self, batch):
        _, step = made(lr=0.0)
        first = step(*batch).item()
        total = step(*batch)
        for _ in range(999):
            total += step(*batch)
        assert total.item() == pytest.approx(1000 * first, rel=1e-4)

    def test_versions_are_their_own(self, batch):
        _, step = made()
        loss, factor = step(*batch), torch.ones((), requires_grad=True)
        product = loss * factor
        step(*batch)
        product.backward()
        assert factor.grad == loss


@pytest.mark.parametrize("how", [copy.deepcopy, lambda step: pickle.loads(pickle.dumps(step))], ids=["copy", "pickle"])
@every_setting
def test_copies(batch, settings, how):
    model, step = made(**settings)
    step(*batch)
    step.lr = 0.05
    twin = how(step)
    assert twin.model is not model
    assert repr(twin) == repr(step)
    for _ in range(2):
        assert step(*batch).item() == twin(*batch).item()
    for p, q in zip(model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.filterwarnings("ignore:Seems like")  # copies of torch's optimizers and schedulers give the same warning
def test_a_copy_of_model_step_and_scheduler_together(batch):
    model, step = made()
    scheduler = torch.optim.lr_scheduler.StepLR(step.optimizer, 1, 0.5)
    twin_model, twin, twins = copy.deepcopy((model, step, scheduler))
    twin(*batch)
    twins.step()
    assert twin.model is twin_model
    assert (twin.lr, step.lr) == (0.05, 0.1)
    assert twins.optimizer is twin.optimizer


def test_repr():
    _, step = made(momentum=0.9)
    expected = "TrainStep(MLP 4-8-3, sgd(lr=0.1, weight_decay=0.0, momentum=0.9), "
    assert repr(step) == expected + "loss='cross_entropy', dtype=torch.float32, backend='torch')"
