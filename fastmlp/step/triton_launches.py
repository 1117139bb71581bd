"""A training step on a GPU as launches of kernels: 2L - 1 for an L-layer network.

    L - 1  linear_fwd     the first one gathers its rows by index and scales uint8 pixels
    1      head           last linear, softmax cross-entropy, dZ_L and dZ_{L-1}
    L - 2  linear_dgrad   dZ_{l-1} = (dZ_l W_l) f'_{l-1}
    1      wgrad_update   every layer's dW, db and optimizer update, and the mean loss

The kernels that make dZ also write the sums of its rows, block by block. The last launch makes db from these sums.

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

Buffers are allocated once per batch size, and given up when many sizes would hold too much memory.
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
from ..kernels.head import MAX_CLASSES
from ..kernels.layout import Layer, Layout
from ..kernels.optimizer import EMA_COLUMNS, HYPER_COLUMNS
from ..kernels.reduce_update import reduce_update
from ..kernels.wgrad_update import wgrad_update, workspace
from ..nn import Linear
from .cpu_dropout import StepDropout
from .graphs import GraphCache
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


class StepLaunches:
    """Forward, backward and update of an MLP as launches of kernels on the current stream.

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
            self._sums = parallel.sums([self.layout.total], torch.float32, members)
            (self.grads,) = self._sums.parts
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
        self.graphs: GraphCache | None = None
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
            assert self.grads is not None
            self._weights_step(plan, x, rows, row, loss, updates, divisor, grads=self.grads)
            self._sums.reduce(loss, plan.m if divisor is None else divisor)
            self._apply(self.grads, row)
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

    def _apply(self, grads: Tensor, row: Tensor) -> None:
        """Update by gradients that are complete."""
        if self.late is None:
            reduce_update(self.layout, grads, 1, self.rule.kernel, row, states=self.states, active=self.active)
        else:
            self.late.examine(grads, row)
            self.late.apply(grads[None], row, scaled=False)
