"""Checkpoints: weights as safetensors, and beside them the configuration as JSON.

``save_checkpoint("runs/mlp", ...)`` writes ``runs/mlp.safetensors`` and ``runs/mlp.json``. Both names, and ``runs/mlp``
alone, name this checkpoint; a folder stands for ``model`` in the folder. The JSON has the size and SHA-256 of the
weights, so the files of two runs are never taken for one checkpoint. Nothing is pickled, so loading cannot run code.

The two files change as one. A save has three steps, each of which is a rename: the weights become
``.mlp.safetensors.DIGEST.new``, the JSON is replaced, and the new weights take their documented name. The second step
decides: before it the JSON names the old weights, which are in place, and after it the JSON names the new weights,
which are under one of two names. `load_checkpoint` looks under both, so a process that dies at any moment, or reads at
any moment, leaves or finds a whole checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from ..base.atomic import folder_lock, open_file, read_file, replace_file, sweep, sync_folder

FORMAT = "fastmlp checkpoint"
FORMAT_VERSION = 1

WEIGHTS_SUFFIX = ".safetensors"
CONFIG_SUFFIX = ".json"
NEW_SUFFIX = ".new"

#: The largest JSON, and the largest header of safetensors, that is read.
MOST_JSON, MOST_HEADER = 64 << 20, 100_000_000

Shapes = dict[str, tuple[int, ...]]
"""The shape of each tensor of a checkpoint."""


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, incomplete, of another format, or its two files do not belong together."""


@dataclass(frozen=True)
class Checkpoint:
    """What the JSON of a checkpoint says.

    Attributes:
        weights: path of the safetensors file.
        config: what the model is built from (sizes, activation, bias, dtype), and what else was saved.
        metrics: results at the time of saving; empty if none were given.
        nbytes: size of the weights file in bytes.
        sha256: SHA-256 of the weights file.
    """

    weights: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    nbytes: int
    sha256: str


def checkpoint_paths(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """(weights, configuration) of the checkpoint that ``path`` names: either file, their common stem, or a folder."""
    given = Path(path).expanduser()
    if given.is_dir():
        given = given / "model"
    # with_suffix would cut "mlp-0.5" at its dot, so only the two known suffixes are taken off.
    stem = given.with_suffix("") if given.suffix in (WEIGHTS_SUFFIX, CONFIG_SUFFIX) else given
    return stem.with_name(stem.name + WEIGHTS_SUFFIX), stem.with_name(stem.name + CONFIG_SUFFIX)


def save_checkpoint(
    path: str | os.PathLike[str],
    model: torch.nn.Module,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any] | None = None,
) -> Path:
    """Save ``model``'s state_dict and ``config``; returns the path of the weights file.

    The checkpoint is replaced as a whole; parent folders are made. If saving fails, or the process dies, the checkpoint
    is still the old one or already the new one.

    Args:
        path: see `checkpoint_paths`.
        model: any module whose state_dict holds tensors only; on any device, shared and strided tensors allowed.
        config: what the model is built from, in JSON's types (a tuple comes back as a list); for an MLP sizes,
            activation and bias, and for an MLPEnsemble members too. The parameters' dtype, such as "float32", is added
            as ``dtype`` if absent, and so is the ``dropout`` of a model that has some.
        metrics: results, for people and scripts. A number that is not finite becomes null, since JSON has no word
            for it.

    Raises:
        TypeError: the state_dict has other values than tensors, or config or metrics have values that JSON cannot hold.
        ValueError: config has a number that is not finite, or key that is not a string.
        OSError: the files cannot be written.
    """
    weights_path, config_path = checkpoint_paths(path)
    weights = save_tensors(_tensors(model), metadata={"format": "pt"})
    config = dict(config)
    if "dtype" not in config and (dtypes := {p.dtype for p in model.parameters()}):
        config["dtype"] = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    if getattr(model, "dropout", None) and "dropout_state" in getattr(model, "_buffers", ()):
        config.setdefault("dropout", model.dropout)
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": _json_value(config, "config"),
        "metrics": _json_value(dict(metrics or {}), "metrics", finite=False),
        "weights": {"file": weights_path.name, "nbytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()},
    }
    text = json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    folder = weights_path.parent
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder) as locked:
        try:
            new = _new_path(weights_path, document["weights"]["sha256"])
            replace_file(new, weights, locked, final=weights_path)
            replace_file(config_path, text.encode(), locked)
            os.replace(new, weights_path)
            sync_folder(folder)
        finally:
            _sweep_weights(path, locked)
    return weights_path


def _new_path(weights_path: Path, sha256: str) -> Path:
    """Where the weights of this digest are before they get their documented name."""
    return weights_path.with_name(f".{weights_path.name}.{sha256[:16]}{NEW_SUFFIX}")


def _sweep_weights(path: str | os.PathLike[str], locked: bool) -> None:
    """Remove new weights that no JSON names: those of a save that failed, or of a process that died."""
    weights_path, _ = checkpoint_paths(path)
    try:
        named = _new_path(weights_path, read_checkpoint(path).sha256).name
    except FileNotFoundError:
        named = ""
    except (OSError, CheckpointError):
        return
    sweep(weights_path.parent, f".{weights_path.name}.", NEW_SUFFIX, locked, keep=named)


def load_checkpoint(
    path: str | os.PathLike[str],
    device: torch.device | str | None = None,
    *,
    check: Callable[[dict[str, Any], Shapes], None] | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(state_dict, config) of a checkpoint, for ``model.load_state_dict``.

    Args:
        path: see `checkpoint_paths`.
        device: where the tensors go; default: the CPU.
        check: called with the config and the tensors' shapes before memory is taken for any tensor; to refuse the
            checkpoint, raise a CheckpointError.

    Raises:
        FileNotFoundError: one of the two files is missing.
        CheckpointError: damaged, of another format, or weights and JSON are not of one checkpoint (a RuntimeError).
        OSError: a file cannot be read, or is no regular file.
        RuntimeError: ``device`` is not a device of this machine.
    """
    found, read = None, read_checkpoint(path)
    while found is None:
        checkpoint, errors = read, []
        # A writer may move the weights from the second name to the first between two looks.
        new = _new_path(checkpoint.weights, checkpoint.sha256)
        for candidate in (checkpoint.weights, new, checkpoint.weights):
            try:
                found = _read_weights(candidate, checkpoint, check)
                break
            except (CheckpointError, FileNotFoundError) as error:
                errors.append(error)
        else:
            read = read_checkpoint(path)
            if read == checkpoint:  # nobody has replaced the checkpoint meanwhile
                raise errors[0]
    if device is not None:
        found = {name: tensor.to(device) for name, tensor in found.items()}
    return found, checkpoint.config


def _read_weights(
    path: Path, checkpoint: Checkpoint, check: Callable[[dict[str, Any], Shapes], None] | None
) -> dict[str, torch.Tensor]:
    """The tensors of ``path``, if the file is the one that the JSON names."""
    try:
        stream = open_file(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the weights of the checkpoint are missing: expected {path} beside its .json"
        ) from error
    with stream:
        nbytes = os.fstat(stream.fileno()).st_size
        if nbytes != checkpoint.nbytes:
            raise CheckpointError(
                f"{path} has {nbytes} bytes, expected {checkpoint.nbytes}: it is truncated, or not "
                "the file its .json was written for. Copy both files again, or train and save again."
            )
        damage = None
        try:
            shapes = _shapes(path, stream, nbytes)
        except CheckpointError as error:
            damage = error
            if nbytes > MOST_HEADER:  # the digest would say no more, and take long
                raise
        else:
            if check is not None:
                check(checkpoint.config, shapes)
        if (digest := _sha256_of(stream)) != checkpoint.sha256:
            raise CheckpointError(
                f"{path} has SHA-256 {digest}, expected {checkpoint.sha256}: it is altered, or not the "
                "file its .json was written for. Copy both files again, or train and save again."
            )
        if damage is not None:
            raise damage
        stream.seek(0)
        weights = stream.read(nbytes)
    try:
        return load_tensors(weights)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error


def _shapes(path: Path, stream: BinaryIO, nbytes: int) -> Shapes:
    """The tensors that a safetensors file promises; CheckpointError unless they take the rest of the file."""
    length = int.from_bytes(stream.read(8), "little")
    if length > min(nbytes - 8, MOST_HEADER):
        raise CheckpointError(
            f"{path} is not a safetensors file: its header would have {length} bytes, of {nbytes} bytes in all"
        )
    try:
        header = json.loads(stream.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        ends = [int(entry["data_offsets"][1]) for entry in entries.values()]
        shapes = {name: tuple(int(n) for n in entry["shape"]) for name, entry in entries.items()}
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: its header is damaged ({error})") from error
    if 8 + length + max(ends, default=0) != nbytes:
        raise CheckpointError(
            f"{path} is not a safetensors file: its header promises {8 + length + max(ends, default=0)} bytes, got "
            f"{nbytes}"
        )
    return shapes


def _sha256_of(stream: BinaryIO) -> str:
    """The SHA-256 of a file, piece by piece, so that a large file takes no memory."""
    stream.seek(0)
    digest = hashlib.sha256()
    while piece := stream.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The configuration and metrics of a checkpoint, without its weights.

    Raises:
        FileNotFoundError: there is no JSON of that name.
        OSError: the JSON cannot be read, or is no regular file.
        CheckpointError: it is not the JSON of a checkpoint, or of a newer format (a RuntimeError).
    """
    weights_path, config_path = checkpoint_paths(path)
    try:
        text = read_file(config_path, MOST_JSON)
    except FileNotFoundError as error:
        there = f" ({weights_path.name} alone is not enough)" if weights_path.exists() else ""
        raise FileNotFoundError(
            f"there is no checkpoint {os.fspath(path)}: expected {config_path} and {weights_path.name}{there}"
        ) from error
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        raise CheckpointError(f"{config_path} is damaged: it is not JSON ({error})") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(
            f'{config_path} is not the configuration of a checkpoint: expected "format": "{FORMAT}". '
            "Checkpoints are written by save_checkpoint or `fastmlp train --out`."
        )
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{config_path} has format version {version!r}, this fastmlp reads {FORMAT_VERSION}; "
            "if a newer fastmlp wrote it, upgrade"
        )
    config, metrics, weights = (document.get(key) for key in ("config", "metrics", "weights"))
    if not (isinstance(config, dict) and isinstance(metrics, dict) and isinstance(weights, dict)):
        raise CheckpointError(f"{config_path} is damaged: it lacks config, metrics or weights")
    nbytes, sha256 = weights.get("nbytes"), weights.get("sha256")
    if not (isinstance(nbytes, int) and isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)):
        raise CheckpointError(f"{config_path} is damaged: it lacks the size and SHA-256 of the weights")
    return Checkpoint(weights_path, config, metrics, nbytes, sha256)


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state_dict as what safetensors can hold: on the CPU, contiguous, each tensor with memory of its own."""
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"a checkpoint holds tensors only, but state_dict()[{name!r}] is a {type(value).__name__}")
        tensor = value.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:  # tied weights, or views of one buffer
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    return tensors


def _json_value(value: Any, where: str, finite: bool = True) -> Any:
    """``value`` in JSON's types; ``where`` names it in errors. Without ``finite``, NaN and infinities become None."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        if finite:
            raise ValueError(f"{where} is {value}; expected a finite number, since JSON has no other")
        return None
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}; expected strings only")
        return {key: _json_value(item, f"{where}[{key!r}]", finite) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item, f"{where}[{index}]", finite) for index, item in enumerate(value)]
    raise TypeError(
        f"{where} is a {type(value).__name__}, which JSON cannot hold; expected a string, number, bool, None, list or "
        "dict (for a tensor pass .item() or .tolist(), for a dtype or device its name)"
    )
