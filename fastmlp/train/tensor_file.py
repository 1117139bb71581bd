"""One file of tensors in the format safetensors, written without a copy of the tensors and checked when it is read.

The header has a text for each key of ``about``, and the CRC-32 of the tensors' bytes. `write_tensors` replaces the file
as a whole, so a file is what one call wrote. Nothing is pickled, so reading cannot run code.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..base.atomic import folder_lock, open_file, replace_file
from .checkpoint import MOST_HEADER, CheckpointError

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write the tensors, which may be on any device, and the texts of ``about``; the file is replaced as a whole.

    The bytes are on the disk when the call returns, and the new name is when the system next writes names. So after a
    power cut the old file may be there; after the death of the process it is the new one.

    Raises:
        TypeError: a tensor of a dtype that no state of a run has.
        OSError: the file cannot be written; it is then the old one or the whole new one.
    """
    target = Path(path)
    pieces: list[memoryview] = []
    entries: dict[str, object] = {}
    offset = crc = 0
    # Wide elements come first, so that each tensor begins at a multiple of its element's size.
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        if tensor.dtype not in _NAMES:
            raise TypeError(f"{name} is {tensor.dtype}; expected one of {', '.join(map(str, _NAMES))}")
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        end = offset + flat.numel() * flat.element_size()
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        if flat.numel():
            pieces.append(flat.view(torch.uint8).numpy().data)
            crc = zlib.crc32(pieces[-1], crc)
        offset = end
    header = json.dumps({"__metadata__": {**about, "crc32": f"{crc:08x}"}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    content = [memoryview(len(header).to_bytes(8, "little") + header), *pieces]
    target.parent.mkdir(parents=True, exist_ok=True)
    with folder_lock(target.parent) as locked:
        replace_file(target, content, locked, sync_names=False)


def read_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, texts) of a file that `write_tensors` wrote with ``about["format"] == kind``.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the file cannot be read, or is no regular file.
        CheckpointError: the file is damaged, or of another kind (a RuntimeError).
    """
    with open_file(path) as stream:
        content = stream.read()
    length = int.from_bytes(content[:8], "little")
    try:
        if length > min(len(content) - 8, MOST_HEADER):
            raise ValueError(f"a header of {length} bytes, of {len(content)} in all")
        about = json.loads(content[8 : 8 + length]).get("__metadata__")
        if not isinstance(about, dict) or not all(isinstance(text, str) for text in about.values()):
            raise ValueError("no texts in the header")
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{os.fspath(path)} is damaged, or no file of fastmlp: {error}") from error
    if about.get("format") != kind:
        raise CheckpointError(f"{os.fspath(path)} is no {kind}: its format is {about.get('format')!r}")
    if f"{zlib.crc32(memoryview(content)[8 + length :]):08x}" != about.get("crc32"):
        raise CheckpointError(f"{os.fspath(path)} is damaged: its bytes are not those that were written")
    try:
        return load(content), about
    except SafetensorError as error:
        raise CheckpointError(f"{os.fspath(path)} is damaged: {error}") from error
