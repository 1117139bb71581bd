"""The training step on plain torch: in-place BLAS on buffers allocated once, no tape. It is what a CPU runs.

For each batch size a plan holds the buffers and, per layer, the functions that were chosen for its three products: by
``fastmlp.step.cpu_plan`` for a step, ``fastmlp.cpu.few_rows`` for a layer, ``fastmlp.cpu.gemm`` for a product. A step
then is a fixed list of calls: forward, loss and dA, and from the last layer down dX, activation derivative, dW with its
update. Plain SGD updates each weight inside its gradient's GEMM.

On another device than a CPU (float64 on a GPU) aten makes all products, and nothing is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..base.losses import takes_classes
from ..cpu import gemm, threads
from ..cpu.few_rows import Products, layer_products
from ..cpu.widened import wide_update, wide_wgrad
from ..nn import Linear
from ..online import online_epoch
from .cpu_losses import LossFunction, loss_function
from .cpu_optimizer import TorchOptimizer
from .cpu_plan import scratch_batch, scratch_layers, step_way
from .loss_scale import LossScale
from .optimizers import Optimizer
from .parameters import Copies

__all__ = ["TorchStep"]

#: Batch sizes whose buffers are kept; a further one takes the place of the first.
_PLANS = 8


class _Layer:
    """One layer's tensors, and the places of its gradients among those of all trained parameters."""

    def __init__(self, module: Linear, dtype: torch.dtype, index: int, plain: bool) -> None:
        weight = Copies(module.weight, dtype)
        bias = None if module.bias is None else Copies(module.bias, dtype)
        self.activation: str = module.activation
        self.f = ACTIVATIONS[module.activation]
        self.saves_z = self.f.saved == "z"
        self.weight, self.master_w, self.train_w = weight.used, weight.master, weight.trained
        self.bias = None if bias is None else bias.used
        self.row_b = None if bias is None else bias.master.unsqueeze(0)
        self.train_b = bias is not None and bias.trained
        self.in_place = plain and self.train_w and self.master_w is self.weight
        self.grad_w, self.grad_b = index, index + self.train_w
        self.copies = [c for c in (weight, bias) if c is not None]


@dataclass
class _Plan:
    """Buffers and chosen functions for one batch size."""

    x: Tensor
    pixels: Tensor | None
    y: Tensor | None
    products: list[Products]
    kept_a: list[Tensor | None]
    loss: LossFunction
    alone: bool  #: whether steps run on one thread


class TorchStep:
    """Forward, backward and update of an MLP in torch operations; ``fastmlp.TrainStep`` is the public way to it."""

    def __init__(self, layers: list[Linear], rule: Optimizer, loss: str, dtype: torch.dtype) -> None:
        self.rule, self.loss, self.dtype = rule, loss, dtype
        self._modules, self.device = layers, layers[0].weight.device
        loss_scale = LossScale(self.device) if dtype == torch.float16 else None
        # Gradients and optimizer state exist only where the optimizer needs them all at once.
        self.plain = rule.is_plain_sgd and loss_scale is None
        self.layers: list[_Layer] = []
        masters: list[Tensor] = []
        for module in layers:
            layer = _Layer(module, dtype, len(masters), self.plain)
            masters += [c.master for c in layer.copies if c.trained]
            self.layers.append(layer)
        self.lowest = next(i for i, layer in enumerate(self.layers) if layer.train_w or layer.train_b)
        self.optimizer = TorchOptimizer(masters, rule, loss_scale)
        self._scale = None if loss_scale is None else loss_scale.scale
        copies = [c for layer in self.layers for c in layer.copies if not c.is_one]
        self._copies, self._trained_copies = copies, [c for c in copies if c.trained]
        self._db = [
            torch.empty_like(layer.row_b) if self.plain and layer.train_b and layer.row_b is not None else None
            for layer in self.layers
        ]
        # A tensor, as torch would make one of a Python number at every step.
        self._pixel = self.layers[0].weight.new_full((), 1 / 255)
        self._wgrad_out: dict[int, Tensor] = {}
        self._plans: dict[int, _Plan] = {}

    def _plan(self, m: int) -> _Plan:
        plan = self._plans.get(m)
        if plan is None:
            if len(self._plans) == _PLANS:
                del self._plans[next(iter(self._plans))]
            way: gemm.Library = "aten"
            if self.device.type == "cpu":
                way = step_way(self._modules, self.rule, self.loss, self.dtype, m, self._trials)
            plan = self._plans[m] = self._new_plan(m, way)
            gemm.keep_choices()
        return plan

    def _trials(self, m: int, ways: Sequence[gemm.Library]) -> dict[gemm.Library, Callable[[], object]]:
        """Steps of ``m`` rows, one for each way, that touch nothing of this one's."""
        layers = scratch_layers(self._modules)
        step = TorchStep(layers, replace(self.rule, lr=1e-3), self.loss, self.dtype)
        x, y, out = scratch_batch(m, layers, self.loss, self.dtype)
        return {way: partial(step._run, step._step, step._new_plan(m, way), x, y, out) for way in ways}

    def _new_plan(self, m: int, way: gemm.Library) -> _Plan:
        with nullcontext() if way == "each" else gemm.only_aten():
            return self._plan_products(m, alone=way == "alone")

    def _plan_products(self, m: int, *, alone: bool) -> _Plan:
        layers, dtype = self.layers, self.dtype
        new = layers[0].weight.new_empty
        loss = loss_function(self.loss, m, layers[-1].weight.shape[0], dtype, self.device, self._scale)
        y = torch.empty(m, dtype=torch.int64, device=self.device) if takes_classes(self.loss) else None
        plan = _Plan(new((m, layers[0].weight.shape[1])), None, y, [], [], loss, alone)
        for i, layer in enumerate(layers):
            n, k = layer.weight.shape
            fused = layer.activation if layer.f.epilogue else "identity"
            out, dx = new((m, n)), new((m, k)) if i > self.lowest else None
            narrow = layer.train_w and layer.weight.dtype != layer.master_w.dtype
            wide = narrow and wide_wgrad(m, layer.master_w, dtype, update=self.plain)
            dw = self._wgrad_buffer(i, wide=wide) if layer.train_w and not layer.in_place else None
            products = layer_products(m, layer.weight, layer.bias, fused, out, dx, update=layer.in_place, dw=dw)
            if wide and self.plain:
                products = products._replace(update=wide_update(m, layer.master_w, dtype))
            plan.products.append(products)
            plan.kept_a.append(None if layer.f.epilogue else new((m, n)))
        return plan

    def _wgrad_buffer(self, i: int, *, wide: bool) -> Tensor:
        """Where dW of a layer is computed: the gradient itself, or a narrower tensor that is then widened into it."""
        layer, dtype = self.layers[i], gemm.product_dtype(self.dtype, self.device)
        if layer.master_w.dtype == dtype or (wide and not self.plain):
            return self.optimizer.grads[layer.grad_w]
        if i not in self._wgrad_out:
            self._wgrad_out[i] = torch.empty_like(layer.weight, dtype=dtype)
        return self._wgrad_out[i]

    def step(self, x: Tensor, y: Tensor, out: Tensor, rows: Tensor | None = None) -> None:
        """One step on x [M, K] (float or uint8) and targets; writes the mean loss into ``out`` (0-d).

        ``rows`` int64 [M] takes those rows of x and y.
        """
        plan = self._plan(x.shape[0] if rows is None else rows.shape[0])
        self._run(self._step, plan, x, y, out, rows)

    def _run(self, work: Callable[..., None], plan: _Plan, *args: Tensor | None) -> None:
        if plan.alone:
            threads.alone(work, plan, *args)
        else:
            work(plan, *args)

    def _step(self, plan: _Plan, x: Tensor, y: Tensor, out: Tensor, rows: Tensor | None = None) -> None:
        inputs, outputs, da = self._forward(plan, x, y, out, rows)
        if self.plain:
            self._backward(plan, inputs, outputs, da, self._apply_plain)
            self._publish()
        else:
            self._backward(plan, inputs, outputs, da, self._store)
            self._update(scaled=True)

    def gradients(self, x: Tensor, y: Tensor, out: Tensor, *, accumulate: bool = False) -> list[Tensor]:
        """Gradients of the trained masters, in the order of the parameters; parameters stay as they are."""
        kept = [g.clone() for g in self.optimizer.grads] if accumulate else None
        plan = self._plan(x.shape[0])
        self._run(self._gradients, plan, x, y, out)
        grads = self.optimizer.grads
        if self._scale is not None:
            torch._foreach_mul_(grads, 1 / self._scale)
        if kept is not None:
            torch._foreach_add_(grads, kept)
        return grads

    def _gradients(self, plan: _Plan, x: Tensor, y: Tensor, out: Tensor) -> None:
        inputs, outputs, da = self._forward(plan, x, y, out, None)
        self._backward(plan, inputs, outputs, da, self._store)

    def update(self) -> None:
        """Apply the optimizer to what ``gradients`` left."""
        self._update(scaled=False)

    def parameter_state(self) -> dict[str, list[Tensor]]:
        """What belongs to each trained parameter, live: optimizer state, and masters of 16 bits."""
        state = self.optimizer.parameter_state()
        if any(c.master is not c.data for layer in self.layers for c in layer.copies):
            state["master"] = list(self.optimizer.params)
        return state

    def counters(self) -> dict[str, float]:
        """AdamW's number of updates; float16's loss scale and the good steps since it last moved."""
        return self.optimizer.counters()

    def set_counters(self, counters: dict[str, float]) -> None:
        """What ``counters`` returned; call it after ``parameter_state`` was written to."""
        self.optimizer.set_counters(counters)
        self._publish()

    def _update(self, *, scaled: bool) -> None:
        self.optimizer.update(scaled=scaled)
        self._publish()

    def _publish(self) -> None:
        for copies in self._trained_copies:
            copies.publish()

    def _forward(
        self, plan: _Plan, x: Tensor, y: Tensor, out: Tensor, rows: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Inputs A_{l-1} of every layer, what each activation's derivative needs, and dA_L."""
        for copies in self._copies:
            copies.refresh()
        if rows is not None:
            if plan.y is None or plan.y.dtype != y.dtype:
                plan.y = y.new_empty((rows.shape[0], *y.shape[1:]))
            y = torch.index_select(y, 0, rows, out=plan.y)
        a = self._input(plan, x, rows)
        inputs, outputs = [], []
        for layer, products, kept in zip(self.layers, plan.products, plan.kept_a, strict=True):
            inputs.append(a)
            z = products.linear(a)
            a = z if kept is None else layer.f.into(z, kept)
            outputs.append(z if layer.saves_z else a)
        return inputs, outputs, plan.loss(a, y, out)

    def _input(self, plan: _Plan, x: Tensor, rows: Tensor | None) -> Tensor:
        """X in the compute dtype: gathered, converted, pixels scaled; x itself when nothing is to be done."""
        if rows is None:
            if x.dtype == self.dtype:
                return x
            source = x
        elif x.dtype == self.dtype:
            return torch.index_select(x, 0, rows, out=plan.x)
        else:
            if plan.pixels is None or plan.pixels.dtype != x.dtype:
                plan.pixels = torch.empty_like(plan.x, dtype=x.dtype)
            source = torch.index_select(x, 0, rows, out=plan.pixels)
        plan.x.copy_(source)
        return plan.x.mul_(self._pixel) if x.dtype == torch.uint8 else plan.x

    def _backward(
        self,
        plan: _Plan,
        inputs: list[Tensor],
        outputs: list[Tensor],
        da: Tensor,
        consume: Callable[[_Plan, int, Tensor, Tensor], None],
    ) -> None:
        """From the last layer down; ``consume(plan, layer, dZ, X)`` takes each layer's gradient."""
        for i in range(len(self.layers) - 1, self.lowest - 1, -1):
            dz = self.layers[i].f.backward(da, outputs[i], inplace=True)
            dgrad = plan.products[i].dgrad
            if dgrad is not None:  # before the weight changes
                da = dgrad(dz)
            consume(plan, i, dz, inputs[i])

    def _apply_plain(self, plan: _Plan, i: int, dz: Tensor, x: Tensor) -> None:
        """W -= lr dZ^T X, b -= lr sum dZ."""
        layer, lr = self.layers[i], self.rule.lr
        products, db = plan.products[i], self._db[i]
        if products.update is not None:
            products.update(dz, x, lr)
        elif products.wgrad is not None:
            grad = products.wgrad(dz, x)
            if grad.dtype != layer.master_w.dtype:
                grad = self.optimizer.grads[layer.grad_w].copy_(grad)
            layer.master_w.add_(grad, alpha=-lr)
        if db is not None and layer.row_b is not None:
            # Of a single row, dZ is its own sum.
            is_sum = dz.shape[0] == 1 and dz.dtype == db.dtype
            summed = dz if is_sum else torch.sum(dz, 0, True, dtype=db.dtype, out=db)
            layer.row_b.add_(summed, alpha=-lr)

    def _store(self, plan: _Plan, i: int, dz: Tensor, x: Tensor) -> None:
        """Write dW and db into the gradients."""
        layer, grads = self.layers[i], self.optimizer.grads
        if layer.train_w:
            wgrad, into = plan.products[i].wgrad, grads[layer.grad_w]
            if wgrad is None:
                torch.mm(dz.t(), x, out=into)
            else:
                grad = wgrad(dz, x)
                if grad.dtype == into.dtype:
                    grads[layer.grad_w] = grad
                else:
                    into.copy_(grad)
        if layer.train_b:
            into = grads[layer.grad_b]
            torch.sum(dz, 0, dtype=into.dtype, out=into)

    def epoch(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        order: Tensor,
        lrs: Tensor,
        losses: Tensor,
    ) -> None:
        """Steps over ``order``, each with its learning rate (float64 on the host); writes each step's loss."""
        if batch_size == 1 and self._is_online(images):
            online_epoch(
                [layer.weight for layer in self.layers],
                [layer.bias for layer in self.layers],
                [layer.activation for layer in self.layers],
                images,
                labels,
                lrs.tolist(),
                order,
                losses=losses,
            )
            return
        base = self.rule.lr
        try:
            for rows, lr, out in zip(order.split(batch_size), lrs.tolist(), losses.unbind(), strict=True):
                self.rule.lr = lr
                self.step(images, labels, out, rows)
        finally:
            self.rule.lr = base

    def _is_online(self, images: Tensor) -> bool:
        """Whether single-sample steps are those of the exact blocked recurrence (``fastmlp.online``)."""
        return (
            self.plain
            and self.device.type == "cpu"
            and self.loss == "cross_entropy"
            and self.dtype in (torch.float32, torch.float64)
            and images.dtype in (self.dtype, torch.uint8)
            and not self._copies
            and all(x.train_w and (x.train_b or x.bias is None) for x in self.layers)
        )
