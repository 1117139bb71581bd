"""Tensors whose memory an engine may read: dense ones with memory of their own, which holds their values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

#: The FakeTensorMode that is active, or None. A subclass of it may make real tensors on some devices.
fake_mode: Callable[[], object] = partial(torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey.FAKE)


def in_memory(t: Tensor) -> Tensor:
    """The tensor off the tape, or a copy where the memory does not hold the values.

    The memory of ``z.conj().imag`` holds the negatives of the values, and autograd's own zeros have no memory.
    """
    t = t.detach() if t.requires_grad else t
    return t.clone() if t.is_neg() or t._is_zerotensor() else t


def check_readable(t: Tensor, name: str, like: Tensor) -> None:
    """RuntimeError unless the tensor is dense and has memory; next to a fake tensor ``like`` it needs no memory."""
    if t.layout != torch.strided:
        advice = "to_padded_tensor(0.0)" if t.is_nested else "to_dense()"
        raise RuntimeError(f"expected a dense {name}, got one of layout {t.layout}; use .{advice}")
    if type(t) is Tensor or isinstance(like, FakeTensor) or not t.numel():
        return
    if isinstance(t, FakeTensor) or not _has_memory(t):
        otherwise = "make the model in FakeTensorMode too" if isinstance(t, FakeTensor) else "train with autograd"
        raise RuntimeError(
            f"a step reads {name} from memory, and a {type(t).__name__} has no memory of its own; give the step a "
            f"plain tensor, or {otherwise}"
        )


def check_not_faking(like: Tensor) -> None:
    """RuntimeError inside FakeTensorMode for a real ``like``: the buffers of a step would become fake."""
    if fake_mode() is None or isinstance(like, FakeTensor):
        return
    if isinstance(torch.empty(0, device=like.device), FakeTensor):
        raise RuntimeError(
            "a step cannot train a real model inside FakeTensorMode; leave it, or make the model inside too"
        )


def _has_memory(t: Tensor) -> bool:
    """Whether a tensor of any class has memory; one that wraps other tensors has none."""
    try:
        return t.untyped_storage().data_ptr() != 0
    except RuntimeError:
        return False
