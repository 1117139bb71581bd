"""The bundled subset and the full FashionMNIST, where this machine has it."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import shutil
import struct
import subprocess
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmlp import data
from fastmlp.base import atomic
from fastmlp.data import DataIntegrityError, fashion_mnist, idx, load_fashion_mnist, make_subset
from tests.support.datasets import Machine, proxy, write


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def full_folder() -> Path:
    """A folder on this machine with all of FashionMNIST."""
    folder = data.find_fashion_mnist()
    if folder is None:
        pytest.skip("the full FashionMNIST is not on this machine")
    return folder


# The times in the gzip headers of the publisher's files, and the MD5 sums of these files. The data set's README and
# torchvision.datasets.FashionMNIST.resources have the sums. The times were found as those that give the sums.
PUBLISHED = {
    "train-images-idx3-ubyte": (1504176606, "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
    "train-labels-idx1-ubyte": (1504176606, "25c81989df183df01b3e8a0aad5dffbe"),
    "t10k-images-idx3-ubyte": (1504176627, "bef4ecab320f06d8554ea6380940ec79"),
    "t10k-labels-idx1-ubyte": (1504176627, "bb300cfdad3c16e7a12a480ee83cd310"),
}


@pytest.fixture(scope="session")
def published(full_folder: Path) -> dict[str, bytes]:
    """The gzip files as the publisher made them, from this machine's copy of the content."""
    paths = fashion_mnist.find_files(full_folder, fashion_mnist.FULL)
    assert paths is not None
    published = {}
    for name, content in fashion_mnist.read_files(paths, fashion_mnist.FULL).items():
        program = shutil.which("gzip")
        if program is None or b"Free Software Foundation" not in subprocess.check_output([program, "--version"]):
            pytest.skip("needs GNU gzip, with which the publisher compressed")
        body = subprocess.run([program, "-6", "-n", "-c"], input=content.data, capture_output=True, check=True).stdout
        has_name, unix = 8, 3
        header = struct.pack("<BBBBIBB", 0x1F, 0x8B, 8, has_name, PUBLISHED[name][0], 0, unix)
        published[name] = header + name.encode() + b"\0" + body[10:]
    return published


class TestSubset:
    def test_bundled(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train, test = load_fashion_mnist(source="bundled")
        assert train.images.shape == (6_000, 784)
        assert test.images.shape == (1_000, 784)
        assert train.labels.bincount().tolist() == [600] * 10
        assert test.labels.bincount().tolist() == [100] * 10
        assert test.source == "FashionMNIST subset 1000 test (bundled with fastmlp)"

    def test_files_are_small_and_licensed(self) -> None:
        folder = fashion_mnist.SUBSET_FOLDER
        assert sum(path.stat().st_size for path in folder.glob("*.gz")) < 3.2e6
        assert "Zalando SE" in (folder / "LICENSE.fashion-mnist").read_text(encoding="utf-8")
        readme = (folder / "README.md").read_text(encoding="utf-8")
        assert all(file.sha256 in readme for pair in fashion_mnist.SUBSET.values() for file in pair)

    def test_gzip_bytes_do_not_depend_on_the_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        first = idx.compress(b"content")
        monkeypatch.setattr(time, "time", lambda: 1e9)
        assert idx.compress(b"content") == first
        assert gzip.decompress(first) == b"content"

    def test_rule(self) -> None:
        labels = np.array([3, 0, 3, 1, 0, 3, 2, 4, 5, 6, 7, 8, 9, 0], dtype=np.uint8)
        assert make_subset.select(labels, 2).tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12]

    def test_making_it_from_other_data(self, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(FileNotFoundError, match="none of the FashionMNIST files"):
            make_subset.main(["--from", str(tmp_path)])
        write(tmp_path / "other", machine.contents)
        with pytest.raises(DataIntegrityError):
            make_subset.main(["--from", str(tmp_path / "other")])
        monkeypatch.setattr(make_subset, "FULL", fashion_mnist.FULL)
        with pytest.raises(SystemExit, match=f"expected .*{fashion_mnist.SUBSET['train'][0].sha256}"):
            make_subset.main(["--from", str(tmp_path / "other"), "--to", str(tmp_path / "made")])
        assert not (tmp_path / "made").exists()

    def test_damaged_installation(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fashion_mnist, "SUBSET_FOLDER", tmp_path)
        with pytest.raises(FileNotFoundError, match=r"has no data\. This installation .* install it again"):
            load_fashion_mnist(source="bundled")

    def test_needs_uint8(self) -> None:
        with pytest.raises(TypeError, match="needs uint8 values, got float64"):
            idx.encode(np.zeros(3))


class TestFullData:
    def test_checksums_are_those_of_the_published_files(self, published: dict[str, bytes]) -> None:
        """FULL's SHA-256 sums were taken from a repackaged copy; the publisher's MD5 sums confirm its content."""
        sums = {name: hashlib.md5(content, usedforsecurity=False).hexdigest() for name, content in published.items()}
        assert sums == {name: md5 for name, (_, md5) in PUBLISHED.items()}

    def test_checksums_are_torchvisions(self) -> None:
        datasets = pytest.importorskip("torchvision.datasets")
        assert datasets.FashionMNIST.resources == [(f"{name}.gz", md5) for name, (_, md5) in PUBLISHED.items()]
        assert tuple(datasets.FashionMNIST.classes) == fashion_mnist.CLASSES

    def test_content(self, full_folder: Path) -> None:
        train, test = load_fashion_mnist(full_folder)
        assert train.images.shape == (60_000, 784)
        assert test.images.shape == (10_000, 784)
        assert train.labels.bincount().tolist() == [6_000] * 10
        assert test.labels.bincount().tolist() == [1_000] * 10
        assert train.source == f"FashionMNIST 60000 train ({full_folder})"

    def test_agrees_with_torchvisions_reader(self, full_folder: Path, tmp_path: Path) -> None:
        datasets = pytest.importorskip("torchvision.datasets")
        raw = tmp_path / "FashionMNIST" / "raw"
        paths = fashion_mnist.find_files(full_folder, fashion_mnist.FULL)
        assert paths is not None
        write(raw, {n: c.tobytes() for n, c in fashion_mnist.read_files(paths, fashion_mnist.FULL).items()})
        for ours, is_train in zip(load_fashion_mnist(tmp_path), (True, False), strict=True):
            theirs = datasets.FashionMNIST(tmp_path, train=is_train)
            assert torch.equal(ours.images, theirs.data.flatten(1))
            assert torch.equal(ours.labels, theirs.targets)

    def test_subset_is_a_part_of_it(self, full_folder: Path) -> None:
        full, subset = load_fashion_mnist(full_folder), load_fashion_mnist(source="bundled")
        for whole, part, per_class in zip(full, subset, (600, 100), strict=True):
            rows = torch.cat([(whole.labels == c).nonzero()[:per_class, 0] for c in range(10)]).sort().values
            assert torch.equal(part.images, whole.images[rows])
            assert torch.equal(part.labels, whole.labels[rows])

    def test_subset_can_be_made_again(
        self, full_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        make_subset.main(["--from", str(full_folder), "--to", str(tmp_path)])
        made = fashion_mnist.find_files(tmp_path, fashion_mnist.SUBSET)
        assert made is not None
        fashion_mnist.read_files(made, fashion_mnist.SUBSET)  # checks the sums
        sums = {f"{file.sha256}  {made[file.name]}" for pair in fashion_mnist.SUBSET.values() for file in pair}
        assert set(capsys.readouterr().out.splitlines()) == sums

    @pytest.mark.slow
    def test_real_torchvision_downloads(
        self,
        published: dict[str, bytes],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """torchvision's own code and MD5 check, with this test as the publisher's server."""
        pytest.importorskip("torchvision")

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.rpartition("/")[2].removesuffix(".gz")
                self.send_response(200)
                self.send_header("Content-Length", str(len(published[name])))
                self.end_headers()
                if self.headers.get("Method") != "HEAD":  # torchvision asks for redirects so
                    self.wfile.write(published[name])

            def log_message(self, *arguments: object) -> None:
                pass

        monkeypatch.setattr(atomic, "cache_folder", lambda: tmp_path / "caches")
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            proxy(monkeypatch, server.server_address[1])
            train, test = load_fashion_mnist(source="torchvision")
            server.shutdown()
        assert (len(train), len(test)) == (60_000, 10_000)
        assert train.origin == str(tmp_path / "caches" / "fashion-mnist")
        assert capfd.readouterr() == ("", "")
