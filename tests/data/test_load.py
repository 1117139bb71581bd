"""Data by one text, torchvision's sets, tables and their standardization."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastmlp.base import atomic
from fastmlp.data import DataIntegrityError, Standardization, Table, fetch, load_data, torchvision_sets
from fastmlp.data.fetch import SourceUnavailable
from fastmlp.data.torchvision_sets import SETS, parsed
from tests.support.small_data import bars, idx_folder


def test_the_bundled_subset():
    train, test = load_data("bundled")
    assert (len(train), len(test), train.shape) == (6000, 1000, (28, 28))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "no/such/folder",
            "no/such/folder does not exist; expected fashion-mnist, bundled, torchvision:NAME, a folder",
        ),
        ("fashion_mnits", "fashion_mnits does not exist; expected"),
        ("fashion_mnits", "Did you mean 'fashion-mnist'?"),
        ("bundle", "Did you mean 'bundled'?"),
        ("mnist", "Did you mean 'torchvision:MNIST'?"),
        ("cifar-10", "Did you mean 'torchvision:CIFAR10'?"),
        ("torchvision:MNITS", "unknown data set of torchvision 'MNITS'; expected one of FashionMNIST, MNIST, KMNIST"),
        ("torchvision:MNITS", "Did you mean 'MNIST'?"),
        ("torchvision:SVHN", "unknown data set of torchvision 'SVHN'"),
        ("torchvision:EMNIST:lettres", "has an unknown split 'lettres'; expected one of balanced, byclass, bymerge"),
        ("torchvision:EMNIST:lettres", "Did you mean 'letters'?"),
        ("torchvision:MNIST:letters", "has an unknown split 'letters'; only EMNIST has splits"),
        ("torchvision:MNIST@", "names no folder; expected torchvision:MNIST@FOLDER, or nothing after it"),
    ],
)
def test_words_that_name_nothing(source, words):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_data(source)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_no_npz(tmp_path):
    (tmp_path / "data.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"data.csv is a file, but no .npz file; expected fashion-mnist"):
        load_data(tmp_path / "data.csv")
    if os.name == "posix":
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(ValueError, match="is neither a folder nor a regular file"):
            load_data(tmp_path / "fifo")


def test_a_missing_file_is_missing_for_values_too():
    with pytest.raises(FileNotFoundError, match=r"tabel\.npz does not exist; expected fashion-mnist"):
        load_data("tabel.npz", values=True)


@pytest.mark.parametrize("source", [None, "bundled", "torchvision:MNIST", "."])
def test_only_npz_files_have_values(source):
    with pytest.raises(ValueError, match=r"has classes, but the loss is one of values; expected an \.npz file"):
        load_data(source, values=True)


# torchvision


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No cache, no ./data, and no network."""

    def refuse(staging: Path, name: str, **options: str) -> Path:
        raise SourceUnavailable(f"{name} {options or ''} is offline")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(atomic, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(fetch, "fetch_torchvision", refuse)


def test_every_name_is_a_class_of_torchvision():
    datasets = pytest.importorskip("torchvision.datasets")
    for name in SETS:
        assert parsed(name) == parsed(name.lower())
        assert parsed(name)[0] == getattr(datasets, name).__name__
    assert tuple(datasets.EMNIST.splits) == tuple(
        sorted(torchvision_sets.EMNIST_SPLITS, key=datasets.EMNIST.splits.index)
    )
    assert parsed("emnist@~")[1:] == ({"split": "balanced"}, Path.home())
    assert parsed("EMNIST:letters") == ("EMNIST", {"split": "letters"}, None)


@pytest.mark.parametrize("where", ["named", "data", "cache"])
def test_torchvisions_own_files(tmp_path, offline, where):
    pytest.importorskip("torchvision")
    root = {"named": tmp_path / "my", "data": tmp_path / "data", "cache": tmp_path / "cache/torchvision/MNIST"}[where]
    idx_folder(root / "MNIST/raw")
    train, test = load_data(f"torchvision:mnist{f'@{root}' if where == 'named' else ''}")
    images, labels = bars(64)
    assert train.images.numpy().tobytes() == images.tobytes()
    assert train.labels.tolist() == labels.tolist()
    assert (len(test), train.shape, train.classes[3]) == (16, (8, 8), "3 - three")
    assert train.source == f"MNIST 64 train ({root})"


def test_a_download_enters_the_cache_whole(tmp_path, offline, monkeypatch):
    pytest.importorskip("torchvision")

    def fetched(staging: Path, name: str, **options: str) -> Path:
        idx_folder(staging / "torchvision/MNIST/raw")
        return staging / "torchvision"

    with pytest.raises(FileNotFoundError, match=r"neither in data/ nor in .*download failed \(MNIST  is offline\). If"):
        load_data("torchvision:MNIST")
    with pytest.raises(FileNotFoundError, match=r"\(EMNIST {'split': 'balanced'} is offline\)"):
        load_data("torchvision:EMNIST")
    assert list((tmp_path / "cache/torchvision").iterdir()) == []
    monkeypatch.setattr(fetch, "fetch_torchvision", fetched)
    (tmp_path / "cache/torchvision/MNIST").mkdir()  # what an older torchvision left
    assert len(load_data("torchvision:MNIST")[0]) == 64
    assert [path.name for path in (tmp_path / "cache/torchvision").iterdir()] == ["MNIST"]
    monkeypatch.setattr(fetch, "fetch_torchvision", None)
    assert len(load_data("torchvision:MNIST")[0]) == 64


def test_damaged_and_missing_files(tmp_path, offline):
    pytest.importorskip("torchvision")
    with pytest.raises(FileNotFoundError, match=r"has no MNIST of torchvision; expected the folder that torchvision\."):
        load_data(f"torchvision:MNIST@{tmp_path}")
    with pytest.raises(FileNotFoundError, match=r"none is no folder; expected the folder that torchvision\."):
        load_data(f"torchvision:MNIST@{tmp_path / 'none'}")
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(FileNotFoundError, match=r"cifar-10-batches-py has not all files of CIFAR10, or a file that"):
        load_data(f"torchvision:CIFAR10@{tmp_path}")
    folder = idx_folder(tmp_path / "MNIST/raw")
    (folder / "train-images-idx3-ubyte").write_bytes(b"damaged")
    with pytest.raises(DataIntegrityError, match="torchvision cannot read MNIST in"):
        load_data(f"torchvision:MNIST@{tmp_path}")


def test_without_torchvision(monkeypatch, offline):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(RuntimeError, match=r"needs the package torchvision, which cannot be imported .*pip install"):
        load_data("torchvision:MNIST")


def part(data: object, targets: object, classes: int) -> SimpleNamespace:
    return SimpleNamespace(data=data, targets=targets, classes=[f"c{i}" for i in range(classes)])


def test_what_is_special_about_some_sets(tmp_path):
    images = torch.arange(2 * 2 * 3, dtype=torch.uint8).view(2, 2, 3)
    dataset = torchvision_sets._dataset
    qmnist = part(images, torch.tensor([[1, 5, 6], [0, 7, 8]]), 2)
    assert dataset(qmnist, "QMNIST", "QMNIST", "train", tmp_path).labels.tolist() == [1, 0]
    emnist = dataset(part(images, torch.tensor([0, 1]), 2), "EMNIST", "EMNIST letters", "train", tmp_path)
    assert emnist.images[0].view(3, 2).T.tolist() == images[0].tolist()
    assert (emnist.shape, emnist.name) == ((3, 2), "EMNIST letters")
    cifar = dataset(part(np.zeros((2, 4, 4, 3), np.uint8), [1, 0], 2), "CIFAR10", "CIFAR10", "test", tmp_path)
    assert (cifar.images.shape, cifar.shape, cifar.labels.tolist()) == ((2, 48), (4, 4, 3), [1, 0])
    with pytest.raises(DataIntegrityError, match=r"MNIST in .* is damaged: class number 2"):
        dataset(part(images, torch.tensor([0, 2]), 2), "MNIST", "MNIST", "train", tmp_path)


# Tables


def test_standardization():
    x = torch.randn(1000, 3, dtype=torch.float64) * torch.tensor([1e-6, 1.0, 1e6]) + torch.tensor([5.0, 0.0, 1e9])
    scale = Standardization.of(x)
    z = scale(x, torch.float64)
    torch.testing.assert_close(z.mean(0), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(3, dtype=torch.float64), rtol=1e-6, atol=0)
    assert torch.equal(scale(x[:7], torch.float32), z[:7].float())
    again = Standardization.from_dict(scale.as_dict(), 3)
    assert torch.equal(again(x, torch.float32), scale(x, torch.float32))


def test_standardization_in_blocks(monkeypatch):
    x = torch.randn(20, 3)
    scale, z = Standardization.of(x), Standardization.of(x)(x, torch.float32)
    monkeypatch.setattr("fastmlp.data.table._BLOCK", 7)
    torch.testing.assert_close(Standardization.of(x).std, scale.std, rtol=1e-14, atol=0)
    assert torch.equal(scale(x, torch.float32), z)


@pytest.mark.parametrize("unit", [1e-200, 1.0, 1e200])
def test_standardization_of_numbers_that_have_no_squares(unit):
    x = torch.tensor([[1.0, 5.0], [3.0, 5.0]], dtype=torch.float64) * unit
    scale = Standardization.of(x)
    torch.testing.assert_close(scale.mean / unit, torch.tensor([2.0, 5.0], dtype=torch.float64))
    torch.testing.assert_close(scale(x, torch.float32), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))


@pytest.mark.parametrize("value", [0.0, 0.1, -1e30, 12345.678])
def test_a_constant_feature_becomes_0(value):
    z = Standardization.of(torch.full((101, 2), value))(torch.full((3, 2), value), torch.float32)
    assert z.abs().max() < 1e-3


@pytest.mark.parametrize(
    "values",
    [
        None,
        [],
        {},
        {"mean": [0.0], "std": [1.0]},
        {"mean": [0, 1], "std": [1, 0]},
        {"mean": [0, 1], "std": [1, True]},
        {"mean": [0, 1], "std": [1, float("nan")]},
        {"mean": [0, 10**400], "std": [1, 1]},
        {"mean": "ab", "std": [1, 1]},
        {"mean": [0, "1"], "std": [1, 1]},
    ],
)
def test_damaged_standardization(values):
    with pytest.raises(ValueError, match="expected mean and std as 2 finite numbers each, std above 0"):
        Standardization.from_dict(values, 2)


def test_table():
    table = Table(torch.zeros(3, 2), torch.tensor([0, 1, 1]), "N", "train", "/a/b", ("a", "b"))
    assert repr(table) == "Table(N 3 train (/a/b), device=cpu)"
    assert table.published == "N 3 train (b)"
    assert table.rows(torch.tensor([2, 0]), "validation").y.tolist() == [1, 0]
    assert table.to("cpu").x is table.x
