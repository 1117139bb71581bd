"""The preset members: every contender trains every member rightly, and the gate, the table and the plot see them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from bench.measure.gate import judge
from bench.measure.runner import prepare
from bench.presets import MEMBERS, Case, preset
from bench.problems import MembersProblem, StepProblem
from bench.report.figures import draw
from bench.report.markdown import NOT_MEASURED, render
from bench.report.members import curves
from bench.report.readme import speed_section
from bench.report.tables import print_run
from bench.rivals import rivals_for
from tests.support.steps import one_thread  # noqa: F401

SIZES = (6, 8, 5, 3)
RIVALS = [rival for rival in rivals_for(MembersProblem(SIZES, 4)) if rival.name != "vmap_compiled"]
#: More members than the gate compares.
MANY = 11


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.name)
def test_every_contender_trains_every_member(rival, optimizer):
    entry, run = prepare(rival, Case(MembersProblem(SIZES, 4, optimizer=optimizer, members=MANY)))
    if entry["status"] == "unavailable":
        pytest.skip(entry["reason"])
    assert (entry["status"], entry["reason"]) == ("ok", "")
    assert run is not None


def test_a_member_is_trained_as_if_it_were_alone():
    """The oracle of three members against the oracle of single networks with the members' values and batches."""
    problem = MembersProblem(SIZES, 5, members=3, optimizer="adamw")

    class Alone(StepProblem):
        def parameters(self):
            return [p[member] for p in problem.parameters()]

        def make_inputs(self, index):
            return tuple(t[member] for t in problem.make_inputs(index))

    together = problem.oracle(torch.float64)
    for member in range(3):
        alone = Alone(SIZES, 5, "relu", optimizer="adamw").oracle(torch.float64)
        for name, value in alone.items():
            torch.testing.assert_close(together[name][member], value, rtol=1e-12, atol=1e-14)


def test_the_gate_compares_the_first_and_the_last_member():
    problem = MembersProblem(SIZES, 4, members=MANY)
    right = problem.oracle(torch.float32)
    assert problem.compared(torch.arange(MANY)).tolist() == [0, 1, 3, 4, 6, 7, 9, 10]
    assert problem.compared(torch.arange(MANY)).shape[0] == right["parameter 0"].shape[0]
    assert MembersProblem(SIZES, 4, members=2).compared(torch.arange(2)).tolist() == [0, 1]
    assert judge(problem, right).passed
    start = [problem.compared(p) for p in problem.parameters()]
    for member in (0, -1):
        untrained = {name: value.clone() for name, value in right.items()}
        for value, p in zip(untrained.values(), start, strict=True):
            value[member] = p[member]
        assert not judge(problem, untrained).passed
    # What a mean over the members would do.
    averaged = {n: p + (value - p) / MANY for (n, value), p in zip(right.items(), start, strict=True)}
    assert not judge(problem, averaged).passed


def test_work_grows_with_the_members():
    one, many = (MembersProblem(SIZES, 4, members=members) for members in (1, MANY))
    for what in ("flops", "bytes", "rows"):
        assert getattr(many, what) == MANY * getattr(one, what)
    assert one.flops == StepProblem(SIZES, 4).flops
    assert (one.name, many.name[:10]) == ("1 member of 6-8-5-3 relu batch 4 sgd float32", "11 members")


# The report


def document(*, is_gpu: bool = False) -> dict[str, Any]:
    """A run of the preset whose contenders take 1, 2, ... ms a member in the order of ``RIVALS``."""
    cases = []
    for case in preset("members", "cpu").cases:
        contenders = [rival for rival in rivals_for(case.problem) if rival.name not in case.leave_out]
        results = [
            {"rival": rival.name, "label": rival.label, "notes": "", "status": "ok", "reason": "", "overall": 1e-7}
            | {"seconds": [1e-3 * (number + 1) * case.value] * 3}
            for number, rival in enumerate(contenders)
        ]
        sizes = {"flops": case.problem.flops, "bytes": case.problem.bytes, "rows": case.problem.rows}
        place = {"axis": case.axis, "value": case.value}
        cases.append({"problem": case.problem.describe(), **place, **sizes, "timing": "chain", "results": results})
    machine = {"name": "Test CPU", "slug": "test-cpu", "threads": 2, "is_gpu": is_gpu, "commit": "abc"}
    machine |= {"versions": {"torch": "2"}, "changed_files": []}
    head = {"kind": "times", "preset": "members", "started": "2026-01-02", "rounds": 3, "command": "bench members"}
    run: dict[str, Any] = json.loads(json.dumps({**head, "machine": machine, "cases": cases}))
    return run


def test_the_table_has_the_time_of_one_member():
    text = render([document()], {})
    section = text.partition("## Many networks\n")[2].partition("\n## ")[0]
    tables = [line for line in section.splitlines() if "1 member |" in line]
    assert [line.split("|")[1].strip() for line in tables] == list(curves(document()))
    assert len(tables) == 4
    assert (
        section.count("| **fastmlp TrainStep(MLPEnsemble)** | " + " | ".join(["1.00 ms (3.00×)"] * len(MEMBERS))) == 4
    )
    assert "| loop of PyTorch eager (fused) | 3.00 ms |" in section
    compiled = next(line for line in section.splitlines() if line.startswith("| torch.func.vmap, step compiled"))
    assert compiled.count("–") == 2  # compiled for four of the six
    assert (section.count(NOT_MEASURED), section.count("CPU: not measured")) == (1, 0)
    other = render([document(is_gpu=True)], {}).partition("## Many networks\n")[2].partition("\n## ")[0]
    assert (other.count(NOT_MEASURED), other.count("CPU: not measured")) == (0, 1)


def test_the_readme_has_the_largest_number_of_networks():
    quick = document() | {"preset": "quick", "cases": []}
    text = speed_section([quick, document()])
    rows = [line for line in text.splitlines() if line.startswith("| 54-128-128-7, batch 256, adamw | ")]
    assert rows == ["| 54-128-128-7, batch 256, adamw | 1.00 ms (3.00×) | 2.00 ms (1.50×) | 3.00 ms | 4.00 ms (0.75×) "
                    "| 5.00 ms (0.60×) | 6.00 ms (0.50×) |"]  # fmt: skip
    assert "| 1,000 networks, time per network | fastmlp TrainStep(MLPEnsemble) |" in text
    assert "](bench/results/test-cpu/members.png)" in text
    assert "MLPEnsemble" not in speed_section([quick])


def test_the_plot_has_a_panel_for_each_network_and_optimizer(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("bench.report.figures.save", lambda figure, path: figures.append(figure))
    assert draw(document(), tmp_path, roofline=False) == [tmp_path / "members.png"]
    (figure,) = figures
    assert [axes.get_title() for axes in figure.axes] == list(curves(document()))
    lines = figure.axes[0].get_lines()
    assert {line.get_label(): line.get_ydata()[-1] for line in lines}["fastmlp TrainStep(MLPEnsemble)"] == 1000
    assert [axes.get_xscale() + axes.get_yscale() for axes in figure.axes] == ["loglog"] * 4
    assert len(figure.legends[0].get_texts()) == len(lines) == 6


def test_the_table_at_the_end_of_a_run_fits_eighty_columns(capsys):
    print_run(document())
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines()) <= 80
    assert "a member" in out
