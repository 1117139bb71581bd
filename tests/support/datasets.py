"""What the tests of the data share: a small data set in FashionMNIST's format, and a machine to load it on."""

from __future__ import annotations

import gzip
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmlp.base import atomic
from fastmlp.data import ImageDataset, fashion_mnist, fetch, idx
from fastmlp.data.fetch import SourceUnavailable

REPOSITORY = Path(__file__).parents[2]
IMAGES = "train-images-idx3-ubyte"
NAMES = (IMAGES, "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

posix = pytest.mark.skipif(os.name != "posix", reason="the stand-ins are POSIX scripts")


def make_contents(seed: int = 0) -> dict[str, bytes]:
    """A data set in FashionMNIST's format: 40 training and 20 test images."""
    rng = np.random.default_rng(seed)
    contents = {}
    for split, count in (("train", 40), ("t10k", 20)):
        contents[f"{split}-images-idx3-ubyte"] = idx.encode(rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        contents[f"{split}-labels-idx1-ubyte"] = idx.encode(rng.permutation(np.arange(count) % 10).astype(np.uint8))
    return contents


def file_set(contents: dict[str, bytes]) -> fashion_mnist.FileSet:
    return fashion_mnist._file_set(40, 20, tuple(hashlib.sha256(contents[n]).hexdigest() for n in NAMES))


def write(folder: Path, contents: dict[str, bytes], compressed: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


def assert_is(loaded: tuple[ImageDataset, ImageDataset], contents: dict[str, bytes]) -> None:
    for dataset, split, count in zip(loaded, ("train", "t10k"), (40, 20), strict=True):
        assert dataset.images.dtype == torch.uint8
        assert dataset.images.shape == (count, 784)
        assert dataset.images.numpy().tobytes() == contents[f"{split}-images-idx3-ubyte"][16:]
        assert dataset.labels.dtype == torch.int64
        assert dataset.labels.tolist() == list(contents[f"{split}-labels-idx1-ubyte"][8:])
        assert len(dataset) == count


class Machine:
    """A machine with nothing on it, no cache, no system folder, no network, that `fastmlp.data` sees from now on."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.caches = folder / "caches"
        self.cache = self.caches / "fashion-mnist"
        self.system = folder / "system"
        self.contents = make_contents()
        self.fetched: list[str] = []
        self.online: dict[str, bool] = {"torchvision": False, "debian": False}
        monkeypatch.setattr(atomic, "cache_folder", lambda: self.caches)
        monkeypatch.setattr(fetch, "SYSTEM_FOLDER", self.system)
        monkeypatch.setattr(fetch, "fetch_torchvision", self.fetcher("torchvision"))
        monkeypatch.setattr(fetch, "fetch_debian", self.fetcher("debian"))
        monkeypatch.setattr(fashion_mnist, "FULL", file_set(self.contents))

    def fetcher(self, name: str) -> Callable[[Path], Path]:
        def fetch_files(staging: Path) -> Path:
            self.fetched.append(name)
            if not self.online[name]:
                raise SourceUnavailable(f"{name} is offline")
            layout = Path("torchvision", "FashionMNIST", "raw") if name == "torchvision" else Path("unpacked")
            write(staging / layout, self.contents, compressed=True)
            return staging / layout.parts[0]

        return fetch_files


def proxy(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Send the HTTP requests of child processes to ``port`` of this machine."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
