"""The training step on a GPU: the launches of ``triton_launches``, captured in CUDA graphs.

An epoch is captured in graphs of at most ``CHUNK`` steps. Each step has its own places in static tables of row numbers,
learning rates and losses, which are filled before a replay: one capture serves every epoch and any order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.configs import cdiv
from ..kernels.dependent import launches_dependent
from ..kernels.device import tf32_allowed
from ..kernels.wgrad_update import workspace
from .graphs import GraphCache, GraphEntry, can_capture, refuse_capture
from .optimizers import Optimizer
from .triton_launches import StepLaunches

if TYPE_CHECKING:
    from .data_parallel import DataParallel

#: Steps of one captured graph.
CHUNK = 512


class TritonStep(StepLaunches):
    """Steps, epochs, gradients and state of an MLP on the kernels; ``fastmlp.TrainStep`` is the public way to it.

    Args:
        cuda_graph: whether to capture steps, where the device and ``parallel`` allow it; the others are those of
            ``StepLaunches``.
    """

    def __init__(self, *args: Any, cuda_graph: bool, parallel: DataParallel | None = None, **kwargs: Any) -> None:
        super().__init__(*args, parallel=parallel, **kwargs)
        self._converted: Tensor | None = None
        if cuda_graph and (parallel is None or parallel.capturable) and can_capture(self.device):
            self.graphs = GraphCache(self.device)

    @staticmethod
    def structure(rule: Optimizer) -> tuple[object, ...]:
        """What the engine is built for."""
        return rule.structure

    def settings_changed(self) -> None:
        """Take up the rule's settings; those of its ``structure`` are as they were."""
        if self.late is not None:
            self.late.settings_changed()
        self.rows.forget()

    def rates_changed(self) -> None:
        """Take up other learning rates; the other settings are as they were."""
        self.settings_changed()

    def _follow(self) -> None:
        """Bring the parameters as they are now into what the products read and, where a version tells, the masters.

        The kernel of the update compares parameters with their masters itself.
        """
        for copies in self._widened:
            copies.follow_version()
        if self._narrowed:
            torch._foreach_copy_([c.used for c in self._narrowed], [c.data for c in self._narrowed])

    def step(self, x: Tensor, y: Tensor, out: Tensor, weight: Tensor | None = None) -> None:
        """One step on x [M, K] (the compute dtype or uint8) and targets; writes the mean loss into ``out`` (0-d).

        ``weight`` [M] are sample weights. With members x is [M, K] or [E, M, K], targets and weights likewise, and
        ``out`` is [E].
        """
        if self._copied:
            self._follow()
        if x.dtype is not self.dtype or not x.is_contiguous():
            x = self._cast(x)
        m = x.shape[-2]
        plan, row = self._plan(m), self.rows.next()
        weights = self._step_loss.weights(y, weight, plan.divisor)
        self.rows.steps += 1
        entry = None
        if self.graphs is not None:
            weighs = 0 if weight is None else weight.dim()
            key = (m, self._baked(), x.dtype, y.dtype, x.dim(), y.shape, weights.ignored, weighs)
            entry = self.graphs.entry(key)
        if self.graphs is None or entry is None:
            self._launch(plan, x, y, None, row, out, weights)
            return
        buffers = entry.buffers
        if not buffers:
            buffers["x"] = torch.empty(x.shape, dtype=x.dtype, device=self.device)
            buffers["y"] = torch.empty(y.shape, dtype=y.dtype, device=self.device)
            buffers["row"], buffers["loss"] = torch.empty_like(row), torch.empty_like(out)
            if weight is not None:
                buffers["weight"] = torch.empty(weight.shape, dtype=torch.float32, device=self.device)
        buffers["x"].copy_(x)
        buffers["y"].copy_(y)
        if weight is not None:
            weights = weights._replace(sample=buffers["weight"].copy_(weight))
        if buffers.get("source") is not row:
            buffers["source"] = row
            buffers["row"].copy_(row)
        if entry.graph is not None:
            entry.graph.replay()
        else:
            static = buffers["x"], buffers["y"], None, buffers["row"], buffers["loss"], weights
            self.graphs.run(entry, lambda: self._launch(plan, *static))
        out.copy_(buffers["loss"])

    def _baked(self) -> tuple[object, ...]:
        """What a graph keeps of the settings at its capture."""
        return tf32_allowed(), launches_dependent(), self._drawn

    def epoch(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        order: Tensor,
        lrs: Tensor,
        losses: Tensor,
        weight: Tensor | None = None,
    ) -> None:
        """Steps over ``order``, each with its learning rate (float64 on the host); writes each step's loss.

        With groups ``lrs`` is [steps, G]. With members ``order`` is [n] or [E, n], and ``lrs`` and ``losses`` are
        [steps, E]. ``weight`` [N] are the sample weights of all rows.
        """
        if self.graphs is not None:
            refuse_capture()
        self._follow()
        images = self._cast_once(images)
        n = order.shape[-1]
        full = n // batch_size
        for begin in range(0, full, CHUNK):
            count = min(CHUNK, full - begin)
            rows = order[..., begin * batch_size : (begin + count) * batch_size].unflatten(-1, (count, batch_size))
            self._chunk(images, labels, weight, rows, lrs[begin : begin + count], losses[begin : begin + count])
        if full < lrs.shape[0]:
            self._chunk(images, labels, weight, order[..., None, full * batch_size :], lrs[full:], losses[full:])

    def _chunk(
        self, images: Tensor, labels: Tensor, weight: Tensor | None, rows: Tensor, lrs: Tensor, out: Tensor
    ) -> None:
        """``count`` steps of equal size, by one graph where there are graphs; writes their losses.

        ``rows`` is [count, m], or [E, count, m].
        """
        count, m = rows.shape[-2:]
        plan, table = self._plan(m), self.rows.of(lrs)
        weights = self._step_loss.weights(labels, weight, plan.divisor)
        self.rows.steps += count
        own, padded_members = rows.shape[:-2], () if self.members is None else (cdiv(self.members, 4) * 4,)
        # A graph reads the memory at these addresses, whichever tensor lies there at its replay.
        read = [t for t in (images, labels, weight) if t is not None]
        data = [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in read]
        key = (m, self._baked(), count, *own, weights.ignored, *data)
        entry = self.graphs.entry(key) if self.graphs is not None else None
        buffers = GraphEntry().buffers if entry is None else entry.buffers
        if not buffers:
            # 16 bytes per step keep every pointer aligned alike, so that all steps share one compiled kernel.
            buffers["rows"] = torch.zeros((count, *own, m + m % 2), dtype=torch.int64, device=self.device)
            buffers["table"] = torch.empty_like(table)
            buffers["losses"] = torch.zeros((count, *(padded_members or (4,))), dtype=torch.float32, device=self.device)
        buffers["rows"][..., :m].copy_(rows.movedim(-2, 0))
        buffers["table"].copy_(table)
        each = 0 if self.members is None else slice(self.members)

        def launch() -> None:
            for i in range(count):
                taken, losses = buffers["rows"][i, ..., :m], buffers["losses"][i, each]
                self._launch(plan, images, labels, taken, buffers["table"][i], losses, weights)

        if self.graphs is None or entry is None:
            launch()
        else:
            self.graphs.run(entry, launch)
        out.copy_(buffers["losses"][:, each])

    def gradients(
        self, x: Tensor, y: Tensor, out: Tensor, *, accumulate: bool = False, weight: Tensor | None = None
    ) -> list[Tensor]:
        """Gradients of the trained parameters, float32, in the order of the parameters.

        Those of members that are not active are 0, or what was there if ``accumulate``.
        """
        if self.grads is None:
            self.grads = torch.zeros(self.layout.flat_shape, dtype=torch.float32, device=self.device)
        elif self.active is not None and not accumulate:
            self.grads.masked_fill_(~self.active[:, None], 0)
        self._follow()
        x = self._cast(x)
        plan = self._plan(x.shape[-2])
        partial = plan.partial
        if partial is None:
            plan.partial = workspace(self.layout, plan.m, self.dtype, self.device, direct=False)
        weights = self._step_loss.weights(y, weight, plan.divisor)
        kept = self.grads.clone() if accumulate and self._sums is not None else None
        self._forward_backward(plan, x, y, None, weights)
        row, divisor, adds = self.rows.next(), weights.divisor, accumulate and kept is None
        self._weights_step(plan, x, None, row, out, None, divisor, grads=self.grads, accumulate=adds)
        if self._sums is not None:
            self._sums.reduce(out, plan.m if divisor is None else divisor)
            if self.active is not None:
                self.grads.masked_fill_(~self.active[:, None], 0)
        if kept is not None:
            self.grads.add_(kept)
        plan.partial = partial
        return self.layout.views(self.grads)

    def update(self) -> None:
        """Apply the optimizer to the gradients of the last ``gradients``."""
        row, grads = self.rows.next(), self.grads
        assert grads is not None
        self.rows.applied()
        self._apply(grads, row)

    def _cast(self, x: Tensor) -> Tensor:
        x = x if x.dtype in (self.dtype, torch.uint8) else x.to(self.dtype)
        return x if x.stride(-1) == 1 else x.contiguous()

    def _cast_once(self, images: Tensor) -> Tensor:
        """As ``_cast``, into the same memory at every epoch, so that graphs find it again."""
        if images.dtype in (self.dtype, torch.uint8) and images.stride(-1) == 1:
            return images
        dtype = torch.uint8 if images.dtype == torch.uint8 else self.dtype
        if self._converted is None or (self._converted.shape, self._converted.dtype) != (images.shape, dtype):
            self._converted = None  # given up before the next one is allocated
            self._converted = torch.empty(images.shape, dtype=dtype, device=self.device)
        return self._converted.copy_(images)

    def updated(self) -> None:
        """Take the versions of the parameters for those of this engine's last update."""
        for copies in self._copied:
            copies.published()

    def parameter_state(self) -> dict[str, list[Tensor]]:
        """What belongs to each trained parameter, live and float32: optimizer state, and masters of 16 bits."""
        for copies in self._copied:
            copies.follow()
        state: dict[str, list[Tensor]] = {}
        for name, flat in zip(self.rule.kept, self.states, strict=True):
            state[name] = self.layout.views(flat)
        if any(layer.weight.dtype != torch.float32 for layer in self.layers):
            state["master"] = list(self.layout.params)
        return state

    def counters(self) -> dict[str, Any]:
        """The number of updates where the rule counts; float16's loss scale and the good steps since it last moved.

        Floats, or with members a list of floats each.
        """
        counters: dict[str, Any] = {"step": self.rows.counter()} if self.rule.counted else {}
        return counters | (self.loss_scale.counters() if self.loss_scale is not None else {})

    def set_counters(self, counters: dict[str, Any]) -> None:
        """What ``counters`` returned; call it after ``parameter_state`` was written to."""
        self.rows.set_counter(counters.get("step", 0.0))
        if self.loss_scale is not None:
            self.loss_scale.set_counters(counters)
        for copies in self._copied:
            if copies.trained:
                copies.publish()
