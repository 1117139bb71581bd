"""The training step on a CPU: in-place BLAS on buffers allocated once, no tape.

For each batch size a plan holds the buffers and, per layer, the functions that were chosen for its three products
(``fastmlp.cpu_gemm``). A step then is a fixed list of calls: forward, loss and dA, and from the last layer down
dX, activation derivative, dW with its update. Plain SGD updates each weight inside its gradient's GEMM.

Parameters of 16 bits, and a 16-bit compute dtype, have float32 masters that the optimizer works on; float16 also
scales the loss and skips a step whose gradients overflow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import cpu_gemm
from .activations import LEAKY_SLOPE, saved_for_grad
from .nn import Linear
from .online import online_epoch
from .step_config import OptimizerConfig
from .step_losses import LossFunction, loss_function
from .torch_backend import activation_bwd

__all__ = ["TorchStep"]

_FUSED = ("identity", "sigmoid", "relu", "tanh")
_SCALE_START, _SCALE_GROWTH_STEPS = 2.0**16, 2000


def _activate_into(out: Tensor, z: Tensor, activation: str) -> Tensor:
    """A = f(Z) into ``out``, for the activations that no GEMM applies."""
    match activation:
        case "step":
            return torch.ge(z, 0, out=out)
        case "leaky_relu":
            return torch.ops.aten.leaky_relu.out(z, LEAKY_SLOPE, out=out)
        case "gelu":
            return torch.ops.aten.gelu.out(z, out=out)
    return torch.ops.aten.silu.out(z, out=out)


@dataclass
class _Layer:
    """One layer's tensors: masters that are optimized, and what the products read (the same, or 16-bit copies)."""

    module: Linear
    weight: Tensor
    bias: Tensor | None
    master_w: Tensor
    master_b: Tensor | None
    train_w: bool
    train_b: bool


@dataclass
class _Plan:
    """Buffers and chosen functions for one batch size."""

    x: Tensor
    pixels: Tensor | None
    linear: list[Callable[[Tensor], Tensor]]
    kept_a: list[Tensor | None]
    dgrad: list[Callable[[Tensor], Tensor] | None]
    wgrad: list[Callable[[Tensor, Tensor], Tensor] | None]
    update: list[Callable[[Tensor, Tensor, float], object] | None]
    loss: LossFunction


class TorchStep:
    """Forward, backward and update of an MLP on a CPU; ``fastmlp.TrainStep`` is the public way to it."""

    def __init__(self, layers: list[Linear], config: OptimizerConfig, loss: str, dtype: torch.dtype) -> None:
        self.config, self.loss, self.dtype = config, loss, dtype
        wide = torch.promote_types(dtype, torch.float32)
        self.layers = [self._layer(module, dtype, wide) for module in layers]
        trained = [i for i, layer in enumerate(self.layers) if layer.train_w or layer.train_b]
        self.lowest = min(trained)
        self.scaled = dtype == torch.float16
        self.scale, self._good_steps = (_SCALE_START if self.scaled else 1.0), 0
        self._plans: dict[int, _Plan] = {}
        self.masters = [
            t
            for layer in self.layers
            for t, train in ((layer.master_w, layer.train_w), (layer.master_b, layer.train_b))
            if train and t is not None
        ]
        # Gradients and optimizer state exist only where the optimizer needs them all at once.
        self.plain = config.is_plain_sgd and not self.scaled
        self._grads: list[Tensor] | None = None
        self._momenta = [torch.zeros_like(t) for t in self.masters] if config.momentum else []
        self._second = [torch.zeros_like(t) for t in self.masters] if config.name == "adamw" else []
        self._first = [torch.zeros_like(t) for t in self.masters] if config.name == "adamw" else []
        self._steps = [torch.zeros(()) for _ in self.masters] if config.name == "adamw" else []

    @staticmethod
    def _layer(module: Linear, dtype: torch.dtype, wide: torch.dtype) -> _Layer:
        def pair(param: Tensor) -> tuple[Tensor, Tensor]:
            """(what products read, what the optimizer updates) of a parameter."""
            data = param.detach()
            if not data.is_contiguous():
                raise RuntimeError(
                    f"TrainStep updates parameters in place and needs them contiguous, got strides {data.stride()}; "
                    "assign param.data = param.data.contiguous()"
                )
            master = data if data.dtype == wide else data.to(wide)
            return (data if data.dtype == dtype else data.to(dtype)), master

        weight, master_w = pair(module.weight)
        bias, master_b = pair(module.bias) if module.bias is not None else (None, None)
        return _Layer(
            module,
            weight,
            bias,
            master_w,
            master_b,
            module.weight.requires_grad,
            module.bias is not None and module.bias.requires_grad,
        )

    def _plan(self, m: int) -> _Plan:
        plan = self._plans.get(m)
        if plan is not None:
            return plan
        dtype, layers = self.dtype, self.layers
        loss = loss_function(self.loss, m, layers[-1].weight.shape[0], dtype)
        plan = _Plan(torch.empty((m, layers[0].weight.shape[1]), dtype=dtype), None, [], [], [], [], [], loss)
        for i, layer in enumerate(layers):
            n, k = layer.weight.shape
            activation = layer.module.activation
            fused = activation if activation in _FUSED else "identity"
            plan.linear.append(cpu_gemm.linear(m, layer.weight, layer.bias, fused, torch.empty((m, n), dtype=dtype)))
            plan.kept_a.append(None if activation in _FUSED else torch.empty((m, n), dtype=dtype))
            down = torch.empty((m, k), dtype=dtype) if i > self.lowest else None
            plan.dgrad.append(None if down is None else cpu_gemm.dgrad(m, layer.weight, down))
            in_place = self.plain and layer.train_w and layer.master_w is layer.weight
            plan.update.append(cpu_gemm.wgrad_update(m, layer.weight) if in_place else None)
            plan.wgrad.append(
                cpu_gemm.wgrad(m, k, n, dtype, torch.empty((n, k), dtype=dtype))
                if layer.train_w and not in_place
                else None
            )
        self._plans[m] = plan
        return plan

    def step(self, x: Tensor, y: Tensor, out: Tensor, rows: Tensor | None = None) -> None:
        """One step on x [M, K] (float or uint8) and targets; writes the mean loss into ``out`` (0-d).

        ``rows`` int64 [M] takes those rows of x and y.
        """
        plan, inputs, outputs, da = self._forward(x, y, out, rows)
        if self.plain:
            self._backward(plan, inputs, outputs, da, self._apply_plain)
            self._sync_copies()
        else:
            self._backward(plan, inputs, outputs, da, self._store)
            self.update()

    def gradients(self, x: Tensor, y: Tensor, out: Tensor, *, accumulate: bool = False) -> list[Tensor]:
        """Gradients of the trained masters, in the order of the parameters; parameters stay as they are."""
        kept = [g.clone() for g in self._grad_buffers()] if accumulate else None
        plan, inputs, outputs, da = self._forward(x, y, out, None)
        self._backward(plan, inputs, outputs, da, self._store)
        if self.scale != 1.0:
            torch._foreach_mul_(self._grad_buffers(), 1 / self.scale)
        if kept is not None:
            torch._foreach_add_(self._grad_buffers(), kept)
        return self._grad_buffers()

    def _forward(
        self, x: Tensor, y: Tensor, out: Tensor, rows: Tensor | None
    ) -> tuple[_Plan, list[Tensor], list[Tensor], Tensor]:
        """Inputs A_{l-1} of every layer, what each activation's derivative needs, and dA_L."""
        m = x.shape[0] if rows is None else rows.shape[0]
        plan = self._plan(m)
        if rows is not None:
            y = y.index_select(0, rows)
        a = self._input(plan, x, rows)
        inputs, outputs = [], []
        for layer, linear, kept in zip(self.layers, plan.linear, plan.kept_a, strict=True):
            inputs.append(a)
            z = linear(a)
            if kept is None:
                a = z
            else:
                a = _activate_into(kept, z, layer.module.activation)
            outputs.append(z if saved_for_grad(layer.module.activation) == "z" else a)
        da = plan.loss(a, y, out)
        if self.scale != 1.0:
            da.mul_(self.scale)
        return plan, inputs, outputs, da

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
                plan.pixels = torch.empty(plan.x.shape, dtype=x.dtype)
            source = torch.index_select(x, 0, rows, out=plan.pixels)
        plan.x.copy_(source)
        return plan.x.mul_(1 / 255) if x.dtype == torch.uint8 else plan.x

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
            dz = activation_bwd(da, outputs[i], self.layers[i].module.activation, inplace=True)
            dgrad = plan.dgrad[i]
            if dgrad is not None:  # before the weight changes
                da = dgrad(dz)
            consume(plan, i, dz, inputs[i])

    def _apply_plain(self, plan: _Plan, i: int, dz: Tensor, x: Tensor) -> None:
        """W -= lr dZ^T X, b -= lr sum dZ."""
        layer, lr = self.layers[i], self.config.lr
        update, wgrad = plan.update[i], plan.wgrad[i]
        if update is not None:
            update(dz, x, lr)
        elif wgrad is not None:
            layer.master_w.add_(wgrad(dz, x), alpha=-lr)
        if layer.train_b and layer.master_b is not None:
            layer.master_b.add_(dz.sum(0, dtype=layer.master_b.dtype), alpha=-lr)

    def _store(self, plan: _Plan, i: int, dz: Tensor, x: Tensor) -> None:
        """Write dW and db into the gradient buffers."""
        layer, grads = self.layers[i], self._grad_buffers()
        at = sum(below.train_w + below.train_b for below in self.layers[:i])
        if layer.train_w:
            wgrad = plan.wgrad[i]
            grad = torch.mm(dz.t(), x, out=grads[at]) if wgrad is None else wgrad(dz, x)
            if grad.dtype == grads[at].dtype:
                grads[at] = grad
            else:
                grads[at].copy_(grad)
            at += 1
        if layer.train_b:
            torch.sum(dz, 0, dtype=grads[at].dtype, out=grads[at])

    def _grad_buffers(self) -> list[Tensor]:
        if self._grads is None:
            self._grads = [torch.zeros_like(t) for t in self.masters]
        return self._grads

    def update(self) -> None:
        """Apply the optimizer to the gradient buffers."""
        grads, config = self._grad_buffers(), self.config
        if self.scaled and not self._unscale(grads):
            return
        if config.max_grad_norm is not None:
            norm = torch.nn.utils.get_total_norm(grads)
            torch._foreach_mul_(grads, torch.clamp(config.max_grad_norm / (norm + 1e-6), max=1.0))
        with torch.no_grad():
            if config.name == "sgd":
                torch._fused_sgd_(
                    self.masters,
                    grads,
                    self._momenta,
                    weight_decay=config.weight_decay,
                    momentum=config.momentum,
                    lr=config.lr,
                    dampening=0.0,
                    nesterov=config.nesterov,
                    maximize=False,
                    is_first_step=False,
                )
            else:
                torch._foreach_add_(self._steps, 1)
                torch._fused_adamw_(
                    self.masters,
                    grads,
                    self._first,
                    self._second,
                    [],
                    self._steps,
                    lr=config.lr,
                    beta1=config.betas[0],
                    beta2=config.betas[1],
                    weight_decay=config.weight_decay,
                    eps=config.eps,
                    amsgrad=False,
                    maximize=False,
                )
        self._sync_copies()

    def _unscale(self, grads: list[Tensor]) -> bool:
        """Divide by the loss scale; False, with a smaller scale from now on, when a gradient has overflowed."""
        finite = all(bool(g.isfinite().all()) for g in grads)
        if not finite:
            self.scale, self._good_steps = max(1.0, self.scale / 2), 0
            return False
        torch._foreach_mul_(grads, 1 / self.scale)
        self._good_steps += 1
        if self._good_steps == _SCALE_GROWTH_STEPS:
            self.scale, self._good_steps = self.scale * 2, 0
        return True

    def _sync_copies(self) -> None:
        """Round the masters into the parameters and the 16-bit copies, where they are apart."""
        with torch.no_grad():
            for layer in self.layers:
                for master, used, param in (
                    (layer.master_w, layer.weight, layer.module.weight),
                    (layer.master_b, layer.bias, layer.module.bias),
                ):
                    if master is None or used is None:
                        continue
                    if used is not master:
                        used.copy_(master)
                    data = param.detach()
                    if data.data_ptr() not in (master.data_ptr(), used.data_ptr()):
                        data.copy_(master)

    def epoch(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        order: Tensor,
        lrs: Sequence[float],
        losses: Tensor,
    ) -> None:
        """Steps over ``order``, each with its learning rate; writes each step's loss."""
        if batch_size == 1 and self._is_online(images):
            online_epoch(
                [layer.weight for layer in self.layers],
                [layer.bias for layer in self.layers],
                [layer.module.activation for layer in self.layers],
                images,
                labels,
                lrs,
                order,
                losses=losses,
            )
            return
        base = self.config.lr
        try:
            for rows, lr, out in zip(order.split(batch_size), lrs, losses.unbind(), strict=True):
                self.config.lr = lr
                self.step(images, labels, out, rows)
        finally:
            self.config.lr = base

    def _is_online(self, images: Tensor) -> bool:
        """Whether single-sample steps are those of the exact blocked recurrence (``fastmlp.online``)."""
        return (
            self.plain
            and self.loss == "cross_entropy"
            and self.dtype in (torch.float32, torch.float64)
            and images.dtype in (self.dtype, torch.uint8)
            and self.layers[-1].module.activation == "identity"
            and all(x.train_w and (x.train_b or x.bias is None) and x.master_w is x.weight for x in self.layers)
        )
