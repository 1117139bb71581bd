"""Data sets in folders: the four idx files of any labels, or one subfolder of images for each class."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path

import numpy as np
import torch

from . import fashion_mnist
from .dataset import ImageDataset, load_fashion_mnist
from .described import numbers, shown
from .idx import DataIntegrityError, read_any

#: The largest edge of images that are taken as they are, where all have one size, and the edges of all other images.
MOST_EDGE, EDGE = 64, 28
GRAY_MODES = ("1", "L", "I", "F", "I;16", "I;16B", "I;16L", "I;16N", "LA", "La")
EXPECTED = (
    "expected the idx files train-images-idx3-ubyte and so on, plain or .gz, or one subfolder of images for each "
    "class, perhaps in train/ and test/"
)


def load_folder(folder: Path) -> tuple[ImageDataset, ImageDataset | None]:
    """(train, test) on the CPU of a folder of either kind; test is None where there is no folder test/.

    Raises:
        ValueError: the folder has neither, or an image that cannot be read.
        DataIntegrityError: an idx file is damaged.
        OSError: some of the idx files are missing, or a file cannot be read.
    """
    place = _idx_folder(folder)
    return load_images(folder) if place is None else _load_idx(place)


def _idx_folder(folder: Path) -> Path | None:
    """Where the idx files are: as FashionMNIST's, or in ``NAME/raw`` below, where torchvision puts them."""
    for layout in fashion_mnist.LAYOUTS:
        if _some(folder / layout):
            return folder / layout
    below = [path for path in sorted(folder.glob("*/raw")) if _some(path)]
    if len(below) > 1:
        raise ValueError(f"{folder} has more than one data set: {shown([str(p) for p in below])}; name one of them")
    return below[0] if below else None


def _names() -> list[str]:
    return [file.name for pair in fashion_mnist.FULL.values() for file in pair]


def _some(folder: Path) -> bool:
    return any((folder / f"{name}{suffix}").is_file() for name in _names() for suffix in ("", ".gz"))


def _load_idx(folder: Path) -> tuple[ImageDataset, ImageDataset]:
    paths = fashion_mnist.find_files(folder, fashion_mnist.FULL, "idx")
    assert paths is not None
    known = {file.name: file.sha256 for pair in fashion_mnist.FULL.values() for file in pair}
    found = {}
    # The small files first: they tell FashionMNIST, which is checked as a whole, from other data.
    for name in sorted(_names(), key=lambda name: "labels" not in name):
        content = read_any(paths[name])
        header = fashion_mnist.IdxFile(name, content.shape, "").header
        if hashlib.sha256(header + content.tobytes()).hexdigest() == known[name]:
            return load_fashion_mnist(folder)
        found[name] = content
    name = folder.parent.name if folder.name == "raw" else folder.name
    splits = {}
    for split, (image_file, label_file) in fashion_mnist.FULL.items():
        images, labels = found[image_file.name], found[label_file.name]
        if images.ndim < 2 or labels.ndim != 1 or len(images) != len(labels) or images.size == 0:
            raise DataIntegrityError(
                f"{paths[image_file.name]} has images {list(images.shape)} and {paths[label_file.name].name} has "
                f"labels {list(labels.shape)}; expected [N, height, width] and [N] with the same N of at least 1"
            )
        splits[split] = (
            torch.tensor(images.reshape(len(images), -1), device="cpu"),
            torch.tensor(labels, dtype=torch.int64, device="cpu"),
        )
    (train, train_labels), (test, test_labels) = splits["train"], splits["test"]
    if train.shape[1] != test.shape[1]:
        raise DataIntegrityError(
            f"{folder} has training images of {train.shape[1]} pixels and test images of {test.shape[1]}; expected the "
            "same"
        )
    classes, origin, shape = numbers(int(train_labels.max()) + 1), str(folder.absolute()), found[_names()[0]].shape[1:]
    if int(test_labels.max()) >= len(classes):
        raise DataIntegrityError(
            f"{folder} has test labels up to {test_labels.max()}; expected 0 to {len(classes) - 1}, as in training"
        )
    return (
        ImageDataset(train, train_labels, name, "train", origin, classes, shape),
        ImageDataset(test, test_labels, name, "test", origin, classes, shape),
    )


def load_images(folder: Path) -> tuple[ImageDataset, ImageDataset | None]:
    """(train, test) of one subfolder of images for each class, or of the same in ``train/`` and ``test/``.

    Where all training images have one size of at most 64 pixels an edge, all images get this size, and else 28 x 28.
    They are gray if all training images are, and else in colour.
    """
    parts = [path.name for path in _folders(folder)]
    split = "train" in parts
    if "test" in parts and not split:
        raise ValueError(f"{folder} has test/, but no train/; {EXPECTED}")
    root = folder / "train" if split else folder
    classes = tuple(path.name for path in _folders(root))
    if not classes:
        names = sorted(path.name for path in root.iterdir())
        found = f"has no subfolder, only {shown(names)}" if names else "is empty"
        raise ValueError(f"{root} {found}; {EXPECTED}. Leave source out for FashionMNIST.")
    files = {name: _images(root / name) for name in classes}
    for name, paths in files.items():
        if not paths:
            raise ValueError(f"{root / name} has no image files; every subfolder is a class, with its images in it")
    shape = _common_shape([path for paths in files.values() for path in paths])
    train = _read(files, shape, folder, "train", classes)
    others = [name for name in parts if split and name not in ("train", "test")]
    if others:
        warnings.warn(f"{folder} has train/, so {shown(others)} beside it is not used", stacklevel=4)
    if not split or "test" not in parts:
        return train, None
    files = {path.name: _images(path) for path in _folders(folder / "test")}
    if unknown := sorted(files.keys() - set(classes)):
        raise ValueError(f"{folder / 'test'} has {shown(unknown)}, which train/ has not; expected the same classes")
    if not any(files.values()):
        raise ValueError(f"{folder / 'test'} has no image files; expected one subfolder for each class, as in train/")
    return train, _read(files, shape, folder, "test", classes)


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    """The image files in a folder, by the endings that pillow knows."""
    from PIL import Image

    known = Image.registered_extensions()
    paths = (path for path in folder.iterdir() if not path.name.startswith(".") and path.suffix.lower() in known)
    return sorted(path for path in paths if path.is_file())


def _common_shape(paths: list[Path]) -> tuple[int, ...]:
    from .images import size_and_mode

    found = {size_and_mode(path) for path in paths}
    sizes = {size for size, _ in found}
    width, height = sizes.pop()
    if sizes or max(width, height) > MOST_EDGE:
        width = height = EDGE
    return (height, width) if all(mode in GRAY_MODES for _, mode in found) else (height, width, 3)


def _read(
    files: dict[str, list[Path]], shape: tuple[int, ...], folder: Path, split: str, classes: tuple[str, ...]
) -> ImageDataset:
    from .images import load_pixels

    labelled = [(path, classes.index(name)) for name, paths in files.items() for path in paths]
    images = np.empty((len(labelled), *shape), dtype=np.uint8)
    for image, (path, _) in zip(images, labelled, strict=True):
        image[...] = load_pixels(path, shape)
    labels = torch.tensor([label for _, label in labelled], dtype=torch.int64, device="cpu")
    pixels = torch.from_numpy(images.reshape(len(images), -1))
    return ImageDataset(pixels, labels, folder.absolute().name, split, os.fspath(folder.absolute()), classes, shape)
