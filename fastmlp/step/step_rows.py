"""The rows of numbers that the kernels read of each step, on the device, and the number of updates that they depend on.

The numbers of a step are one row of ``Optimizer.rows``, or with members one row each. The host knows the number of
updates, unless members may pause: then only the device knows how many updates each member had. The kernel of the update
counts them (``updates``), and the rows are computed on the device from these counts. A row depends on the count of its
member alone, so rows are computed ahead for as long as nobody writes to ``active``. Its version tells of a write.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .groups import Groups
from .optimizers import Optimizer
from .per_member import PerMember

#: The most steps whose rows are computed ahead, and the most rows of all members together.
_AHEAD, _AHEAD_ROWS = 256, 1 << 16


class StepRows:
    """The rows of the next steps of a rule.

    Args:
        members: the number of members; None for a single model.
        active: bool [E] on the device: the members that are trained; None where all of them are, always.
        count: the number of updates on the device, where ``late_update`` counts them and corrects the rows.
        groups: of the parameters; None: all have the rule.

    Attributes:
        steps: the number of updates as far as the host knows.
        updates: int32 [E], the number of updates of each member, for the kernel to raise; None where not needed.
    """

    def __init__(
        self,
        rule: Optimizer,
        device: torch.device,
        members: int | None,
        active: Tensor | None,
        count: Tensor | None,
        groups: Groups | None = None,
    ) -> None:
        self._groups = groups
        self._rule, self._device, self._members, self._active, self._count = rule, device, members, active, count
        self.steps = 0
        self.updates: Tensor | None = None
        if rule.counted and active is not None and count is None:
            self.updates = torch.zeros(active.shape, dtype=torch.int32, device=device)
        self._changes = rule.counted and count is None
        self._most = _AHEAD if members is None else max(1, min(_AHEAD, _AHEAD_ROWS // members))
        self.forget()

    def forget(self) -> None:
        """Drop the rows that were computed ahead."""
        #: The learning rate of rows that are computed ahead, the number of the first one's step, and the rows.
        self._ahead: tuple[float, int, list[Tensor]] = (-1.0, 0, [])
        self._version = -1 if self._active is None else self._active._version

    def of(self, lrs: Tensor) -> Tensor:
        """The rows of the next steps, [steps, columns] on the device, with members and groups [steps, E, G, columns].

        ``lrs`` is float64 [steps], [steps, E], [steps, G] or [steps, E, G] on the host. Where ``late_update`` counts,
        it corrects the row.
        """
        rule: Optimizer | Groups = self._rule if self._groups is None else self._groups
        count = None
        if self.updates is not None:
            after = torch.arange(1, 1 + lrs.shape[0], dtype=torch.float64, device=self._device)
            return rule.rows(self._there(lrs), self.updates.double() + after[:, None])
        if self._changes:
            count = torch.arange(self.steps + 1, self.steps + 1 + lrs.shape[0], dtype=torch.float64, device="cpu")
            count = count if self._members is None else count[:, None]
        return self._there(rule.rows(lrs, count))

    def _there(self, values: Tensor) -> Tensor:
        if self._device.type == "cuda":
            return values.pin_memory().to(self._device, non_blocking=True)
        return values.to(self._device)

    def next(self) -> Tensor:
        """The next step's row. Rows that change by step are computed ahead, ever more while the learning rate stays."""
        lr, first, rows = self._ahead
        if self.updates is not None and self._version != self._active._version:  # type: ignore[union-attr]
            self.forget()
            rows = []
        i = self.steps - first if self._changes else 0
        same = lr is self._rule.lr or lr == self._rule.lr
        if not same or not 0 <= i < len(rows):
            more = min(2 * len(rows), self._most) if same and self._changes else 1
            rows, i = list(self.of(self._rates(max(1, more))).unbind()), 0
            self._ahead = self._rule.lr, self.steps, rows
        return rows[i]

    def _rates(self, steps: int) -> Tensor:
        if self._groups is not None:
            return torch.stack([self._rates_of(rule.lr, steps) for rule in self._groups.rules], -1)
        return self._rates_of(self._rule.lr, steps)

    def _rates_of(self, lr: Any, steps: int) -> Tensor:
        if isinstance(lr, PerMember):
            return torch.tensor(lr, dtype=torch.float64, device="cpu").expand(steps, -1)
        shape = (steps,) if self._members is None else (steps, self._members)
        return torch.full(shape, lr, dtype=torch.float64, device="cpu")

    def applied(self) -> None:
        """An update was launched that does not raise ``updates``."""
        self.steps += 1
        if self.updates is not None:
            self.updates.add_(self._active)  # type: ignore[arg-type]

    def counter(self) -> float | list[float]:
        """The number of updates, or one per member."""
        count = self.updates if self._count is None else self._count
        if count is None:
            return float(self.steps) if self._members is None else [float(self.steps)] * self._members
        return count.double().tolist() if self._members is not None else float(count.item())

    def set_counter(self, value: float | list[float]) -> None:
        """What ``counter`` returned.

        Raises:
            ValueError: numbers that differ, where the members cannot pause.
        """
        self.forget()
        numbers = [int(number) for number in value] if isinstance(value, list) else [int(value)]
        count = self.updates if self._count is None else self._count
        if count is not None:
            count.copy_(
                torch.tensor(numbers if self._members is not None else numbers[0], dtype=torch.int32, device="cpu")
            )
        elif len(set(numbers)) > 1:
            raise ValueError(f"members that cannot pause have one number of updates, got {numbers}")
        self.steps = max(numbers)
