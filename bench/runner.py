"""From a preset to one JSON document: for each case build, judge and time every contender that runs here."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from typing import Any

from . import machine
from .gate import judge
from .presets import Case, Preset
from .problems import GATE_CALLS
from .results import FORMAT, Document
from .rivals import rivals_for
from .rivals.protocol import Rival, Run
from .timing import TURN_S, interleaved

__all__ = ["prepare", "run_case", "run_preset"]

Log = Callable[[str], None]


def prepare(rival: Rival, case: Case) -> tuple[dict[str, Any], Run | None]:
    """(the rival's entry in the JSON, its run if it may be timed): available, built, and right."""
    entry: dict[str, Any] = {"rival": rival.name, "label": rival.label, "notes": rival.notes}
    if rival.name in case.leave_out:
        return {**entry, "status": "left out", "reason": "not part of this preset"}, None
    available = rival.available(case.problem)
    if not available.ok:
        return {**entry, "status": "unavailable", "reason": available.reason}, None
    try:
        begin = time.perf_counter()
        run = rival.build(case.problem)
        run()
        run.finish()
        entry["setup_s"] = time.perf_counter() - begin
        for _ in range(GATE_CALLS - 1):
            run()
        run.finish()
        verdict = judge(case.problem, run.results())
    except Exception as error:  # a contender that breaks must not end the run of the others
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        return {**entry, "status": "failed", "reason": reason[:300]}, None
    entry |= {"worst": verdict.what, "error": verdict.error, "allowed": verdict.allowed, "overall": verdict.overall}
    if not verdict.passed:
        return {**entry, "status": "wrong", "reason": str(verdict)}, None
    return {**entry, "status": "ok", "reason": ""}, run


def run_case(case: Case, rounds: int, log: Log, turn_s: float = TURN_S) -> dict[str, Any]:
    """The case's entry in the JSON."""
    problem = case.problem
    entries, runs = [], {}
    for rival in rivals_for(problem):
        entry, run = prepare(rival, case)
        entries.append(entry)
        if run is not None:
            runs[rival.name] = run
        elif entry["status"] in ("wrong", "failed"):
            log(f"  {rival.label}: {entry['status']}: {entry['reason']}")
    samples = interleaved(runs, rounds, problem.device, turn_s=turn_s) if runs else {}
    for entry in entries:
        if entry["rival"] in samples:
            taken = samples[entry["rival"]]
            entry |= {"calls": taken.calls, "seconds": taken.seconds}
    return {
        "problem": problem.describe(),
        "axis": case.axis,
        "value": case.value,
        "flops": problem.flops,
        "bytes": problem.bytes,
        "rows": problem.rows,
        "results": entries,
    }


def run_preset(
    chosen: Preset, device: str, command: str, log: Log, *, rounds: int | None = None, turn_s: float = TURN_S
) -> Document:
    """Run every case; ``log`` gets a line a case and one a contender that went wrong."""
    started = datetime.datetime.now(datetime.timezone.utc)
    about, peaks = machine.describe(device), machine.peaks(device)
    cases = []
    for number, case in enumerate(chosen.cases, 1):
        begin = time.perf_counter()
        log(f"[{number}/{len(chosen.cases)}] {case.problem.kind}: {case.problem.name}")
        cases.append(run_case(case, rounds or chosen.rounds, log, turn_s))
        log(f"  {time.perf_counter() - begin:.0f} s")
    return {
        "format": FORMAT,
        "kind": "times",
        "preset": chosen.name,
        "command": command,
        "started": started.isoformat(timespec="seconds"),
        "rounds": rounds or chosen.rounds,
        "machine": about,
        "peaks": peaks,
        "cases": cases,
    }
