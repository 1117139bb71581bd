"""activation_bwd has no tiles to choose; its cases differ in activation, dtype and layout."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch

from fastmlp.activations import ACTIVATIONS, saved_for_grad
from fastmlp.kernels import Dropout, activation_bwd

from .cases import KernelCases

__all__ = ["KERNELS"]


def _activation_bwd(
    activation: str, rows: int, cols: int, *, columns: bool, drops: bool = False
) -> Callable[[torch.dtype, None], object]:
    def launch(dtype: torch.dtype, tile: None) -> object:
        da = torch.zeros((cols, rows), dtype=dtype).t() if columns else torch.zeros((rows, cols), dtype=dtype)
        saved = None if saved_for_grad(activation) is None else torch.zeros((rows, cols), dtype=dtype)
        dropout = Dropout(torch.zeros(2, dtype=torch.int64), 0, 0.1) if drops else None
        return activation_bwd(da, saved, activation, dropout=dropout)

    return launch


def _variants() -> dict[str, Callable[[torch.dtype, None], object]]:
    """Every activation with dense, aligned operands, and each other layout with one activation."""
    variants = {f"dense-{f}": _activation_bwd(f, 64, 512, columns=False) for f in ACTIVATIONS if f != "identity"}
    variants["odd-sigmoid"] = _activation_bwd("sigmoid", 7, 77, columns=False)
    variants["columns-gelu"] = _activation_bwd("gelu", 64, 512, columns=True)
    variants["odd-columns-silu"] = _activation_bwd("silu", 7, 77, columns=True)
    variants["dense-dropout-sigmoid"] = _activation_bwd("sigmoid", 64, 512, columns=False, drops=True)
    variants["odd-columns-dropout-gelu"] = _activation_bwd("gelu", 7, 77, columns=True, drops=True)
    return variants


KERNELS = {
    "activation_bwd": KernelCases(
        ("_activation_bwd_kernel",),
        tiles=lambda dtype, device, variant: (None,),
        variants=_variants(),
        force=lambda tile: nullcontext(),
        aligned=lambda variant, dtype, tile: variant.startswith("dense"),
    )
}
