"""Float32 masters and 16-bit copies of parameters: one rule for every engine.

Parameters of 16 bits, and parameters that compute in 16 bits, have float32 masters, which the optimizer works on: in 16
bits an update smaller than half a unit in the last place would be lost.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Copies:
    """A parameter, what the products read and what the optimizer updates: all the same tensor, or rounded copies.

    Attributes:
        data: the parameter, off the tape.
        master: what the optimizer updates: float32, or float64 where the parameter or ``dtype`` is.
        used: what the products read, in ``dtype``.
        trained: whether the parameter requires a gradient.
        is_one: whether all three are one tensor.
    """

    def __init__(self, param: Tensor, dtype: torch.dtype) -> None:
        self.data = data = param.detach()
        self.trained = param.requires_grad
        wide = torch.promote_types(torch.promote_types(dtype, torch.float32), data.dtype)
        self.master = data if data.dtype == wide else data.to(wide)
        self.used = data if data.dtype == dtype else self.master if wide == dtype else data.to(dtype)
        self.is_one = self.used is data and self.master is data
        self.version = data._version

    def refresh(self) -> None:
        """Follow a change that somebody else made to the parameter, such as load_state_dict."""
        if self.data._version != self.version:
            if self.master is not self.data:
                self.master.copy_(self.data)
            if self.used is not self.data:
                self.used.copy_(self.master)
            self.version = self.data._version

    def publish(self) -> None:
        """Round the updated master into the parameter and into what the products read."""
        if self.master is not self.data:
            self.data.copy_(self.master)
        if self.used is not self.data and self.used is not self.master:
            self.used.copy_(self.master)
        self.version = self.data._version
