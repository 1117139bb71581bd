"""FashionMNIST: every source and their order, damaged files, the cache, devices."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmlp.data import (
    DataIntegrityError,
    ImageDataset,
    SubsetWarning,
    dataset,
    fashion_mnist,
    fetch,
    load_fashion_mnist,
)
from tests.support.datasets import IMAGES, NAMES, REPOSITORY, Machine, assert_is, file_set, make_contents, posix, write


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


class TestGivenFolder:
    @pytest.mark.parametrize("compressed", [False, True])
    @pytest.mark.parametrize("layout", [".", "raw", "FashionMNIST/raw"])
    def test_layouts(self, machine: Machine, tmp_path: Path, layout: str, compressed: bool) -> None:
        folder = write(tmp_path / "given" / layout, machine.contents, compressed)
        loaded = load_fashion_mnist(tmp_path / "given")
        assert_is(loaded, machine.contents)
        assert loaded[0].source == f"FashionMNIST 40 train ({folder})"
        assert loaded[1].source == f"FashionMNIST 20 test ({folder})"
        assert loaded[0].classes == fashion_mnist.CLASSES
        assert dataset.find_fashion_mnist(tmp_path / "given") == folder
        assert machine.fetched == []

    def test_plain_and_gzip_mixed(self, machine: Machine, tmp_path: Path) -> None:
        folder = write(tmp_path / "given", machine.contents)
        (folder / f"{IMAGES}.gz").write_bytes(gzip.compress((folder / IMAGES).read_bytes()))
        (folder / IMAGES).unlink()
        assert_is(load_fashion_mnist(str(folder)), machine.contents)

    def test_home_is_expanded(self, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("USERPROFILE", str(tmp_path))
        write(tmp_path / "given", machine.contents)
        assert_is(load_fashion_mnist("~/given"), machine.contents)

    def test_folder_without_data_is_an_error_even_with_a_cache(self, machine: Machine, tmp_path: Path) -> None:
        write(machine.cache, machine.contents)
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match=r"empty has no FashionMNIST data; expected train-images") as e:
            load_fashion_mnist(tmp_path / "empty")
        assert "Leave root out" in str(e.value)

    def test_missing_folder(self, machine: Machine, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
            load_fashion_mnist(tmp_path / "nowhere")

    def test_file_instead_of_folder(self, machine: Machine, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises(NotADirectoryError, match="file is a file; expected the folder"):
            load_fashion_mnist(tmp_path / "file")

    def test_some_files_missing(self, machine: Machine, tmp_path: Path) -> None:
        folder = write(tmp_path / "given", machine.contents)
        (folder / NAMES[1]).unlink()
        with pytest.raises(FileNotFoundError, match=r"only 3 of the 4 .*Missing.*: train-labels-idx1-ubyte\."):
            load_fashion_mnist(folder)

    def test_type(self) -> None:
        with pytest.raises(TypeError):
            load_fashion_mnist(5)  # type: ignore[arg-type]


class TestDamagedFiles:
    def damage(self, machine: Machine, folder: Path, name: str, content: bytes) -> str:
        """The error message after ``content`` took the place of file ``name``."""
        write(folder, machine.contents)
        (folder / name.removesuffix(".gz")).unlink()
        (folder / name).write_bytes(content)
        with pytest.raises(DataIntegrityError) as error:
            load_fashion_mnist(folder)
        message = str(error.value)
        assert isinstance(error.value, RuntimeError)
        assert str(folder / name) in message
        plain = name.removesuffix(".gz")
        assert f"{len(machine.contents[plain])} bytes uncompressed" in message
        assert hashlib.sha256(machine.contents[plain]).hexdigest() in message
        assert "Put a good copy in its place" in message
        return message

    def test_truncated_plain(self, machine: Machine, tmp_path: Path) -> None:
        message = self.damage(machine, tmp_path / "d", IMAGES, machine.contents[IMAGES][:-1])
        assert f"Found: {40 * 784 + 15} bytes: the file is truncated" in message

    @pytest.mark.parametrize("keep", [5, 12, 20, -20, -4])
    def test_truncated_gzip(self, machine: Machine, tmp_path: Path, keep: int) -> None:
        content = gzip.compress(machine.contents[IMAGES])[:keep]
        message = self.damage(machine, tmp_path / "d", f"{IMAGES}.gz", content)
        assert f"a damaged or truncated gzip file of {len(content)} bytes" in message

    @pytest.mark.parametrize("position", [16, 5000, -1])
    def test_one_bit_flipped(self, machine: Machine, tmp_path: Path, position: int) -> None:
        content = bytearray(machine.contents[IMAGES])
        content[position] ^= 1
        message = self.damage(machine, tmp_path / "d", IMAGES, bytes(content))
        assert f"SHA-256 {hashlib.sha256(content).hexdigest()}: the file is altered" in message

    def test_one_bit_flipped_in_gzip(self, machine: Machine, tmp_path: Path) -> None:
        content = bytearray(gzip.compress(machine.contents[IMAGES]))
        content[len(content) // 2] ^= 4
        self.damage(machine, tmp_path / "d", f"{IMAGES}.gz", bytes(content))

    def test_altered_content_in_a_sound_gzip(self, machine: Machine, tmp_path: Path) -> None:
        altered = bytearray(machine.contents[IMAGES])
        altered[100] ^= 255
        message = self.damage(machine, tmp_path / "d", f"{IMAGES}.gz", gzip.compress(altered))
        assert "the file is altered" in message

    def test_empty(self, machine: Machine, tmp_path: Path) -> None:
        assert "it is empty" in self.damage(machine, tmp_path / "d", NAMES[1], b"")

    def test_web_page_instead_of_data(self, machine: Machine, tmp_path: Path) -> None:
        message = self.damage(machine, tmp_path / "d", IMAGES, b"<html>Please log in</html>" * 2000)
        assert "starts with 3c 68 74 6d 6c" in message
        assert "starting with 00 00 08 03" in message

    def test_too_long(self, machine: Machine, tmp_path: Path) -> None:
        message = self.damage(machine, tmp_path / "d", IMAGES, machine.contents[IMAGES] + b"\0")
        assert f"more than {40 * 784 + 16} bytes" in message

    def test_another_data_set(self, machine: Machine, tmp_path: Path) -> None:
        message = self.damage(machine, tmp_path / "d", IMAGES, make_contents(seed=1)[IMAGES])
        assert "the file is altered" in message

    def test_gzip_bomb_is_not_unpacked(self, machine: Machine, tmp_path: Path) -> None:
        bomb = gzip.compress(machine.contents[IMAGES] + bytes(200_000_000), compresslevel=1)
        assert "more than" in self.damage(machine, tmp_path / "d", f"{IMAGES}.gz", bomb)

    @pytest.mark.parametrize("place", ["cache", "system"])
    def test_damaged_cache_or_system_folder_is_not_skipped(self, machine: Machine, place: str) -> None:
        folder = write(getattr(machine, place), machine.contents)
        (folder / IMAGES).write_bytes(b"")
        machine.online["debian"] = True
        remedy = {"cache": "Delete the folder", "system": "apt-get install --reinstall dataset-fashion-mnist"}[place]
        with pytest.raises(DataIntegrityError, match=remedy):
            load_fashion_mnist()
        (folder / IMAGES).unlink()
        with pytest.raises(FileNotFoundError, match=remedy):
            load_fashion_mnist()
        assert machine.fetched == []


class TestOrder:
    def test_each_source_in_turn(self, machine: Machine) -> None:
        """Sources appear from the last to the first; each time the new one is used."""
        with pytest.warns(SubsetWarning):
            loaded = load_fashion_mnist()
        assert loaded[0].source == "FashionMNIST subset 6000 train (bundled with fastmlp)"
        assert machine.fetched == ["torchvision", "debian"]

        for name, asked in (("debian", ["torchvision", "debian"]), ("torchvision", ["torchvision"])):
            machine.online[name], machine.fetched = True, []
            loaded = load_fashion_mnist()
            assert_is(loaded, machine.contents)
            assert machine.fetched == asked
            assert loaded[0].source == f"FashionMNIST 40 train ({machine.cache})"
            shutil.rmtree(machine.cache)

        machine.fetched = []
        for folder in (machine.system, machine.cache):
            write(folder, machine.contents)
            loaded = load_fashion_mnist()
            assert_is(loaded, machine.contents)
            assert loaded[0].origin == str(folder)
            assert dataset.find_fashion_mnist() == folder
        assert machine.fetched == []

    def test_downloads_are_cached_and_read_again(self, machine: Machine) -> None:
        machine.online["debian"] = True
        first = load_fashion_mnist()
        second = load_fashion_mnist()
        assert machine.fetched == ["torchvision", "debian"]
        assert_is(second, machine.contents)
        assert first[0].source == second[0].source
        assert {p.name for p in machine.cache.iterdir()} == set(NAMES)
        assert [p.name for p in machine.caches.iterdir()] == ["fashion-mnist"]

    @pytest.mark.parametrize("source", dataset.SOURCES)
    def test_one_source_only(self, machine: Machine, source: str) -> None:
        if source == "bundled":
            assert len(load_fashion_mnist(source="bundled")[0]) == 6000
            return
        with pytest.raises(FileNotFoundError, match=rf"source asked for \({source}: .*apt-get install dataset"):
            load_fashion_mnist(source=source)
        write(machine.cache, machine.contents)
        write(machine.system, machine.contents)
        machine.online = {"torchvision": True, "debian": True}
        assert_is(load_fashion_mnist(source=source), machine.contents)
        assert machine.fetched in ([], [source, source])

    def test_warning_says_what_was_tried_and_what_to_do(self, machine: Machine) -> None:
        with pytest.warns(SubsetWarning) as caught:
            load_fashion_mnist()
        (warning,) = caught
        message = str(warning.message)
        for part in (
            "6000 of 60000 training and 1000 of 10000 test images",
            "not comparable",
            f"cache: no data in {machine.cache}",
            f"system: no data in {machine.system}",
            "torchvision: torchvision is offline",
            "debian: debian is offline",
            "apt-get install dataset-fashion-mnist",
        ):
            assert part in message
        assert warning.filename == __file__
        assert not machine.caches.exists()
        assert dataset.find_fashion_mnist() is None

    def test_unreadable_cache_of_another_user(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        def is_file(path: Path) -> bool:
            if path.is_relative_to(machine.cache):
                raise PermissionError(13, "Permission denied", str(path))
            return os.path.isfile(path)

        monkeypatch.setattr(Path, "is_file", is_file)
        write(machine.system, machine.contents)
        assert load_fashion_mnist()[0].origin == str(machine.system)
        assert dataset.find_fashion_mnist() == machine.system
        with pytest.raises(FileNotFoundError, match="no permission to read"):
            load_fashion_mnist(source="cache")

    def test_unknown_source(self) -> None:
        with pytest.raises(ValueError, match=r"unknown source 'web'; expected one of cache, system"):
            load_fashion_mnist(source="web")
        with pytest.raises(ValueError, match="root or source, not both"):
            load_fashion_mnist("folder", source="cache")


class TestCache:
    def test_damaged_download_is_left_out(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        def damaged(staging: Path) -> Path:
            return write(staging, {**machine.contents, IMAGES: b"not an image"})

        monkeypatch.setattr(fetch, "fetch_torchvision", damaged)
        with pytest.warns(SubsetWarning, match=r"torchvision's download failed: .*is not the expected file"):
            load_fashion_mnist()
        assert not machine.caches.exists()
        machine.online["debian"] = True
        assert_is(load_fashion_mnist(), machine.contents)

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    def test_interrupted_writing_leaves_nothing(
        self, machine: Machine, monkeypatch: pytest.MonkeyPatch, error: BaseException
    ) -> None:
        machine.online["torchvision"] = True
        write_file = dataset.atomic_write

        def fail_at_the_third(path: Path, content: memoryview) -> None:
            if len(list(path.parent.iterdir())) == 2:
                raise error
            write_file(path, content)

        monkeypatch.setattr(dataset, "atomic_write", fail_at_the_third)
        if isinstance(error, OSError):
            with pytest.warns(UserWarning, match="cannot be kept in .*No space left on device") as caught:
                loaded = load_fashion_mnist()
            assert caught[0].filename == __file__
            assert_is(loaded, machine.contents)
            assert loaded[0].origin == "torchvision's download, not kept"
        else:
            with pytest.raises(KeyboardInterrupt):
                load_fashion_mnist()
        assert list(machine.caches.iterdir()) == []

    def test_somebody_else_was_faster(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        def slow(staging: Path) -> Path:
            write(machine.cache, machine.contents)  # meanwhile, in another process
            (machine.cache / "mark").touch()
            return machine.fetcher("debian")(staging)

        machine.online["debian"] = True
        monkeypatch.setattr(fetch, "fetch_torchvision", slow)
        assert_is(load_fashion_mnist(), machine.contents)
        assert (machine.cache / "mark").exists()
        assert [p.name for p in machine.caches.iterdir()] == ["fashion-mnist"]

    def test_abandoned_folders_are_removed(self, machine: Machine) -> None:
        old, new = machine.caches / ".fashion-mnist-old", machine.caches / ".fashion-mnist-new"
        for folder in (old, new):
            write(folder, {IMAGES: b"half"})
        os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
        machine.online["torchvision"] = True
        load_fashion_mnist()
        assert not old.exists()
        assert new.exists()  # another process may be writing it

    @posix
    def test_two_processes(self, tmp_path: Path) -> None:
        """Both processes fetch at the same time; one fills the cache, both get the data, nothing else is left."""
        program = """
            import json, sys, time
            from pathlib import Path
            from fastmlp import data
            from fastmlp.base import atomic
            from fastmlp.data import fashion_mnist, fetch
            folder, me = Path(sys.argv[1]), sys.argv[2]
            atomic.cache_folder = lambda: folder / "caches"
            fetch.SYSTEM_FOLDER = folder / "system"
            fashion_mnist.FULL = fashion_mnist._file_set(40, 20, json.loads((folder / "sums").read_text()))
            def fetched(staging):
                (folder / f"{me}-fetches").touch()
                while len(list(folder.glob("*-fetches"))) < 2:
                    time.sleep(0.01)
                return folder / "mirror"
            fetch.fetch_torchvision = fetched
            train, test = data.load_fashion_mnist()
            print(train.labels.tolist(), train.source)
        """
        contents = make_contents()
        write(tmp_path / "mirror", contents)
        (tmp_path / "sums").write_text(json.dumps([f.sha256 for pair in file_set(contents).values() for f in pair]))
        children = [
            subprocess.Popen(
                [sys.executable, "-W", "error", "-c", textwrap.dedent(program), str(tmp_path), name],
                cwd=REPOSITORY,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for name in ("a", "b")
        ]
        results = [child.communicate(timeout=120) for child in children]
        labels = list(contents["train-labels-idx1-ubyte"][8:])
        expected = f"{labels} FashionMNIST 40 train ({tmp_path / 'caches' / 'fashion-mnist'})\n"
        assert results == [(expected, "")] * 2
        assert [p.name for p in (tmp_path / "caches").iterdir()] == ["fashion-mnist"]
        cached = tmp_path / "caches" / "fashion-mnist"
        assert {p.name: p.read_bytes() for p in cached.iterdir()} == contents


class TestDevice:
    def test_default_and_torch_device(self) -> None:
        for device in (None, "cpu", torch.device("cpu")):
            train, test = load_fashion_mnist(device=device, source="bundled")
            assert train.images.device == test.labels.device == torch.device("cpu")

    def test_unknown_device_before_anything_is_fetched(self, machine: Machine) -> None:
        machine.online["torchvision"] = True
        with pytest.raises(RuntimeError, match="Expected one of cpu, cuda"):
            load_fashion_mnist(device="gpu")
        assert machine.fetched == []

    @pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA works here")
    def test_device_that_this_machine_lacks(self, machine: Machine) -> None:
        with pytest.raises(RuntimeError, match=r"device 'cuda' cannot be used: .*'cpu' always works"):
            load_fashion_mnist(device="cuda")
        assert machine.fetched == []

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_gpu(self) -> None:
        on_cpu, _ = load_fashion_mnist(source="bundled")
        train, test = load_fashion_mnist(device="cuda", source="bundled")
        assert train.images.is_cuda
        assert test.labels.is_cuda
        assert torch.equal(train.images.cpu(), on_cpu.images)
        with pytest.raises(RuntimeError, match="cannot be used"):
            load_fashion_mnist(device=f"cuda:{torch.cuda.device_count()}", source="bundled")


class TestImageDataset:
    def make(self, **changes: object) -> ImageDataset:
        fields: dict[str, object] = {
            "images": torch.zeros(3, 4, dtype=torch.uint8),
            "labels": torch.zeros(3, dtype=torch.int64),
            "name": "N",
            "split": "test",
            "origin": "here",
            "classes": ("a", "b"),
        }
        return ImageDataset(**{**fields, **changes})  # type: ignore[arg-type]

    def test_source_and_repr(self) -> None:
        dataset = self.make()
        assert dataset.source == "N 3 test (here)"
        assert repr(dataset) == "ImageDataset(N 3 test (here), device=cpu)"

    def test_immutable(self) -> None:
        with pytest.raises(AttributeError):
            self.make().name = "other"  # type: ignore[misc]

    def test_to(self) -> None:
        dataset = self.make()
        assert dataset.to("cpu").images is dataset.images
        moved = dataset.to("meta")
        assert moved.images.device.type == moved.labels.device.type == "meta"
        assert moved.source == dataset.source

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"images": np.zeros((3, 4), np.uint8)}, TypeError, "images must be a tensor, got ndarray"),
            ({"images": torch.zeros(3, 4)}, TypeError, "images must be torch.uint8, got torch.float32"),
            ({"labels": torch.zeros(3)}, TypeError, "labels must be torch.int64, got torch.float32"),
            ({"labels": torch.zeros(2, dtype=torch.int64)}, ValueError, r"got \[3, 4\] and \[2\]"),
            ({"images": torch.zeros(3, 2, 2, dtype=torch.uint8)}, ValueError, r"got \[3, 2, 2\] and \[3\]"),
            ({"labels": torch.zeros(3, dtype=torch.int64, device="meta")}, ValueError, "got cpu and meta"),
        ],
    )
    def test_bad_fields(self, changes: dict[str, object], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            self.make(**changes)


def test_torchvision_is_not_imported(tmp_path: Path) -> None:
    program = "import sys; from fastmlp import data; data.load_fashion_mnist(source='bundled'); "
    program += "print([name for name in sys.modules if name.partition('.')[0] == 'torchvision'])"
    result = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_images_are_aligned() -> None:
    train, test = load_fashion_mnist(source="bundled")
    assert train.images.data_ptr() % 64 == test.images.data_ptr() % 64 == 0
    assert train.images.is_contiguous()
