"""Checkpoints: weights as safetensors, and beside them the configuration as JSON.

``save_checkpoint("runs/mlp", ...)`` writes ``runs/mlp.safetensors`` and ``runs/mlp.json``. Both names, and ``runs/mlp``
alone, name this checkpoint; a folder stands for ``model`` in the folder. The JSON has the size and SHA-256 of the
weights, so the files of two runs are never taken for one checkpoint. Nothing is pickled, so loading cannot run code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from ..base.atomic import atomic_write

FORMAT = "fastmlp checkpoint"
FORMAT_VERSION = 1

WEIGHTS_SUFFIX = ".safetensors"
CONFIG_SUFFIX = ".json"


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

    Each file is replaced whole, the JSON last; parent folders are made. If the process dies between the two files,
    `load_checkpoint` refuses them.

    Args:
        path: see `checkpoint_paths`.
        model: any module whose state_dict holds tensors only; on any device, shared and strided tensors allowed.
        config: what the model is built from, in JSON's types (a tuple comes back as a list); for an MLP sizes,
            activation and bias. The parameters' dtype, such as "float32", is added as ``dtype`` if absent.
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
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": _json_value(config, "config"),
        "metrics": _json_value(dict(metrics or {}), "metrics", finite=False),
        "weights": {"file": weights_path.name, "nbytes": len(weights), "sha256": _sha256(weights)},
    }
    text = json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    atomic_write(weights_path, weights)
    atomic_write(config_path, text.encode())
    return weights_path


def load_checkpoint(
    path: str | os.PathLike[str], device: torch.device | str | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(state_dict, config) of a checkpoint, for ``model.load_state_dict``.

    Args:
        path: see `checkpoint_paths`.
        device: where the tensors go; default: the CPU.

    Raises:
        FileNotFoundError: one of the two files is missing.
        CheckpointError: damaged, of another format, or weights and JSON are not of one checkpoint (a RuntimeError).
        RuntimeError: ``device`` is not a device of this machine.
    """
    checkpoint = read_checkpoint(path)
    try:
        weights = checkpoint.weights.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the weights of the checkpoint are missing: expected {checkpoint.weights} beside its .json"
        ) from error
    if len(weights) != checkpoint.nbytes:
        raise CheckpointError(
            f"{checkpoint.weights} has {len(weights)} bytes, expected {checkpoint.nbytes}: it is truncated, or not "
            "the file its .json was written for. Copy both files again, or train and save again."
        )
    if (digest := _sha256(weights)) != checkpoint.sha256:
        raise CheckpointError(
            f"{checkpoint.weights} has SHA-256 {digest}, expected {checkpoint.sha256}: it is altered, or not the "
            "file its .json was written for. Copy both files again, or train and save again."
        )
    try:
        tensors = load_tensors(weights)
    except SafetensorError as error:
        raise CheckpointError(f"{checkpoint.weights} is not a safetensors file: {error}") from error
    if device is not None:
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    return tensors, checkpoint.config


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The configuration and metrics of a checkpoint, without its weights.

    Raises:
        FileNotFoundError: there is no JSON of that name.
        CheckpointError: it is not the JSON of a checkpoint, or of a newer format (a RuntimeError).
    """
    weights_path, config_path = checkpoint_paths(path)
    try:
        text = config_path.read_bytes()
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
    if not (isinstance(nbytes, int) and isinstance(sha256, str)):
        raise CheckpointError(f"{config_path} is damaged: it lacks the size and SHA-256 of the weights")
    return Checkpoint(weights_path, config, metrics, nbytes, sha256)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


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
