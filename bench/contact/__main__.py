"""A process of a stage: ``python -m bench.contact MODULE --results FD``; ``pool`` starts it and talks to it."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import time
from pathlib import Path
from typing import Any

from .report import Report


def _listed(stage: Any, report: Report) -> dict[str, Any]:
    try:
        return {"units": list(stage.units(report))}
    except Exception as error:
        return {"reason": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Answer until the standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("--results", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    os.set_inheritable(args.results, False)
    report = Report(args.results, args.out, args.rehearse, args.workers)
    stage = importlib.import_module(args.module)
    with contextlib.ExitStack() as stack:
        if getattr(stage, "DEVICE", True):
            from .device import opened

            report._device = stack.enter_context(opened(rehearsal=args.rehearse))
        report.send({"ready": True})
        for line in sys.stdin:
            command, _, rest = line.rstrip("\n").partition(" ")
            if command == "list":
                report.send(_listed(stage, report))
                continue
            seconds, _, unit = rest.partition(" ")
            report.until = time.monotonic() + float(seconds)
            usable = True
            try:
                stage.run(unit, report)
            except Exception as error:  # what a driver, a compiler or a kernel raises is the result
                report.exception(unit, error)
            if report._device is not None:
                try:
                    report._device.synchronize()
                except Exception as error:  # for example after an illegal access, when every further call fails
                    report.exception(f"{unit}: the device afterwards", error)
                    usable = False
            report.send({"done": usable and not report.spent})


if __name__ == "__main__":
    main()
