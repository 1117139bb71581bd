"""Small data sets of every kind that ``--data`` takes, made in a test's folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fastmlp.data import idx


def bars(n: int, classes: int = 4, size: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images [n, size, size] and class numbers uint8 [n]: a bright bar is in another place for each class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    images = rng.integers(0, 50, (n, size, size))
    for image, label in zip(images, labels, strict=True):
        image[:, label * size // classes] += 200
    return images.astype(np.uint8), labels.astype(np.uint8)


def idx_folder(folder: Path, train: int = 64, test: int = 16, **options: int) -> Path:
    """The four idx files."""
    folder.mkdir(parents=True)
    for part, count, seed in (("train", train, 0), ("t10k", test, 1)):
        images, labels = bars(count, seed=seed, **options)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx.encode(images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx.encode(labels))
    return folder


def image_folder(folder: Path, n: int = 64, **options: int) -> Path:
    """One subfolder of PNG files for each class: bar0, bar1 and so on."""
    for number, (image, label) in enumerate(zip(*bars(n, **options), strict=True)):
        path = folder / f"bar{label}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def table(n: int = 96, features: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """float64 features [n, features] far from 0 and of different scales, and a smooth function of them [n]."""
    z = np.random.default_rng(seed).normal(size=(n, features))
    return z * 10.0 ** np.arange(features) + 100, z[:, 0] - 0.5 * z[:, 1] + 0.1 * z[:, 2] ** 2
