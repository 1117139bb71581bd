"""How a call is timed, on a stand-in GPU: chains of calls, flushed single calls, and results that name the way."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from bench.measure import timing
from bench.measure.results import FOLDER, load_all, timing_of
from bench.measure.runner import BuiltCase
from bench.measure.timing import Turns, take_turns
from bench.presets import NAMES, Case, preset
from bench.problems import LinearProblem, StepProblem
from bench.report.compare import compare
from bench.report.markdown import render
from bench.report.tables import print_run
from bench.rivals.jax_operations import JaxOperation

#: Microseconds that the host takes to synchronise with the device.
SYNC = 30
FLUSH = 200


class Device:
    """A host and a device, each with a clock in microseconds. Time passes only for the work that is asked for."""

    def __init__(self) -> None:
        self.host = self.ready = 0
        self.log: list[str] = []

    def work(self, host: int, device: int) -> None:
        """The host launches work in ``host`` microseconds, which then takes the device ``device`` microseconds."""
        self.host += host
        self.ready = max(self.host, self.ready) + device

    def synchronize(self, *device: Any) -> None:
        self.host = max(self.host, self.ready) + SYNC

    def clock(self) -> float:
        """Seconds on the host."""
        return self.host / 1e6


class Event:
    """A torch.cuda.Event on the device of the fixture ``machine``."""

    machine: Device

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = max(self.machine.host, self.machine.ready)

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) / 1e3


class Buffer:
    """The buffer that is overwritten to flush the L2 cache."""

    def __init__(self, machine: Device) -> None:
        self.machine = machine

    def zero_(self) -> None:
        self.machine.log.append("flush")
        self.machine.work(1, FLUSH)


class Launches:
    """A contender whose call takes the host ``host`` and the device ``device`` microseconds."""

    def __init__(self, machine: Device, host: int, device: int) -> None:
        self.machine, self.cost = machine, (host, device)

    def __call__(self) -> None:
        self.machine.log.append("call")
        self.machine.work(*self.cost)

    def finish(self) -> None:
        self.machine.log.append("wait")
        self.machine.synchronize()


@pytest.fixture
def machine(monkeypatch):
    machine = Device()
    monkeypatch.setattr(timing, "PAUSE_S", 0)
    monkeypatch.setattr(timing, "_flush_buffer", lambda device: Buffer(machine))
    monkeypatch.setattr(torch.cuda, "Event", type("PlayedEvent", (Event,), {"machine": machine}))
    monkeypatch.setattr(torch.cuda, "synchronize", machine.synchronize)
    return machine


def taken(machine: Device, way: str, host: int, device: int) -> tuple[float, int]:
    """(microseconds per call, calls) of one round."""
    turns = Turns({"it": Launches(machine, host, device)}, "cuda:0", way, turn_s=0.01, clock=machine.clock)
    machine.log.clear()
    take_turns([turns], 1)
    (seconds,) = turns.samples["it"].seconds
    return 1e6 * seconds, turns.samples["it"].calls


@pytest.mark.parametrize(("host", "device"), [(5, 20), (50, 20)], ids=["the device is slower", "the host is slower"])
def test_a_chain_takes_what_the_slower_of_host_and_device_takes(machine, host, device):
    took, calls = taken(machine, "chain", host, device)
    # The first launch is not overlapped, and the last call is waited for once.
    assert took == pytest.approx(max(host, device) + (min(host, device) + SYNC) / calls)
    assert machine.log == ["call", "wait", *["call"] * calls, "wait"]


def test_a_chain_fills_its_turn_although_the_warm_up_waits_for_every_call(machine):
    took, calls = taken(machine, "chain", 5, 20)
    assert took * calls == pytest.approx(10_000, rel=0.1)


def test_flushed_calls_begin_with_a_cold_cache_and_hide_the_host(machine):
    took, calls = taken(machine, "flushed", 50, 20)
    assert took == 20
    assert machine.log == ["call", *["flush", "call"] * calls, "wait"]


def test_only_single_operations_on_a_gpu_are_flushed():
    for name in NAMES:
        for device in ("cpu", "cuda:0"):
            for case in preset(name, device).cases:
                trains = case.problem.kind in ("step", "online", "epoch", "members")
                assert case.problem.timing == ("chain" if trains or device == "cpu" else "flushed")


def test_what_torchs_events_cannot_see_is_not_flushed(monkeypatch):
    jax = pytest.importorskip("jax")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    available = JaxOperation().available(LinearProblem(8, 12, 6, device="cuda:0"))
    assert (available.ok, "streams of its own" in available.reason) == (False, True)


@pytest.mark.parametrize("problem", [LinearProblem(8, 12, 6), StepProblem((12, 4), 3)], ids=lambda p: p.kind)
def test_a_case_is_timed_its_problems_way_and_says_so(problem, monkeypatch):
    monkeypatch.setattr("bench.measure.runner.rivals_for", lambda problem: [])
    ways = []
    monkeypatch.setattr(
        "bench.measure.runner.Turns", lambda runs, device, way, turn_s: ways.append(way) or Turns({}, device)
    )
    monkeypatch.setattr(type(problem), "timing", "some way")
    assert BuiltCase(Case(problem), print).entry()["timing"] == "some way"
    assert ways == ["some way"]


# Results


def run_of_a_gpu(**more: Any) -> dict[str, Any]:
    """A run of two cases on a GPU, one timed each way."""
    result = {"rival": "eager", "label": "eager", "status": "ok", "reason": "", "seconds": [1.0, 1.0], "notes": ""}
    machine = {"name": "GPU", "slug": "gpu", "threads": 2, "commit": "abc", "is_gpu": True, "versions": {}}
    sizes = {"flops": 10, "bytes": 10, "rows": 1, "axis": "", "value": 0}
    cases = [
        {"problem": {"kind": kind, "name": "small", "dtype": "float32"}, **sizes, "timing": way, "results": [result]}
        for kind, way in (("step", "chain"), ("wgrad", "flushed"))
    ]
    head = {"kind": "times", "preset": "quick", "started": "2026-01-02", "rounds": 2, "command": "bench"}
    return {**head, "machine": {**machine, "changed_files": []}, "cases": cases, **more}


def test_older_runs_are_read_as_they_were_timed():
    run = run_of_a_gpu()
    for case in run["cases"]:
        del case["timing"]
    assert [timing_of(run, case) for case in run["cases"]] == ["flushed", "flushed"]
    run["machine"]["is_gpu"] = False
    assert [timing_of(run, case) for case in run["cases"]] == ["chain", "chain"]
    kept = load_all(FOLDER)
    assert {timing_of(d, case) for d in kept if d["kind"] == "times" for case in d["cases"]} == {"chain"}


def test_times_taken_in_two_ways_are_not_compared():
    new = run_of_a_gpu()
    old = copy.deepcopy(new)
    assert len(compare(old, new)) == 2
    for case in old["cases"]:
        del case["timing"]
    (change,) = compare(old, new)
    assert change.problem == "wgrad: small"


def test_tables_of_a_gpu_say_how_it_was_timed(capsys):
    print_run(run_of_a_gpu())
    blocks = capsys.readouterr().out.split("\n\n")
    assert blocks[1].splitlines()[:2] == ["step: small", "  calls in a row"]
    assert blocks[2].splitlines()[:2] == ["wgrad: small", "  L2 overwritten before each call"]
    text = render([json.loads(json.dumps(run_of_a_gpu()))], {})
    assert "GPU: median, calls in a row" in text
    assert "GPU: median, L2 overwritten before each call" in text
