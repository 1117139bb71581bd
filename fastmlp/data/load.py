"""Any data that ``fastmlp train --data`` takes, by one text."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..base.names import did_you_mean
from . import torchvision_sets
from .dataset import ImageDataset, load_fashion_mnist, usable_device
from .folders import load_folder
from .npz import load_npz
from .table import Table
from .torchvision_sets import load_torchvision

DEFAULT, BUNDLED, TORCHVISION = "fashion-mnist", "bundled", "torchvision:"
EXPECTED = f"{DEFAULT}, {BUNDLED}, {TORCHVISION}NAME, a folder or an .npz file"

Samples = ImageDataset | Table


def load_data(
    source: str | os.PathLike[str] | None = None, device: torch.device | str | None = None, *, values: bool = False
) -> tuple[Samples, Samples | None]:
    """Data by a text: (train, test), where test is None if the data have no test set.

    Args:
        source: one of
            "fashion-mnist" (default) or "bundled": as `load_fashion_mnist` finds it, or its bundled subset;
            "torchvision:NAME": FashionMNIST, MNIST, KMNIST, EMNIST, QMNIST, CIFAR10 or CIFAR100, from torchvision's
            files in ``./data`` or the cache, or downloaded into the cache; "torchvision:EMNIST:SPLIT" (default
            balanced);
            "torchvision:NAME@FOLDER" where FOLDER is torchvision's root;
            a folder: with the four idx files of FashionMNIST, MNIST and the like, or with one subfolder of images for
            each class, perhaps in ``train/`` and ``test/``;
            an .npz file: x (uint8 pixels, or floating point) and y, perhaps also x_test, y_test, classes and
            sample_weight.
        device: where the tensors go; default: the CPU.
        values: y has values for a regression, not classes; only an .npz file can have values.

    Raises:
        FileNotFoundError, OSError: the data is not there, or cannot be read.
        ValueError, RuntimeError: the data is not of that kind, damaged, or torchvision is missing.
    """
    target = usable_device(device)
    text = DEFAULT if source is None else os.fspath(source)
    named = text in (DEFAULT, BUNDLED) or text.startswith(TORCHVISION)
    path = Path(text).expanduser()
    train: Samples
    test: Samples | None
    if not named and path.is_file():
        if path.suffix.lower() != ".npz":
            raise ValueError(f"{path} is a file, but no .npz file; expected {EXPECTED}")
        train, test = load_npz(path, values)
    elif not named and not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected {EXPECTED}{_meant(text)}")
    elif values:
        raise ValueError(f"{text} has classes, but the loss is one of values; expected an .npz file with values y")
    elif text in (DEFAULT, BUNDLED):
        return load_fashion_mnist(device=target, source=BUNDLED if text == BUNDLED else None)
    elif text.startswith(TORCHVISION):
        train, test = load_torchvision(text.removeprefix(TORCHVISION))
    elif path.is_dir():
        train, test = load_folder(path)
    else:
        raise ValueError(f"{path} is neither a folder nor a regular file; expected {EXPECTED}")
    return train.to(target), None if test is None else test.to(target)


def _meant(text: str) -> str:
    """What was probably meant by a word that is no name and no path."""
    known = (DEFAULT, BUNDLED, *(f"{TORCHVISION}{name}" for name in torchvision_sets.SETS))
    if os.sep in text or "." in text:
        return ""
    sets = did_you_mean(text, torchvision_sets.SETS).replace("'", f"'{TORCHVISION}", 1)
    return did_you_mean(text, known) or sets
