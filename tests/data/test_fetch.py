"""Fetching FashionMNIST: the watched child process, torchvision's download, the Debian package."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import pytest

from fastmlp.base import atomic
from fastmlp.data import SubsetWarning, fetch, load_fashion_mnist
from fastmlp.data.fetch import SourceUnavailable, fetch_debian, fetch_torchvision
from fastmlp.data.idx import DataIntegrityError
from tests.support.datasets import NAMES, Machine, assert_is, posix, proxy, write
from tests.support.faults import KINDS, every_kill, every_point


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


class TestRunWatched:
    def run(self, folder: Path, program: str, **timeouts: float) -> None:
        fetch.run_watched([sys.executable, "-S", "-c", textwrap.dedent(program)], folder, **timeouts)

    def test_prints_nothing(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.run(tmp_path, "import sys; print('out'); print('50%', file=sys.stderr); open('done', 'w')")
        assert (tmp_path / "done").exists()
        assert capfd.readouterr() == ("", "")

    def test_failure_says_the_last_line(self, tmp_path: Path) -> None:
        with pytest.raises(SourceUnavailable, match=r"failed: the reason$"):
            self.run(tmp_path, "import sys; print('10%\\r20%\\r'); sys.exit('the reason')")

    def test_failure_prefers_apts_error_lines(self, tmp_path: Path) -> None:
        with pytest.raises(SourceUnavailable, match=r"failed: first; second$"):
            self.run(tmp_path, "import sys; print('E: first\\nE: second\\nW: no matter'); sys.exit(100)")

    def test_silent_failure(self, tmp_path: Path) -> None:
        with pytest.raises(SourceUnavailable, match="it printed nothing"):
            self.run(tmp_path, "import sys; sys.exit(1)")

    def test_no_such_program(self, tmp_path: Path) -> None:
        with pytest.raises(SourceUnavailable, match="cannot be started"):
            fetch.run_watched([str(tmp_path / "nothing")], tmp_path)

    @posix
    def test_stalled_child_is_ended_with_its_helpers(self, tmp_path: Path) -> None:
        program = """
            import os, subprocess, sys, time
            helper = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
            open("pids", "w").write(f"{os.getpid()} {helper.pid}")
            time.sleep(600)
        """
        with pytest.raises(SourceUnavailable, match=r"received nothing for 0\.5 seconds"):
            self.run(tmp_path, program, start_timeout=60, stall_timeout=0.5)
        deadline = time.monotonic() + 30
        for pid in map(int, (tmp_path / "pids").read_text().split()):
            while is_running(pid):
                assert time.monotonic() < deadline, f"process {pid} still runs"
                time.sleep(0.05)

    def test_progress_is_not_a_stall(self, tmp_path: Path) -> None:
        program = """
            import time
            for i in range(9):
                open("file", "a").write("x"); time.sleep(0.4)
        """
        self.run(tmp_path, program, start_timeout=60, stall_timeout=3)
        assert (tmp_path / "file").read_text() == "x" * 9


def is_running(pid: int) -> bool:
    """Whether the process runs, which a process that has ended does not, even if nobody waited for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not Path("/proc/self").exists()


class TestTorchvision:
    """The child process, with a stand-in for torchvision on its path."""

    def stand_in(self, folder: Path, monkeypatch: pytest.MonkeyPatch, download: str) -> None:
        package = folder / "modules" / "torchvision"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        program = f"""
import os, socket, sys, time
class FashionMNIST:
    def __init__(self, root, train, download):
        assert download
        raw = os.path.join(root, "FashionMNIST", "raw")
        os.makedirs(raw)
{textwrap.indent(textwrap.dedent(download), " " * 8)}
"""
        (package / "datasets.py").write_text(program)
        monkeypatch.setenv("PYTHONPATH", str(folder / "modules"))

    def test_download(
        self, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(fetch, "fetch_torchvision", fetch_torchvision)
        mirror = write(tmp_path / "mirror", machine.contents)
        self.stand_in(
            tmp_path,
            monkeypatch,
            f"""
            import shutil
            print("100%|####|", file=sys.stderr)
            shutil.copytree({str(mirror)!r}, raw, dirs_exist_ok=True)
            """,
        )
        loaded = load_fashion_mnist()
        assert_is(loaded, machine.contents)
        assert loaded[0].origin == str(machine.cache)
        assert machine.fetched == []
        assert capfd.readouterr() == ("", "")

    def test_error_becomes_the_reason(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stand_in(tmp_path, monkeypatch, "raise RuntimeError('Error downloading:\\nTried mirror,\\n  got 404')")
        with pytest.raises(SourceUnavailable, match=r"Error downloading: Tried mirror, got 404$"):
            fetch_torchvision(tmp_path)

    def test_hanging_download_is_ended(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stand_in(tmp_path, monkeypatch, "time.sleep(600)")
        monkeypatch.setattr(fetch, "STALL_TIMEOUT", 0.5)
        with pytest.raises(SourceUnavailable, match=r"received nothing for 0\.5 seconds"):
            fetch_torchvision(tmp_path)

    def test_connections_have_a_timeout(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stand_in(tmp_path, monkeypatch, "raise RuntimeError(socket.getdefaulttimeout())")
        with pytest.raises(SourceUnavailable, match=rf"failed: {fetch.SOCKET_TIMEOUT}$"):
            fetch_torchvision(tmp_path)

    def test_not_installed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stand_in(tmp_path, monkeypatch, "")
        (tmp_path / "modules" / "torchvision" / "datasets.py").write_text("raise ImportError('no torchvision here')")
        with pytest.raises(SourceUnavailable, match="torchvision cannot be imported: no torchvision here"):
            fetch_torchvision(tmp_path)

    def test_real_torchvision_without_network(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("torchvision")
        with socket.socket() as reserved:  # bound but not listening: connections are refused
            reserved.bind(("127.0.0.1", 0))
            proxy(monkeypatch, reserved.getsockname()[1])
            with pytest.raises(SourceUnavailable, match="Error downloading train-images-idx3-ubyte"):
                fetch_torchvision(tmp_path)


@posix
class TestDebian:
    """The path of a package, with stand-ins for apt-get and dpkg, for which a package is a tar file."""

    @pytest.fixture
    def tools(self, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(fetch, "fetch_debian", fetch_debian)
        monkeypatch.setattr(fetch, "SYSTEM_FOLDER", Path("/usr/share/datasets/fashion-mnist-of-the-test"))
        write(tmp_path / "package/usr/share/datasets/fashion-mnist-of-the-test", machine.contents, compressed=True)
        shutil.make_archive(str(tmp_path / "package"), "tar", tmp_path / "package")
        folder = tmp_path / "bin"
        folder.mkdir()
        monkeypatch.setenv("PATH", str(folder))
        self.script(folder / "dpkg", "import tarfile; tarfile.open(args[1]).extractall(args[2])")
        return folder

    def script(self, path: Path, program: str) -> None:
        program = textwrap.dedent(program)
        path.write_text(f"#!{sys.executable}\nimport os, sys, shutil\nargs = sys.argv[1:]\n{program}\n")
        path.chmod(0o755)

    def apt_get(self, folder: Path, program: str) -> None:
        log = folder.parent / "log"
        package = f"{folder.parent / 'package.tar'}"
        prelude = f"open({str(log)!r}, 'a').write(' '.join(args) + '\\n'); package = {package!r}\n"
        self.script(folder / "apt-get", prelude + textwrap.dedent(program))

    def test_download_and_unpack(self, tools: Path, machine: Machine, capfd: pytest.CaptureFixture[str]) -> None:
        self.apt_get(tools, "print('Get:1'); shutil.copy(package, 'dataset-fashion-mnist_0_all.deb')")
        loaded = load_fashion_mnist(source="debian")
        assert_is(loaded, machine.contents)
        assert loaded[0].origin == str(machine.cache)
        assert capfd.readouterr() == ("", "")
        (call,) = (tools.parent / "log").read_text().splitlines()
        assert call.endswith("download dataset-fashion-mnist")
        assert "Timeout=10" in call

    def test_lists_of_our_own_where_the_system_has_none(self, tools: Path, machine: Machine) -> None:
        self.apt_get(
            tools,
            """
            lists = [a for a in args if a.startswith("-oDir::State::Lists=")]
            if not lists:
                sys.exit("E: Unable to locate package dataset-fashion-mnist")
            done = os.path.join(lists[0].partition("=")[2], "done")
            if args[-1] == "update":
                open(done, "w")
            else:
                assert os.path.exists(done)
                shutil.copy(package, 'dataset-fashion-mnist_0_all.deb')
            """,
        )
        assert_is(load_fashion_mnist(source="debian"), machine.contents)
        assert len((tools.parent / "log").read_text().splitlines()) == 3

    @pytest.mark.parametrize(
        ("program", "reason"),
        [
            ("sys.exit('E: Failed to fetch: Temporary failure resolving')", "Temporary failure resolving"),
            ("sys.exit('E: Unable to locate package dataset-fashion-mnist')", "Unable to locate package"),
            ("pass", "left 0 packages"),
            ("open('dataset-fashion-mnist_0_all.deb', 'w')", "dpkg failed"),
            ("import time; time.sleep(600)", "received nothing"),
        ],
    )
    def test_failures(
        self, tools: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch, program: str, reason: str
    ) -> None:
        monkeypatch.setattr(fetch, "STALL_TIMEOUT", 3.0 if "sleep" in program else 60.0)
        self.apt_get(tools, program)
        with pytest.warns(SubsetWarning, match=f"debian: .*{reason}"):
            load_fashion_mnist()
        assert not machine.caches.exists()

    def test_not_a_debian(self, tools: Path) -> None:
        with pytest.raises(FileNotFoundError, match="needs apt-get and dpkg, which are not installed"):
            load_fashion_mnist(source="debian")

    @pytest.mark.slow
    def test_real_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        if not (shutil.which("apt-get") and shutil.which("dpkg")):
            pytest.skip("not a Debian")
        command = ["apt-get", "-q", "-oAcquire::http::Timeout=10", "-oAcquire::Retries=0", "download", fetch.PACKAGE]
        if subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=300).returncode != 0:
            pytest.skip("apt-get reaches no repository that has the package")
        monkeypatch.setattr(atomic, "cache_folder", lambda: tmp_path / "caches")
        train, test = load_fashion_mnist(source="debian")
        assert (len(train), len(test)) == (60_000, 10_000)


@posix
class TestFaults:
    """A fault at any file call of a download leaves no cache or a whole one, and the next load is right."""

    @pytest.mark.parametrize("kind", [*KINDS, "kill"])
    def test_a_fault_at_any_call(
        self, request: pytest.FixtureRequest, machine: Machine, kind: str, recwarn: pytest.WarningsRecorder
    ) -> None:
        full = request.config.getoption("full")
        machine.online["debian"] = True

        def before() -> None:
            shutil.rmtree(machine.caches, ignore_errors=True)

        def work() -> None:
            with warnings.catch_warnings(), contextlib.suppress(KeyboardInterrupt):
                warnings.simplefilter("ignore")
                assert_is(load_fashion_mnist(source="debian"), machine.contents)

        points = 0
        kills = every_kill(machine.caches, before, work, 1 if full else 9)
        for _ in kills if kind == "kill" else every_point(machine.caches, kind, before, work, 1 if full else 3):
            points += 1
            names = set(os.listdir(machine.cache)) if machine.cache.exists() else set()
            assert names in (set(), set(NAMES))
            machine.fetched.clear()
            assert_is(load_fashion_mnist(source="debian"), machine.contents)
            assert os.listdir(machine.caches) == ["fashion-mnist"]
        print(f"{kind}: {points} faults, 0 losses")
        assert points >= (2 if kind == "half" else 40 if full else 5)

    def test_gzip_with_endless_zeros(self, machine: Machine, tmp_path: Path) -> None:
        folder = write(tmp_path / "data", machine.contents, compressed=True)
        os.truncate(folder / f"{NAMES[0]}.gz", 20 << 30)
        with pytest.raises(DataIntegrityError, match=f"Found: {20 << 30} bytes, more than any copy has"):
            load_fashion_mnist(folder)
