"""Folders: idx files of any labels, and one subfolder of images for each class."""

from __future__ import annotations

import gzip
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmlp.data import DataIntegrityError, fashion_mnist, idx, load_data
from fastmlp.data.images import load_pixels
from tests.support.datasets import NAMES, Machine, assert_is, write
from tests.support.small_data import bars, idx_folder, image_folder


class TestIdx:
    @pytest.mark.parametrize("layout", [".", "raw", "MNIST/raw", "FashionMNIST/raw"])
    def test_layouts_and_labels(self, tmp_path: Path, layout: str) -> None:
        folder = idx_folder(tmp_path / "my" / layout, classes=4, size=8)
        train, test = load_data(tmp_path / "my")
        images, labels = bars(64)
        assert train.images.numpy().tobytes() == images.tobytes()
        assert train.labels.tolist() == labels.tolist()
        assert (train.classes, train.shape, len(test)) == (("0", "1", "2", "3"), (8, 8), 16)
        assert (train.origin, test.split) == (str(folder), "test")
        assert train.name == (layout.split("/")[0] if "/" in layout else "my")

    def test_gzip(self, tmp_path: Path) -> None:
        folder = idx_folder(tmp_path / "my")
        expected = load_data(folder)
        for name in NAMES:
            (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
            (folder / name).unlink()
        for found, data in zip(load_data(folder), expected, strict=True):
            assert torch.equal(found.images, data.images)

    def test_fashion_mnist_is_known_by_its_content(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The names and sizes of MNIST's files are the same."""
        machine = Machine(tmp_path / "machine", monkeypatch)
        folder = write(tmp_path / "my", machine.contents)
        loaded = load_data(folder)
        assert_is(loaded, machine.contents)
        assert loaded[0].source == f"FashionMNIST 40 train ({folder})"
        assert loaded[0].classes == fashion_mnist.CLASSES

    @pytest.mark.parametrize("name", NAMES)
    def test_damaged_fashion_mnist_is_no_other_data(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        machine = Machine(tmp_path / "machine", monkeypatch)
        folder = write(tmp_path / "my", machine.contents)
        (folder / name).write_bytes(machine.contents[name][:-1] + bytes([machine.contents[name][-1] ^ 1]))
        with pytest.raises(DataIntegrityError, match="the file is altered"):
            load_data(folder)

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            (NAMES[0], b"", "found nothing, because it is empty"),
            (NAMES[0], b"<html>", "expected it to start with 00 00 08 and the number of axes, found 3c 68 74 6d"),
            (NAMES[1], bytes((0, 0, 13, 1, 0, 0, 0, 1)), "is not an idx file of unsigned bytes"),
            (NAMES[1], bytes((0, 0, 8, 200, 0)), "it ends within its header of 200 axes"),
            (NAMES[0], bytes((0, 0, 8, 3)) + b"\xff" * 12, "promises 4294967295 x 4294967295 x 4294967295 = "),
            (NAMES[0], idx.encode(bars(64)[0])[:-1], "promises 64 x 8 x 8 = 4096 values, the file has 4095"),
            (NAMES[0], idx.encode(bars(64)[0]) + b"x", "the file has 4097"),
            (NAMES[0], idx.encode(bars(63)[0]), "has images [63, 8, 8] and train-labels-idx1-ubyte has labels [64]"),
            (NAMES[2], idx.encode(bars(16, size=4)[0]), "has training images of 64 pixels and test images of 16"),
            (NAMES[3], idx.encode(bars(16)[1] + np.uint8(1)), "has test labels up to 4; expected 0 to 3"),
        ],
    )
    @pytest.mark.parametrize("packed", [False, True])
    def test_damage(self, tmp_path: Path, name: str, content: bytes, words: str, packed: bool) -> None:
        folder = idx_folder(tmp_path / "my")
        (folder / name).unlink()
        (folder / f"{name}{'.gz' if packed else ''}").write_bytes(gzip.compress(content) if packed else content)
        with pytest.raises(DataIntegrityError) as error:
            load_data(folder)
        assert packed or words in str(error.value)
        assert "\n" not in str(error.value)

    def test_missing_files(self, tmp_path: Path) -> None:
        folder = idx_folder(tmp_path / "my")
        (folder / NAMES[3]).unlink()
        with pytest.raises(FileNotFoundError, match=r"has only 3 of the 4 idx files\. Missing.*: t10k-labels-idx1"):
            load_data(folder)

    def test_more_than_one_data_set(self, tmp_path: Path) -> None:
        for name in ("KMNIST", "MNIST"):
            idx_folder(tmp_path / name / "raw")
        with pytest.raises(ValueError, match=r"has more than one data set: .*KMNIST/raw, .*MNIST/raw; name one"):
            load_data(tmp_path)


class TestImages:
    def test_train_and_test(self, tmp_path: Path) -> None:
        image_folder(tmp_path / "my" / "train", 40)
        image_folder(tmp_path / "my" / "test", 8, seed=1)
        shutil.rmtree(tmp_path / "my/test/bar2")
        train, test = load_data(tmp_path / "my")
        images, labels = bars(40)
        assert train.classes == test.classes == ("bar0", "bar1", "bar2", "bar3")
        assert sorted(train.labels.tolist()) == sorted(labels.tolist())
        assert train.images[0].tolist() == images[0].flatten().tolist()
        assert train.shape == (8, 8)
        assert test.labels.tolist() == [0, 0, 1, 1, 3, 3]
        assert train.source == f"my 40 train ({tmp_path / 'my'})"

    def test_classes_alone(self, tmp_path: Path) -> None:
        folder = image_folder(tmp_path / "my", 8)
        for name in (".DS_Store", "bar0/Thumbs.db", "bar1/.hidden.png", "notes.txt"):
            (folder / name).write_text("no image")
        train, test = load_data(folder)
        assert (len(train), test) == (8, None)

    def test_colours_and_sizes(self, tmp_path: Path) -> None:
        folder = image_folder(tmp_path / "my", 8)
        image = Image.fromarray(np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3))
        image.save(folder / "bar0/x.png")
        train, _ = load_data(folder)
        assert (train.shape, train.images.shape) == ((28, 28, 3), (9, 28 * 28 * 3))
        for path in folder.glob("*/[0-9]*.png"):
            image.save(path)
        train, _ = load_data(folder)
        assert train.shape == (6, 8, 3)
        assert train.images[0].tolist() == np.asarray(image).flatten().tolist()

    def test_images_that_exif_turns_are_not_cut(self, tmp_path: Path) -> None:
        exif, upright = Image.Exif(), np.arange(6 * 4, dtype=np.uint8).reshape(6, 4)
        exif[0x0112] = 6
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            Image.fromarray(np.rot90(upright)).save(tmp_path / name / "x.png", exif=exif)
        train, _ = load_data(tmp_path)
        assert train.shape == (6, 4)
        assert train.images[0].tolist() == upright.flatten().tolist()

    def test_large_images_are_made_small(self, tmp_path: Path) -> None:
        for name, level in (("a", 10), ("b", 200)):
            (tmp_path / name).mkdir()
            Image.new("L", (100, 65), level).save(tmp_path / name / "1.png")
        train, _ = load_data(tmp_path)
        assert train.shape == (28, 28)
        assert train.images.float().mean(1).tolist() == [10, 200]

    @pytest.mark.parametrize(
        ("prepare", "words"),
        [
            (
                lambda f: None,
                "is empty; expected the idx files train-images-idx3-ubyte and so on, plain or .gz, or one",
            ),
            (lambda f: (f / "a.png").touch(), "has no subfolder, only a.png; expected the idx files"),
            (lambda f: (f / "train").mkdir(), "train is empty; expected"),
            (lambda f: image_folder(f / "test", 4), "has test/, but no train/; expected"),
            (lambda f: (image_folder(f, 4), (f / "new").mkdir()), "new has no image files; every subfolder is a class"),
            (
                lambda f: (image_folder(f / "train", 4), image_folder(f / "test/bar9", 4)),
                "test has bar9, which train/ has not; expected the same classes",
            ),
            (lambda f: (image_folder(f / "train", 4), (f / "test").mkdir()), "test has no image files; expected one"),
            (lambda f: (image_folder(f, 4) / "bar0/no.png").write_text("x"), "bar0/no.png is not an image that can be"),
        ],
    )
    def test_mistakes(self, tmp_path: Path, prepare: object, words: str) -> None:
        prepare(tmp_path)  # type: ignore[operator]
        with pytest.raises(ValueError) as error:
            load_data(tmp_path)
        assert words in str(error.value)
        assert "\n" not in str(error.value)

    def test_other_folders_beside_train_are_named(self, tmp_path: Path) -> None:
        image_folder(tmp_path / "train", 8)
        image_folder(tmp_path / "val", 8)
        with pytest.warns(UserWarning, match="has train/, so val beside it is not used"):
            assert load_data(tmp_path)[1] is None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert len(load_data(tmp_path)[0]) == 8


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "I;16", "F"])
@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3), (5, 7), (5, 7, 3)])
def test_pixels_of_every_mode(tmp_path, mode, shape):
    """A gray picture has the same values in every mode that can hold them, and in the three colours."""
    gray = np.full((8, 8), 255, dtype=np.uint8) if mode == "1" else bars(1)[0][0]
    image = Image.fromarray(gray)
    if mode == "I;16":
        image = Image.fromarray(gray.astype(np.uint16) * 257)
    elif mode == "F":
        image = Image.fromarray(gray.astype(np.float32) / 255)
    elif mode != "L":
        image = image.convert(mode)
    image.save(tmp_path / "x.tif")
    pixels = load_pixels(tmp_path / "x.tif", shape)
    assert (pixels.shape, pixels.dtype) == (shape, np.uint8)
    if shape[0] == 8:
        expected = gray if len(shape) == 2 else np.repeat(gray[..., None], 3, 2)
        assert np.abs(pixels.astype(int) - expected).max() <= 2
