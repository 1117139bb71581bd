"""The data sets of torchvision that are classes of small images, by name.

torchvision reads its own files, from ``./data`` or from fastmlp's cache, or downloads them into the cache. A download
enters the cache whole or not at all.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..base import atomic
from ..base.arguments import check_classes
from ..base.atomic import sweep, sync_folder
from ..base.names import did_you_mean, unknown
from . import fetch
from .dataset import ImageDataset
from .fetch import SourceUnavailable
from .idx import DataIntegrityError

logger = logging.getLogger("fastmlp.data")

SETS = ("FashionMNIST", "MNIST", "KMNIST", "EMNIST", "QMNIST", "CIFAR10", "CIFAR100")
#: EMNIST's parts, the first of which is taken where none is named.
EMNIST_SPLITS = ("balanced", "byclass", "bymerge", "letters", "digits", "mnist")
#: Where torchvision's examples put their data.
USUAL_FOLDER = Path("data")


def load_torchvision(text: str) -> tuple[ImageDataset, ImageDataset]:
    """(train, test) on the CPU of ``NAME``, ``EMNIST:SPLIT`` or ``NAME@FOLDER``; FOLDER is torchvision's root.

    Images are upright, with the rows one after the other, and of CIFAR with the three colours of a pixel together.

    Raises:
        ValueError: an unknown name or split.
        FileNotFoundError: the data is not in the folder that was named, or nowhere and cannot be downloaded.
        DataIntegrityError: torchvision cannot read its files.
        RuntimeError: torchvision is not installed.
    """
    name, options, folder = parsed(text)
    try:
        from torchvision import datasets
    except ImportError as error:
        raise RuntimeError(
            f"torchvision:{name} needs the package torchvision, which cannot be imported ({error}); install it with "
            "pip install torchvision, or give a folder of the idx files"
        ) from error
    kind = getattr(datasets, name)
    if folder is not None:
        found = _read(kind, folder, options)
        if found is None:
            raise FileNotFoundError(
                f"{_without(kind, folder)}; expected the folder that torchvision.datasets.{name} takes as "
                f"root, or leave @{folder} out to look in {USUAL_FOLDER}/ and the cache, or download it"
            )
    else:
        folder, found = _found_or_fetched(kind, name, options)
    title = f"{name} {options['split']}" if options else name
    train, test = (
        _dataset(part, name, title, split, folder) for part, split in zip(found, ("train", "test"), strict=True)
    )
    return train, test


def _without(kind: Any, folder: Path) -> str:
    """Why torchvision does not find a data set in a folder."""
    if not folder.is_dir():
        return f"{folder} is {'a file' if folder.exists() else 'no folder'}"
    below = folder / getattr(kind, "base_folder", kind.__name__)
    if below.is_dir():
        return f"{below} has not all files of {kind.__name__}, or a file that differs from torchvision's"
    return f"{folder} has no {kind.__name__} of torchvision"


def parsed(text: str) -> tuple[str, dict[str, str], Path | None]:
    """(name, options of the class, folder) of ``NAME``, ``EMNIST:SPLIT`` or either with ``@FOLDER``."""
    what, at, folder = text.partition("@")
    given, colon, split = what.partition(":")
    name = next((known for known in SETS if known.casefold() == given.casefold()), None)
    if name is None:
        raise ValueError(unknown("data set of torchvision", given, SETS))
    if at and not folder:
        raise ValueError(f"torchvision:{text} names no folder; expected torchvision:{what}@FOLDER, or nothing after it")
    options = {"split": split or EMNIST_SPLITS[0]} if name == "EMNIST" else {}
    if colon and (split not in EMNIST_SPLITS or not options):
        expected = f"expected one of {', '.join(EMNIST_SPLITS)}" if options else "only EMNIST has splits"
        hint = did_you_mean(split, EMNIST_SPLITS) if options else ""
        raise ValueError(f"torchvision:{what} has an unknown split {split!r}; {expected}{hint}")
    return name, options, Path(folder).expanduser() if at else None


def _found_or_fetched(kind: Any, name: str, options: dict[str, str]) -> tuple[Path, tuple[Any, Any]]:
    cache = atomic.cache_folder() / "torchvision" / name
    for folder in (USUAL_FOLDER, cache):
        if folder.is_dir() and (found := _read(kind, folder, options)) is not None:
            return folder, found
    try:
        _fetch(kind, cache, options)
    except (SourceUnavailable, OSError) as error:
        raise FileNotFoundError(
            f"torchvision:{name} is neither in {USUAL_FOLDER}/ nor in {cache}, and its download failed ({error}). If "
            f"you have torchvision's files, name their folder: torchvision:{name}@FOLDER"
        ) from error
    found = _read(kind, cache, options)
    if found is None:
        raise DataIntegrityError(
            f"torchvision downloaded {name} to {cache}, but does not find it there; delete the folder"
        )
    return cache, found


def _fetch(kind: Any, folder: Path, options: dict[str, str]) -> None:
    """Download to a new folder beside ``folder``, which then takes its name."""
    name = folder.name
    logger.info("%s: fetching it with torchvision", name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{name}-"
    sweep(folder.parent, prefix, "", locked=False)  # what a process left that was killed, a day ago or longer
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent, ignore_cleanup_errors=True) as staging:
        fetched = fetch.fetch_torchvision(Path(staging), name, **options)
        if folder.is_dir() and _read(kind, folder, options) is None:
            shutil.rmtree(folder)  # a copy that torchvision does not take for the data
        try:
            os.replace(fetched, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
        sync_folder(folder.parent)


def _read(kind: Any, folder: Path, options: dict[str, str]) -> tuple[Any, Any] | None:
    """Both parts as torchvision has them; None where torchvision does not find them in ``folder``."""
    try:
        return kind(folder, train=True, **options), kind(folder, train=False, **options)
    except RuntimeError as error:
        if "not found" in str(error):
            return None
        raise DataIntegrityError(f"torchvision cannot read {kind.__name__} in {folder}: {error}") from error
    except (OSError, ValueError, AssertionError, LookupError, EOFError, TypeError) as error:
        raise DataIntegrityError(
            f"torchvision cannot read {kind.__name__} in {folder}: {error or type(error).__name__}. Delete the damaged "
            "files to download them anew"
        ) from error


def _dataset(part: Any, name: str, title: str, split: str, folder: Path) -> ImageDataset:
    images, labels = torch.as_tensor(part.data, device="cpu"), torch.as_tensor(part.targets, device="cpu")
    if name == "QMNIST":  # the other columns say who wrote the digit
        labels = labels[:, 0]
    if name == "EMNIST":  # whose files have rows and columns exchanged
        images = images.transpose(1, 2)
    labels = labels.to(torch.int64)
    try:
        rows = images.reshape(len(images), -1).contiguous()
        dataset = ImageDataset(
            rows, labels, title, split, str(folder.absolute()), tuple(part.classes), tuple(images.shape[1:])
        )
        check_classes(labels, len(part.classes))
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        raise DataIntegrityError(f"{name} in {folder} is damaged: {error}") from error
    return dataset
