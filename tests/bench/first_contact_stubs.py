"""A stage of bench/first_contact.py whose units go wrong in every way; it needs no device and imports no torch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from bench.contact.report import Report

DEVICE = False
UNITS = ("good", "raises", "crashes", "hangs", "shouts", "huge", "garbage", "NaN", "last")


def units(report: Report) -> list[str]:
    return os.environ.get("FIRST_CONTACT_UNITS", ",".join(UNITS)).split(",")


def run(unit: str, report: Report) -> None:
    match unit:
        case "raises":
            raise ValueError("a kernel that raises\nwith a second line")
        case "crashes":
            report.item("before the crash")
            os.abort()
        case "hangs":
            # A child that outlives its parent unless the whole group is killed.
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            Path(report.out, "child.pid").write_text(str(child.pid))
            time.sleep(600)
        case "shouts":
            for _ in range(64):
                os.write(1, b"x" * (1 << 20))
            print("the end of the shouting", flush=True)
            report.item("shouted")
        case "huge":
            report.item("huge", values=list(range(100_000)))
        case "garbage":
            os.write(report.results, b"no JSON\n")
            time.sleep(600)
        case "NaN":
            report.share("NaN", float("nan"))
        case _:
            report.item(unit)
