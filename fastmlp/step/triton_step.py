"""The training step on a GPU: 2L - 1 kernel launches for an L-layer network, captured in CUDA graphs.

    L - 1  linear_fwd     the first one gathers its rows by index and scales uint8 pixels
    1      head           last linear, softmax cross-entropy, dZ_L and dZ_{L-1}
    L - 2  linear_dgrad   dZ_{l-1} = (dZ_l W_l) f'_{l-1}
    1      wgrad_update   every layer's dW, db and optimizer update, and the mean loss

The kernels that make dZ also write the sums of its rows, block by block, from which the last launch makes db.

Nothing is launched for zeroing gradients, casting, gathering, scaling or averaging. A long batch costs one launch
more (the reduction of split sums), float16's loss scale two and clipping three, whatever the batch: they need all
gradients first (``late_update``). Class weights, an ignored label and sample weights cost one launch more from batches
of 2,049 rows on, which adds the weights of the rows up (``kernels/row_weights``); no other option of a loss costs one.
With float32 parameters and 16-bit products, a step or an epoch begins with one launch of torch's, outside the graph: it
copies the parameters into what the products read, because anybody may have written to a parameter since the last call.
Losses other than cross-entropy, more classes than the head takes, or an activation behind the last layer put
linear_fwd, the loss kernel and a dgrad in the place of the head.

An ensemble of E members (``members``) takes the same launches: every tensor has an axis of members in front, and X, the
targets and the order may do without. Each member has its own settings, loss, norm and loss scale. Members that are not
``active`` are left out by the kernels, which read the flags at every step, so that one graph serves all. The update
counts the updates of each member for AdamW (``step_rows``).

Dropout (``dropout``) adds nothing to the launches. The kernels that make A_l and dZ_l of a hidden layer make the mask,
each for itself, from the seed and the step in the device's memory. wgrad_update raises the step: it is the one launch
that every forward pass of a step or of ``gradients`` has after all that read the number. An update that is skipped or
that comes later does not matter there.

Buffers are allocated once per batch size, and given up when many sizes would hold too much memory. An epoch is captured
in graphs of at most ``CHUNK`` steps. Each step has its own places in static tables of row numbers, learning rates and
losses, which are filled before a replay: one capture serves every epoch and any order.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..activations import saved_for_grad
from ..base.losses import takes_classes
from ..kernels import Dropout, activation_bwd, head, linear_dgrad, linear_fwd
from ..kernels.column_sums import ColumnSums, padded
from ..kernels.configs import cdiv
from ..kernels.dependent import launches_dependent
from ..kernels.device import tf32_allowed
from ..kernels.head import MAX_CLASSES
from ..kernels.layout import Layer, Layout
from ..kernels.optimizer import EMA_COLUMNS, HYPER_COLUMNS
from ..kernels.wgrad_update import reduce_update, wgrad_update, workspace
from ..nn import Linear
from .cpu_dropout import StepDropout
from .graphs import GraphCache, GraphEntry, can_capture, refuse_capture
from .groups import Groups
from .late_update import LateUpdate
from .loss_options import PLAIN, LossOptions
from .loss_scale import LossScale
from .optimizers import Optimizer
from .parameters import Copies
from .step_rows import StepRows
from .triton_loss import RowWeights, StepLoss

if TYPE_CHECKING:
    from .data_parallel import DataParallel, Sums

#: Steps of one captured graph.
CHUNK = 512
#: Batch sizes whose buffers are kept, and bytes of all of them together; the latest is kept whatever its size.
_PLANS, _PLAN_BYTES = 16, 1 << 30


@dataclass
class _Plan:
    """Buffers of one batch size."""

    m: int
    a: list[Tensor]
    z: list[Tensor | None]
    dz: list[Tensor | None]
    loss_rows: Tensor
    #: The weight of the batch, by which its sums are divided, where rows have weights.
    divisor: Tensor
    partial: Tensor | None
    #: Sums of the rows of dZ by its producer; None for layers without a trained bias, and for all without the head.
    sums: list[ColumnSums | None]

    @property
    def tensors(self) -> list[Tensor]:
        """All of them: what one step writes and the next one does not read."""
        every = [*self.a, *self.z, *self.dz, self.loss_rows, self.divisor, self.partial]
        return [t for t in [*every, *(s.values for s in self.sums if s)] if t is not None]


class TritonStep:
    """Forward, backward and update of an MLP with the kernels; ``fastmlp.TrainStep`` is the public way to it.

    Args:
        layers: modules with ``weight`` [N, K], ``bias`` [N] or None, ``activation``; with members an axis E in front.
        members: the number of members of an ensemble; None for a single model.
        active: bool [E] on the device, which anybody may write to between steps; None: all members, always.
    """

    def __init__(
        self,
        layers: list[Linear],
        rule: Optimizer,
        loss: str,
        dtype: torch.dtype,
        *,
        cuda_graph: bool,
        groups: Groups | None = None,
        options: LossOptions = PLAIN,
        parallel: DataParallel | None = None,
        members: int | None = None,
        active: Tensor | None = None,
    ) -> None:
        self.layers, self.rule, self.loss, self.dtype = layers, rule, loss, dtype
        self.members, self.active = members, active
        self._of = () if members is None else (members,)
        self.device = layers[0].weight.device
        self.activations = [layer.activation for layer in layers]
        own = layers[0].weight.dtype
        if own not in (torch.float32, dtype):
            raise TypeError(f"parameters in {own} cannot be trained in {dtype}; use dtype={own}")
        self._weights = [Copies(layer.weight, dtype) for layer in layers]
        self._biases = [None if layer.bias is None else Copies(layer.bias, dtype) for layer in layers]
        self.weights = [weight.used for weight in self._weights]
        self.biases = [None if bias is None else bias.used for bias in self._biases]
        self.trained = [i for i, layer in enumerate(layers) if layer.weight.requires_grad]
        for i, layer in enumerate(layers):
            if layer.bias is not None and layer.bias.requires_grad and i not in self.trained:
                raise NotImplementedError(
                    f"layer {i} has a frozen weight and a trained bias, which the kernels do not do; freeze both, "
                    "train both, or use backend 'torch'"
                )
        self.lowest = min(self.trained)
        row: tuple[int, ...] = (HYPER_COLUMNS if rule.ema_decay is None else EMA_COLUMNS,)
        settings = None
        if groups is not None:
            row, settings = (len(groups.rules), *row), [i * row[0] for i in groups.numbers]
        trained = [self._trained_layer(i) for i in self.trained]
        self.layout = Layout(trained, low_is_param=own != torch.float32, settings=settings)
        zeros = torch.zeros(self.layout.flat_shape, dtype=torch.float32, device=self.device)
        self.states = [zeros.clone() for _ in rule.kept]
        self.grads: Tensor | None = None if rule.max_grad_norm is None else zeros
        self._sums: Sums | None = None
        if parallel is not None:
            self._sums = parallel.sums([self.layout.total], torch.float32)
            self.grads = self._sums.flat
            cuda_graph = cuda_graph and parallel.capturable
        self.loss_scale = LossScale(self.device, members) if dtype == torch.float16 else None
        self._scale = None if self.loss_scale is None else self.loss_scale.scale
        self._step_loss = StepLoss(loss, options, self._scale, self.device)
        self._unscale = None if self.loss_scale is None else self.loss_scale.inverse
        #: None where the gradients are applied as soon as they are there.
        self.late: LateUpdate | None = None
        if self.loss_scale is not None or rule.max_grad_norm is not None:
            self.late = LateUpdate(self.layout, rule, self.states, self.loss_scale, row, active)
        count = None if self.late is None else self.late.count
        self.rows = StepRows(rule, self.device, members, active, count, groups)
        self._has_head = (
            self.loss == "cross_entropy"
            and self.activations[-1] == "identity"
            and layers[-1].weight.shape[-2] <= MAX_CLASSES
        )
        self.dropout = None
        self._plans: OrderedDict[int, _Plan] = OrderedDict()
        self._converted: Tensor | None = None
        self.graphs = GraphCache(self.device) if cuda_graph and can_capture(self.device) else None
        self._copied = [c for c in (*self._weights, *self._biases) if c is not None and not c.is_one]
        self._narrowed = [c for c in self._copied if c.master is c.data]
        self._widened = [c for c in self._copied if c.master is not c.data]

    @property
    def dropout(self) -> StepDropout | None:
        """What the next steps drop; it may be assigned between steps. Each step, and each call of ``gradients``, adds 1
        to the step of the state.
        """
        return self._dropout

    @dropout.setter
    def dropout(self, of: StepDropout | None) -> None:
        self._dropout = of
        self._drops: list[Dropout | None] = [None] * len(self.layers)
        self._drawn: tuple[object, ...] | None = None
        if of is not None:
            state, rates, stream = of
            for i, p in enumerate(rates):
                self._drops[i] = Dropout(state, i, p, stream) if p else None
            self._drawn = state.data_ptr(), rates, stream

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

    def _trained_layer(self, i: int) -> Layer:
        low = self.dtype != torch.float32
        weight, bias = self._weights[i], self._biases[i]
        if bias is None or not bias.trained:
            return Layer(weight.master, None, weight.used if low else None, None)
        return Layer(weight.master, bias.master, weight.used if low else None, bias.used if low else None)

    def _plan(self, m: int) -> _Plan:
        plan = self._plans.get(m)
        if plan is None:
            plan = self._plans[m] = self._new_plan(m)
            held = sum(t.nbytes for p in self._plans.values() for t in p.tensors)
            while len(self._plans) > 1 and (held > _PLAN_BYTES or len(self._plans) > _PLANS):
                oldest, dropped = self._plans.popitem(last=False)
                held -= sum(t.nbytes for t in dropped.tensors)
                if self.graphs is not None:
                    self.graphs.drop(oldest)
        self._plans.move_to_end(m)
        return plan

    def _new_plan(self, m: int) -> _Plan:
        def buffer(n: int) -> Tensor:
            return torch.empty((*self._of, m, n), dtype=self.dtype, device=self.device)

        outputs = [layer.weight.shape[-2] for layer in self.layers]
        last = len(outputs) - 1
        dz: list[Tensor | None] = [buffer(n) if i >= self.lowest else None for i, n in enumerate(outputs)]
        sums: list[ColumnSums | None] = [None] * len(outputs)
        if self._has_head:
            dz[last] = buffer(padded(outputs[last]))  # so that its rows are loaded 16 bytes at a time
            for i in self.trained:
                if (bias := self._biases[i]) is not None and bias.trained:
                    sums[i] = ColumnSums(m, outputs[i], self.device, members=self.members)
        elements = 1 if takes_classes(self.loss) else outputs[-1]
        return _Plan(
            m,
            [buffer(n) for n in outputs],
            [buffer(n) if saved_for_grad(f) == "z" else None for n, f in zip(outputs, self.activations, strict=True)],
            dz,
            torch.empty((*self._of, m * elements), dtype=torch.float32, device=self.device),
            torch.empty(self._of, dtype=torch.float32, device=self.device),
            workspace(self.layout, m, self.dtype, self.device, direct=self.late is None and self._sums is None),
            sums,
        )

    def _saved(self, plan: _Plan, i: int) -> Tensor | None:
        """What f'_i is computed from."""
        kind = saved_for_grad(self.activations[i])
        return {"a": plan.a[i], "z": plan.z[i], None: None}[kind]

    def _forward(self, plan: _Plan, x: Tensor, rows: Tensor | None, layers: int) -> Tensor:
        """A_l of the first ``layers`` layers; returns the last one (x itself for none)."""
        a = x
        for i in range(layers):
            z = plan.z[i] if i >= self.lowest else None
            linear_fwd(
                a,
                self.weights[i],
                self.biases[i],
                self.activations[i],
                save_z=z is not None,
                rows=rows if i == 0 else None,
                a=plan.a[i],
                z=z,
                active=self.active,
                dropout=self._drops[i],
            )
            a = plan.a[i]
        return a

    def _forward_backward(self, plan: _Plan, x: Tensor, y: Tensor, rows: Tensor | None, weights: RowWeights) -> None:
        """Everything up to dZ of every trained layer, and the loss of every row."""
        last = len(self.layers) - 1
        if self._has_head:
            below = last - 1 if last > self.lowest else None
            h = self._forward(plan, x, rows, last)
            head(
                h,
                self.weights[last],
                self.biases[last],
                y,
                activation="identity" if below is None else self.activations[below],
                saved=None if below is None else self._saved(plan, below),
                class_weight=self._step_loss.options.class_weight,
                gather_h=rows is not None and last == 0,
                want_dz_prev=below is not None,
                loss=plan.loss_rows,
                dz=plan.dz[last],
                dz_prev=None if below is None else plan.dz[below],
                sums=plan.sums[last],
                prev_sums=None if below is None else plan.sums[below],
                **self._step_loss.of_cross_entropy(plan.m, rows, weights),
                active=self.active,
                dropout=None if below is None else self._drops[below],
            )
            top = last - 1
        else:
            a = self._forward(plan, x, rows, last + 1)
            self._loss_gradient(plan, a, y, rows, weights)
            top = last
        for i in range(top, self.lowest, -1):
            dz = plan.dz[i]
            assert dz is not None
            linear_dgrad(
                dz,
                self.weights[i],
                self._saved(plan, i - 1),
                self.activations[i - 1],
                dx=plan.dz[i - 1],
                sums=plan.sums[i - 1],
                active=self.active,
                dropout=self._drops[i - 1],
            )

    def _loss_gradient(self, plan: _Plan, a: Tensor, y: Tensor, rows: Tensor | None, weights: RowWeights) -> None:
        """DZ_L from the network's output, by the loss's own kernel, and the loss of every row or element."""
        last = len(self.layers) - 1
        dz = plan.dz[last]
        assert dz is not None
        self._step_loss.gradient(a, y, rows, weights, plan.loss_rows, dz, self.active)
        if self.activations[last] != "identity":
            activation_bwd(dz, self._saved(plan, last), self.activations[last], dz=dz, active=self.active)

    def _weights_step(
        self,
        plan: _Plan,
        x: Tensor,
        rows: Tensor | None,
        row: Tensor,
        loss: Tensor,
        updates: Tensor | None = None,
        divisor: Tensor | None = None,
        **outputs: Any,
    ) -> None:
        """The grouped weight gradient with its update; with ``outputs`` of ``wgrad_update`` it goes there."""
        inputs = [x, *plan.a[:-1]]
        dzs = [plan.dz[i] for i in self.trained]
        wgrad_update(
            self.layout,
            [dz for dz in dzs if dz is not None],
            [inputs[i] for i in self.trained],
            "none" if outputs else self.rule.kernel,
            row,
            states=self.states,
            rows=rows if self.trained[0] == 0 else None,
            loss_rows=plan.loss_rows,
            loss=loss,
            divisor=divisor,
            partial=plan.partial,
            unscale=self._unscale,
            sums=[plan.sums[i] for i in self.trained],
            active=self.active,
            updates=updates,
            dropout_state=None if self._dropout is None else self._dropout[0],
            **outputs,
        )

    def _launch(
        self,
        plan: _Plan,
        x: Tensor,
        y: Tensor,
        rows: Tensor | None,
        row: Tensor,
        loss: Tensor,
        weights: RowWeights,
    ) -> None:
        """The whole step as launches on the current stream."""
        divisor = weights.divisor
        self._forward_backward(plan, x, y, rows, weights)
        late, updates = self.late, self.rows.updates
        if self._sums is not None:
            self._weights_step(plan, x, rows, row, loss, updates, divisor, grads=self._sums.flat)
            self._sums.reduce(loss, plan.m if divisor is None else divisor)
            self._apply(self._sums.flat, row)
        elif late is None:
            self._weights_step(plan, x, rows, row, loss, updates, divisor)
        elif late.squares is None:
            assert plan.partial is not None
            self._weights_step(plan, x, rows, row, loss, updates, divisor, overflow=late.overflow)
            late.apply(plan.partial, row, scaled=True)
        else:
            assert self.grads is not None
            outputs = {"grads": self.grads, "squares": late.squares, "overflow": late.overflow}
            self._weights_step(plan, x, rows, row, loss, updates, divisor, **outputs)
            late.apply(self.grads[None], row, scaled=False)

    def step(self, x: Tensor, y: Tensor, out: Tensor, weight: Tensor | None = None) -> None:
        """One step on x [M, K] (the compute dtype or uint8) and targets; writes the mean loss into ``out`` (0-d).

        ``weight`` [M] are sample weights. With members x is [M, K] or [E, M, K], the targets likewise, and ``out`` is
        [E].
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
            key = (m, self._baked(), x.dtype, y.dtype, x.dim(), y.shape, weights.ignored, weight is None)
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
                buffers["weight"] = torch.empty(m, dtype=torch.float32, device=self.device)
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

    def _apply(self, grads: Tensor, row: Tensor) -> None:
        """Update by gradients that are complete."""
        if self.late is None:
            reduce_update(self.layout, grads, 1, self.rule.kernel, row, states=self.states, active=self.active)
        else:
            self.late.examine(grads, row)
            self.late.apply(grads[None], row, scaled=False)

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
        """The versions of the parameters are those of this engine's last update."""
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
