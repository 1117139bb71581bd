"""Make the bundled subset from the full FashionMNIST files, reproducibly.

    python -m fastmlp.data.make_subset --from /usr/share/datasets/fashion-mnist

The subset has the first 600 training images and the first 100 test images of each class, in the order of the full
files: 6,000 and 1,000 images, every class equally often, none of them picked by hand.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..base.atomic import atomic_write
from .fashion_mnist import CLASSES, FULL, SUBSET, SUBSET_FOLDER, find_files, read_files
from .idx import compress, encode

PER_CLASS = {"train": 600, "test": 100}


def select(labels: npt.NDArray[np.uint8], per_class: int) -> npt.NDArray[np.int64]:
    """Indices, ascending, of the first ``per_class`` entries of each class in ``labels`` [N]."""
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(len(CLASSES))]))


def make_subset(source: Path) -> dict[str, bytes]:
    """The subset's idx files (uncompressed) by name, from the folder of the full files.

    Raises:
        FileNotFoundError: ``source`` lacks one of the full files.
        fastmlp.data.DataIntegrityError: one of them is not the published file.
    """
    paths = find_files(source, FULL)
    if paths is None:
        raise FileNotFoundError(f"{source} has none of the FashionMNIST files")
    contents = read_files(paths, FULL)
    subset = {}
    for split, (images, labels) in FULL.items():
        label_values = labels.values(contents[labels.name])
        rows = select(label_values, PER_CLASS[split])
        subset[images.name] = encode(images.values(contents[images.name])[rows])
        subset[labels.name] = encode(label_values[rows])
    return subset


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the subset's gzip files; SystemExit if their content has other checksums than the recorded ones."""
    parser = argparse.ArgumentParser(prog="python -m fastmlp.data.make_subset", description=__doc__)
    parser.add_argument("--from", dest="source", type=Path, required=True, help="folder of the full idx files")
    parser.add_argument("--to", dest="target", type=Path, default=SUBSET_FOLDER, help="default: %(default)s")
    options = parser.parse_args(arguments)
    subset = make_subset(options.source)
    for file in (file for pair in SUBSET.values() for file in pair):
        digest = hashlib.sha256(subset[file.name]).hexdigest()
        if digest != file.sha256:
            raise SystemExit(f"{file.name} has SHA-256 {digest}, expected {file.sha256} (fashion_mnist.SUBSET)")
    for name, content in subset.items():
        path = options.target / f"{name}.gz"
        atomic_write(path, compress(content))
        print(f"{hashlib.sha256(content).hexdigest()}  {path}")


if __name__ == "__main__":
    main()
