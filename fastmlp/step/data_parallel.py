"""Data-parallel steps: every process has a part of the batch, and all apply the gradient of the whole batch.

    g = sum over processes of m_p g_p / sum of m_p        g_p: gradient of the mean over the m_p rows of process p

Where rows have weights, m_p is their sum; each member of an ensemble has its own. The gradients, the loss and m_p are
one buffer, which one all-reduce adds up between the gradient and the update. What an update looks at in all gradients
together, clipping's norm and float16's overflow, is therefore the same in every process, and so are the parameters. The
order of the sums is the communication library's.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .loss_options import LossOptions

#: The loss and the number of rows follow the gradients.
_TAIL = 2


class DataParallel:
    """What the processes of a group have in common.

    Args:
        group: an initialized ``torch.distributed`` process group that the calling process belongs to.
        device: of the model; the group's backend has to serve it.

    Raises:
        TypeError: group is no process group.
        RuntimeError: torch.distributed is not initialized, or the group has no backend for the device.
        ValueError: the calling process is not in the group.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "process_group needs torch.distributed to be initialized; call torch.distributed.init_process_group "
                "first, in processes that torchrun starts"
            )
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("the calling process is not in the process_group; make the TrainStep in its members only")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "expected process_group to be a torch.distributed.ProcessGroup, such as torch.distributed.group.WORLD, "
                f"got {type(group).__name__}"
            )
        backends = dict(pair.split(":") for pair in str(dist.get_backend_config(group)).split(","))
        backend = backends.get(device.type)
        if backend is None:
            raise RuntimeError(
                f"the process_group has no backend for {device.type} (it has {', '.join(sorted(backends))}); "
                "initialize it with one, such as gloo for a CPU and nccl for a GPU"
            )
        self.group, self.device = group, device
        self.rank = dist.get_rank(group)
        #: Whether the all-reduce can be part of a CUDA graph.
        self.capturable = backend == "nccl"

    def start(self, parameters: Sequence[Tensor], description: str) -> None:
        """Give every process the parameters of the first one.

        Raises:
            RuntimeError: the processes have different models, optimizers, losses or dtypes.
        """
        shapes = [(tuple(p.shape), str(p.dtype), p.requires_grad) for p in parameters]
        self._same("model and settings", zlib.crc32(repr((shapes, description)).encode()), description)
        first = dist.get_global_rank(self.group, 0)
        with torch.no_grad():
            for parameter in parameters:
                dist.broadcast(parameter, first, group=self.group)

    def check_epoch(self, steps: int, batch_size: int, rows: int, last: int) -> tuple[int, int, int]:
        """(rows of a full step, rows of the last step, rows of the epoch) of all processes together.

        Raises:
            RuntimeError: the processes would do different numbers of steps, and wait for each other forever.
        """
        self._same("number of steps", steps, f"{rows} rows in steps of {batch_size}")
        counts = torch.tensor((batch_size, last, rows), dtype=torch.int64, device="cpu").to(self.device)
        dist.all_reduce(counts, group=self.group)
        full, last, rows = counts.tolist()
        return full, last, rows

    def _same(self, what: str, number: int, description: str) -> None:
        ends = torch.tensor((number, -number), dtype=torch.int64, device="cpu").to(self.device)
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=self.group)
        most, least = ends.tolist()
        if most != -least:
            raise RuntimeError(
                f"the processes of the group differ in their {what}; expected the same in all, and the process of rank "
                f"{dist.get_rank(self.group)} has {description}"
            )

    @staticmethod
    def counted_rows(loss: str, y: Tensor, weight: Tensor | None, options: LossOptions) -> int | Tensor:
        """By what the mean over a batch divides: the number of rows, or the sum of their weights, 0-d or [E]."""
        if loss != "cross_entropy" or y.is_floating_point():
            return y.shape[-2 if y.is_floating_point() else -1] if weight is None else weight.sum(-1)
        counts = y != options.ignored
        each = counts if options.class_weight is None else options.class_weight[y * counts] * counts
        return each.sum(-1) if weight is None else (each * weight).sum(-1)

    def sums(self, numels: Sequence[int], dtype: torch.dtype, members: int | None = None) -> Sums:
        """A buffer for gradients of so many elements, of each member where there are members."""
        return Sums(self, numels, dtype, members)


class Sums:
    """The buffer of one engine: ``flat``, in which gradients are, and the numbers that go with them.

    ``flat`` is [sum of numels], and ``parts`` are its parts of these numels. With members each part is [E, numel], of
    all members side by side, since fused optimizers read gradients that are contiguous.
    """

    def __init__(
        self, parallel: DataParallel, numels: Sequence[int], dtype: torch.dtype, members: int | None = None
    ) -> None:
        self._group = parallel.group
        count, of = members or 1, () if members is None else (members,)
        total = sum(numels) * count
        self._all = torch.zeros(total + _TAIL * count, dtype=dtype, device=parallel.device)
        self.flat = self._all[:total]
        split = self.flat.split([n * count for n in numels])
        self.parts = [part.view(*of, n) for part, n in zip(split, numels, strict=True)]
        self._scaled = [self.flat] if members is None else self.parts
        self._loss, self._rows = self._all[total:].view(_TAIL, *of).unbind()

    def reduce(self, loss: Tensor, rows: int | Tensor) -> None:
        """Make ``flat`` and ``loss`` (0-d or [E]), means over the rows of a process, the means over those of all.

        ``rows`` is how many rows of this process count, or the sum of their weights (0-d or [E]).
        """
        if isinstance(rows, Tensor):
            self._rows.copy_(rows)
        else:
            self._rows.fill_(rows)
        for gradients in self._scaled:
            gradients.mul_(self._rows.unsqueeze(-1))
        self._loss.copy_(loss).mul_(self._rows)
        if isinstance(rows, Tensor):
            self._loss.masked_fill_(self._rows == 0, 0)  # the mean over no rows is NaN
        dist.all_reduce(self._all, group=self._group)
        counted = self._rows.masked_fill(self._rows == 0, 1)  # no row counts: the gradient is 0, as in torch
        for gradients in self._scaled:
            gradients.div_(counted.unsqueeze(-1))
        loss.copy_(self._loss.div_(self._rows))
