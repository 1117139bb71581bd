"""What FashionMNIST is: class names, files, checksums and folder layouts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .idx import Bytes, IdxFile, read_verified

NAME = "FashionMNIST"
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
IMAGE_SIZE = (28, 28)

SPLITS = ("train", "test")
FileSet = Mapping[str, tuple[IdxFile, IdxFile]]  # split -> (images, labels)


def _file_set(train: int, test: int, sha256: tuple[str, str, str, str]) -> FileSet:
    return {
        "train": (
            IdxFile("train-images-idx3-ubyte", (train, *IMAGE_SIZE), sha256[0]),
            IdxFile("train-labels-idx1-ubyte", (train,), sha256[1]),
        ),
        "test": (
            IdxFile("t10k-images-idx3-ubyte", (test, *IMAGE_SIZE), sha256[2]),
            IdxFile("t10k-labels-idx1-ubyte", (test,), sha256[3]),
        ),
    }


# The content of the publisher's files. gzip files of this content with the publisher's file names and times have the
# MD5 sums of the data set's own README (tests/data/test_full.py checks it).
FULL = _file_set(
    60_000,
    10_000,
    (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
)

# The files in bundled/, made by make_subset.py.
SUBSET = _file_set(
    6_000,
    1_000,
    (
        "cf313073c7eb485392848071d5c433571d7166043e971e3345b095cc30518084",
        "097b93fbcf9bd5bc648b1a457ddc55c9e4ab49afb33f9ecae8ce068399a75e3a",
        "7cee33c3c6414b1b86c25e665a6c4f41584269de3b7cc9768b1d351922845eef",
        "3128d790775889812b73c4f13923559c8b9e281d112c6ea7862acf60a206a909",
    ),
)
SUBSET_FOLDER = Path(__file__).parent / "bundled"

# Where the four files are in a folder that a user names; torchvision.datasets.FashionMNIST has the last layout.
LAYOUTS = (Path(), Path("raw"), Path(NAME, "raw"))


def find_files(folder: Path, files: FileSet, kind: str = NAME) -> dict[str, Path] | None:
    """The path of each file of ``files`` in ``folder`` by name, plain rather than gzip; None if there is none of them.

    ``kind`` is what an error calls the files.

    Raises:
        FileNotFoundError: some of the files are missing.
    """
    names = [file.name for pair in files.values() for file in pair]
    found: dict[str, Path] = {}
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                found[name] = path
                break
    if not found:
        return None
    missing = [name for name in names if name not in found]
    if missing:
        raise FileNotFoundError(
            f"{folder} has only {len(found)} of the {len(names)} {kind} files. "
            f"Missing, with or without .gz: {', '.join(missing)}."
        )
    return found


def read_files(paths: Mapping[str, Path], files: FileSet) -> dict[str, Bytes]:
    """The verified content of every file by name; errors as in `fastmlp.data.idx.read_verified`."""
    return {file.name: read_verified(paths[file.name], file) for pair in files.values() for file in pair}
