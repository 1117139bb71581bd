"""The idx file format: reading files of known and of any content, and writing.

An idx file is two zero bytes, a type code (8: unsigned byte), the number of axes, each axis' length as a big-endian
32-bit integer, then the values in row-major order. ``read_verified`` reads a file of one known content, whose SHA-256
it checks. The checksum is that of the uncompressed content, so ``name`` and ``name.gz`` have the same one. ``read_any``
reads a file whose size is the one that its header says.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..base.atomic import open_file

UNSIGNED_BYTE = 8
#: gzip's compression makes nothing this many times smaller.
MOST_RATIO = 1100

Bytes = npt.NDArray[np.uint8]


class DataIntegrityError(RuntimeError):
    """A data file is truncated, altered, or not the file its name says."""


@dataclass(frozen=True)
class IdxFile:
    """One unsigned-byte idx file: its name without ``.gz``, its shape, and the SHA-256 of its content."""

    name: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def header(self) -> bytes:
        """The bytes before the first value."""
        return struct.pack(f">HBB{len(self.shape)}I", 0, UNSIGNED_BYTE, len(self.shape), *self.shape)

    @property
    def nbytes(self) -> int:
        """Length of the uncompressed file in bytes."""
        return len(self.header) + math.prod(self.shape)

    def values(self, content: Bytes) -> Bytes:
        """The values of a verified file as a view of ``self.shape``."""
        return content[len(self.header) :].reshape(self.shape)


def read_verified(path: Path, file: IdxFile) -> Bytes:
    """The whole uncompressed content of ``path``, a plain or gzip copy of ``file``, as uint8 [file.nbytes].

    Raises:
        DataIntegrityError: the content is not ``file``'s; the message has the path, what was expected and found.
        OSError: the file cannot be read.
    """
    try:
        # One more byte than expected shows that a file is too long.
        with open_file(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            # gzip passes over any number of zeros after its data, and makes no file this much larger.
            if size > 2 * file.nbytes + 65536:
                raise _integrity_error(path, file, f"{size} bytes, more than any copy has")
            with gzip.GzipFile(fileobj=stream) if path.suffix == ".gz" else stream as content_stream:
                content = content_stream.read(file.nbytes + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        found = f"a damaged or truncated gzip file of {path.stat().st_size} bytes ({error})"
        raise _integrity_error(path, file, found) from error
    if content[: len(file.header)] != file.header:
        found = f"a file that starts with {content[: len(file.header)].hex(' ') or 'nothing: it is empty'}"
        raise _integrity_error(path, file, found)
    if len(content) < file.nbytes:
        raise _integrity_error(path, file, f"{len(content)} bytes: the file is truncated")
    if len(content) > file.nbytes:
        raise _integrity_error(path, file, f"more than {file.nbytes} bytes")
    digest = hashlib.sha256(content).hexdigest()
    if digest != file.sha256:
        raise _integrity_error(path, file, f"{file.nbytes} bytes with SHA-256 {digest}: the file is altered")
    return np.frombuffer(content, dtype=np.uint8)


def read_any(path: Path) -> Bytes:
    """The values of an idx file of unsigned bytes, plain or gzip, in the shape that its header says.

    The size of the file is compared with the header's before memory is taken for the values.

    Raises:
        DataIntegrityError: no idx file of unsigned bytes, or truncated, too long or damaged.
        OSError: the file cannot be read.
    """
    wrong = f"{path} is not an idx file of unsigned bytes"
    try:
        with open_file(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            packed = path.suffix == ".gz"
            with gzip.GzipFile(fileobj=stream) if packed else stream as content_stream:
                start = content_stream.read(4)
                if len(start) < 4 or start[:3] != bytes((0, 0, UNSIGNED_BYTE)) or start[3] == 0:
                    raise DataIntegrityError(
                        f"{wrong}: expected it to start with 00 00 08 and the number of axes, found "
                        f"{start.hex(' ') or 'nothing, because it is empty'}"
                    )
                lengths = content_stream.read(4 * start[3])
                if len(lengths) < 4 * start[3]:
                    raise DataIntegrityError(f"{wrong}: it ends within its header of {start[3]} axes")
                shape = struct.unpack(f">{start[3]}I", lengths)
                expected, head = math.prod(shape), 4 + len(lengths)
                most = MOST_RATIO * size + 65536 if packed else size - head
                if expected > most or (not packed and expected < most):
                    raise DataIntegrityError(
                        f"{path} is truncated or damaged: its header promises {_shown(shape)} = {expected} values, the "
                        f"file has {f'{size} bytes' if packed else most}"
                    )
                content = content_stream.read(expected + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataIntegrityError(f"{path} is a damaged or truncated gzip file ({error})") from error
    if len(content) != expected:
        raise DataIntegrityError(
            f"{path} is truncated or damaged: its header promises {_shown(shape)} = {expected} values, it has "
            f"{len(content) if len(content) < expected else 'more'}"
        )
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _shown(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _integrity_error(path: Path, file: IdxFile, found: str) -> DataIntegrityError:
    shape = "x".join(map(str, file.shape))
    return DataIntegrityError(
        f"{path} is not the expected file. Expected: {file.name}, idx of {shape} unsigned bytes, {file.nbytes} bytes "
        f"uncompressed, starting with {file.header.hex(' ')}, SHA-256 {file.sha256}. Found: {found}."
    )


def encode(values: npt.NDArray[Any]) -> bytes:
    """The idx file that holds ``values`` (uint8, any shape)."""
    if values.dtype != np.uint8:
        raise TypeError(f"an idx file of unsigned bytes needs uint8 values, got {values.dtype}")
    return IdxFile("", values.shape, "").header + values.tobytes()


def compress(content: bytes) -> bytes:
    """``content`` as gzip with no name and no time: with one version of zlib, equal content gives equal bytes."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0) as stream:
        stream.write(content)
    return buffer.getvalue()
