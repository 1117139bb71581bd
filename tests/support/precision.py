"""Torch's settings for the precision of float32 products: every call that makes one, and how to take them back."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

__all__ = ["SETTINGS", "default_precision", "set_matmul"]


def set_matmul(value: str) -> None:
    """The newer setting, for products on CUDA devices."""
    torch.backends.cuda.matmul.fp32_precision = value


def _set_all(value: str) -> None:
    torch.backends.fp32_precision = value


def _set_cuda(value: str) -> None:
    torch.backends.cudnn.fp32_precision = value  # torch's getter also reads this setting for products without one


def _set_allow(value: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = value


def _set_onednn(value: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = value


_old = torch.set_float32_matmul_precision
_Step = tuple[Callable[..., None], object]

#: By name: the settings that a user makes, in order, and whether they allow tf32 on CUDA devices.
SETTINGS: dict[str, tuple[tuple[_Step, ...], bool]] = {
    "none": ((), False),
    "old highest": (((_old, "highest"),), False),
    "old high": (((_old, "high"),), True),
    "old medium": (((_old, "medium"),), True),
    "allow_tf32": (((_set_allow, True),), True),
    "allow_tf32, and not": (((_set_allow, True), (_set_allow, False)), False),
    "matmul ieee": (((set_matmul, "ieee"),), False),
    "matmul tf32": (((set_matmul, "tf32"),), True),
    "matmul none": (((set_matmul, "none"),), False),
    "matmul tf32, then none": (((set_matmul, "tf32"), (set_matmul, "none")), False),
    "all ieee": (((_set_all, "ieee"),), False),
    "all tf32": (((_set_all, "tf32"),), True),
    "all bf16, which CUDA has not": (((_set_all, "bf16"),), False),
    "all tf32, matmul ieee": (((_set_all, "tf32"), (set_matmul, "ieee")), False),
    "all tf32, matmul none": (((_set_all, "tf32"), (set_matmul, "none")), True),
    "all ieee, matmul tf32": (((_set_all, "ieee"), (set_matmul, "tf32")), True),
    "CUDA tf32": (((_set_cuda, "tf32"),), True),
    "CUDA ieee, all tf32": (((_set_cuda, "ieee"), (_set_all, "tf32")), False),
    "oneDNN bf16": (((_set_onednn, "bf16"),), False),
    "old high, matmul ieee": (((_old, "high"), (set_matmul, "ieee")), False),
    "matmul tf32, old highest": (((set_matmul, "tf32"), (_old, "highest")), False),
    "old high, all ieee": (((_old, "high"), (_set_all, "ieee")), True),
    "old highest, all tf32": (((_old, "highest"), (_set_all, "tf32")), False),
}


def _state() -> tuple[str, ...]:
    cuda, onednn = torch.backends.cudnn, torch.backends.mkldnn
    modules = (torch.backends.cuda.matmul, torch.backends, cuda, cuda.conv, cuda.rnn, onednn, onednn.matmul)
    return tuple(module.fp32_precision for module in modules)


@pytest.fixture
def default_precision() -> Iterator[None]:
    """Torch's defaults before the test, and after it."""
    before = _state()
    assert torch.get_float32_matmul_precision() == "highest"
    yield
    _old("highest")  # the older setting is stored apart, and sets the newer ones too
    for take_back in (set_matmul, _set_cuda, _set_onednn, _set_all):
        take_back("none")
    assert _state() == before
