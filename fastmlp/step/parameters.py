"""Float32 masters and 16-bit copies of parameters: one rule for every engine.

Parameters of 16 bits, and parameters that compute in 16 bits, have float32 masters, which the optimizer works on: in 16
bits an update smaller than half a unit in the last place would be lost.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Copies:
    """A parameter, what the products read and what the optimizer updates: all the same tensor, or rounded copies.

    The parameter is the model, and anybody may write to it at any time. Its version counter tells of most writes, but
    an edit of ``.data`` does not raise the counter, nor does a fused optimizer of torch. ``follow`` therefore also
    compares values.

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
        self._version = data._version
        #: Where a CPU rounds the master to, to compare it with the parameter.
        self._rounded = torch.empty_like(data) if data.is_cpu and self.master is not data else None

    def follow(self) -> None:
        """Make the copies those of the parameter, whoever wrote to it. The device is not waited for.

        Where nobody wrote, the master keeps the digits that the parameter has no room for.
        """
        if not self.follow_version() and self.master is not self.data:
            rounded = self.master.to(self.data.dtype) if self._rounded is None else self._rounded.copy_(self.master)
            if self._rounded is None or not torch.equal(_words(rounded), _words(self.data)):
                self.master.copy_(torch.where(rounded == self.data, self.master, self.data.to(self.master.dtype)))
        if self.used is not self.data and self.used is not self.master:
            self.used.copy_(self.master)

    def follow_version(self) -> bool:
        """Whether the version tells of a write; the master then is the parameter."""
        if self.data._version == self._version:
            return False
        if self.master is not self.data:
            self.master.copy_(self.data)
        self._version = self.data._version
        return True

    def publish(self) -> None:
        """Round the updated master into the parameter; ``follow`` brings it to what the products read."""
        if self.master is not self.data:
            self.data.copy_(self.master)
            self._version = self.data._version

    def published(self) -> None:
        """Take the parameter's version for that of the last update."""
        self._version = self.data._version


def _words(t: Tensor) -> Tensor:
    """The bits of a tensor, as the integers that a CPU compares fastest: six times as fast as 16 bits of a float."""
    whole = t.numel() % 4 == 0 and t.storage_offset() % 4 == 0
    return t.view(-1).view(torch.int64 if whole else torch.int16)
