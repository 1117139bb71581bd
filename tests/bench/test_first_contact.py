"""bench/first_contact.py: stages that crash, hang and shout beside good ones, and the cheap stages rehearsed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest

from bench import first_contact
from bench.contact.document import FILE_BYTES, Document
from bench.contact.pool import ROOT, Stage
from bench.contact.verdict import LENGTH, verdict

STUBS = "tests.bench.first_contact_stubs"


def load(out: Path) -> dict[str, Any]:
    return json.loads((out / "first_contact.json").read_text())


def alive(pid: int) -> bool:
    """Whether a process runs; a process that has ended and waits for its parent does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    """One run of five stages, with the verdict and the items by unit.

    The module of one stage is missing, the units of one stage go wrong, one stage never ends, one stage has no time
    left, and one stage is good.
    """
    out = tmp_path_factory.mktemp("contact") / "new" / "folder"
    stages = (
        Stage("missing", "tests.no_such_module", 10, 10),
        Stage("wrong", STUBS, 30, 30, workers=2, unit_s=6),
        Stage("unaffordable", STUBS, 1, 1, least=1000),
        Stage("imports", "bench.contact.versions", 30, 30),
    )
    text = first_contact.run(out, 150, rehearse=True, stages=stages)
    items: dict[str, Any] = {}
    for item in load(out)["items"]:
        if item["stage"] == "wrong":
            items.setdefault(item["unit"], []).append(item)
    return out, text, items


def test_every_unit_has_its_result_whatever_the_others_do(broken: tuple[Path, str, dict[str, Any]]) -> None:
    _, _, items = broken
    status = {unit: found[-1]["status"] for unit, found in items.items()}
    assert status == {
        "good": "ok", "raises": "failed", "crashes": "crashed", "hangs": "hung", "shouts": "ok", "huge": "failed",
        "garbage": "crashed", "NaN": "wrong", "last": "ok",
    }  # fmt: skip
    assert items["raises"][0]["reason"] == "ValueError: a kernel that raises"
    assert items["crashes"][0]["name"] == "before the crash"
    assert "SIGABRT" in items["crashes"][1]["reason"]
    assert items["NaN"][0]["share"] == "nan"


def test_a_hanging_process_is_killed_with_its_children(broken: tuple[Path, str, dict[str, Any]]) -> None:
    out, _, _ = broken
    assert not alive(int((out / "child.pid").read_text()))


def test_a_stage_that_does_not_start_or_has_no_time_stops_no_other(broken: tuple[Path, str, dict[str, Any]]) -> None:
    stages = load(broken[0])["stages"]
    assert {name: about["status"] for name, about in stages.items()} == {
        "missing": "failed", "wrong": "failed", "unaffordable": "skipped", "imports": "ok", "5 verdict": "ok",
    }  # fmt: skip
    assert "no_such_module" in stages["missing"]["reason"]
    assert "it needs 1000" in stages["unaffordable"]["reason"]


def test_the_versions_are_those_of_this_process(broken: tuple[Path, str, dict[str, Any]]) -> None:
    import torch

    found = {item["name"]: item for item in load(broken[0])["items"] if item["stage"] == "imports"}
    assert found["packages"]["torch"] == torch.__version__.partition("+")[0] or found["packages"]["torch"] in (
        torch.__version__
    )
    assert found["device"]["capability"] == "80"
    assert found["import fastmlp.kernels"]["file"] == str(ROOT / "kernels" / "__init__.py")


def test_what_is_killed_at_the_end_of_its_stage_is_unfinished_and_not_wrong(tmp_path: Path) -> None:
    hanging = Stage("slow", "tests.bench.first_contact_stubs", 1, 1, unit_s=600)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(first_contact, "RESERVE", 0.0)
        patch.setenv("FIRST_CONTACT_UNITS", "good,hangs,last")
        text = first_contact.run(tmp_path, 8, rehearse=True, stages=(hanging,))
    assert [(item["unit"], item["status"]) for item in load(tmp_path)["items"]] == [
        ("good", "ok"), ("hangs", "unfinished"), ("", "skipped"),
    ]  # fmt: skip
    assert load(tmp_path)["stages"]["slow"]["status"] == "not finished"
    assert text.startswith("NOT FINISHED")


def test_what_runs_when_the_command_is_ended_is_unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRST_CONTACT_UNITS", "good,hangs,last")
    before = signal.signal(signal.SIGTERM, first_contact._stop)
    stages = [Stage(name, STUBS, 1, 1, workers=2) for name in ("first", "second")]

    def end_it() -> None:
        while not (tmp_path / "child.pid").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_it).start()
    try:
        text = first_contact.run(tmp_path, 100, rehearse=True, stages=stages)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert {item["unit"]: item["status"] for item in load(tmp_path)["items"]}["hangs"] == "unfinished"
    assert {about["status"] for about in load(tmp_path)["stages"].values()} == {"stopped", "ok"}
    assert text.startswith("NOT FINISHED")
    assert not alive(int((tmp_path / "child.pid").read_text()))


def test_files_and_verdict_are_small(broken: tuple[Path, str, dict[str, Any]]) -> None:
    out, text, _ = broken
    files = [path for path in out.iterdir() if path.name != "child.pid"]
    assert {path.name for path in files} == {"first_contact.json", "verdict.txt", "log.txt"}
    assert all(path.stat().st_size < FILE_BYTES for path in files)
    assert "the end of the shouting" in (out / "log.txt").read_text()
    assert (out / "log.txt").stat().st_size < 1 << 20
    assert text == (out / "verdict.txt").read_text()
    assert text.startswith("NOT OK: first contact, rehearsal without a GPU; no time is given")
    assert "hangs" in text


def test_the_verdict_has_at_most_ten_thousand_characters() -> None:
    items = [
        {"stage": "3", "unit": "u", "name": f"{kind} {i} " + 300 * "x", "status": "wrong", "reason": 900 * "y", **more}
        for i in range(400)
        for kind, more in (("kernel", {"share": 2.0, "kind": str(i)}), ("step", {"table": "facts", "us": 1.5}))
    ]
    stages = {f"stage {i}": {"status": "failed", "reason": 1000 * "z"} for i in range(12)}
    text = verdict({"rehearsal": False, "stages": stages, "items": items})
    assert len(text) <= LENGTH
    assert text.startswith("NOT OK")
    assert "... cut" in text


def test_a_verdict_shows_times_beside_the_estimates_only_if_they_were_taken() -> None:
    step = {"stage": "3", "unit": "u", "status": "info", "table": "step", "mode": "bfloat16", "batch": 64}
    of = {"estimate_us": 12.5, "estimate_eager_us": 105.0, "estimate_of": "H100 SXM, batch 64; never measured"}
    items = [
        {**step, "name": "a", "who": "fastmlp", "us": 12.25, **of}, {**step, "name": "b", "who": "eager", "us": None},
        {**step, "table": "kernels", "name": "fwd 64x512 over 784 bfloat16", "us": 3.0, "estimate_us": 4.5},
    ]  # fmt: skip
    text = verdict({"rehearsal": False, "stages": {"3": {"status": "ok"}}, "items": items})
    assert text.startswith("OK")
    assert [line.split() for line in text.splitlines() if line.startswith("bfloat16")] == [
        ["bfloat16", "64", "12.2", "12.5", "105.0", "0.98"],
        ["bfloat16", "64:", "fwd", "64x512", "over", "784", "3.0/4.5"],
    ]
    assert "never measured" in text
    assert "H100 SXM" in text
    del items[0]["estimate_us"]
    assert "12.2" not in verdict({"rehearsal": True, "stages": {}, "items": items})


def test_the_file_is_whole_at_any_time(tmp_path: Path) -> None:
    document = Document(tmp_path, rehearsal=True)
    seen, done = [], threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.append(len(load(tmp_path)["items"]))

    document.stage("s", status="running")
    reader = threading.Thread(target=read)
    reader.start()
    for i in range(300):
        document.item("s", str(i), status="ok", value=i)
    done.set()
    reader.join()
    assert seen == sorted(seen)
    assert len(load(tmp_path)["items"]) == 300
    assert [path.name for path in tmp_path.iterdir()] == ["first_contact.json"]


def test_a_file_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    document = Document(tmp_path, rehearsal=True)
    document.stage("s", status="ok")
    (tmp_path / ".first_contact.json.tmp").mkdir()
    document.item("s", "u", status="ok")
    assert "Directory" in document.unwritten
    (tmp_path / ".first_contact.json.tmp").rmdir()
    document.item("s", "u", status="ok")
    assert document.unwritten == ""
    assert len(load(tmp_path)["items"]) == 2


def test_the_file_stays_below_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.contact.document.FILE_BYTES", 40_000)
    document = Document(tmp_path, rehearsal=True)
    for i in range(100):
        document.item("s", str(i), status="ok", reason=1000 * "x")
    assert (tmp_path / "first_contact.json").stat().st_size < 40_000
    assert load(tmp_path)["items_left_out"] > 50


def test_the_driver_imports_neither_torch_nor_fastmlp() -> None:
    code = (
        "import runpy, sys; sys.argv = ['first_contact.py', '--help']\n"
        "try: runpy.run_path('bench/first_contact.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'triton', 'numpy', 'fastmlp'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_folder_that_cannot_be_made_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command = [sys.executable, "bench/first_contact.py", "--out", str(tmp_path / "file" / "x"), "--limit", "9"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "cannot be written to" in done.stderr


def test_told_to_end_it_still_gives_its_verdict(tmp_path: Path) -> None:
    """The script starts as a file from another folder with an empty environment, and is ended within a stage."""
    command = [sys.executable, str(ROOT / "bench" / "first_contact.py"), "--out", "out", "--limit", "600", "--rehearse"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        path = tmp_path / "out" / "first_contact.json"
        until = time.monotonic() + 60
        while time.monotonic() < until and not (path.exists() and load(path.parent)["items"]):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        text = process.communicate(timeout=60)[0]
    assert text.startswith("0 versions: at most")
    assert "NOT FINISHED: first contact, rehearsal" in text
    assert "0 versions        stopped" in text
    assert load(tmp_path / "out")["items"][0]["python"]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """torch.cuda's events, streams and graphs as stand-ins that record, beside tensors of a GPU that is not there.

    Each stand-in has the methods and signatures of the original, so a call that torch does not know raises.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    calls: list[str] = []

    def recorded(name: str, value: Any = None) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return value

        return call

    event = create_autospec(torch.cuda.Event)
    event.return_value.record.side_effect = recorded("record")
    event.return_value.elapsed_time.side_effect = recorded("elapsed", 5.0)
    stream = create_autospec(torch.cuda.Stream)
    graph = create_autospec(torch.cuda.CUDAGraph)
    graph.return_value.replay.side_effect = recorded("replay")

    @contextmanager
    def capturing(cuda_graph: Any, pool: Any = None) -> Iterator[None]:
        calls.append("capture begins")
        yield
        calls.append("capture ends")

    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream.return_value)
    monkeypatch.setattr(torch.cuda, "stream", lambda chosen: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", recorded("synchronize"))
    with FakeTensorMode():
        yield calls


def test_a_capture_has_one_run_before_it(cuda: list[str]) -> None:
    from bench.contact.device import Gpu

    replay = Gpu().capture(lambda: cuda.append("launch"))
    replay()
    assert cuda == ["launch", "capture begins", "launch", "capture ends", "replay"]


def test_times_are_read_after_waiting(cuda: list[str]) -> None:
    from bench.contact.device import Gpu

    def launch() -> None:
        cuda.append("launch")

    assert Gpu().chain(launch, 4) == 5000.0 / 4
    assert cuda == [*3 * ["launch"], "synchronize", "record", *4 * ["launch"], "record", "synchronize", "elapsed"]
    cuda.clear()
    assert Gpu().cold(launch, 2) == 5000.0
    assert cuda == ["launch", *2 * ["record", "launch", "record"], "synchronize", "elapsed", "elapsed"]
    cuda.clear()
    assert Gpu().host(launch, 2) > 0
    assert cuda == [*3 * ["launch"], "synchronize", *2 * ["launch"], "synchronize"]
    cuda.clear()

    class Contender:
        def __call__(self) -> None:
            launch()

        def finish(self) -> None:
            cuda.append("finished")

        def results(self) -> dict[str, Any]:
            return {}

    assert Gpu().steps(Contender(), 2) > 0
    assert cuda == [*3 * ["launch"], "launch", "finished", *2 * ["launch"], "finished"]


def test_a_rehearsal_has_every_method_of_a_gpu_and_no_time() -> None:
    from bench.contact.device import Gpu, Rehearsal

    methods = {name for name, value in vars(Gpu).items() if callable(value)}
    assert methods == {name for name, value in vars(Rehearsal).items() if callable(value)}
    here = Rehearsal()
    runs: list[int] = []
    for timed in (here.chain, here.steps, here.cold, here.host):
        assert timed(lambda: runs.append(1), 100) is None
    assert len(runs) == 4


def test_the_strongest_contenders_have_their_turn_first_and_none_takes_minutes() -> None:
    from bench.contact import timings
    from bench.contact.device import Gpu

    units = timings.units(SimpleNamespace(device=Gpu(), rehearsal=False))  # type: ignore[arg-type]
    turns = list(dict.fromkeys(unit.split()[0] for unit in units if unit.startswith("rival:")))
    assert set(turns[:2]) == {"rival:cuda_graph", "rival:whole_default"}
    assert not any("max_autotune" in turn for turn in turns)


def test_nvidia_smi_is_asked_field_by_field_where_it_does_not_know_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.contact.device import Gpu

    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\ncase "$*" in *odd*) exit 2;; *name,power*) echo "H, 5 W";; *) echo " H ";; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert Gpu().query("name power") == {"name": "H", "power": "5 W"}
    assert Gpu().query("name odd power") == {"name": "H", "power": "H"}


@pytest.mark.execute
def test_stages_rehearsed(tmp_path: Path) -> None:
    """A unit of each stage that launches kernels runs in this process. Right results pass, and no time is given."""
    import torch

    from bench.contact import alternatives, kernels_once, network, tiles, timings
    from bench.contact.device import opened
    from bench.contact.report import Report

    results, ours = os.pipe()
    report = Report(ours, tmp_path, rehearsal=True)
    threads = torch.get_num_threads()
    with opened(rehearsal=True) as device:
        report._device = device
        kernels_once.run("tuple bfloat16", report)
        tiles.run(next(unit for unit in tiles.units(report) if unit.startswith("fwd tf32 wide")), report)
        network.run("labels -", report)
        timings.run("gaps - 0", report)
        alternatives.run(alternatives.units(report)[0], report)
    torch.set_num_threads(threads)
    os.close(ours)
    with os.fdopen(results) as stream:
        items = [json.loads(line) for line in stream]
    assert [item for item in items if item["status"] not in ("ok", "info")] == []
    assert [item["name"] for item in items[:3]] == [
        "tuple arguments, bfloat16",
        "fwd tf32 wide 16x32x32 2w 4s",
        "label -1",
    ]
    assert sum("share" in item and item["share"] <= 1 for item in items) == 7
    assert {item.get("us") for item in items} == {None}


@pytest.mark.execute
def test_a_wrong_product_is_over_its_budget() -> None:
    import torch

    from bench.contact.device import opened
    from bench.contact.judging import product_share
    from bench.static.workloads import float32_precision
    from bench.tune import product

    threads = torch.get_num_threads()
    with opened(rehearsal=True):
        right = product("fwd", 17, 16, 32, torch.float32, "cpu")
        assert product_share(right, "float32")[0] <= 1
        wrong = dataclasses.replace(right, results=lambda: {"A": right.results()["A"] * (1 + 1e-5)})
        assert product_share(wrong, "float32")[0] > 1
        # Operands have digits that tf32 lacks, so one tf32 product is accurate enough for tf32 but not for float32.
        with float32_precision("tf32"):
            assert product_share(right, "float32")[0] > 1
            assert product_share(right, "tf32")[0] <= 1
    torch.set_num_threads(threads)


def test_the_alternatives_are_of_kinds_and_modes_that_exist() -> None:
    from bench.contact.alternatives import ALTERNATIVES
    from bench.contact.device import Gpu
    from bench.contact.judging import NUMERICS
    from fastmlp.kernels.configs import GEMM_KINDS

    assert {tried.finding for tried in ALTERNATIVES} == {"P1", "P2", "P3", "P4", "P5", "P6"}
    for tried in ALTERNATIVES:
        assert tried.kind in GEMM_KINDS
        assert tried.mode in NUMERICS
        assert tried.batch in Gpu.batches
        assert not tried.splits or tried.kind in ("wgrad", "update")
        assert all(n & (n - 1) == 0 for tile in tried.tiles for n in (*tile[:3], tile.num_warps))


def _tests_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, seconds: float) -> list[dict[str, Any]]:
    """The items of the stage of tests on a file with this source."""
    from bench.contact import tests
    from bench.contact.report import Report

    path = tmp_path / "test_it.py"
    path.write_text(source)
    monkeypatch.setattr(tests, "REHEARSED", str(path))
    results, ours = os.pipe()
    tests.run("pytest", Report(ours, tmp_path, rehearsal=True, until=time.monotonic() + seconds))
    os.close(ours)
    with os.fdopen(results) as stream:
        return [json.loads(line) for line in stream]


def test_failing_tests_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def test_good(): pass\ndef test_bad(): assert 1 == 2, 'not equal'\n"
    bad, run = _tests_stage(tmp_path, monkeypatch, source, 90)
    assert bad["name"].endswith("::test_bad")
    assert "not equal" in bad["reason"]
    assert (run["status"], run["tests"], run["broken"]) == ("wrong", 2, 1)


def test_tests_that_take_too_long_are_interrupted_and_those_before_them_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time is over when the slow test has begun, however long a process takes to start on this machine."""
    begun = tmp_path / "begun"

    class Pytest(subprocess.Popen):  # type: ignore[type-arg]
        waited = False

        def communicate(self, input: str | None = None, timeout: float | None = None) -> tuple[str, str]:
            if not self.waited:
                self.waited = True
                while not begun.exists() and self.poll() is None:
                    time.sleep(0.05)
                raise subprocess.TimeoutExpired(self.args, 0)
            return super().communicate(input, timeout)

    monkeypatch.setattr(subprocess, "Popen", Pytest)
    source = (
        "import pathlib, time\ndef test_good(): pass\n"
        f"def test_slow():\n    pathlib.Path({str(begun)!r}).touch()\n    time.sleep(100)\n"
    )
    (run,) = _tests_stage(tmp_path, monkeypatch, source, 300)
    assert (run["status"], run["tests"]) == ("unfinished", 1)
    assert run["reason"].startswith("interrupted")


def test_the_stage_of_tests_selects_as_make_does() -> None:
    from bench.contact.tests import SELECTIONS

    made = re.findall(r'-m "(gpu[^"]*)"', (ROOT / "Makefile").read_text())
    assert set(made) <= {marked for marked, _ in SELECTIONS.values()}
