"""The logic of a sweep: every member is what `fit` would train alone; divisions, groups, ranking, and their files."""

from __future__ import annotations

import math

import pytest
import torch

import fastmlp
from fastmlp.base.losses import STEP_LOSSES
from fastmlp.train import DivergenceError, evaluate, fit
from fastmlp.train.checkpoint import CheckpointError
from fastmlp.train.initial import initialize_
from fastmlp.train.scores import takes_values
from fastmlp.train.split import fold, held_out
from fastmlp.train.sweep.group import Held, Result, evaluate_members, train_group
from fastmlp.train.sweep.plan import Data, Training, division_bytes, grouped, member_bytes, members_of
from fastmlp.train.sweep.results import as_csv, as_row, bests, load_group, ranked, save_group

SIZES = (3, 6, 3)


def axes(**changes) -> dict:
    start = {"sizes": [SIZES], "activation": ["tanh"], "lr": [0.1], "momentum": [0.9], "weight_decay": [0.0]}
    start |= {"dropout": [0.0]}
    return {**start, "seed": [0], "fold": [None], **changes}


def training(**changes) -> Training:
    start = {"epochs": 3, "batch_size": 8, "optimizer": "sgd", "loss": "cross_entropy"}
    return Training(**{**start, "schedule": "linear", "warmup": 0.1, "dtype": torch.float64, **changes})


def members(**changes) -> list:
    return members_of(axes(**changes), lambda sizes, activation: 0.5)


def rows(n: int = 41, loss: str = "cross_entropy") -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(n, 3, dtype=torch.float64)
    return x, torch.rand(n, 3, dtype=torch.float64) if takes_values(loss) else (x[:, 0] > 0).long() + (x[:, 1] > 1)


def centered(kept: torch.Tensor):
    """Depends on the training rows, as a standardization does."""
    mean = kept.mean(0)
    return lambda x: x - mean


def alone(member, data: Data, run: Training) -> tuple[fastmlp.MLP, fastmlp.train.History]:
    """The member trained by `fit`."""
    kept, held = data.divided(*member.division)
    prepare = (lambda x: x) if data.prepare is None else data.prepare(data.x[kept])
    model = fastmlp.MLP(member.sizes, member.activation, dtype=run.dtype, dropout=member.dropout)
    initialize_(model, member.seed)
    settings = {"momentum": member.momentum, "weight_decay": member.weight_decay, **run.settings, **run.options}
    settings |= {} if data.weight is None else {"sample_weight": data.weight[kept]}
    settings |= {"lr": member.lr, "seed": member.seed, "validation": (prepare(data.x[held]), data.y[held])}
    names = ("epochs", "batch_size", "optimizer", "loss", "schedule", "warmup")
    settings |= {name: getattr(run, name) for name in names}
    return model, fit(model, (prepare(data.x[kept]), data.y[kept]), **settings)


def assert_as_alone(found: list, data: Data, run: Training, every: int = 1) -> None:
    """All groups of the members give the results and the parameters of `fit`, for every so-many-th member."""
    for numbers in grouped(found, data, run, math.inf):
        group = [found[number] for number in numbers]
        results, parameters = train_group(group, data, run)
        for place, (member, result) in list(enumerate(zip(group, results, strict=True)))[::every]:
            model, history = alone(member, data, run)
            best = history.best
            metric = best.validation_r2 if takes_values(run.loss) and run.loss != "bce" else best.validation_accuracy
            assert result.validation_metric == (None if metric is None else pytest.approx(metric, rel=1e-9))
            # `fit` has the sums of the losses in float32.
            assert result.validation_loss == pytest.approx(best.validation_loss, rel=1e-6)
            assert result.train_loss == pytest.approx(best.train_loss, rel=1e-6)
            assert (result.best_epoch, result.epochs, result.diverged) == (best.epoch, run.epochs, None)
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(parameters[name][place], parameter.detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("loss", STEP_LOSSES)
def test_members_are_those_that_fit_trains_alone(loss):
    """Own seeds, own held-out rows, own settings; with and without inputs that depend on the training rows."""
    data = Data(*rows(loss=loss), share=0.2, prepare=centered if loss == "mse" else None)
    found = members(lr=[0.1, 0.02], momentum=[0.0, 0.9], weight_decay=[0.0, 0.01], seed=[0, 5])
    assert_as_alone(found, data, training(loss=loss), every=5)


@pytest.mark.parametrize("prepare", [None, centered])
def test_folds_are_those_that_fit_trains_alone(prepare):
    """41 rows in 3 folds: the members have 27 or 28 training rows, and so two groups."""
    data = Data(*rows(), folds=3, prepare=prepare)
    found = members(lr=[0.1, 0.3], seed=[1, 2], fold=range(3))
    assert len(grouped(found, data, training(), math.inf)) == 2
    assert_as_alone(found, data, training(schedule="cosine"), every=3)


def test_optimizers_and_long_epochs(monkeypatch):
    """The epoch is run in stretches of steps, and members of one division share an order."""
    monkeypatch.setattr("fastmlp.train.sweep.group.CHECK_EVERY", 2)
    monkeypatch.setattr("fastmlp.train.loop.CHECK_EVERY", 2)
    data = Data(*rows(), share=0.3)
    assert_as_alone(members(lr=[0.01, 0.1], momentum=[None]), data, training(optimizer="adamw", batch_size=5))


OPTIONS = {
    "adam": ({"optimizer": "adam", "settings": {"betas": (0.8, 0.9), "amsgrad": True, "max_grad_norm": 0.1}}, {}),
    "average": ({"optimizer": "rmsprop", "settings": {"alpha": 0.9, "ema_decay": 0.8, "ema_warmup": True}}, {}),
    "groups": ({"options": {"param_groups": [{"params": "*.bias", "lr": 0.5}]}}, {}),
    "loss": ({"options": {"class_weight": torch.tensor([1.0, 2.0, 5.0]).double(), "label_smoothing": 0.1}}, {}),
    "ignored": ({"options": {"ignore_index": 1}}, {"weight": True}),
    "weights": ({}, {"weight": True, "prepare": centered}),
    "values": ({"loss": "huber", "options": {"delta": 0.3}}, {"weight": True}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_a_step(name):
    """The settings of the rules, the average, param groups, the options of the losses, weights of the rows."""
    changes, more = OPTIONS[name]
    run = training(**changes)
    weight = torch.linspace(0.1, 3, 41).double() if more.get("weight") else None
    data = Data(*rows(loss=run.loss), share=0.3, prepare=more.get("prepare"), weight=weight)
    momenta = [0.0, 0.5] if run.optimizer != "adam" else [None]
    assert_as_alone(members(lr=[0.01, 0.1], momentum=momenta, seed=[0, 3]), data, run, every=3)


def test_batches_of_ignored_rows(monkeypatch):
    monkeypatch.setattr("fastmlp.train.sweep.group.CHECK_EVERY", 2)
    monkeypatch.setattr("fastmlp.train.loop.CHECK_EVERY", 2)
    run = training(batch_size=2, options={"ignore_index": 1})
    assert_as_alone(members(lr=[0.001, 0.003], momentum=[0.0], seed=[0, 3]), Data(*rows(), share=0.3), run, every=3)


def test_dropout():
    """A group has one probability; its first member has the masks that it has alone, and the others have masks too."""
    data, run = Data(*rows(), share=0.2), training(epochs=2)
    found = members(dropout=[0.0, 0.5], lr=[0.1, 0.2], seed=[3])
    groups = grouped(found, data, run, math.inf)
    assert [[found[number].dropout for number in group] for group in groups] == [[0.0, 0.0], [0.5, 0.5]]
    assert_as_alone(found, data, run, every=2)
    same = members(dropout=[0.0, 0.5], lr=[0.1], weight_decay=[0.0, 1e-300])
    for numbers, differ in zip(grouped(same, data, run, math.inf), (False, True), strict=True):
        _, parameters = train_group([same[number] for number in numbers], data, run)
        assert torch.equal(*parameters["layers.0.weight"]) != differ


def test_a_member_that_diverges_leaves_the_others_as_they_are():
    data, run = Data(*rows(), share=0.2), training(epochs=2)
    found = members(lr=[0.1, 1e300, 0.2], seed=[0, 1])
    results, parameters = train_group(found, data, run)
    assert [result.diverged is not None for result in results] == [member.lr == 1e300 for member in found]
    for place, member in enumerate(found):
        if member.lr == 1e300:
            with pytest.raises(DivergenceError) as caught:
                alone(member, data, run)
            assert results[place].diverged == caught.value.epoch
            continue
        model, _ = alone(member, data, run)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameters[name][place], parameter.detach(), rtol=1e-9, atol=1e-11)
    results, _ = train_group([member for member in found if member.lr == 1e300], data, run)
    assert [result.epochs for result in results] == [0, 0]


def test_an_exploded_loss_diverges_as_in_fit():
    """Saturated units keep the loss finite."""
    data, run = Data(*rows(), share=0.2), training(epochs=2, loss="mse", schedule="constant")
    data = Data(data.x, torch.rand(41, 3, dtype=torch.float64), share=0.2)
    found = members(lr=[0.05, 3e4], activation=["sigmoid"], momentum=[0.0])
    results, _ = train_group(found, data, run)
    with pytest.raises(DivergenceError) as caught:
        alone(found[1], data, run)
    assert [result.diverged for result in results] == [None, caught.value.epoch]


@pytest.mark.parametrize("loss", STEP_LOSSES)
@pytest.mark.parametrize("divisions", [1, 2])
def test_members_are_evaluated_as_models(loss, divisions, monkeypatch):
    """Members 0 and 2 have the first division, member 1 has the last one, and member 2 is left out."""
    monkeypatch.setattr("fastmlp.train.sweep.group.MOST_ROWS", 16)
    x, y = rows(loss=loss)
    models = [fastmlp.MLP(SIZES, "relu", dtype=torch.float64) for _ in range(3)]
    parts = torch.stack([torch.randperm(len(y))[:30] for _ in range(divisions)])
    of = torch.tensor([0, divisions - 1, 0])
    for target in (y, torch.ones_like(y)):
        held = Held.made(x, target, parts, of, loss)
        active = torch.tensor([True, True, False])
        losses, metrics = evaluate_members(fastmlp.MLPEnsemble.stack(models), held, loss, active)
        for number in (0, 1):
            part = parts[of[number]]
            value, metric = evaluate(models[number], (x[part], target[part]), loss=loss)
            assert losses[number].item() == pytest.approx(value, rel=1e-6)
            found = metrics[number].item()
            assert math.isnan(found) if metric is None else found == pytest.approx(metric, rel=1e-6)
        assert losses[2].isnan()
        assert metrics[2].isnan()


@pytest.mark.parametrize(("n", "count"), [(7, 7), (20, 3), (41, 5)])
def test_folds(n, count):
    y = torch.arange(n) % 3
    parts = [fold(y, count, part, seed=4) for part in range(count)]
    assert torch.cat([held for _, held in parts]).sort().values.tolist() == list(range(n))
    for kept, held in parts:
        assert sorted([*kept.tolist(), *held.tolist()]) == list(range(n))
        assert held.tolist() == sorted(held.tolist())
    sizes = [len(held) for _, held in parts]
    assert max(sizes) - min(sizes) <= 1
    for label in range(3):
        counts = [int((y[held] == label).sum()) for _, held in parts]
        assert max(counts) - min(counts) <= 1
    data = Data(torch.zeros(n, 1), y, folds=count)
    assert [data.trained(part) for part in range(count)] == [len(kept) for kept, _ in parts]
    assert not torch.equal(fold(y, 2, 0, seed=1)[1], fold(y, 2, 0, seed=2)[1])
    for wrong in (1, n + 1):
        with pytest.raises(ValueError, match=rf"expected 2 to {n} folds for {n} training rows, got {wrong}"):
            fold(y, wrong, 0)
    with pytest.raises(ValueError, match="expected a part from 0 to 1"):
        fold(y, 2, 2)


def test_held_out_rows_are_those_of_before():
    """The rows that a seed holds out are part of what a run gives."""
    _, held = held_out(torch.arange(12) % 2, 0.25, seed=3)
    assert held.tolist() == [3, 6, 8]


def test_groups():
    data, run = Data(*rows(), share=0.2, prepare=centered), training()
    found = members(lr=[0.1, 0.2], momentum=[0.0, 0.9], seed=range(5), sizes=[SIZES, (3, 4, 3)])
    assert [member.number for member in found] == list(range(40))
    whole = grouped(found, data, run, math.inf)
    assert [len(group) for group in whole] == [10] * 4
    for group in whole:
        seeds = [found[number].seed for number in group]
        assert seeds == sorted(seeds)
        assert len({(found[number].sizes, found[number].momentum) for number in group}) == 1
    assert [len(group) for group in grouped(found, data, run, math.inf, most=4)] == [4, 4, 2] * 4
    assert [len(group) for group in grouped(found, data, run, math.inf, parts=3)] == [4, 4, 2] * 4
    room = 3 * member_bytes(found[0], data, run) + 2 * division_bytes(data, run)
    small = grouped(found[:20], data, run, room)
    assert max(map(len, small)) == 3
    assert sorted(number for group in small for number in group) == list(range(20))
    assert [len(group) for group in grouped(found, data, run, 0)] == [1] * 40
    assert division_bytes(data, run) - division_bytes(Data(data.x, data.y, share=0.2), run) == 41 * (3 + 1) * 8
    wide = members(sizes=[(3, 60, 3)])[0]
    assert member_bytes(wide, data, run) > 3 * member_bytes(found[0], data, run)


def result(score: float | None, loss: float = 1.0) -> Result:
    return Result(diverged=1) if score is None else Result(loss, score, 0.5, 1, 2)


def test_ranking():
    found = members(lr=[0.1, 0.2, 0.3, 0.4], seed=[0, 1])
    results = [result(s) for s in (0.5, 0.7, 0.9, None, 0.6, 0.8, None, None)]
    standings = ranked(found, results, "cross_entropy")
    assert [standing.setting["lr"] for standing in standings] == [0.3, 0.1, 0.2, 0.4]
    assert [standing.diverged for standing in standings] == [0, 0, 1, 2]
    first = standings[0]
    assert (first.mean, first.worst, first.best, first.members) == (pytest.approx(0.7), 0.6, 0.8, 2)
    assert first.deviation == pytest.approx(math.sqrt(0.02))
    assert (standings[2].deviation, standings[3].mean) == (None, None)
    assert bests(found, results, "cross_entropy") == {found[0].setting: 1, found[2].setting: 2, found[4].setting: 5}
    values = [result(0.0, loss) for loss in (3, 1, 2, 2.5, 0.5, 4, 9, 9)]
    assert [standing.setting["lr"] for standing in ranked(found, values, "mse")] == [0.1, 0.2, 0.3, 0.4]
    assert bests(found, values, "mse")[found[4].setting] == 4


def test_tables():
    found = members(seed=[0, 1])
    lines = as_csv([as_row(m, r, "mse") for m, r in zip(found, [result(0.5), result(None)], strict=True)]).splitlines()
    assert lines[0].split(",")[:3] == ["number", "sizes", "activation"]
    assert "validation_r2" in lines[0]
    assert lines[1] == "0,3-6-3,tanh,0.1,0.9,0.0,0.0,0,,1.0,0.5,0.5,1,2,"
    assert lines[2] == "1,3-6-3,tanh,0.1,0.9,0.0,0.0,1,,,,,,0,1"


def test_the_file_of_a_group(tmp_path):
    found = members(lr=[0.1, 0.2], seed=[0, 1])
    results = [result(s) for s in (0.5, 0.7, 0.9, None)]
    path = tmp_path / "groups" / "0001.safetensors"
    parameters = {"layers.0.weight": torch.randn(4, 6, 3)}
    save_group(path, found, results, parameters, "cross_entropy", 1.5)
    back, best, seconds = load_group(path, found)
    assert (back, seconds, set(best)) == (results, 1.5, {1, 2})
    assert torch.equal(best[2]["layers.0.weight"], parameters["layers.0.weight"][2])
    with pytest.raises(CheckpointError, match="has members of another sweep"):
        load_group(path, found[:3])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_group(path, found)
