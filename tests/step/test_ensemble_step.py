"""TrainStep of an MLPEnsemble: each member is trained as the same MLP alone, whatever the members have in common."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmlp
from fastmlp import MLP, MLPEnsemble, TrainStep
from fastmlp.base.losses import STEP_LOSSES, takes_classes
from fastmlp.cpu import MEMBER_WAYS
from fastmlp.step.per_member import PerMember
from tests.support.steps import (
    allocations,
    assert_run_within_budget,
    budget_used,
    converted,
    flat,
    fresh_choices,  # noqa: F401
    have_fastest,
    network,
    one_thread,  # noqa: F401
)
from tests.support.steps import threads as torch_threads
from tests.support.torchs import OPTIMIZERS

E, B, SIZES = 3, 70, (5, 17, 6, 3)


def members(activation: Any = ("gelu", "sigmoid"), dtype: torch.dtype = torch.float64, count: int = E) -> list[MLP]:
    return [converted(network(SIZES, activation, seed=e), dtype) for e in range(count)]


def target(loss: str, *shape: int) -> Tensor:
    if takes_classes(STEP_LOSSES[loss]):
        return torch.randint(0, SIZES[-1], shape)
    return torch.rand(*shape, SIZES[-1], dtype=torch.float64)


def data(loss: str = "cross_entropy", steps: int = 8, rows: int = B, count: int = E) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches, in turn the same for all members and one for each."""
    for i in range(steps):
        first, second = ([count] if i & bit else [] for bit in (1, 2))
        yield torch.randn(*first, rows, SIZES[0], dtype=torch.float64), target(loss, *second, rows)


def part(t: Tensor, e: int, dims: int) -> Tensor:
    return t[e] if t.dim() > dims else t


def setting(value: Any, e: int) -> Any:
    return value[e] if isinstance(value, list) else value


def check_members(
    single: list[MLP],
    settings: dict[str, Any],
    loss: str = "cross_entropy",
    *,
    steps: int = 8,
    tolerance: float = 1e-10,
) -> TrainStep:
    """Train the ensemble and each of its members alone in float64: the same parameters and losses."""
    ensemble = MLPEnsemble.stack(single)
    step = TrainStep(ensemble, loss=loss, **settings)
    alone = [TrainStep(m, loss=loss, **{k: setting(v, e) for k, v in settings.items()}) for e, m in enumerate(single)]
    dims = 1 if takes_classes(STEP_LOSSES[loss]) else 2
    starts = [flat(model) for model in single]
    for x, y in data(loss, steps, count=len(single)):
        losses = step(x, y)
        expected = [one(part(x, e, 2), part(y, e, dims)) for e, one in enumerate(alone)]
        torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-9, atol=1e-12)
    for model, trained, start in zip(single, ensemble.unstack(), starts, strict=True):
        assert (flat(trained) - flat(model)).norm() <= tolerance * flat(model).norm()
        assert (flat(model) - start).norm() > 1e-4 * start.norm(), "nothing was learned"
    return step


class TestMembers:
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_every_optimizer(self, optimizer):
        check_members(members(), OPTIMIZERS[optimizer])

    @pytest.mark.parametrize("loss", STEP_LOSSES)
    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_every_loss(self, loss, optimizer):
        check_members(members(), OPTIMIZERS[optimizer], loss)

    @pytest.mark.parametrize(
        "settings",
        [
            {"lr": [0.1, 0.3, 0.2]},
            {"lr": [0.1, 0.3, 0.2], "momentum": [0.9, 0.8, 0.8], "weight_decay": 0.01},
            {"lr": 0.1, "momentum": [0.9, 0.0, 0.5]},
            {"lr": 0.1, "momentum": [0.9, 0.7, 0.5], "nesterov": True, "max_grad_norm": 0.1},
            {"optimizer": "adamw", "lr": [0.01, 0.01, 0.02], "weight_decay": [0.1, 0.0, 0.1]},
        ],
    )
    def test_settings_per_member(self, settings):
        check_members(members(), settings)

    @pytest.mark.parametrize("way", MEMBER_WAYS)
    @pytest.mark.parametrize(
        ("optimizer", "dtype"), [("sgd", torch.float32), ("clipping, momentum", torch.float32), ("sgd", torch.bfloat16)]
    )
    @pytest.mark.usefixtures("fresh_choices")
    def test_every_way_to_share_threads(self, way, optimizer, dtype, monkeypatch):
        asked = []

        def fastest(candidates: Any) -> Any:
            asked.append(tuple(candidates))
            return way if way in candidates else next(iter(candidates))

        have_fastest(monkeypatch, fastest)
        monkeypatch.setattr("fastmlp.step.cpu_ensemble._CACHE", 1)
        ensembles = []
        for count in (2, 1):
            monkeypatch.setattr("fastmlp.cpu.choose._WORTH_MEASURING", 1 if count == 2 else 1 << 20)
            torch.manual_seed(0)
            with torch_threads(count):
                ensemble = MLPEnsemble.stack(members(dtype=torch.float32))
                step = TrainStep(ensemble, dtype=dtype, **OPTIMIZERS[optimizer])
                for i, (x, y) in enumerate(data()):
                    step.active = [True, i != 3, True]
                    step(x.to(dtype), y)
                step.active = [True, False, True]
                grads = step.gradients(x.to(dtype), y)
                step.update()
            ensembles.append([*ensemble.parameters(), *grads.values()])
        assert asked[0] == MEMBER_WAYS
        for p, q in zip(*ensembles, strict=True):
            tolerance = {} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.03}
            torch.testing.assert_close(p, q, **tolerance)

    @pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
    def test_a_hundred_steps_in_float32(self, optimizer):
        """Within the budget of torch's own error, as for each MLP alone."""
        settings, start = OPTIMIZERS[optimizer], members("tanh")
        batches = list(data(steps=100, rows=16))
        runs = {}
        for dtype in (torch.float64, torch.float32):
            single = [converted(model, dtype) for model in start]
            for e, model in enumerate(single):
                one = TrainStep(model, **settings)
                for x, y in batches:
                    one(part(x, e, 2).to(dtype), part(y, e, 1))
            runs[dtype] = single
        ensemble = MLPEnsemble.stack([converted(model, torch.float32) for model in start])
        step = TrainStep(ensemble, **settings)
        for x, y in batches:
            step(x.float(), y)
        for actual, expected, own in zip(ensemble.unstack(), runs[torch.float64], runs[torch.float32], strict=True):
            eps = torch.finfo(torch.float32).eps
            assert_run_within_budget(flat(actual), flat(expected), flat(own), 100, eps)

    @pytest.mark.parametrize("mixed", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_sixteen_bits(self, dtype, mixed, optimizer):
        settings, start = OPTIMIZERS[optimizer], members("tanh", torch.float32 if mixed else dtype)
        ensemble = MLPEnsemble.stack(start)
        exact = [converted(model, torch.float64) for model in start]
        step = TrainStep(ensemble, dtype=dtype, **settings)
        alone = [TrainStep(model, dtype=dtype, **settings) for model in start]
        reference = [TrainStep(model, **settings) for model in exact]
        for x, y in data(steps=6):
            x = x.to(dtype)
            step(x, y)
            for e in range(E):
                alone[e](part(x, e, 2), part(y, e, 1))
                reference[e](part(x, e, 2).double(), part(y, e, 1))
        for actual, expected, own in zip(ensemble.unstack(), exact, start, strict=True):
            assert budget_used(flat(actual), flat(expected), flat(own), 6, torch.finfo(dtype).eps) <= 1

    def test_a_loss_scale_of_its_own(self):
        """An overflow of one member skips the update of this member alone."""
        ensemble = MLPEnsemble.stack(members("relu", torch.float32))
        step = TrainStep(ensemble, optimizer="adamw", lr=0.01, dtype=torch.float16)
        x, y = torch.randn(E, B, SIZES[0]), target("cross_entropy", E, B)
        step(x, y)
        before = [p.clone() for p in ensemble.parameters()]
        x[1, 0, 0] = float("inf")
        step(x, y)
        state = step.state_dict()
        assert state["loss_scale"].tolist() == [2.0**15, 2.0**14, 2.0**15]
        assert state["loss_scale_good_steps"].tolist() == [2, 0, 2]
        assert state["step"].tolist() == [2, 1, 2]
        for p, q in zip(ensemble.parameters(), before, strict=True):
            assert [torch.equal(p[e], q[e]) for e in range(E)] == [False, True, False]

    @pytest.mark.parametrize("frozen", [["layers.0.weight", "layers.0.bias"], ["layers.1.weight"], ["layers.2.bias"]])
    @pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
    def test_frozen_parameters(self, frozen, optimizer):
        single = members()
        for model in single:
            for name in frozen:
                model.get_parameter(name).requires_grad_(False)
        kept = [[model.get_parameter(name).clone() for name in frozen] for model in single]
        step = check_members(single, OPTIMIZERS[optimizer])
        for e, values in enumerate(kept):
            for name, value in zip(frozen, values, strict=True):
                assert torch.equal(step.model.get_parameter(name)[e], value)

    def test_one_layer_and_one_member(self):
        single = [converted(network((5, 3)), torch.float64)]
        ensemble = MLPEnsemble.stack(single)
        step, alone = TrainStep(ensemble, lr=0.3), TrainStep(single[0], lr=0.3)
        for x, y in data(steps=4, count=1):
            torch.testing.assert_close(step(x, y)[0], alone(part(x, 0, 2), part(y, 0, 1)))
        torch.testing.assert_close(flat(ensemble), flat(single[0]))


class TestActive:
    @pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
    @pytest.mark.parametrize("masks", [["10011"] * 2, ["10101", "11111", "01010"], ["00000", "11011"]])
    def test_members_that_pause_are_untouched_and_go_on(self, optimizer, masks):
        single = members(count=5)
        ensemble = MLPEnsemble.stack(single)
        step = TrainStep(ensemble, **OPTIMIZERS[optimizer])
        alone = [TrainStep(model, **OPTIMIZERS[optimizer]) for model in single]
        for mask in ["11111", *masks, "11111"]:
            active = [bit == "1" for bit in mask]
            step.active = active
            for x, y in data(steps=2, count=5):
                before = {**ensemble.state_dict(), **step.state_dict()}
                before = {name: t.clone() for name, t in before.items()}
                losses = step(x, y)
                after = {**ensemble.state_dict(), **step.state_dict()}
                for e in range(5):
                    if active[e]:
                        torch.testing.assert_close(losses[e], alone[e](part(x, e, 2), part(y, e, 1)))
                    else:
                        assert losses[e].isnan()
                        assert all(torch.equal(after[name][e], t[e]) for name, t in before.items())
        for trained, model in zip(ensemble.unstack(), single, strict=True):
            torch.testing.assert_close(flat(trained), flat(model))

    def test_written_in_place_and_in_epochs(self):
        ensemble = MLPEnsemble.stack(members())
        step = TrainStep(ensemble, lr=0.1)
        step.active[1] = False
        before = ensemble.layers[0].weight.detach().clone()
        x, y = torch.randn(B, 5, dtype=torch.float64), target("cross_entropy", B)
        assert step.epoch(x, y, 16).isnan().tolist() == [False, True, False]
        assert step.losses.shape == (5, E)
        same = [torch.equal(ensemble.layers[0].weight[e], before[e]) for e in range(E)]
        assert same == [False, True, False]

    def test_gradients_of_inactive_members_are_zero(self):
        step = TrainStep(MLPEnsemble.stack(members()), lr=0.1)
        x, y = torch.randn(B, 5, dtype=torch.float64), target("cross_entropy", B)
        step.gradients(x, y)
        step.active = torch.tensor([True, False, True])
        grads = step.gradients(x, y)
        assert all(g[0].any() and not g[1].any() and g[2].any() for g in grads.values())
        before = step.model.layers[1].weight.detach().clone()
        step.update()
        assert [torch.equal(step.model.layers[1].weight[e], before[e]) for e in range(E)] == [False, True, False]

    @pytest.mark.parametrize("mask", [[True], torch.ones(E), torch.ones(E + 1, dtype=torch.bool)])
    def test_other_masks(self, mask):
        step = TrainStep(MLPEnsemble(SIZES, E))
        with pytest.raises(ValueError, match=r"active to be bool \[3\]"):
            step.active = mask


class TestBatches:
    @pytest.mark.parametrize("optimizer", ["sgd", "clipping", "adamw"])
    def test_accumulated_gradients(self, optimizer):
        single = members()
        ensemble = MLPEnsemble.stack(single)
        step = TrainStep(ensemble, **OPTIMIZERS[optimizer])
        alone = [TrainStep(model, **OPTIMIZERS[optimizer]) for model in single]
        for i, (x, y) in enumerate(data()):
            grads = step.gradients(x, y, accumulate=i % 2 == 1)
            for e, one in enumerate(alone):
                expected = one.gradients(part(x, e, 2), part(y, e, 1), accumulate=i % 2 == 1)
                assert grads.keys() == expected.keys()
                for name in grads:
                    torch.testing.assert_close(grads[name][e], expected[name])
                if i % 2 == 1:
                    one.update()
            if i % 2 == 1:
                step.update()
        for trained, model in zip(ensemble.unstack(), single, strict=True):
            torch.testing.assert_close(flat(trained), flat(model))

    @pytest.mark.parametrize("own_data", [False, True])
    @pytest.mark.parametrize("own_order", [False, True])
    @pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
    def test_epochs(self, own_data, own_order, loss):
        single, lead = members(), [E] if own_data else []
        ensemble = MLPEnsemble.stack(single)
        images = torch.randint(0, 256, (*lead, 50, 5), dtype=torch.uint8)
        labels = target(loss, *lead, 50)
        order = torch.stack([torch.randperm(50)[:43] for _ in range(E)]) if own_order else torch.randperm(50)[:43]
        step = TrainStep(ensemble, lr=[0.1, 0.2, 0.3], momentum=0.5, loss=loss)
        factors = torch.rand(5, E).tolist() if own_order else torch.rand(5).tolist()
        dims = 1 if loss == "cross_entropy" else 2
        means = step.epoch(images, labels, 10, order, factors)
        for e, model in enumerate(single):
            one = TrainStep(model, lr=0.1 * (e + 1), momentum=0.5, loss=loss)
            of_member = [f[e] for f in factors] if own_order else factors
            mean = one.epoch(part(images, e, 2), part(labels, e, dims), 10, part(order, e, 1), of_member)
            torch.testing.assert_close(means[e], mean)
            torch.testing.assert_close(step.losses[:, e], one.losses)
            torch.testing.assert_close(flat(ensemble.unstack()[e]), flat(model))
        assert means.dtype == torch.float32

    @pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
    def test_no_memory_is_allocated(self, optimizer):
        ensemble = MLPEnsemble.stack(members("relu", torch.float32))
        step = TrainStep(ensemble, **{**OPTIMIZERS[optimizer], "lr": 0.01})
        x, y = torch.randn(E, B, 5), target("cross_entropy", E, B)
        assert sum(n for n in allocations(lambda: step(x, y)) if n > 0) < 1024

    def test_an_empty_batch_changes_nothing(self):
        ensemble = MLPEnsemble.stack(members())
        before = flat(ensemble)
        losses = TrainStep(ensemble)(torch.ones(E, 0, 5, dtype=torch.float64), target("cross_entropy", 0))
        assert losses.isnan().all()
        assert torch.equal(flat(ensemble), before)

    @pytest.mark.parametrize(
        ("x", "y", "error", "message"),
        [
            ((E + 1, B, 5), (B,), RuntimeError, r"\[3, batch, 5\], got \[4, 70, 5\]"),
            ((B, 5), (E + 1, B), RuntimeError, r"\[batch\], the same for all members, or \[3, batch\], got \[4, 70\]"),
            ((E, B, 5), (B + 1,), ValueError, "as many targets as inputs"),
            ((B, 4), (B,), RuntimeError, "5 features, got 4"),
            ((B,), (B,), RuntimeError, "got \\[70\\]"),
        ],
    )
    def test_batches_that_do_not_fit(self, x, y, error, message):
        step = TrainStep(MLPEnsemble.stack(members()))
        with pytest.raises(error, match=message):
            step(torch.ones(x, dtype=torch.float64), torch.zeros(y, dtype=torch.int64))

    def test_a_class_that_does_not_exist_changes_no_member(self):
        ensemble = MLPEnsemble.stack(members())
        before, y = flat(ensemble), target("cross_entropy", E, B)
        y[2, 7] = 3
        with pytest.raises(IndexError, match="class number 3 is out of range"):
            TrainStep(ensemble)(torch.ones(B, 5, dtype=torch.float64), y)
        assert torch.equal(flat(ensemble), before)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"order": torch.zeros(E + 1, 4, dtype=torch.int64)}, RuntimeError, r"or \[3, n\] for 3 members"),
            ({"order": torch.full((E, 4), B)}, IndexError, "rows from 70 to 70"),
            ({"lr_factors": [1.0]}, ValueError, r"shape \[7\].* or \[7, 3\], got \[1\]"),
            ({"lr_factors": [[1.0, -1.0, 1.0]] * 7}, ValueError, "at least 0, got -1.0"),
            ({"lr_factors": "fast"}, TypeError, "7 times 3"),
        ],
    )
    def test_epochs_that_do_not_fit(self, arguments, error, message):
        step = TrainStep(MLPEnsemble.stack(members()))
        with pytest.raises(error, match=message):
            step.epoch(torch.ones(B, 5, dtype=torch.float64), target("cross_entropy", B), 10, **arguments)


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"lr": [0.1, 0.2]}, ValueError, "lr to be a number or 3, one per member, got 2"),
            ({"momentum": [0.1, 0.2, 1.0]}, ValueError, r"momentum in \[0, 1\), got 1.0"),
            ({"lr": torch.ones(3, 1)}, TypeError, "lr to be a number"),
            ({"betas": (0.9, 0.9), "optimizer": "adamw", "eps": [1e-8] * 3}, TypeError, "eps to be a number"),
            ({"momentum": [0.9, 0.0, 0.5], "nesterov": True}, ValueError, "momentum above 0"),
        ],
    )
    def test_settings_that_do_not_fit(self, settings, error, message):
        with pytest.raises(error, match=message):
            TrainStep(MLPEnsemble(SIZES, E), **settings)

    def test_an_mlp_has_one_learning_rate(self):
        with pytest.raises(TypeError, match="lr to be a number"):
            TrainStep(MLP(SIZES), lr=[0.1, 0.2])

    def test_the_rate_is_one_number_where_all_are_equal(self):
        step = TrainStep(MLPEnsemble(SIZES, E), lr=torch.full((E,), 0.5, dtype=torch.float64))
        assert step.lr == 0.5
        step.lr = [0.1, 0.2, 0.3]
        assert step.lr == (0.1, 0.2, 0.3)
        assert isinstance(step.lr, PerMember)
        step.optimizer.param_groups[0]["weight_decay"] = [0.0, 0.1, 0.0]
        step(torch.ones(2, 5), torch.zeros(2, dtype=torch.int64))
        assert step.rule.weight_decay == (0.0, 0.1, 0.0)

    @pytest.mark.parametrize(
        "schedule",
        [
            lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
            lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5, 0.01),
            lambda o: torch.optim.lr_scheduler.LinearLR(o),
            lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        ],
    )
    def test_schedulers_compute_with_every_rate(self, schedule):
        rates = [0.1, 0.2, 0.4]
        step = TrainStep(MLPEnsemble(SIZES, E), lr=rates)
        alone = [TrainStep(MLP(SIZES), lr=rate) for rate in rates]
        schedulers = [schedule(s.optimizer) for s in (step, *alone)]
        x, y = torch.ones(2, 5), torch.zeros(2, dtype=torch.int64)
        for _ in range(4):
            for s in (step, *alone):
                s(x, y)
            for scheduler in schedulers:
                scheduler.step()
            assert step.lr == pytest.approx([one.lr for one in alone])

    def test_a_scheduler_that_needs_one_rate(self):
        step = TrainStep(MLPEnsemble(SIZES, E), lr=[0.1, 0.2, 0.3])
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(step.optimizer, patience=0)
        scheduler.step(1.0)
        with pytest.raises(TypeError, match="got one per member"):
            scheduler.step(2.0)


class TestState:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
    def test_a_run_goes_on(self, dtype):
        settings = {"optimizer": "adamw", "lr": [0.01, 0.02, 0.03], "dtype": dtype}
        ensemble = MLPEnsemble.stack(members(dtype=torch.float64 if dtype == torch.float64 else torch.float32))
        step = TrainStep(ensemble, **settings)
        batches = [(x.to(dtype), y) for x, y in data(steps=4)]
        step(*batches[0])
        step.active = [True, False, True]
        step(*batches[1])
        state, weights = step.state_dict(), copy.deepcopy(ensemble.state_dict())
        assert state["step"].dtype == torch.float64
        assert state["step"].tolist() == [2, 1, 2]
        assert state["layers.0.weight.exp_avg"].shape == (E, 17, 5)
        other = MLPEnsemble.stack(members(dtype=ensemble.layers[0].weight.dtype))
        other.load_state_dict(weights)
        again = TrainStep(other, **settings)
        again.load_state_dict(state)
        copies = [copy.deepcopy(step), pickle.loads(pickle.dumps(step))]
        for x, y in batches[2:]:
            losses = [s(x, y) for s in (step, again, *copies)]
            for other_losses in losses[1:]:
                assert torch.equal(losses[0].nan_to_num(), other_losses.nan_to_num())
        for s in (again, *copies):
            assert torch.equal(flat(s.model), flat(ensemble))
            assert s.active.tolist() == [True, False, True]

    def test_states_that_do_not_fit(self):
        step = TrainStep(MLPEnsemble(SIZES, E), optimizer="adamw")
        state = step.state_dict()
        with pytest.raises(ValueError, match="expected step of shape \\[3\\], got \\[2\\]"):
            step.load_state_dict({**state, "step": torch.zeros(2)})
        with pytest.raises(ValueError, match="expected active of shape"):
            step.load_state_dict({**state, "active": torch.ones(2, dtype=torch.bool)})
        with pytest.raises(ValueError, match="missing step"):
            step.load_state_dict({name: t for name, t in state.items() if name != "step"})

    def test_follows_the_model(self):
        single = members()
        ensemble = MLPEnsemble.stack(single)
        step = TrainStep(ensemble, lr=0.1, momentum=0.9)
        x, y = next(data())
        step(x, y)
        with torch.no_grad():
            ensemble.layers[0].weight[1] += 1
        ensemble.layers[1].weight.requires_grad_(False)
        ensemble.layers[0].activation = "tanh"
        expected = ensemble(x)
        losses = torch.stack([torch.nn.functional.cross_entropy(expected[e], part(y, e, 1)) for e in range(E)])
        kept = ensemble.layers[1].weight.clone()
        torch.testing.assert_close(step(x, y), losses.detach())
        assert torch.equal(ensemble.layers[1].weight, kept)
        ensemble.layers[0].weight = torch.nn.Parameter(ensemble.layers[0].weight.detach().clone())
        with pytest.raises(RuntimeError, match="replaced or moved"):
            step(x, y)

    def test_other_ensembles(self):
        class Own(MLPEnsemble):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * 2

        with pytest.raises(ValueError, match="forward of its own"):
            TrainStep(Own(SIZES, E))
        ensemble = MLPEnsemble(SIZES, E)
        ensemble.layers[0].register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match="hook"):
            TrainStep(ensemble)

    def test_repr_and_type(self):
        step = TrainStep(MLPEnsemble(SIZES, E), lr=[0.1, 0.2, 0.3])
        assert isinstance(step, TrainStep)
        assert "MLPEnsemble 5-17-6-3 x 3" in repr(step)
        assert "(0.1, 0.2, 0.3)" in repr(step)

    def test_checkpoints(self, tmp_path):
        ensemble = MLPEnsemble(SIZES, E, "tanh")
        config = {"sizes": SIZES, "members": E, "activation": "tanh", "bias": True}
        fastmlp.save_checkpoint(tmp_path / "ensemble", ensemble, config)
        weights, config = fastmlp.load_checkpoint(tmp_path / "ensemble")
        config.pop("dtype")
        other = MLPEnsemble(**config)
        other.load_state_dict(weights)
        assert torch.equal(flat(other), flat(ensemble))
