"""``python -m bench host`` times the work that the host of a GPU does, and leaves no trace."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import torch

from bench import host
from bench.host import WAYS, measure
from fastmlp import cli
from tests.conftest import INTERPRETING

pytestmark = pytest.mark.skipif(INTERPRETING, reason="nothing is launched in interpreter mode")

#: One kernel computes the weight gradients of all layers.
OF_THE_MODULES = {
    "_linear_fwd_kernel": 3,
    "_cross_entropy_kernel": 1,
    "_cross_entropy_bwd_kernel": 1,
    "_linear_dgrad_kernel": 2,
    "_wgrad_update_kernel": 1,
}
KEYS = (
    "eager_us",
    "modules_us",
    "step_us",
    "epoch_step_us",
    "eager_forward_backward_us",
    "modules_forward_backward_us",
)


@pytest.fixture
def launches(monkeypatch) -> Counter[str]:
    """Number of launches by kernel, counted where Triton begins a launch, which therefore begins each of them."""
    from triton.runtime.jit import JITFunction

    from fastmlp.kernels import launch

    monkeypatch.setattr(launch._Memory, "get", lambda memory, key: None)

    counted: Counter[str] = Counter()
    run = JITFunction.run

    def counting(kernel: Any, *args: Any, **options: Any) -> Any:
        counted[kernel.fn.__name__] += 1
        return run(kernel, *args, **options)

    monkeypatch.setattr(JITFunction, "run", counting)
    return counted


@pytest.mark.launch
def test_plain_steps_launch_every_kernel_and_replayed_ones_none(launches, monkeypatch):
    monkeypatch.setattr(host, "STEPS", 4)
    of_a_step = {"_linear_fwd_kernel": 2, "_head_kernel": 1, "_linear_dgrad_kernel": 1, "_wgrad_update_kernel": 1}
    with host.host_gpu():
        calls = host._calls()
        for way, (function, steps) in calls.items():
            for _ in range(host._UNTIL_REPLAYED):
                function()
            launches.clear()
            function()
            if way.startswith("modules"):
                assert dict(launches) == OF_THE_MODULES
            else:
                plain = {name: steps * count for name, count in of_a_step.items()} if "launches" in way else {}
                assert dict(launches) == plain, way
    assert calls["eager_us"][1] == 1
    assert calls["epoch_step_us"][1] == 4


@pytest.mark.launch
def test_every_way_has_its_median_and_its_rounds(monkeypatch):
    monkeypatch.setattr(host, "STEPS", 4)
    document = json.loads(json.dumps(measure(3, "python -m bench host", turn_s=1e-9)))
    assert set(KEYS) <= set(WAYS)
    for way in WAYS:
        assert len(document["samples_us"][way]) == 3
        assert document[way] == sorted(document["samples_us"][way])[1] > 0
    assert document["kind"] == "host"
    assert document["machine"]["name"]
    assert document["machine"]["threads"] == 1


def test_the_stand_ins_are_gone_afterwards(monkeypatch):
    from triton.runtime import driver

    names = ("Stream", "current_stream", "CUDAGraph", "is_current_stream_capturing", "device", "graph", "stream")
    before = [getattr(torch.cuda, name) for name in names], driver._active, torch.get_num_threads()

    def interrupted() -> Any:
        assert torch.get_num_threads() == 1
        assert torch.cuda.CUDAGraph is host._NullGraph
        raise ZeroDivisionError

    monkeypatch.setattr(host, "_calls", interrupted)
    with pytest.raises(ZeroDivisionError):
        measure(1, "")
    assert ([getattr(torch.cuda, name) for name in names], driver._active, torch.get_num_threads()) == before


@pytest.fixture
def document(monkeypatch) -> dict[str, Any]:
    """The document of a run that was not measured, to test what the command prints."""
    samples = {way: [10.0 * (i + 1), 11.0 * (i + 1), 12.0 * (i + 1)] for i, way in enumerate(WAYS)}
    machine = {"name": "Test CPU", "threads": 1, "commit": "abcdef"}
    medians = {way: values[1] for way, values in samples.items()}
    made = {"kind": "host", "rounds": 3, "machine": machine, **medians, "samples_us": samples}
    monkeypatch.setattr(host, "measure", lambda rounds, command: {**made, "rounds": rounds, "command": command})
    return made


def test_command_prints_a_table(document, capsys):
    assert cli.main(["bench", "host"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "host time of a step: Test CPU, commit abcdef, 11 rounds"
    assert max(map(len, lines)) <= 80
    (graph,) = (line for line in lines if "TrainStep in a graph" in line)
    assert graph.split()[-5:] == ["44.0", "µs", "±9", "%", "4"]


def test_command_prints_json(document, capsys):
    assert cli.main(["bench", "host", "--rounds", "5", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {**document, "rounds": 5, "command": "fastmlp bench host --rounds 5 --json"}


def test_interpreter_mode_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert cli.main(["bench", "host", "--rounds", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "TRITON_INTERPRET" in line
