"""The benchmarks' own parts: turns, the gate, which contenders are timed, and the changes between two runs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from bench.measure.gate import judge, worst
from bench.measure.machine import describe
from bench.measure.results import load, save
from bench.measure.runner import GROUP_BYTES, BuiltCase, groups
from bench.measure.timing import Turns, take_turns
from bench.presets import NAMES, Case, preset
from bench.problems import GATE_CALLS, LinearProblem, StepProblem
from bench.report.compare import compare, print_changes
from bench.rivals import RIVALS, rivals_for
from bench.rivals.protocol import OK, Availability, OpRun
from tests.support.precision import SETTINGS
from tests.support.steps import have_16_bit_products

PROBLEM = LinearProblem(8, 12, 6)


class Forward(OpRun):
    """A contender for linear_act whose result is multiplied by ``wrong``."""

    def __init__(self, problem, wrong=1.0):
        super().__init__(problem, ("A",))
        self.wrong = wrong

    def compute(self, *inputs):
        x, w, b, _ = inputs
        return torch.sigmoid(x @ w.t() + b) * self.wrong


class Contender:
    """``build`` is called only where the contender is available."""

    kinds = frozenset({"linear_act"})
    notes = ""

    def __init__(self, name, build, available=OK):
        self.name = self.label = name
        self.build = build
        self._available = available

    def available(self, problem):
        return self._available


def test_every_contender_has_its_turn_in_every_round():
    order = []

    class Noted(Forward):
        def __init__(self, name):
            super().__init__(PROBLEM)
            self.name = name

        def __call__(self):
            order.append(self.name)
            return super().__call__()

    runs = {name: Noted(name) for name in "abc"}
    turns = Turns(runs, "cpu", turn_s=1e-9)
    take_turns([turns], 3)
    samples = turns.samples
    assert {name: len(s.seconds) for name, s in samples.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(seconds > 0 for s in samples.values() for seconds in s.seconds)
    # One call fills a turn of zero length, and the next round begins with another contender.
    rounds = ["".join(order[-9:])[i : i + 3] for i in (0, 3, 6)]
    assert [sorted(turn) for turn in rounds] == [["a", "b", "c"]] * 3
    assert len(set(rounds)) > 1


def test_a_round_goes_through_all_problems(monkeypatch):
    order = []
    problems = [Turns({}, "cpu"), Turns({}, "cpu")]
    monkeypatch.setattr(Turns, "round", lambda turns, number: order.append((problems.index(turns), number)))
    take_turns(problems, 2)
    assert order == [(0, 0), (1, 0), (0, 1), (1, 1)]


@pytest.fixture(params=[True, False], ids=["16-bit products", "no 16-bit products"])
def processor(request, monkeypatch) -> bool:
    """Whether the processor has 16-bit products, on which the cases of a preset depend."""
    have_16_bit_products(monkeypatch, request.param)
    return request.param


@pytest.mark.parametrize("name", NAMES)
def test_groups_are_the_cases_in_their_order(processor, name):
    """The preset quick is one group; a case larger than a group's memory is a group of its own."""
    cases = preset(name, "cpu").cases
    found = list(groups(cases))
    assert [case for group in found for case in group] == list(cases)
    assert len(found) == 1 or name != "quick"
    for group in found:
        assert len(group) == 1 or 10 * sum(case.problem.memory for case in group) <= GROUP_BYTES


def test_gate_passes_the_right_result_and_rejects_a_wrong_one():
    for wrong, passed in ((1.0, True), (1 + 1e-4, False), (float("nan"), False)):
        run = Forward(PROBLEM, wrong)
        for _ in range(GATE_CALLS):
            run()
        assert judge(PROBLEM, run.results()).passed is passed


@pytest.mark.parametrize(
    ("results", "message"), [({}, r"\['A'\], got \[\]"), ({"A": torch.zeros(8, 5)}, r"\[8, 6\], got \[8, 5\]")]
)
def test_gate_says_what_is_missing(results, message):
    with pytest.raises(ValueError, match=message):
        judge(PROBLEM, results)


def test_gate_judges_by_the_worst_tensor():
    right = {"small": torch.ones(3, dtype=torch.double), "large": torch.full((3,), 100.0, dtype=torch.double)}
    wrong = {"small": right["small"] * 1.01, "large": right["large"]}
    verdict = worst(wrong, right, right, dtype=torch.float32, reduction=1)
    assert (verdict.passed, verdict.what) == (False, "small")
    assert verdict.error == pytest.approx(0.01)
    assert verdict.overall == pytest.approx(0.01 / 100, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
def test_gate_notices_a_step_that_is_off_by_a_thousandth(optimizer):
    problem = StepProblem((12, 8, 4), 16, optimizer=optimizer)
    right = problem.oracle(torch.float32)
    assert judge(problem, right).passed
    start = dict(zip(right, problem.parameters(), strict=True))
    off = {name: start[name] + (value - start[name]) * 1.001 for name, value in right.items()}
    assert not judge(problem, off).passed


def test_nothing_is_timed_of_a_wrong_failed_absent_or_unwanted_contender(monkeypatch):
    def broken(problem):
        raise RuntimeError("out of order\nand more")

    contenders = [
        Contender("right", Forward),
        Contender("wrong", lambda problem: Forward(problem, 1.01)),
        Contender("failed", broken),
        Contender("absent", broken, Availability(False, "not installed")),
        Contender("unwanted", broken),
    ]
    monkeypatch.setattr("bench.measure.runner.rivals_for", lambda problem: contenders)
    lines: list[str] = []
    built = BuiltCase(Case(PROBLEM, leave_out=frozenset({"unwanted"})), lines.append, 1e-9)
    take_turns([built.turns], 2)
    case = built.entry()
    by_name = {entry["rival"]: entry for entry in case["results"]}
    status = {name: entry["status"] for name, entry in by_name.items()}
    assert status == {
        "right": "ok",
        "wrong": "wrong",
        "failed": "failed",
        "absent": "unavailable",
        "unwanted": "left out",
    }
    assert [name for name, entry in by_name.items() if "seconds" in entry] == ["right"]
    assert len(by_name["right"]["seconds"]) == 2
    assert by_name["failed"]["reason"] == "RuntimeError: out of order"
    assert by_name["absent"]["reason"] == "not installed"
    assert len(lines) == 2


def test_contenders_have_names_of_their_own():
    for kind in {kind for rival in RIVALS for kind in rival.kinds}:
        names = [rival.name for rival in RIVALS if kind in rival.kinds]
        assert len(names) == len(set(names)), kind


def test_units_at_a_kink_may_have_either_derivative():
    """A z may be so near to 0 that its sign in float32 is chance. The gate allows what depends on the sign, no more."""
    problem = StepProblem((40, 30, 10), 8192, "relu")
    unsettled = problem.unsettled()
    assert set(unsettled) == set(problem.oracle(torch.float64))
    far = {name: value.norm().item() for name, value in unsettled.items()}
    moved = {name: value.norm().item() for name, value in problem.judged(problem.oracle(torch.float64)).items()}
    assert 0 < far["parameter 0"] < 1e-2 * moved["parameter 0"]
    assert StepProblem((40, 30, 10), 8192, "sigmoid").unsettled() == {}
    assert StepProblem((40, 30, 10), 8192, "relu", dtype="bfloat16").unsettled() == {}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_presets_have_a_baseline_and_ours_in_every_case(processor, name, device):
    cases = preset(name, device).cases
    halves = {case.problem.dtype for case in cases} - {"float32"}
    assert bool(halves) == (name not in ("online", "members", "shapes") and (processor or device != "cpu"))
    assert len({(case.problem, case.axis) for case in cases}) == len(cases)
    for case in cases:
        contenders = {rival.name for rival in rivals_for(case.problem)} - case.leave_out
        assert {"fastmlp", "eager"} <= contenders
    if name == "scaling":
        assert {case.value for case in cases if case.axis == "batch"} >= {1, 65536}
        assert {case.value for case in cases if case.axis == "width"} >= {64, 4096}
        assert {case.value for case in cases if case.axis == "depth"} >= {1, 16}
    if name == "members":
        assert {(case.value, case.problem.optimizer) for case in cases} >= {(1, "sgd"), (1000, "adamw")}


# Two runs beside each other


def document(seconds: dict[str, list[float]], **more: Any) -> dict[str, Any]:
    """A run of one case with these times."""
    results = [
        {"rival": name, "label": name, "status": "ok", "reason": "", "seconds": times}
        for name, times in seconds.items()
    ]
    problem = {"kind": "step", "name": "small", "dtype": "float32"}
    machine = {"name": "CPU", "slug": "cpu", "threads": 2, "commit": "abc"}
    case = {"problem": problem, "axis": "", "value": 0, "flops": 10, "bytes": 10, "rows": 1, "results": results}
    return {"kind": "times", "preset": "quick", "started": "now", "machine": machine, "cases": [case], **more}


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ([1.0, 1.0, 1.0], [1.2, 1.2, 1.2], "slower"),
        ([1.2, 1.2, 1.2], [1.0, 1.0, 1.0], "faster"),
        ([1.0, 1.0, 1.0], [1.04, 1.04, 1.04], "same"),  # less than the tolerance
        ([1.0, 1.2, 1.4], [1.3, 1.45, 1.6], "same"),  # the spreads overlap
    ],
)
def test_verdicts(before, after, verdict):
    (change,) = compare(document({"a": before}), document({"a": after}))
    assert change.verdict == verdict


def test_changes_are_sorted_and_printed_with_their_spread(capsys):
    before = document({"a": [1.0, 1.0, 1.0], "b": [1.0, 1.0, 1.0], "gone": [1.0]})
    after = document({"a": [0.5, 0.5, 0.5], "b": [1.9, 2.0, 2.1]})
    changes = compare(before, after)
    assert [(change.label, change.verdict) for change in changes] == [("b", "slower"), ("a", "faster")]
    print_changes(before, after, changes)
    lines = capsys.readouterr().out.splitlines()
    slower = next(line for line in lines if line.startswith("slower"))
    assert "2.00" in slower
    assert "±5 %" in slower
    assert lines[-1] == "1 slower, 1 faster, 0 same; 0 of 2 agree within their spread"


def test_contenders_are_compared_in_units_of_the_baseline(capsys):
    """On a machine at two thirds of its speed only the baseline's own times change."""
    before = document({"eager": [2.0, 2.2], "a": [1.0, 1.2]})
    after = document({"eager": [3.0, 3.3], "a": [1.5, 1.8]})
    changes = compare(before, after)
    assert [(change.label, change.verdict) for change in changes] == [("eager", "slower"), ("a", "same")]
    assert changes[1].factor == pytest.approx(1)
    print_changes(before, after, changes)
    assert "1.92 (1.83–2.01) x" in capsys.readouterr().out


def test_runs_without_a_common_case_are_an_error():
    other = copy.deepcopy(document({"a": [1.0]}))
    other["cases"][0]["problem"]["name"] = "large"
    with pytest.raises(ValueError, match="no case in common"):
        compare(document({"a": [1.0]}), other)
    with pytest.raises(ValueError, match="accuracy"):
        compare(document({"a": [1.0]}), document({}, kind="accuracy"))


@pytest.mark.usefixtures("default_precision")
@pytest.mark.parametrize("name", SETTINGS)
def test_the_precision_of_float32_is_recorded(name):
    """Every setting of torch's is recorded, though torch.get_float32_matmul_precision raises in half of them."""
    steps, allowed = SETTINGS[name]
    for set_to, value in steps:
        set_to(value)
    assert (describe("cpu")["float32_precision"]["cuda"] == "tf32") == allowed


def test_no_result_has_a_path_of_the_machine(tmp_path):
    reasons = {
        "OSError: /home/me/env/lib/libfoo.so.1: cannot open": "OSError: .../libfoo.so.1: cannot open",
        "No module in '/opt/a b/x.py'": "No module in '.../a b/x.py'",
        "see https://example.org/a/b, 5 images/s, 1/2/3": "see https://example.org/a/b, 5 images/s, 1/2/3",
        "fastmlp bench quick": "fastmlp bench quick",
    }
    document = {"machine": {"slug": "cpu"}, "preset": "quick", "format": 1, "cases": [{"results": list(reasons)}]}
    path = save(document, tmp_path)
    assert load(path)["cases"] == [{"results": list(reasons.values())}]
    assert path == tmp_path / "cpu" / "quick.json"
