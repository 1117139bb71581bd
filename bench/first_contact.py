"""One command for the first contact with a GPU: does fastmlp run, is it right, and how fast is it?

    python3 bench/first_contact.py --out DIR --limit SECONDS [--rehearse]

The command works from a checkout that is not installed. Its own process touches no GPU and imports no torch. Every
stage runs in processes of its own with a deadline of its own. A stage that crashes, hangs or fails stops no other
stage. ``DIR`` gets ``first_contact.json``, which is written anew after every item, and a few files beside it. The
verdict and the tables are printed last. ``--rehearse`` runs everything on a simulated GPU at small sizes, and gives no
times.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

if not __package__:  # run as a file, Python would look for modules in bench/, where some have common names
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench.contact.document import FILE_BYTES, Document, save_text
from bench.contact.pool import ROOT, Stage, run_stage
from bench.contact.verdict import verdict

__all__ = ["STAGES", "main", "run"]

_MODULES = "bench.contact."
#: Processes of a stage that compiles, at most; the machine's cores bound them too.
_MANY = 14

#: The stages in their order, explained in README.md beside this file. ``seconds`` are shares of the limit.
STAGES = (
    Stage("0 versions", _MODULES + "versions", 15, 25, least=3),
    Stage("1 kernels once", _MODULES + "kernels_once", 30, 120, least=10, workers=_MANY, unit_s=60),
    Stage("2a tiles", _MODULES + "tiles", 90, 80, least=15, workers=_MANY, unit_s=60),
    Stage("2b network", _MODULES + "network", 50, 150, least=15, workers=_MANY, unit_s=90),
    Stage("2c tests", _MODULES + "tests", 110, 30, least=15),
    Stage("3 timings", _MODULES + "timings", 170, 80, least=20, unit_s=60),
    Stage("3x alternatives", _MODULES + "alternatives", 40, 40, least=10, unit_s=60),
    Stage("4 profile", _MODULES + "profile", 35, 60, least=10, unit_s=60),
)
#: Seconds kept for the verdict and for ending the processes.
RESERVE = 5.0


class _Stopped(BaseException):
    """The command was told to end."""


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stopped(signal.Signals(number).name)


def _environment(scratch: Path) -> dict[str, str]:
    """The environment of every process: it finds the checkout, and shares the caches of compiled code."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
    environment.setdefault("TRITON_CACHE_DIR", str(scratch / "triton"))
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(scratch / "inductor"))
    environment["XDG_CACHE_HOME"] = str(scratch / "cache")  # no tiles and no choices from an earlier measurement
    environment.pop("TRITON_INTERPRET", None)
    return environment


def run(out: Path, limit: float, *, rehearse: bool = False, stages: Sequence[Stage] = STAGES) -> str:
    """Run the stages within ``limit`` seconds; returns the verdict. Leaves at most 8 files in ``out``.

    Raises:
        OSError: nothing can be written to ``out``.
    """
    begin = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    save_text(out / "verdict.txt", "not finished\n")
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    document = Document(out, rehearsal=rehearse, started=started, limit_s=limit)
    logs: list[str] = []
    with tempfile.TemporaryDirectory(prefix="first-contact-", ignore_cleanup_errors=True) as scratch:
        environment = _environment(Path(scratch))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        processes = max(1, cores - 2 if cores > 4 else cores)
        try:
            for number, stage in enumerate(stages):
                left = limit - RESERVE - (time.monotonic() - begin)
                # All later stages share the time that earlier stages did not use.
                shares = [later.rehearsed if rehearse else later.seconds for later in stages[number:]]
                seconds = left * shares[0] / sum(shares)
                if seconds < stage.least:
                    reason = f"{max(0.0, seconds):.0f} s are left for it, and it needs {stage.least:.0f}"
                    document.stage(stage.name, status="skipped", reason=reason, seconds=0.0)
                    continue
                _say(f"{stage.name}: at most {seconds:.0f} s")
                chosen = Stage(**{**vars(stage), "workers": min(stage.workers, processes)})
                options = ["--out", str(out.resolve()), "--workers", str(min(_MANY, processes))]
                found = run_stage(
                    chosen, document, seconds, [*options, *(["--rehearse"] if rehearse else [])], environment
                )
                logs += [f"==== {stage.name}\n{log}" for log in found]
                about = document.data["stages"][stage.name]
                _say(f"  {about['status']} after {about['seconds']:.0f} s {about['reason']}".rstrip()[:300])
        except (_Stopped, KeyboardInterrupt) as stopped:
            for stage in stages:
                if document.data["stages"].get(stage.name, {}).get("status", "running") == "running":
                    document.stage(stage.name, status="stopped", reason=str(stopped) or "interrupted")
    document.stage("5 verdict", status="ok", reason="", seconds=round(time.monotonic() - begin, 1))
    return _finish(out, document, logs)


def _finish(out: Path, document: Document, logs: list[str]) -> str:
    try:
        text = verdict(document.data)
    except Exception as error:  # the numbers are in the file, and the reader must know of the error
        text = f"the verdict could not be written ({type(error).__name__}: {error})\n"
    if document.unwritten:
        text = f"{document.path.name} could not be written: {document.unwritten}\n{text}"
    try:
        save_text(out / "verdict.txt", text)
        save_text(out / "log.txt", "\n".join(logs)[-FILE_BYTES // 4 :])
        for path in out.iterdir():
            if path.stat().st_size > FILE_BYTES:
                os.truncate(path, FILE_BYTES)
    except OSError as error:
        text += f"{error}\n"
    return text


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # the output may be closed
        print(line, flush=True)


def main() -> int:
    """Run the command; the exit status is 1 if anything is wrong or unfinished, 2 if nothing can be written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--limit", type=float, default=520, help="seconds for all stages (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="run without a GPU, at small sizes, and give no times")
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    try:
        text = run(args.out, args.limit, rehearse=args.rehearse)
    except OSError as error:
        print(f"first_contact.py: {args.out} cannot be written to: {error}", file=sys.stderr)
        return 2
    _say(text)
    return 0 if text.startswith("OK") else 1


if __name__ == "__main__":
    sys.exit(main())
