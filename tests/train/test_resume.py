"""A run that was stopped goes on from its state and gives the bits of the run that was never stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import fastmlp
from fastmlp.train import CHECK_EVERY, History, fit
from fastmlp.train.checkpoint import CheckpointError
from fastmlp.train.initial import initialize_
from fastmlp.train.state import FORMAT, RunState, load_state, save_state
from fastmlp.train.tensor_file import read_tensors, write_tensors
from tests.support.faults import KINDS, every_kill, every_point

SGD = {"optimizer": "sgd", "momentum": 0.0, "lr": 0.3}
MOMENTUM = {"optimizer": "sgd", "lr": 0.1, "weight_decay": 1e-3, "max_grad_norm": 1.0}
ADAMW = {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.99)}
OPTIMIZERS = {"sgd": SGD, "momentum": MOMENTUM, "adamw": ADAMW}


def blobs(n: int = 240, seed: int = 0) -> tuple[Tensor, Tensor]:
    """uint8 rows of three classes that overlap, so that a validation loss rises again."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (n,), generator=g)
    means = torch.randint(90, 160, (3, 12), generator=torch.Generator().manual_seed(99)).float()
    return (means[labels] + 60 * torch.randn(n, 12, generator=g)).clamp(0, 255).to(torch.uint8), labels


def new_model(dtype: torch.dtype = torch.float32) -> fastmlp.MLP:
    return initialize_(fastmlp.MLP((12, 16, 3), "tanh", dtype=dtype), 0)


def untimed(history: History) -> list[dict[str, object]]:
    return [{k: v for k, v in d.items() if "second" not in k} for d in history.as_dicts()]


def assert_same_run(a: tuple[nn.Module, History], b: tuple[nn.Module, History]) -> None:
    for ours, theirs in zip(a[0].state_dict().values(), b[0].state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert untimed(a[1]) == untimed(b[1])


class Stop(BaseException):
    """What ends a process, as far as `fit` sees."""


def stopped_after(epoch: int, path: Path, **options: object) -> None:
    """A run whose process ends right after the state of an epoch is written."""

    def keep(state: object) -> None:
        save_state(path, state)
        if state.epoch == epoch:
            raise Stop

    with contextlib.suppress(Stop):
        fit(options.pop("model", None) or new_model(), blobs(), checkpoint=keep, **options)


@pytest.mark.parametrize("engine", ["step", "autograd"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_runs_are_equal_to_the_bit(tmp_path, name, engine):
    options = {**OPTIMIZERS[name], "engine": engine, "epochs": 4, "batch_size": 32, "test": blobs(60, seed=1)}
    whole = new_model()
    expected = whole, fit(whole, blobs(), **options)
    for epoch in (1, 3, 4):
        stopped_after(epoch, tmp_path / "state", **options)
        model = fastmlp.MLP((12, 16, 3), "tanh")
        assert_same_run((model, fit(model, blobs(), resume=tmp_path / "state", **options)), expected)


def test_options_of_the_step(tmp_path):
    """Param groups, by parameter or by name alike, 16-bit products and weights of the rows."""
    weight = torch.linspace(0.5, 2, 240)
    options = {**MOMENTUM, "epochs": 3, "batch_size": 32, "dtype": torch.bfloat16, "sample_weight": weight}
    whole, groups = new_model(), [{"params": "*.bias", "weight_decay": 0.0}]
    expected = whole, fit(whole, blobs(), param_groups=groups, **options)
    first = new_model()
    stopped = [{"params": [layer.bias for layer in first.layers], "weight_decay": 0.0}]
    stopped_after(2, tmp_path / "state", model=first, param_groups=stopped, **options)
    rest = {"resume": tmp_path / "state", **options}
    model = fastmlp.MLP((12, 16, 3), "tanh")
    for changes, words in (
        ({"param_groups": groups, "sample_weight": None}, "sample_weight=None differs"),
        ({"param_groups": groups, "sample_weight": weight.flip(0)}, "sample_weight='.*' differs"),
        ({"param_groups": None}, "param_groups=None differs"),
        ({"param_groups": groups, "dtype": None}, "dtype=None differs"),
    ):
        with pytest.raises(ValueError, match=words):
            fit(model, blobs(), **{**rest, **changes})
    assert_same_run((model, fit(model, blobs(), param_groups=iter(groups), **rest)), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("engine", ["step", "autograd"])
def test_other_dtypes(tmp_path, dtype, engine):
    """Masters and the loss scale are part of the state."""
    options = {**MOMENTUM, "engine": engine, "epochs": 3, "batch_size": 16}
    whole = new_model(dtype)
    expected = whole, fit(whole, blobs(), **options)
    stopped_after(2, tmp_path / "state", model=new_model(dtype), **options)
    model = fastmlp.MLP((12, 16, 3), "tanh", dtype=dtype)
    assert_same_run((model, fit(model, blobs(), resume=tmp_path / "state", **options)), expected)


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_stop_within_an_epoch(tmp_path, stop):
    """``on_progress`` returns True; the last stretch of an epoch is followed by its end."""
    options = {**MOMENTUM, "epochs": 2, "batch_size": 1, "test": blobs(60, seed=1), "schedule": "cosine"}
    whole = new_model()
    expected = whole, fit(whole, blobs(), **options)
    seen = []

    def on_progress(progress: object) -> bool:
        seen.append(progress)
        return len(seen) == stop

    first = fit(new_model(), blobs(), checkpoint=tmp_path / "state", on_progress=on_progress, **options)
    state = load_state(tmp_path / "state")
    assert (len(first.epochs), state.step) == ((stop // 3), CHECK_EVERY * (stop % 3))
    assert state.seconds > 0
    model = fastmlp.MLP((12, 16, 3), "tanh")
    assert_same_run((model, fit(model, blobs(), resume=tmp_path / "state", **options)), expected)


def test_validation_and_patience(tmp_path):
    """The best parameters of before the stop are those of the end."""
    options = {"lr": 0.5, "epochs": 40, "batch_size": 8, "validation": 0.3, "patience": 4, "schedule": "constant"}
    options["test"] = blobs(60, seed=1)
    whole = new_model()
    expected = whole, fit(whole, blobs(), **options)
    epochs, best = len(expected[1].epochs), expected[1].best.epoch
    assert 1 <= best == epochs - 4
    assert expected[1].best.test_loss is not None
    assert sum(result.test_loss is not None for result in expected[1].epochs) == 1
    for epoch in {1, best, epochs - 1, epochs}:
        stopped_after(epoch, tmp_path / "state", **options)
        state = load_state(tmp_path / "state")
        assert (state.best is None) == (epoch == best or state.history.best.epoch == epoch)
        model = fastmlp.MLP((12, 16, 3), "tanh")
        assert_same_run((model, fit(model, blobs(), resume=tmp_path / "state", **options)), expected)
    more = fit(fastmlp.MLP((12, 16, 3), "tanh"), blobs(), resume=tmp_path / "state", **{**options, "patience": 6})
    assert len(more.epochs) > epochs


def test_more_epochs(tmp_path):
    options = {**ADAMW, "batch_size": 32, "schedule": "constant"}
    whole = new_model()
    expected = whole, fit(whole, blobs(), epochs=5, **options)
    fit(new_model(), blobs(), epochs=2, checkpoint=tmp_path / "state", **options)
    model = new_model()
    history = fit(model, blobs(), epochs=5, checkpoint=tmp_path / "state", resume=tmp_path / "state", **options)
    assert_same_run((model, history), expected)
    model = new_model()
    again = fit(model, blobs(), epochs=5, resume=tmp_path / "state", **options)
    assert_same_run((model, again), expected)
    assert again.as_dicts() == history.as_dicts(), "nothing was trained, so the times are those of the run"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.2}, r"lr=0.2 differs from the 0.1 of the run to resume"),
        ({"optimizer": "adamw", "momentum": None}, r"optimizer='adamw' differs from the 'sgd'"),
        ({"momentum": 0.5}, "momentum=0.5 differs from the 0.9"),
        ({"epochs": 1}, "epochs=1 is less than the 2 of the run to resume"),
        ({"batch_size": 16}, "batch_size=16 differs from the 32"),
        ({"seed": 1}, "seed=1 differs from the 0"),
        ({"schedule": "cosine"}, "schedule='cosine' differs"),
        ({"engine": "autograd"}, "engine='autograd' differs"),
        ({"validation": 0.2}, "the run to resume was given validation data: False, and now: True"),
        ({"train": blobs(seed=3)}, "the training data are not those of the run to resume"),
        (
            {"model": fastmlp.MLP((12, 8, 3))},
            r"another model: layers.0.weight is \[8, 12\] torch.float32, and was \[16",
        ),
        (
            {"model": fastmlp.MLP((12, 16, 3), "relu")},
            r"another model: it is MLP(?s:.*)relu(?s:.*) and was MLP(?s:.*)tanh",
        ),
        ({"model": new_model(torch.float64)}, r"is \[16, 12\] torch.float64, and was \[16, 12\] torch.float32"),
    ],
)
def test_another_run_is_refused(tmp_path_factory, changes, message):
    path = tmp_path_factory.getbasetemp() / "refused.state"
    options = {"model": new_model(), "train": blobs(), "epochs": 2, "batch_size": 32, "lr": 0.1, "engine": "step"}
    if not path.exists():
        fit(checkpoint=path, **options)
    with pytest.raises(ValueError, match=message):
        fit(resume=path, **{**options, **changes})


def test_wrong_arguments(tmp_path):
    class Ready:
        def epoch(self, *arguments: object) -> Tensor:
            return torch.tensor(1.0)

    with pytest.raises(TypeError, match="need an engine with state_dict and load_state_dict, got Ready"):
        fit(new_model(), blobs(), lr=0.1, engine=Ready(), checkpoint=tmp_path / "state")
    with pytest.raises(ValueError, match="patience needs validation data to judge the epochs by"):
        fit(new_model(), blobs(), blobs(), lr=0.1, patience=3)
    for patience in (0, 1.5):
        with pytest.raises(ValueError, match="patience must be a whole number of at least 1"):
            fit(new_model(), blobs(), lr=0.1, validation=0.1, patience=patience)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'momentun'.*Did you mean 'momentum'"):
        fit(new_model(), blobs(), lr=0.1, momentun=0.5)
    with pytest.raises(FileNotFoundError):
        fit(new_model(), blobs(), lr=0.1, resume=tmp_path / "none")


# The file


def small_state(tmp_path: Path) -> Path:
    fit(new_model(), blobs(), epochs=1, lr=0.1, checkpoint=tmp_path / "state", validation=0.5)
    return tmp_path / "state"


def test_other_validation_data_are_refused(tmp_path):
    options = {"lr": 0.1, "checkpoint": tmp_path / "state"}
    fit(new_model(), blobs(), epochs=1, validation=blobs(seed=1), **options)
    with pytest.raises(ValueError, match="the validation data are not those of the run to resume"):
        fit(new_model(), blobs(), epochs=2, validation=blobs(seed=2), resume=tmp_path / "state", **options)


def test_kept_states_are_those_of_their_epochs():
    """A function that gets the states may keep them: the run goes on with a history of its own."""
    kept: list[RunState] = []
    whole, again = new_model(), new_model()
    fit(whole, blobs(), lr=0.1, epochs=3, checkpoint=kept.append)
    assert [state.epoch for state in kept] == [1, 2, 3]
    fit(again, blobs(), lr=0.1, epochs=3, resume=kept[0])
    for ours, theirs in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_file_is_safetensors(tmp_path):
    path = small_state(tmp_path)
    read = safetensors.torch.load_file(path)
    state = load_state(path)
    assert {name for name in read if name.startswith("model.")} == {f"model.{name}" for name in state.model}
    assert {name.rpartition(".")[2] for name in state.engine} == {"momentum_buffer"}
    tensors = {
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "half": torch.randn(3).half(),
        "brain": torch.randn(5, 2).bfloat16()[:, 1],
        "bytes": torch.arange(7, dtype=torch.uint8),
        "whole": torch.arange(3),
    }
    write_tensors(tmp_path / "all", tensors, {"format": "x"})
    again, about = read_tensors(tmp_path / "all", "x")
    assert about["format"] == "x"
    assert set(again) == set(safetensors.torch.load_file(tmp_path / "all"))
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor)
    with pytest.raises(TypeError, match=r"c is torch.complex64; expected one of torch.float64"):
        write_tensors(tmp_path / "all", {"c": torch.zeros(1, dtype=torch.complex64)}, {})


def test_a_state_comes_back(tmp_path):
    state = load_state(small_state(tmp_path))
    state.extra = {"options": {"data": "a folder"}}
    state.history.epochs[0] = dataclasses.replace(state.history.epochs[0], train_loss=math.pi)
    save_state(tmp_path / "again", state)
    again = load_state(tmp_path / "again")
    assert again.extra == state.extra
    assert again.history == state.history
    assert again.settings == state.settings
    assert torch.equal(again.order, state.order)


@pytest.mark.parametrize("at", [3, 40, -1], ids=["length", "header", "tensors"])
def test_a_damaged_file_is_refused(tmp_path, at):
    path = small_state(tmp_path)
    content = bytearray(path.read_bytes())
    content[at] ^= 0x55
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state is (damaged|no fastmlp run state)"):
        load_state(path)


def test_other_files_are_refused(tmp_path):
    path = small_state(tmp_path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="damaged"):
        load_state(path)
    write_tensors(path, {}, {"format": FORMAT, "format_version": "9"})
    with pytest.raises(CheckpointError, match="has format version 9, this fastmlp reads 1"):
        load_state(path)
    write_tensors(path, {}, {"format": FORMAT, "format_version": "1", "state": "{}"})
    with pytest.raises(CheckpointError, match="damaged: KeyError"):
        load_state(path)
    safetensors.torch.save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError):
        load_state(path)


@pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")
@pytest.mark.parametrize("kind", [*KINDS, "kill"])
def test_a_fault_at_any_call(tmp_path, kind):
    """The file is the old state or the new one, and the next one is written."""
    state = load_state(small_state(tmp_path))
    folder = tmp_path / "run"
    folder.mkdir()

    def save(number: float) -> None:
        save_state(folder / "state", dataclasses.replace(state, highest_loss=number))

    def work() -> None:
        with contextlib.suppress(OSError, KeyboardInterrupt):
            save(2)

    points, every = Counter(), every_kill if kind == "kill" else partial(every_point, kind=kind)
    faults = every(folder, before=lambda: save(1), work=work)
    for call in faults:
        points[call] += 1
        assert load_state(folder / "state").highest_loss in (1, 2)
        save(3)
        assert os.listdir(folder) == ["state"]
    assert points.total() >= (1 if kind == "half" else 10)
