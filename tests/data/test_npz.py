""".npz files: what is read, what is refused and in which words, and files that promise more than they have."""

from __future__ import annotations

import contextlib
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.lib import format as npy

from fastmlp.data import load_data
from fastmlp.data.npz import load_inputs

X, Y = np.linspace(-1, 1, 24).reshape(8, 3), np.arange(8) % 3


def saved(folder: Path, **arrays: object) -> Path:
    path = folder / "my.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_classes(tmp_path, save):
    save(tmp_path / "my.npz", x=X, y=Y, x_test=X[:2], y_test=Y[:2])
    train, test = load_data(tmp_path / "my.npz")
    assert torch.equal(train.x, torch.from_numpy(X))
    assert train.y.tolist() == Y.tolist()
    assert (train.y.dtype, train.classes, len(test)) == (torch.int64, ("0", "1", "2"), 2)
    assert (train.name, train.split, test.split, train.origin) == ("my", "train", "test", str(tmp_path / "my.npz"))
    assert train.published == "my 8 train (my.npz)"


@pytest.mark.parametrize(
    ("dtype", "becomes"), [("f2", torch.float32), ("f4", torch.float32), (">f8", torch.float64), ("u1", torch.uint8)]
)
def test_dtypes_and_shapes_of_x(tmp_path, dtype, becomes):
    x = np.arange(8 * 2 * 3).reshape(8, 2, 3).astype(dtype)
    train, test = load_data(saved(tmp_path, x_train=np.asfortranarray(x), y_train=Y[:, None]))
    assert test is None
    assert (train.x.dtype, train.shape) == (becomes, (2, 3))
    assert train.x.tolist() == x.reshape(8, 6).tolist()
    assert train.y.shape == (8,)


def test_names_of_classes(tmp_path):
    texts = np.array(["cat", "ant", "bee"])[Y]
    train, test = load_data(saved(tmp_path, x=X, y=texts, x_test=X, y_test=texts))
    assert train.classes == ("ant", "bee", "cat")
    assert [train.classes[label] for label in test.y] == texts.tolist()
    train, _ = load_data(saved(tmp_path, x=X, y=Y, classes=["cat", "ant", "bee", "dog"]))
    assert train.classes == ("cat", "ant", "bee", "dog")
    assert train.y.tolist() == Y.tolist()


def test_weights_of_the_rows(tmp_path):
    for weight in (Y + 1, np.arange(1, 9, dtype="f4")):
        train, test = load_data(saved(tmp_path, x=X, y=Y, x_test=X, y_test=Y, sample_weight=weight))
        assert train.sample_weight.tolist() == weight.tolist()
        assert train.rows(torch.tensor([7, 2]), "train").sample_weight.tolist() == weight[[7, 2]].tolist()
        assert test.sample_weight is None


@pytest.mark.parametrize("y", [X[:, 0], X[:, :2], Y, Y > 0, X[:, :2].astype("f4").reshape(8, 2, 1)])
def test_values(tmp_path, y):
    train, _ = load_data(saved(tmp_path, x=X, y=y), values=True)
    assert train.classes is None
    assert train.y.is_floating_point()
    assert train.y.tolist() == y.reshape(8, -1).astype(float).tolist()


NAN, INF = X.copy(), X.copy()
NAN[5, 1] = np.nan
INF[2, 0] = np.inf


@pytest.mark.parametrize(
    ("arrays", "values", "words"),
    [
        ({"y": Y}, False, "has no x: it has the arrays y; expected x and y"),
        ({"x": X}, False, "has no y: it has the arrays x; expected x and y"),
        ({"X": X, "y": Y}, False, "has no x: it has the arrays X, y; expected x and y (or x_train and y_train), and "),
        ({"X": X, "y": Y}, False, "Did you mean 'X'?"),
        ({}, False, "has no x: it has no arrays"),
        ({"x": X, "x_train": X, "y": Y}, False, "has both x and x_train; expected one of them"),
        ({"x": X, "y": Y, "x_test": X}, False, "has only one of x_test and y_test; expected both or none"),
        ({"x": X, "y": Y[:7]}, False, "x is float64 [8, 3] and y is int64 [7]; expected as many rows of x as of y"),
        ({"x": X, "y": Y, "x_test": X, "y_test": Y[:3]}, False, "expected as many rows of x_test as of y_test"),
        ({"x": X, "y": Y, "x_test": X[:, :2], "y_test": Y}, False, "x_test has 2 values per row, but x has 3 values"),
        ({"x": X, "y": Y, "x_test": X.astype("u1"), "y_test": Y}, False, "x_test has 3 pixels per row, but x has 3"),
        ({"x": NAN, "y": Y}, False, "x has 1 values that are NaN or infinite, the first in row 5, column 1; expected"),
        ({"x": INF, "y": Y}, False, "the first in row 2, column 0; expected finite numbers"),
        ({"x": X, "y": NAN[:, 1]}, True, "y has 1 values that are NaN or infinite, the first in row 5, column 0"),
        ({"x": X.astype(int), "y": Y}, False, "x is int64 [8, 3]; expected floating-point numbers, or uint8 pixels"),
        ({"x": X, "y": Y.astype(float)}, False, "y is floats; expected class numbers; convert them with y.astype('int"),
        ({"x": X, "y": Y - 1}, False, "y has the class number -1; expected numbers of at least 0, also for rows"),
        ({"x": X, "y": Y * 1000}, False, "y has class numbers up to 2000 in 8 rows; expected numbers from 0 to C - 1"),
        ({"x": X, "y": Y, "x_test": X, "y_test": Y + 1}, False, "y_test has class numbers up to 3; expected 0 to 2"),
        ({"x": X, "y": np.stack([Y, Y], 1)}, False, "y is int64 [8, 2]; expected one class number for each row"),
        ({"x": X, "y": Y, "classes": ["a", "b"]}, False, "y has class numbers up to 2, but classes has 2 names"),
        ({"x": X, "y": Y, "classes": ["a", "a", "b"]}, False, "expected different texts, one for each class"),
        (
            {"x": X, "y": np.array(["a", "b"] * 4), "classes": ["a", "c"]},
            False,
            "y has 'b', which is no class; the classes are a, c",
        ),
        ({"x": X, "y": np.array(["a", "b"] * 4)}, True, "expected numbers"),
        ({"x": X.astype(object), "y": Y}, False, "x has Python objects, which are not read"),
        ({"x": X, "y": np.array([None] * 8)}, False, "y has Python objects, which are not read"),
        ({"x": X[:0], "y": Y[:0]}, False, "y is empty; expected a class number for each row"),
        ({"x": X[:0], "y": X[:0]}, True, "x is float64 [0, 3]; expected at least one row and one feature"),
        ({"x": X[0, 0], "y": Y[0]}, False, "expected as many rows of x as of y"),
        ({"x": X, "y": Y, "sample_weight": Y}, False, "sample_weight has 0 in row 0; expected numbers above 0, and no"),
        ({"x": X, "y": Y, "sample_weight": NAN[:, 1]}, False, "sample_weight has 1 values that are NaN or infinite"),
        ({"x": X, "y": Y, "sample_weight": Y[:7]}, False, "sample_weight is int64 [7]; expected numbers [8], one for"),
        ({"x": X + 1j, "y": Y}, False, "x is complex128 [8, 3]; expected floating-point numbers"),
    ],
)
def test_mistakes(tmp_path, arrays, values, words):
    path = saved(tmp_path, **arrays)
    with pytest.raises(ValueError) as error:
        load_data(path, values=values)
    assert words in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def header(shape: tuple[int, ...], dtype: str = "<f8") -> bytes:
    stream = io.BytesIO()
    npy.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("shape", [(10**12,), (10**9, 10**9), (2**62, 4), (3,)])
def test_a_header_that_promises_more_than_there_is_takes_no_memory(tmp_path, monkeypatch, shape, compression):
    with zipfile.ZipFile(tmp_path / "my.npz", "w", compression) as archive:
        archive.writestr("x.npy", header(shape) + bytes(16))
        archive.writestr("y.npy", header((2,)) + bytes(16))
    monkeypatch.setattr(npy, "read_array", None)
    with pytest.raises(ValueError, match=r"x promises \[.*\] in float64, but has 16 bytes"):
        load_data(tmp_path / "my.npz")


def test_a_member_that_promises_more_than_the_file_can_have(tmp_path):
    """The size that the zip archive has for the member is as large as the header says, and the bytes are not there."""
    with zipfile.ZipFile(tmp_path / "my.npz", "w") as archive:
        archive.writestr("x.npy", header((10**8,)))
        archive.writestr("y.npy", header((10**8,)))
        for info in archive.infolist():
            info.file_size = len(header((10**8,))) + 8 * 10**8
    with pytest.raises(ValueError, match="more than the file can have"):
        load_data(tmp_path / "my.npz")


@pytest.mark.parametrize("content", [b"", b"PK\3\4 not an archive", b"\x93NUMPY\1\0", b"x" * 1000])
def test_files_that_are_no_archive(tmp_path, content):
    (tmp_path / "my.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"my.npz is not an .npz file, or damaged: .*; expected one of numpy.savez"):
        load_data(tmp_path / "my.npz")


def test_damage_anywhere_is_a_value_error(tmp_path):
    """Every byte in turn is another one: the file is read, or refused with a ValueError."""
    np.savez_compressed(tmp_path / "good.npz", x=X[:2].astype("f4"), y=Y[:2])
    good = (tmp_path / "good.npz").read_bytes()
    for place in range(len(good)):
        (tmp_path / "my.npz").write_bytes(good[:place] + bytes([good[place] ^ 0x55]) + good[place + 1 :])
        with contextlib.suppress(ValueError):
            load_data(tmp_path / "my.npz")


def test_inputs_for_predict(tmp_path):
    assert load_inputs(saved(tmp_path, x=X)).tolist() == X.tolist()
    with pytest.raises(ValueError, match=r"has no x: it has z; expected x"):
        load_inputs(saved(tmp_path, z=X))
