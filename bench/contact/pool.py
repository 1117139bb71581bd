"""The processes of one stage: they take its units in turn, and a process that crashes or hangs is replaced.

A process is ``python -m bench.contact``, in a session of its own, so that a kill also ends what it has started. It
reads ``list`` and ``run SECONDS UNIT`` from its standard input and answers in JSON lines on a pipe of their own. The
last 64 KiB of its output are kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .document import BAD, Document

__all__ = ["ROOT", "Stage", "run_stage"]

ROOT = Path(__file__).resolve().parent.parent.parent
_LOG_BYTES, _LINE_BYTES = 64 << 10, 1 << 20
#: Seconds between the time at which a unit should stop by itself and its end.
MARGIN = 2.0

Message = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: its name in the tables.
        module: a module with ``units`` and ``run``.
        seconds: its share of the time, relative to the other stages'.
        rehearsed: the share in a rehearsal, which spends its time on compiling and simulating.
        least: the seconds below which it is skipped.
        workers: processes at most; the machine's cores bound them too.
        unit_s: seconds that one unit may take.
    """

    name: str
    module: str
    seconds: float
    rehearsed: float = 1.0
    least: float = 1.0
    workers: int = 1
    unit_s: float = 600.0


class _Ended(Exception):
    """The process is gone."""


class _Worker:
    """One process of a stage."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str]) -> None:
        results, theirs = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.contact", *arguments, "--results", str(theirs)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            pass_fds=(theirs,), start_new_session=True, cwd=ROOT, env=environment,
        )  # fmt: skip
        os.close(theirs)
        os.set_blocking(results, False)
        self._results, self._buffer = results, b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(results, selectors.EVENT_READ)
        self._log: deque[bytes] = deque()
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    def _read_log(self) -> None:
        assert self.process.stdout is not None
        size = 0
        with contextlib.suppress(OSError, ValueError):
            while chunk := os.read(self.process.stdout.fileno(), 1 << 14):
                self._log.append(chunk)
                size += len(chunk)
                while size > _LOG_BYTES:
                    size -= len(self._log.popleft())

    @property
    def log(self) -> str:
        """The end of what the process printed."""
        return b"".join(self._log).decode(errors="replace")[-_LOG_BYTES:]

    def ask(self, line: str) -> None:
        """Send a line."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise _Ended(str(error)) from error

    def answer(self, until: float) -> Message:
        """The next message.

        Raises:
            TimeoutError: none came.
            _Ended: the process is gone, or writes something else than messages.
        """
        while b"\n" not in self._buffer:
            if len(self._buffer) > _LINE_BYTES:
                raise _Ended("it wrote a line without an end")
            ended = self.process.poll() is not None  # asked before the pipe, which then has all there is
            if self._selector.select(min(0.2, max(0.0, until - time.monotonic()))):
                if not (data := os.read(self._results, 1 << 16)):
                    raise _Ended("it closed its pipe")
                self._buffer += data
            elif ended:
                raise _Ended("it ended")
            elif time.monotonic() > until:
                raise TimeoutError
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError as error:
            raise _Ended(f"it wrote {line[:200]!r}") from error
        return message if isinstance(message, dict) else {}

    def end(self) -> int | None:
        """Kill the process and all that it started; returns its exit status, negative for a signal."""
        status = self.process.poll()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # no signal reaches it inside the driver
            self.process.wait(5)
        self._reader.join(1)
        self._selector.close()
        os.close(self._results)
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()
        return status


@dataclass
class _Run:
    """One run of a stage."""

    stage: Stage
    document: Document
    arguments: list[str]
    environment: dict[str, str]
    until: float
    units: deque[str] = field(default_factory=deque)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopped: bool = False
    reasons: list[str] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)
    workers: set[_Worker] = field(default_factory=set)

    def start(self) -> _Worker:
        worker = _Worker(self.arguments, self.environment)
        with self.lock:
            self.workers.add(worker)
        try:
            worker.answer(self.until)  # "ready"
        except (_Ended, TimeoutError) as error:
            how = "was not ready in time" if isinstance(error, TimeoutError) else f"did not start: {error}"
            self.reasons.append(f"a process {how}; {_last(self.drop(worker)[1])}")
            raise _Ended(how) from error
        return worker

    def drop(self, worker: _Worker) -> tuple[int | None, str]:
        """End a process; returns its exit status and the end of its log."""
        status = worker.end()
        with self.lock:
            self.workers.discard(worker)
            if worker.log.strip():
                self.logs.append(worker.log)
        return status, worker.log

    def serve(self, worker: _Worker | None) -> None:
        """Take units until none are left, or no time; runs in a thread of its own."""
        while not self.stopped and time.monotonic() < self.until - MARGIN:
            with self.lock:
                unit = self.units.popleft() if self.units else None
            if unit is None:
                break
            try:
                worker = worker or self.start()
            except _Ended:
                with self.lock:
                    self.units.appendleft(unit)
                return
            if not self.one(worker, unit):
                worker = None
        if worker is not None:
            self.drop(worker)

    def one(self, worker: _Worker, unit: str) -> bool:
        """Run one unit; returns whether the process can take another."""
        begin = time.monotonic()
        until = min(self.until, begin + self.stage.unit_s)
        name = self.stage.name
        try:
            worker.ask(f"run {max(0.0, until - begin - MARGIN):.1f} {unit}")
            while "done" not in (message := worker.answer(until)):
                self.document.item(name, unit, **message)
            if message["done"]:
                return True
            self.drop(worker)
        except TimeoutError:
            log = self.drop(worker)[1]
            # At the end of its stage a unit may only have been slow.
            word, what = ("unfinished", ", at the end of its stage") if until == self.until else ("hung", "")
            reason = f"killed after {time.monotonic() - begin:.0f} s{what}; {_last(log)}"
            self.document.item(name, unit, status=word, reason=reason)
        except _Ended as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(1)  # its pipe closes a moment before it has a status
            status, log = self.drop(worker)
            word = "unfinished" if self.stopped else "crashed"
            self.document.item(
                name, unit, status=word, reason=f"{error}, {_status(status)}; {_last(log)}", log=log[-1500:]
            )
        return False


def _status(status: int | None) -> str:
    if status is None:
        return "still running"
    if status >= 0:
        return f"exit status {status}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-status).name
    return f"signal {-status}"


def _last(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return f"its last words: {lines[-1][:300]}" if lines else "it printed nothing"


def run_stage(
    stage: Stage, document: Document, seconds: float, options: Sequence[str], environment: dict[str, str]
) -> list[str]:
    """Run a stage within ``seconds``; items go to the document. Returns the ends of its processes' outputs."""
    begin = time.monotonic()
    run = _Run(stage, document, [stage.module, *options], environment, begin + seconds)
    document.stage(stage.name, status="running", allowed_s=round(seconds, 1))
    planned = 0
    try:
        first = run.start()
        first.ask("list")
        found = first.answer(run.until)
        if "units" not in found:
            raise _Ended(str(found.get("reason", found)))
        run.units.extend(found["units"])
        planned = len(run.units)
        count = max(1, min(stage.workers, planned))
        threads = [threading.Thread(target=run.serve, args=(first if i == 0 else None,)) for i in range(count)]
        _join(threads, run)
    except (_Ended, TimeoutError) as error:
        run.reasons.append(f"its work was not listed: {error or 'no time left'}")
    finally:
        run.stopped = True
        for worker in list(run.workers):
            run.drop(worker)
    if run.units:
        reason = f"{len(run.units)} of {planned} units: no time left"
        document.item(stage.name, "", status="skipped", reason=reason, units=list(run.units)[:200])
    items = document.items(stage.name)
    bad = sum(item.get("status") in BAD for item in items)
    unfinished = run.units or any(item.get("status") == "unfinished" for item in items)
    failed = bad or not planned or (run.units and run.reasons)
    status = "failed" if failed else "not finished" if unfinished else "ok"
    document.stage(
        stage.name,
        status=status,
        reason="; ".join(dict.fromkeys(run.reasons))[-1500:],
        seconds=round(time.monotonic() - begin, 1),
        units=planned,
        units_left=len(run.units),
        bad=bad,
    )
    return run.logs


def _join(threads: list[threading.Thread], run: _Run) -> None:
    def wait() -> None:
        # Not join: after a signal, Python 3.11's join takes the thread for ended.
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.05)

    for thread in threads:
        thread.start()
    try:
        wait()
    except BaseException:  # the command is being ended: end the processes first, then their threads
        run.stopped = True
        for worker in list(run.workers):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(worker.process.pid, signal.SIGKILL)
        wait()
        raise
