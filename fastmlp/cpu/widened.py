"""Weight gradients of bfloat16 matrices in the float32 of the masters, where that is faster than in bfloat16.

With few rows, most of the time goes into moving dW. To widen dZ and X, and let the product write or update float32,
is less work than to multiply in bfloat16 and to widen dW. Nor is dW rounded to 16 bits then. A single sample through
784-512-512-10 with two threads of an AMD EPYC took 345 us per step instead of 510, in hours when the two threads shared
a cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import choose, products
from .choose import Choice
from .processor import product_dtype
from .products import Update


def wide_wgrad(m: int, master: Tensor, dtype: torch.dtype, *, update: bool) -> bool:
    """Whether dZ^T X of ``m`` rows in ``dtype`` is faster in the dtype of ``master`` [N, K]: measured, or known.

    ``update`` says whether master -= lr dW follows, or dW is kept in float32.
    """
    n, k = master.shape

    def trials(rows: int) -> dict[Choice, Callable[[], object]]:
        dz, x = (torch.ones(shape, dtype=dtype, device="cpu") for shape in ((rows, n), (rows, k)))
        scratch, dw = torch.zeros_like(master), torch.empty((n, k), dtype=dtype, device="cpu")
        narrow = products.wgrad(rows, n, k, dtype, dw)
        if update:
            into = wide_update(rows, scratch)
            return {"aten": lambda: scratch.add_(narrow(dz, x), alpha=-1e-3), "wide": lambda: into(dz, x, 1e-3)}
        wide = products.wgrad(rows, n, k, dtype, scratch)
        return {"aten": lambda: scratch.copy_(narrow(dz, x)), "wide": lambda: wide(dz, x)}

    if dtype != torch.bfloat16 or master.dtype != torch.float32:
        return False
    if product_dtype(dtype, master.device) != dtype:
        return True
    kind = f"wide wgrad{'_update' if update else ''}"
    return choose.choose(kind, m, k, n, dtype, trials, whatever_size=True) == "wide"


def wide_update(m: int, master: Tensor) -> Update:
    """A function (dZ, X, lr) that does W -= lr dZ^T X in place, for dZ [m, N] and X [m, K] in a narrower dtype."""
    n, k = master.shape
    wide_dz, wide_x = master.new_empty((m, n)), master.new_empty((m, k))
    if m == 1:
        return lambda dz, x, lr: master.addcmul_(wide_dz.copy_(dz).t(), wide_x.copy_(x), value=-lr)
    into = products.update(m, master)
    return lambda dz, x, lr: into(wide_dz.copy_(dz), wide_x.copy_(x), lr)
