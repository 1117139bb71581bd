"""FashionMNIST as tensors: where it is found, integrity checks, and the cache.

`load_fashion_mnist` returns all images of a split as one uint8 tensor on the device, as the training loop takes them.
Every data set says where it came from. Pixels are scaled in the first kernel, not here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..base import atomic
from ..base.atomic import atomic_write, folder_lock, sweep, sync_folder
from ..base.names import unknown
from . import fashion_mnist, fetch
from .described import Described
from .fashion_mnist import FileSet
from .fetch import SourceUnavailable
from .idx import Bytes, DataIntegrityError

logger = logging.getLogger("fastmlp.data")

SOURCES = ("cache", "system", "torchvision", "debian", "bundled")
"""Where `load_fashion_mnist` looks when no folder is given, in this order."""

REMEDY = (
    f"To get the full data: `apt-get install {fetch.PACKAGE}` as root on Debian or Ubuntu, or give the folder of its "
    "four idx files (root=FOLDER in Python, --data FOLDER on the command line)."
)


class SubsetWarning(UserWarning):
    """The full FashionMNIST was not found, and the bundled subset takes its place."""


@dataclass(frozen=True, eq=False, repr=False)
class ImageDataset(Described):
    """Images and labels of one split of a data set, all in memory.

    Attributes:
        images: uint8 [N, pixels], the rows of an image one after the other, values 0 (background) to 255.
        labels: int64 [N], on the same device, values in [0, len(classes)).
        name: of the data set, such as "FashionMNIST".
        split: "train" or "test".
        origin: where the data was read from, mostly a folder; for people.
        classes: the class names; a label is an index into them.
        shape: of one image, [height, width] or [height, width, 3]; None where it is not known.

    Raises:
        TypeError: images or labels are not tensors, not uint8 or not int64.
        ValueError: the shapes do not fit, or the tensors are on two devices.
    """

    images: torch.Tensor
    labels: torch.Tensor
    name: str
    split: str
    origin: str
    classes: tuple[str, ...]
    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for field, tensor, dtype in (("images", self.images, torch.uint8), ("labels", self.labels, torch.int64)):
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{field} must be a tensor, got {type(tensor).__name__}")
            if tensor.dtype != dtype:
                raise TypeError(f"{field} must be {dtype}, got {tensor.dtype}")
        if self.images.dim() != 2 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                "images must be [N, pixels] and labels [N] with the same N, got "
                f"{list(self.images.shape)} and {list(self.labels.shape)}"
            )
        if self.images.device != self.labels.device:
            raise ValueError(
                f"images and labels must be on one device, got {self.images.device} and {self.labels.device}"
            )

    def __len__(self) -> int:
        return self.labels.shape[0]

    def __repr__(self) -> str:
        return f"ImageDataset({self.source}, device={self.images.device})"

    def rows(self, rows: torch.Tensor, split: str) -> ImageDataset:
        """A copy of some rows, under another name of the split."""
        rows = rows.to(self.images.device)
        return dataclasses.replace(self, images=self.images[rows], labels=self.labels[rows], split=split)

    def to(self, device: torch.device | str) -> ImageDataset:
        """The same data on ``device``; a tensor that is already there is shared, not copied."""
        return dataclasses.replace(self, images=self.images.to(device), labels=self.labels.to(device))


def load_fashion_mnist(
    root: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    *,
    source: str | None = None,
) -> tuple[ImageDataset, ImageDataset]:
    """FashionMNIST as (train, test): images uint8 [60000, 784] and [10000, 784], labels int64.

    With ``root``, only that folder is read. The four idx files (``train-images-idx3-ubyte`` and so on, plain or
    ``.gz``) are in ``root`` or, as torchvision lays them out, in ``FashionMNIST/raw`` below it. Without ``root``, the
    sources of `SOURCES` are tried in order:

    1. ``cache``: the user's cache folder (`cache_folder`), which the downloads below fill;
    2. ``system``: ``/usr/share/datasets/fashion-mnist``, the folder of Debian's package ``dataset-fashion-mnist``;
    3. ``torchvision``: torchvision's download;
    4. ``debian``: Debian's package, fetched with ``apt-get download`` and unpacked without root;
    5. ``bundled``: 6,000 training and 1,000 test images that come with fastmlp, with a `SubsetWarning`.

    All content is checked with SHA-256. Damaged data is an error, never a reason to try the next source. A download
    enters the cache whole or not at all, and many processes may load at the same time. The logger ``fastmlp.data``
    says at level INFO which source was left out, and why.

    Args:
        root: folder of the files; ``~`` is expanded.
        device: where the tensors go; default: the CPU.
        source: one of `SOURCES`, the only one to use; ``"bundled"`` then gives no warning.

    Raises:
        FileNotFoundError: ``root`` has no data or only some of the files, or ``source`` is not available.
        DataIntegrityError: a file is truncated or altered (a RuntimeError).
        ValueError: an unknown ``source``, or both ``root`` and ``source``.
        RuntimeError: ``device`` is not a device of this machine.
    """
    if source is not None and source not in SOURCES:
        raise ValueError(unknown("source", source, SOURCES, ", or None to try them all"))
    if root is not None and source is not None:
        raise ValueError(f"give root or source, not both; got root={os.fspath(root)!r} and source={source!r}")
    target = usable_device(device)
    if root is not None:
        folder = _folder_of(root)
        with _remedy("Put a good copy in its place, or leave root out to look for or fetch the data elsewhere."):
            contents = _read_folder(folder)
        return _datasets(contents, fashion_mnist.FULL, fashion_mnist.NAME, str(folder), target)

    failures: list[str] = []
    for name in SOURCES[:-1] if source is None else (source,):
        if name == "bundled":
            return _bundled(target)
        try:
            contents, origin = _load(name)
        except SourceUnavailable as reason:
            logger.info("FashionMNIST: %s is not available: %s", name, reason)
            failures.append(f"{name}: {reason}")
        else:
            logger.info("FashionMNIST: %s: %s", name, origin)
            return _datasets(contents, fashion_mnist.FULL, fashion_mnist.NAME, origin, target)
    tried = "; ".join(failures)
    if source is not None:
        raise FileNotFoundError(f"FashionMNIST is not available from the source asked for ({tried}). {REMEDY}")
    train, test = _bundled(target)
    warnings.warn(
        f"FashionMNIST was not found, so the subset bundled with fastmlp is used: {len(train)} of 60000 training "
        f"and {len(test)} of 10000 test images. Results are not comparable with the full data set. "
        f"Tried: {tried}. {REMEDY}",
        SubsetWarning,
        stacklevel=2,
    )
    return train, test


def find_fashion_mnist(root: str | os.PathLike[str] | None = None) -> Path | None:
    """The folder that `load_fashion_mnist` would read the full data from without a download; None if there is none.

    Contents are not checked.

    Raises:
        FileNotFoundError: a folder has only some of the files, or ``root`` has none.
    """
    if root is not None:
        return _folder_of(root)
    for folder in (cache_folder(), fetch.SYSTEM_FOLDER):
        with contextlib.suppress(PermissionError):
            if _has_data(folder):
                return folder
    return None


def cache_folder() -> Path:
    """Where downloads of FashionMNIST are kept: ``fashion-mnist`` in the user's cache folder of fastmlp."""
    return atomic.cache_folder() / "fashion-mnist"


def usable_device(device: torch.device | str | None) -> torch.device:
    """``device`` as a torch.device on which a tensor can be made; checked before data is read or downloaded."""
    target = torch.device("cpu") if device is None else torch.device(device)
    try:
        torch.empty(0, device=target)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        # A torch built without CUDA raises AssertionError here.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RuntimeError(
            f"device {str(target)!r} cannot be used: {reason}. Expected a device of this machine; 'cpu' always works."
        ) from error
    return target


def _folder_of(root: str | os.PathLike[str]) -> Path:
    """The folder at or below ``root`` that has the files."""
    given = Path(root).expanduser()
    if not given.exists():
        raise FileNotFoundError(f"{given} does not exist; expected the folder of the FashionMNIST files")
    if not given.is_dir():
        raise NotADirectoryError(f"{given} is a file; expected the folder of the FashionMNIST files")
    for layout in fashion_mnist.LAYOUTS:
        if fashion_mnist.find_files(given / layout, fashion_mnist.FULL) is not None:
            return given / layout
    names = ", ".join(file.name for pair in fashion_mnist.FULL.values() for file in pair)
    raise FileNotFoundError(
        f"{given} has no FashionMNIST data; expected {names}, plain or .gz, in it or in FashionMNIST/raw below it. "
        "Leave root out to look in the usual places."
    )


def _read_folder(folder: Path) -> dict[str, Bytes]:
    """The verified contents of the full data set in ``folder``."""
    paths = fashion_mnist.find_files(folder, fashion_mnist.FULL)
    if paths is None:
        raise SourceUnavailable(f"no data in {folder}")
    return fashion_mnist.read_files(paths, fashion_mnist.FULL)


@contextlib.contextmanager
def _remedy(text: str) -> Iterator[None]:
    """Say in an error about damaged or missing files what to do about it."""
    try:
        yield
    except (DataIntegrityError, FileNotFoundError) as error:
        raise type(error)(f"{error} {text}") from error


def _load(source: str) -> tuple[dict[str, Bytes], str]:
    """The verified contents from any source but "bundled", and where they are."""
    if source == "torchvision":
        return _download(fetch.fetch_torchvision, "torchvision's download")
    if source == "debian":
        return _download(fetch.fetch_debian, f"Debian package {fetch.PACKAGE}")
    folder, remedy = fetch.SYSTEM_FOLDER, f"Reinstall it: apt-get install --reinstall {fetch.PACKAGE}."
    if source == "cache":
        folder = cache_folder()
        remedy = f"Delete the folder {folder} and load again to fetch the data anew."
    try:
        with _remedy(remedy):
            return _read_folder(folder), str(folder)
    except PermissionError as error:  # the folder is another user's, and this user cannot repair it
        raise SourceUnavailable(f"no permission to read {error.filename}") from error


def _download(fetcher: Callable[[Path], Path], label: str) -> tuple[dict[str, Bytes], str]:
    """Fetch into a temporary folder, verify, and put the uncompressed files into the cache."""
    logger.info("FashionMNIST: fetching about 30 MB: %s", label)
    try:
        with tempfile.TemporaryDirectory(prefix="fastmlp-", ignore_cleanup_errors=True) as staging:
            fetched = fetcher(Path(staging))
            folder = next((f for f in (fetched / x for x in fashion_mnist.LAYOUTS) if _has_data(f)), fetched)
            contents = _read_folder(folder)
    except (DataIntegrityError, OSError) as error:
        raise SourceUnavailable(f"{label} failed: {error}") from error
    try:
        _install(contents, cache_folder())
    except OSError as error:
        warnings.warn(
            f"FashionMNIST was fetched but cannot be kept in {cache_folder()}: {error}. It will be fetched again the "
            f"next time; make the folder writable, or: {REMEDY}",
            stacklevel=4,
        )
        return contents, f"{label}, not kept"
    return contents, str(cache_folder())


def _has_data(folder: Path) -> bool:
    return fashion_mnist.find_files(folder, fashion_mnist.FULL) is not None


def _install(contents: Mapping[str, Bytes], folder: Path) -> None:
    """Make ``folder`` with the files of ``contents``, whole or not at all.

    The files are written to a new folder beside ``folder``, which is then renamed. A process that comes second finds
    the name taken and drops its own copy, which has the same verified content.

    Raises:
        OSError: no such folder can be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}-"
    with folder_lock(folder.parent) as locked:
        sweep(folder.parent, prefix, "", locked)  # what a process left that was killed
        staging = folder.with_name(f"{prefix}{secrets.token_hex(8)}")  # not mkdtemp: its folders are the owner's alone
        staging.mkdir()
        try:
            for name, content in contents.items():
                atomic_write(staging / name, content.data)
            try:
                os.replace(staging, folder)
                sync_folder(folder.parent)
            except OSError:
                if not _has_data(folder):
                    raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _bundled(device: torch.device) -> tuple[ImageDataset, ImageDataset]:
    files = fashion_mnist.SUBSET
    folder = fashion_mnist.SUBSET_FOLDER
    with _remedy("This installation of fastmlp is damaged: install it again."):
        paths = fashion_mnist.find_files(folder, files)
        if paths is None:
            raise FileNotFoundError(f"{folder} has no data.")
        contents = fashion_mnist.read_files(paths, files)
    return _datasets(contents, files, f"{fashion_mnist.NAME} subset", "bundled with fastmlp", device)


def _datasets(
    contents: Mapping[str, Bytes], files: FileSet, name: str, origin: str, device: torch.device
) -> tuple[ImageDataset, ImageDataset]:
    """(train, test) on ``device`` from verified file contents."""

    def dataset(split: str) -> ImageDataset:
        image_file, label_file = files[split]
        pixels = image_file.values(contents[image_file.name])
        # torch's own memory is aligned for vector loads; the values behind the file's header are not.
        images = torch.empty((len(pixels), pixels[0].size), dtype=torch.uint8, device="cpu")
        images.numpy()[:] = pixels.reshape(images.shape)
        labels = torch.empty(len(pixels), dtype=torch.int64, device="cpu")
        labels.numpy()[:] = label_file.values(contents[label_file.name])
        return ImageDataset(images, labels, name, split, origin, fashion_mnist.CLASSES, pixels.shape[1:]).to(device)

    return dataset("train"), dataset("test")
