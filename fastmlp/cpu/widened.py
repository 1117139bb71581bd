"""Weight gradients of bfloat16 matrices in float32, which the masters have, where that is faster than in bfloat16.

Few rows cost what moving dW costs: to widen dZ and X and let the product write, or update, float32 is less work than to
multiply in bfloat16 and to widen dW. Nor is dW rounded to 16 bits then. A single sample through 784-512-512-10 with two
threads of an AMD EPYC took 345 us a step, against 510, while the two shared a cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import gemm

__all__ = ["wide_update", "wide_wgrad"]


def wide_wgrad(m: int, master: Tensor, dtype: torch.dtype, *, update: bool) -> bool:
    """Whether dZ^T X of ``m`` rows in ``dtype`` is faster in the dtype of ``master`` [N, K]: measured, or known.

    ``update`` says whether master -= lr dW follows, or dW is kept in float32.
    """
    n, k = master.shape

    def trials(rows: int) -> dict[gemm.Library, Callable[[], object]]:
        dz, x = (torch.ones(shape, dtype=dtype, device="cpu") for shape in ((rows, n), (rows, k)))
        scratch, dw = torch.zeros_like(master), torch.empty((n, k), dtype=dtype, device="cpu")
        narrow = gemm.wgrad(rows, dw, dtype)
        if update:
            into = wide_update(rows, scratch, dtype)
            return {
                "aten": lambda: scratch.add_(narrow(dz, x), alpha=-1e-3),
                "wide": lambda: into(dz, x, 1e-3),
            }
        wide = gemm.wgrad(rows, scratch, dtype)
        return {"aten": lambda: scratch.copy_(narrow(dz, x)), "wide": lambda: wide(dz, x)}

    if dtype != torch.bfloat16 or master.dtype != torch.float32:
        return False
    if gemm.product_dtype(dtype, master.device) != dtype:
        return True
    return gemm.choose(f"wide wgrad{'_update' if update else ''}", m, k, n, dtype, trials, 0) == "wide"


def wide_update(m: int, master: Tensor, dtype: torch.dtype) -> Callable[[Tensor, Tensor, float], object]:
    """A function (dZ, X, lr) that does W -= lr dZ^T X in place, for dZ [m, N] and X [m, K] in ``dtype``, which is
    narrower than ``master``'s.
    """
    n, k = master.shape
    wide_dz, wide_x = master.new_empty((m, n)), master.new_empty((m, k))
    if m == 1:
        return lambda dz, x, lr: master.addcmul_(wide_dz.copy_(dz).t(), wide_x.copy_(x), value=-lr)
    into = gemm.wgrad_update(m, master)
    return lambda dz, x, lr: into(wide_dz.copy_(dz), wide_x.copy_(x), lr)
