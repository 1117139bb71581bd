"""Stage 2c: the tests that need a GPU, as ``make test-gpu`` selects them; junit files in the folder of results.

Tests that fill the GPU's memory run one by one, after the others.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from .pool import ROOT
from .report import Report

__all__ = ["DEVICE", "command", "run", "units"]

DEVICE = False
#: pytest's -m, and whether the tests run in parallel.
SELECTIONS = {"pytest": ("gpu and not large", True), "pytest-large": ("gpu and large", False)}
#: The test file of a rehearsal.
REHEARSED = "tests/support/test_covering.py"
_ENDING = 12.0


def units(report: Report) -> list[str]:
    """Runs of pytest."""
    return list(SELECTIONS)[: 1 if report.rehearsal else None]


def command(unit: str, report: Report) -> list[str]:
    """pytest's command line for a selection, if possible with ``report.workers`` processes."""
    marked, parallel = SELECTIONS[unit]
    selection = [REHEARSED] if report.rehearsal else ["-m", marked]
    if parallel and not report.rehearsal:
        selection += ["-n", str(report.workers), "--dist", "worksteal"]
    # -o keeps the junit file small; without a cache folder the checkout stays as it was.
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-o", "junit_logging=no", "--maxfail=200"]
    return [sys.executable, "-m", "pytest", *options, *selection, f"--junitxml={_junit(unit, report)}"]


def _junit(unit: str, report: Report) -> Path:
    return report.out / f"{unit.replace('pytest', 'junit')}.xml"


def run(unit: str, report: Report) -> None:
    """Run a selection; when its time is over it is interrupted, so that the finished tests are reported."""
    process = subprocess.Popen(
        command(unit, report),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    interrupted = False
    try:
        text = process.communicate(timeout=max(1.0, report.seconds_left - _ENDING))[0]
    except subprocess.TimeoutExpired:
        interrupted = True
        process.send_signal(signal.SIGINT)
        try:
            text = process.communicate(timeout=max(1.0, report.seconds_left - 1))[0]
        except subprocess.TimeoutExpired:
            process.kill()
            text = process.communicate()[0]
    print(text[-8000:], flush=True)
    _judge(unit, report, process.returncode, text, interrupted=interrupted)


def _judge(unit: str, report: Report, status: int, text: str, *, interrupted: bool) -> None:
    junit = _junit(unit, report)
    lines = [line for line in text.splitlines() if line.strip()]
    last = lines[-1].strip("= ") if lines else ""
    if not junit.exists():
        report.item(unit, "failed", f"exit status {status}, no junit file; {last}", text=text)
        return
    # An interrupted test has no name.
    cases = [case for case in ElementTree.parse(junit).iter("testcase") if case.get("name")]
    broken = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    for case in broken[:60]:
        found = case.find("failure") if case.find("failure") is not None else case.find("error")
        message = found.get("message", "") if found is not None else ""
        report.item(f"{case.get('classname')}::{case.get('name')}", "wrong", message[:400])
    slowest = sorted(cases, key=lambda case: -float(case.get("time", 0)))[:10]
    skipped = sum(case.find("skipped") is not None for case in cases)
    reason = "interrupted, because its time was over; " * interrupted + last
    good = status == 0 and not broken and len(cases) > skipped
    report.item(
        unit,
        "ok" if good else "unfinished" if interrupted and not broken else "wrong",
        reason,
        tests=len(cases),
        broken=len(broken),
        skipped=skipped,
        slowest=[f"{float(case.get('time', 0)):.1f} s {case.get('name')}" for case in slowest],
    )
