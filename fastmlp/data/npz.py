"""Tables from .npz files of numpy: x and y, and perhaps x_test and y_test.

Nothing is unpickled. The shape in the header of each array is compared with the size of the array in the file before
memory is taken for it, so a small file cannot ask for much memory.
"""

from __future__ import annotations

import dataclasses
import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib import format as npy
from torch import Tensor

from ..base.atomic import open_file
from ..base.names import did_you_mean
from .described import numbers, shown
from .idx import MOST_RATIO
from .table import Table

Array = npt.NDArray[Any]
#: The arrays of a file. ``x_train`` and ``y_train`` are other words for ``x`` and ``y``.
NAMES = ("x", "y", "x_train", "y_train", "x_test", "y_test", "classes", "sample_weight")
EXPECTED = "expected x and y (or x_train and y_train), and perhaps x_test, y_test, classes and sample_weight"


def load_npz(path: Path, values: bool) -> tuple[Table, Table | None]:
    """(train, test) of a file; test is None where the file has no x_test.

    Args:
        path: the file. Its x is uint8 or floating point [N, ...], flattened to [N, features]. Its y is [N] class
            numbers or texts, or values [N] or [N, ...]. ``classes`` has the names of the classes, by their numbers.
            ``sample_weight`` [N] has a weight above 0 for each row of x, which counts in the training.
        values: whether y is values; else y is classes.

    Raises:
        ValueError: an array is missing, or its dtype, shape or values are not those.
        OSError: the file cannot be read.
    """
    arrays, found = read_npz(path, NAMES)
    for name in ("x", "y"):
        if {name, f"{name}_train"} <= arrays.keys():
            raise ValueError(f"{path} has both {name} and {name}_train; expected one of them")
        if name not in arrays and f"{name}_train" in arrays:
            arrays[name] = arrays.pop(f"{name}_train")
        if name not in arrays:
            text = f"has the arrays {shown(found)}" if found else "has no arrays"
            raise ValueError(f"{path} has no {name}: it {text}; {EXPECTED}{did_you_mean(name, found)}")
    if len({"x_test", "y_test"} & arrays.keys()) == 1:
        raise ValueError(f"{path} has only one of x_test and y_test; expected both or none")
    names = _class_names(path, arrays, values)
    train = _table(path, arrays["x"], arrays["y"], "train", names)
    if "sample_weight" in arrays:
        train = dataclasses.replace(train, sample_weight=_weights(path, arrays["sample_weight"], len(train)))
    if "x_test" not in arrays:
        return train, None
    test = _table(path, arrays["x_test"], arrays["y_test"], "test", names)
    for name, ours, theirs in (("x_test", test.x, train.x), ("y_test", test.y, train.y)):
        if ours.shape[1:] != theirs.shape[1:] or ours.dtype.is_floating_point != theirs.dtype.is_floating_point:
            raise ValueError(
                f"{path}: {name} has {_like(ours)} per row, but {name[0]} has {_like(theirs)}; expected the same"
            )
    return train, test


def load_inputs(path: Path) -> Tensor:
    """The x of a file [N, features], for a model to predict; errors as `load_npz`."""
    arrays, found = read_npz(path, ("x",))
    if "x" not in arrays:
        raise ValueError(f"{path} has no x: it has {shown(found) or 'no arrays'}; expected x{did_you_mean('x', found)}")
    return _inputs(path, "x", arrays["x"])


def read_npz(path: Path, names: Sequence[str]) -> tuple[dict[str, Array], list[str]]:
    """The arrays of these names that a .npz file has, and the names of all its arrays.

    Raises:
        ValueError: no .npz file, damaged, an array of Python objects, or one that promises more than the file has.
        OSError: the file cannot be read.
    """
    with open_file(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        try:
            archive = zipfile.ZipFile(stream)
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        except Exception as error:  # for damaged files, zipfile raises nearly every type of error
            raise ValueError(f"{path} is not an .npz file, or damaged: {error}; expected one of numpy.savez") from error
        with archive:
            return {n: _array(path, n, archive, members[n], size) for n in names if n in members}, list(members)


def _array(path: Path, name: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo, size: int) -> Array:
    """One array, after its size was compared with its header's and with the file's."""
    if info.compress_size > size or info.file_size > MOST_RATIO * info.compress_size + 65536:
        raise ValueError(f"{path}: {name} promises {info.file_size} bytes, more than the file can have")
    try:
        with archive.open(info) as stream:
            version = npy.read_magic(stream)
            read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = read_header(stream)
            head = stream.tell()
        if dtype.hasobject:
            raise ValueError("has Python objects, which are not read; save numbers or texts of numpy")
        if math.prod(shape) * dtype.itemsize != info.file_size - head:
            raise ValueError(f"promises {list(shape)} in {dtype}, but has {info.file_size - head} bytes")
        with archive.open(info) as stream:
            return npy.read_array(stream, allow_pickle=False)
    except Exception as error:  # as above, and numpy's errors about its header
        reason = str(error) if isinstance(error, ValueError) else f"is damaged ({error or type(error).__name__})"
        raise ValueError(f"{path}: {name} {' '.join(reason.split())}") from error


def _class_names(path: Path, arrays: dict[str, Array], values: bool) -> tuple[str, ...] | None:
    """The names of the classes, in place of which arrays of texts become class numbers; None for values."""
    targets = [name for name in ("y", "y_test") if name in arrays]
    if values:
        return None
    given = arrays.get("classes")
    if given is not None and (given.dtype.kind != "U" or given.ndim != 1 or len(set(given.tolist())) != given.size):
        raise ValueError(f"{path}: classes is {_about(given)}; expected different texts, one for each class")
    if arrays["y"].dtype.kind == "U":
        names: tuple[str, ...] = tuple((np.unique(arrays["y"]) if given is None else given).tolist())
        place = {text: number for number, text in enumerate(names)}
        for name in targets:
            missing = sorted(set(arrays[name].ravel().tolist()) - place.keys(), key=str)
            if missing:
                raise ValueError(
                    f"{path}: {name} has {missing[0]!r}, which is no class; the classes are {shown(names)}"
                )
            numbered = [place[text] for text in arrays[name].ravel().tolist()]
            arrays[name] = np.array(numbered, dtype=np.int64).reshape(arrays[name].shape)
        return names
    for name in targets:
        _check_numbers(path, name, arrays[name])
    count = int(arrays["y"].max()) + 1
    if given is not None and given.size < count:
        raise ValueError(
            f"{path}: y has class numbers up to {count - 1}, but classes has {given.size} names; expected a name "
            "for each number from 0 on"
        )
    if given is None and count > arrays["y"].size:
        raise ValueError(
            f"{path}: y has class numbers up to {count - 1} in {arrays['y'].size} rows; expected numbers from 0 to "
            "C - 1 for C classes"
        )
    names = numbers(count) if given is None else tuple(given.tolist())
    if "y_test" in arrays and int(arrays["y_test"].max()) >= len(names):
        raise ValueError(
            f"{path}: y_test has class numbers up to {arrays['y_test'].max()}; expected 0 to {len(names) - 1}, as y"
        )
    return names


def _check_numbers(path: Path, name: str, y: Array) -> None:
    if y.size == 0:
        raise ValueError(f"{path}: {name} is empty; expected a class number for each row")
    if y.dtype.kind not in "iub":
        what = "floats" if y.dtype.kind == "f" else f"of dtype {y.dtype}"
        advice = f"; convert them with {name}.astype('int64'), or take a loss of values, such as mse"
        raise ValueError(f"{path}: {name} is {what}; expected class numbers{advice if y.dtype.kind == 'f' else ''}")
    if y.min() < 0:
        raise ValueError(
            f"{path}: {name} has the class number {y.min()}; expected numbers of at least 0, also for rows that "
            "ignore_index leaves out"
        )


def _table(path: Path, x: Array, y: Array, split: str, classes: tuple[str, ...] | None) -> Table:
    test = "_test" if split == "test" else ""
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
        raise ValueError(
            f"{path}: x{test} is {_about(x)} and y{test} is {_about(y)}; expected as many rows of x{test} as of y{test}"
        )
    inputs = _inputs(path, f"x{test}", x)
    if classes is None:
        targets = _values(path, f"y{test}", y)
    elif y.size == len(y):
        targets = torch.from_numpy(y.reshape(-1).astype(np.int64))
    else:
        raise ValueError(f"{path}: y{test} is {_about(y)}; expected one class number for each row")
    return Table(inputs, targets, path.stem, split, str(path.absolute()), classes, x.shape[1:])


def _inputs(path: Path, name: str, x: Array) -> Tensor:
    """X [N, features] in uint8, float32 or float64."""
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise ValueError(
            f"{path}: {name} is {_about(x)}; expected floating-point numbers, or uint8 pixels. Convert it with "
            f"{name}.astype('float32')"
        )
    if x.size == 0:
        raise ValueError(f"{path}: {name} is {_about(x)}; expected at least one row and one feature")
    return _finite(path, name, x)


def _values(path: Path, name: str, y: Array) -> Tensor:
    """Y [N, outputs] in float32 or float64."""
    if y.dtype.kind not in "fiub":
        raise ValueError(f"{path}: {name} is {_about(y)}; expected numbers")
    if y.size == 0:
        raise ValueError(f"{path}: {name} is {_about(y)}; expected at least one row and one value")
    return _finite(path, name, y if y.dtype.kind == "f" else y.astype(np.float64))


def _weights(path: Path, weight: Array, rows: int) -> Tensor:
    """The weights [N] in float32 or float64."""
    if weight.dtype.kind not in "fiu" or weight.shape != (rows,):
        raise ValueError(f"{path}: sample_weight is {_about(weight)}; expected numbers [{rows}], one for each row of x")
    weights = _finite(path, "sample_weight", weight if weight.dtype.kind == "f" else weight.astype(np.float64))
    if not bool((weights > 0).all()):
        row = int((weights <= 0).nonzero()[0, 0])
        raise ValueError(
            f"{path}: sample_weight has {weights[row].item():g} in row {row}; expected numbers above 0, and no "
            "rows that shall not count"
        )
    return weights.flatten()


def _finite(path: Path, name: str, values: Array) -> Tensor:
    """The rows of an array as a tensor [N, K]; ValueError for NaN and infinity."""
    rows = values.reshape(len(values), -1)
    if rows.dtype != np.uint8:
        wrong = ~np.isfinite(rows)
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise ValueError(
                f"{path}: {name} has {wrong.sum()} values that are NaN or infinite, the first in row {row}, column "
                f"{column}; expected finite numbers"
            )
        rows = rows.astype(np.float64 if rows.dtype.itemsize > 4 else np.float32)
    return torch.from_numpy(np.array(rows, order="C"))


def _about(array: Array) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _like(rows: Tensor) -> str:
    kind = "values" if rows.is_floating_point() else "pixels" if rows.dtype == torch.uint8 else "class numbers"
    return f"{rows[0].numel()} {kind}"
