"""From a preset to one JSON document: every contender that runs here is built, judged and timed in each case."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bench.presets import Case, Preset
from bench.problems import GATE_CALLS
from bench.rivals import rivals_for
from bench.rivals.protocol import Rival, Run

from . import machine
from .gate import judge
from .results import FORMAT, Document
from .timing import TURN_S, Turns, take_turns

__all__ = ["BuiltCase", "groups", "prepare", "run_preset"]

Log = Callable[[str], None]

#: Bytes that the cases of a group may take together, and the contenders that each case is assumed to have.
GROUP_BYTES, _CONTENDERS = 4 << 30, 10


def prepare(rival: Rival, case: Case) -> tuple[dict[str, Any], Run | None]:
    """(The rival's entry in the JSON, its run or None); the run is available, built, and right."""
    entry: dict[str, Any] = {"rival": rival.name, "label": rival.label, "notes": rival.notes}
    if rival.name in case.leave_out:
        return {**entry, "status": "left out", "reason": "not part of this preset"}, None
    available = rival.available(case.problem)
    if not available.ok:
        return {**entry, "status": "unavailable", "reason": available.reason}, None
    judged = case.problem.without_chance
    try:
        begin = time.perf_counter()
        run = rival.build(judged)
        run()
        run.finish()
        entry["setup_s"] = time.perf_counter() - begin
        for _ in range(GATE_CALLS - 1):
            run()
        run.finish()
        verdict = judge(judged, run.results())
        if judged is not case.problem:
            run = rival.build(case.problem)
            run()
            run.finish()
    except Exception as error:  # a contender that breaks must not end the run of the others
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        return {**entry, "status": "failed", "reason": reason[:300]}, None
    entry |= {"worst": verdict.what, "error": verdict.error, "allowed": verdict.allowed, "overall": verdict.overall}
    if not verdict.passed:
        return {**entry, "status": "wrong", "reason": str(verdict)}, None
    return {**entry, "status": "ok", "reason": ""}, run


class BuiltCase:
    """A case whose contenders are built, judged and warmed up."""

    def __init__(self, case: Case, log: Log, turn_s: float = TURN_S) -> None:
        self.case = case
        self._entries, runs = [], {}
        for rival in rivals_for(case.problem):
            entry, run = prepare(rival, case)
            self._entries.append(entry)
            if run is not None:
                runs[rival.name] = run
            elif entry["status"] in ("wrong", "failed"):
                log(f"  {rival.label}: {entry['status']}: {entry['reason']}")
        self.turns = Turns(runs, case.problem.device, case.problem.timing, turn_s=turn_s)

    def entry(self) -> dict[str, Any]:
        """The case in the JSON, with the times taken so far."""
        problem = self.case.problem
        for entry in self._entries:
            if entry["rival"] in self.turns.samples:
                taken = self.turns.samples[entry["rival"]]
                entry |= {"calls": taken.calls, "seconds": taken.seconds}
        return {
            "problem": problem.describe(),
            "axis": self.case.axis,
            "value": self.case.value,
            "flops": problem.flops,
            "bytes": problem.bytes,
            "rows": problem.rows,
            "timing": problem.timing,
            "results": self._entries,
        }


def groups(cases: Sequence[Case]) -> Iterator[list[Case]]:
    """The cases in their order, in groups that fit the memory; the cases of a group take their rounds together."""
    group: list[Case] = []
    taken = 0
    for case in cases:
        size = _CONTENDERS * case.problem.memory
        if group and taken + size > GROUP_BYTES:
            yield group
            group, taken = [], 0
        group.append(case)
        taken += size
    if group:
        yield group


def run_preset(
    chosen: Preset, device: str, command: str, log: Log, *, rounds: int | None = None, turn_s: float = TURN_S
) -> Document:
    """Run every case; ``log`` gets a line per case, per contender that went wrong, and per group that was timed."""
    started = datetime.datetime.now(datetime.timezone.utc)
    about, peaks = machine.describe(device), machine.peaks(device)
    rounds = rounds or chosen.rounds
    cases: list[dict[str, Any]] = []
    for group in groups(chosen.cases):
        built: list[BuiltCase] = []
        for case in group:
            begin = time.perf_counter()
            log(f"[{len(cases) + len(built) + 1}/{len(chosen.cases)}] {case.problem.kind}: {case.problem.name}")
            built.append(BuiltCase(case, log, turn_s))
            log(f"  built in {time.perf_counter() - begin:.0f} s")
        begin = time.perf_counter()
        take_turns([case.turns for case in built], rounds)
        log(f"{rounds} rounds of {len(group)} in {time.perf_counter() - begin:.0f} s")
        cases += [case.entry() for case in built]
    return {
        "format": FORMAT,
        "kind": "times",
        "preset": chosen.name,
        "command": command,
        "started": started.isoformat(timespec="seconds"),
        "rounds": rounds,
        "machine": about,
        "peaks": peaks,
        "cases": cases,
    }
