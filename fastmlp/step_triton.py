"""The training step on a GPU: 2L - 1 kernel launches for an L-layer network, captured in CUDA graphs.

    L - 1  linear_fwd     the first one gathers its rows by index and scales uint8 pixels
    1      head           last linear, softmax cross-entropy, dZ_L and dZ_{L-1}
    L - 2  linear_dgrad   dZ_{l-1} = (dZ_l W_l) f'_{l-1}
    1      wgrad_update   every layer's dW, db and optimizer update, and the mean loss

Nothing is launched for zeroing gradients, casting, gathering, scaling or averaging. A long batch costs one launch
more (the reduction of split sums), clipping and float16's loss scale a few more: they need all gradients first.
Losses other than cross-entropy, more classes than the head takes, or an activation behind the last layer put
linear_fwd, the loss kernel and a dgrad in the place of the head.

Every buffer is allocated once a batch size. An epoch is captured in graphs of at most ``CHUNK`` steps, each step with
its own places in static tables of row numbers, learning rates and losses, which are filled before a replay: so one
capture serves every epoch and any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .activations import saved_for_grad
from .kernels import (
    activation_bwd,
    cross_entropy,
    elementwise_loss,
    head,
    linear_dgrad,
    linear_fwd,
    softmax_squared_error,
)
from .kernels.head import MAX_CLASSES
from .kernels.optimizer import HYPER_COLUMNS
from .kernels.wgrad_update import Hyper, Layer, Layout, reduce_update, wgrad_update, workspace
from .nn import Linear
from .step_config import OptimizerConfig
from .step_graph import GraphCache
from .step_losses import takes_classes

__all__ = ["CHUNK", "TritonStep"]

#: Steps of one captured graph.
CHUNK = 512
_SCALE_START, _SCALE_GROWTH_STEPS = 2.0**16, 2000


@dataclass
class _Plan:
    """Buffers of one batch size."""

    m: int
    a: list[Tensor]
    z: list[Tensor | None]
    dz: list[Tensor | None]
    loss_rows: Tensor
    partial: Tensor | None
    static: dict[tuple[object, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)


class TritonStep:
    """Forward, backward and update of an MLP with the kernels; ``fastmlp.TrainStep`` is the public way to it."""

    def __init__(
        self, layers: list[Linear], config: OptimizerConfig, loss: str, dtype: torch.dtype, *, cuda_graph: bool
    ) -> None:
        self.layers, self.config, self.loss, self.dtype = layers, config, loss, dtype
        self.device = layers[0].weight.device
        self.activations = [layer.activation for layer in layers]
        if "softmax" in self.activations:
            raise NotImplementedError(
                "the fused step has no softmax layer; train with autograd, or put the softmax into the loss "
                "('cross_entropy', 'softmax_squared_error')"
            )
        self.masters = [self._master(layer.weight) for layer in layers]
        self.bias_masters = [None if layer.bias is None else self._master(layer.bias) for layer in layers]
        self.weights = [self._used(layer.weight) for layer in layers]
        self.biases = [None if layer.bias is None else self._used(layer.bias) for layer in layers]
        self.trained = [i for i, layer in enumerate(layers) if layer.weight.requires_grad]
        for i, layer in enumerate(layers):
            if layer.bias is not None and layer.bias.requires_grad and i not in self.trained:
                raise NotImplementedError(
                    f"layer {i} has a frozen weight and a trained bias, which the kernels do not do; freeze both, "
                    "train both, or use backend 'torch'"
                )
        self.lowest = min(self.trained)
        self.layout = Layout([self._trained_layer(i) for i in self.trained])
        self.scaled = dtype == torch.float16
        self.all_first = self.scaled or config.max_grad_norm is not None
        name = {"sgd": "momentum" if config.momentum else "sgd", "adamw": "adamw"}[config.name]
        self.hyper = Hyper(
            name, config.nesterov, config.momentum, config.weight_decay, config.betas[0], config.betas[1], config.eps
        )
        zeros = torch.zeros(self.layout.total, device=self.device)
        self.m_state = zeros.clone() if name != "sgd" else None
        self.v_state = zeros.clone() if name == "adamw" else None
        self.grads = zeros if self.all_first else None
        self.scale = torch.tensor(_SCALE_START if self.scaled else 1.0, device=self.device)
        self.inverse_scale = 1 / self.scale
        self.good_steps = torch.zeros((), device=self.device)
        self.steps = 0
        self._row: tuple[tuple[float, ...], Tensor] | None = None
        self._plans: dict[int, _Plan] = {}
        self.graphs = GraphCache() if cuda_graph and self.device.type == "cuda" else None
        #: Parameters with a copy in another precision: (parameter, copy), and the versions that the copies are of.
        self._copied = [
            (param.detach(), copy)
            for layer, *copies in zip(layers, self.masters, self.weights, self.bias_masters, self.biases, strict=True)
            for param, copy in zip((layer.weight, layer.weight, layer.bias, layer.bias), copies, strict=True)
            if param is not None and copy is not None and copy.data_ptr() != param.data_ptr()
        ]
        self._versions = self._current_versions()

    def _current_versions(self) -> list[int]:
        return [param._version for param, _ in self._copied]

    def _follow(self) -> None:
        """Follow changes that somebody else made to the parameters, such as load_state_dict."""
        versions = self._current_versions()
        if versions == self._versions:
            return
        for (param, copy), old, new in zip(self._copied, self._versions, versions, strict=True):
            if new != old:
                copy.copy_(param)
        self._versions = versions

    def _master(self, param: Tensor) -> Tensor:
        data = param.detach()
        if not data.is_contiguous():
            raise RuntimeError(
                f"TrainStep updates parameters in place and needs them contiguous, got strides {data.stride()}; "
                "assign param.data = param.data.contiguous()"
            )
        return data if data.dtype == torch.float32 else data.float()

    def _used(self, param: Tensor) -> Tensor:
        """What the products read: the parameter itself, or a copy in the compute dtype that each update writes."""
        data = param.detach()
        if data.dtype not in (torch.float32, self.dtype):
            raise TypeError(f"parameters in {data.dtype} cannot be trained in {self.dtype}; use dtype={data.dtype}")
        return data if data.dtype == self.dtype else data.to(self.dtype)

    def _trained_layer(self, i: int) -> Layer:
        low = self.dtype != torch.float32
        bias = self.layers[i].bias
        trains_bias = bias is not None and bias.requires_grad
        return Layer(
            self.masters[i],
            self.bias_masters[i] if trains_bias else None,
            self.weights[i] if low else None,
            self.biases[i] if low and trains_bias else None,
        )

    def _plan(self, m: int) -> _Plan:
        plan = self._plans.get(m)
        if plan is None:

            def buffer(n: int) -> Tensor:
                return torch.empty((m, n), dtype=self.dtype, device=self.device)

            outputs = [layer.out_features for layer in self.layers]
            elements = 1 if takes_classes(self.loss) else outputs[-1]
            plan = self._plans[m] = _Plan(
                m,
                [buffer(n) for n in outputs],
                [
                    buffer(n) if saved_for_grad(f) == "z" else None
                    for n, f in zip(outputs, self.activations, strict=True)
                ],
                [buffer(n) if i >= self.lowest else None for i, n in enumerate(outputs)],
                torch.empty(m * elements, dtype=torch.float32, device=self.device),
                workspace(self.layout, m, self.dtype, self.device, direct=not self.all_first),
            )
        return plan

    def _hyper_rows(self, lrs: Sequence[float]) -> Tensor:
        """One row of step-dependent values for each of the next steps, on the host."""
        rows = []
        (beta1, beta2), decay = self.config.betas, self.config.weight_decay
        for t, lr in enumerate(lrs, start=self.steps + 1):
            rows.append((lr, 1 - lr * decay, lr / (1 - beta1**t), (1 - beta2**t) ** -0.5))
        return torch.tensor(rows, dtype=torch.float32).view(-1, HYPER_COLUMNS)

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
            )
            a = plan.a[i]
        return a

    def _forward_backward(self, plan: _Plan, x: Tensor, y: Tensor, rows: Tensor | None) -> None:
        """Everything up to dZ of every trained layer, and the loss of every row."""
        last = len(self.layers) - 1
        scale = self.scale / plan.m if self.scaled else 1 / plan.m
        fused = self.loss == "cross_entropy" and self.activations[last] == "identity"
        if fused and self.layers[last].out_features <= MAX_CLASSES:
            below = last - 1 if last > self.lowest else None
            h = self._forward(plan, x, rows, last)
            head(
                h,
                self.weights[last],
                self.biases[last],
                y,
                activation="identity" if below is None else self.activations[below],
                saved=None if below is None else self._saved(plan, below),
                scale=scale,
                ignore_index=-1,
                rows=rows,
                gather_h=rows is not None and last == 0,
                want_dz_prev=below is not None,
                loss=plan.loss_rows,
                dz=plan.dz[last],
                dz_prev=None if below is None else plan.dz[below],
            )
            top = last - 1
        else:
            a = self._forward(plan, x, rows, last + 1)
            if rows is not None and self.loss != "cross_entropy":
                y = y.index_select(0, rows)
            self._loss_gradient(plan, a, y, rows, scale)
            top = last
        for i in range(top, self.lowest, -1):
            dz = plan.dz[i]
            assert dz is not None
            linear_dgrad(dz, self.weights[i], self._saved(plan, i - 1), self.activations[i - 1], dx=plan.dz[i - 1])

    def _loss_gradient(self, plan: _Plan, a: Tensor, y: Tensor, rows: Tensor | None, scale: float | Tensor) -> None:
        """DZ_L from the network's output, by the loss's own kernel, and the loss of every row or element."""
        last = len(self.layers) - 1
        dz = plan.dz[last]
        assert dz is not None
        if self.loss == "cross_entropy":
            cross_entropy(a, y, ignore_index=-1, scale=scale, rows=rows, loss=plan.loss_rows, dz=dz)
        else:
            # These kernels take their factor from the host; float16's scale joins on the device.
            host = 1 / plan.m if takes_classes(self.loss) else 1 / (plan.m * a.shape[1])
            if self.loss == "softmax_squared_error":
                softmax_squared_error(a, y, scale=host, loss=plan.loss_rows, dz=dz)
            else:
                name = "bce_with_logits" if self.loss == "bce" else self.loss
                elementwise_loss(a, y, name, scale=host, loss=plan.loss_rows.view(a.shape), da=dz)
            if self.scaled:
                dz.mul_(self.scale)
        if self.activations[last] != "identity":
            activation_bwd(dz, self._saved(plan, last), self.activations[last], dz=dz)

    def _weights_step(
        self, plan: _Plan, x: Tensor, rows: Tensor | None, hyper: Hyper, row: Tensor, loss: Tensor, **options: Any
    ) -> None:
        """The grouped weight gradient, with whatever ``hyper`` does to it."""
        inputs = [x, *plan.a[:-1]]
        dzs = [plan.dz[i] for i in self.trained]
        wgrad_update(
            self.layout,
            [dz for dz in dzs if dz is not None],
            [inputs[i] for i in self.trained],
            hyper,
            row,
            m_state=self.m_state,
            v_state=self.v_state,
            rows=rows if self.trained[0] == 0 else None,
            loss_rows=plan.loss_rows,
            loss=loss,
            partial=plan.partial,
            **options,
        )

    def _launch(self, plan: _Plan, x: Tensor, y: Tensor, rows: Tensor | None, row: Tensor, loss: Tensor) -> None:
        """The whole step as launches on the current stream."""
        self._forward_backward(plan, x, y, rows)
        if not self.all_first:
            self._weights_step(plan, x, rows, self.hyper, row, loss)
            return
        unscale = self.inverse_scale if self.scaled else None
        self._weights_step(plan, x, rows, Hyper("none"), row, loss, grads=self.grads, unscale=unscale)
        self._apply(row)

    def _apply(self, row: Tensor) -> None:
        """Update from the flat gradients: clipped, and skipped where float16 overflowed, all on the device."""
        grads = self.grads
        assert grads is not None
        factor, skip = None, None
        if self.scaled:
            finite = grads.isfinite().all()
            skip = (~finite).int()
        if self.config.max_grad_norm is not None:
            norm = torch.linalg.vector_norm(grads)
            factor = torch.clamp(self.config.max_grad_norm / (norm + 1e-6), max=1.0)
        reduce_update(
            self.layout,
            grads,
            1,
            self.hyper,
            row,
            m_state=self.m_state,
            v_state=self.v_state,
            unscale=factor,
            skip=skip,
        )
        if self.scaled:
            self.good_steps.add_(1).mul_(finite)
            grown = self.good_steps >= _SCALE_GROWTH_STEPS
            self.good_steps.mul_(~grown)
            self.scale.mul_(torch.where(finite, torch.where(grown, 2.0, 1.0), 0.5)).clamp_(min=1.0)
            torch.reciprocal(self.scale, out=self.inverse_scale)

    def _state(self) -> list[Tensor]:
        """Every tensor that a step changes and the next one reads."""
        tensors = [*self.layout.params, *self.layout.low, self.m_state, self.v_state]
        tensors += [self.scale, self.inverse_scale, self.good_steps]
        return [t for t in tensors if t is not None]

    def _without_effect(self, launch: Callable[[], None]) -> None:
        """Run ``launch`` once, so that its kernels are compiled and loaded, and undo what it did."""
        before = [t.clone() for t in self._state()]
        launch()
        for t, old in zip(self._state(), before, strict=True):
            t.copy_(old)
        self._versions = self._current_versions()

    def step(self, x: Tensor, y: Tensor, out: Tensor) -> None:
        """One step on x [M, K] (the compute dtype or uint8) and targets; writes the mean loss into ``out`` (0-d)."""
        self._follow()
        x = self._cast(x)
        plan = self._plan(x.shape[0])
        row = self._current_row()
        self.steps += 1
        if self.graphs is None:
            self._launch(plan, x, y, None, row, out)
        else:
            key = (x.dtype, y.dtype, y.shape)
            if key not in plan.static:
                plan.static[key] = torch.empty_like(x).contiguous(), torch.empty_like(y).contiguous()
            static_x, static_y = plan.static[key]
            static_x.copy_(x)
            static_y.copy_(y)
            loss = self.graphs.scalar(("step", plan.m, *key), self.device)

            def launch() -> None:
                self._launch(plan, static_x, static_y, None, row, loss)

            self.graphs.replay(("step", plan.m, *key, row.data_ptr()), launch, self._without_effect)
            out.copy_(loss)

    def _current_row(self) -> Tensor:
        """The next step's values on the device; written anew only when they change."""
        values = tuple(self._hyper_rows([self.config.lr])[0].tolist())
        if self._row is None:
            self._row = values, torch.tensor(values, device=self.device)
        elif self._row[0] != values:
            self._row[1].copy_(torch.tensor(values), non_blocking=True)
            self._row = values, self._row[1]
        return self._row[1]

    def epoch(
        self, images: Tensor, labels: Tensor, batch_size: int, order: Tensor, lrs: Sequence[float], losses: Tensor
    ) -> None:
        """Steps over ``order``, each with its learning rate; writes each step's loss."""
        self._follow()
        images = self._cast(images)
        n = order.shape[0]
        table = self._hyper_rows(lrs).to(self.device)
        full = n // batch_size
        for begin in range(0, full, CHUNK):
            count = min(CHUNK, full - begin)
            rows = order[begin * batch_size : (begin + count) * batch_size].view(count, batch_size)
            losses[begin : begin + count] = self._chunk(images, labels, rows, table[begin : begin + count])
        if full < len(lrs):
            losses[full:] = self._chunk(images, labels, order[full * batch_size :].view(1, -1), table[full:])
        self.steps += len(lrs)

    def _chunk(self, images: Tensor, labels: Tensor, rows: Tensor, table: Tensor) -> Tensor:
        """The losses of ``count`` steps of equal size, by one graph where there are graphs."""
        count, m = rows.shape
        plan = self._plan(m)
        # 16 bytes a step keep every pointer aligned alike, so that all steps share one compiled kernel.
        width = m + m % 2
        key = ("chunk", count, m, images.data_ptr(), labels.data_ptr(), images.shape, images.dtype, labels.dtype)
        buffers = self.graphs.buffers(key) if self.graphs is not None else {}
        if not buffers:
            buffers["rows"] = torch.zeros((count, width), dtype=torch.int64, device=self.device)
            buffers["table"] = torch.empty((count, HYPER_COLUMNS), device=self.device)
            buffers["losses"] = torch.zeros((count, 4), device=self.device)
            buffers["images"], buffers["labels"] = images, labels
        buffers["rows"][:, :m].copy_(rows)
        buffers["table"].copy_(table)

        def launch(steps: int = count) -> None:
            for i in range(steps):
                self._launch(plan, images, labels, buffers["rows"][i, :m], buffers["table"][i], buffers["losses"][i, 0])

        if self.graphs is None:
            launch()
        else:
            self.graphs.replay(key, launch, lambda _: self._without_effect(lambda: launch(1)))
        return buffers["losses"][:, 0]

    def gradients(self, x: Tensor, y: Tensor, out: Tensor, *, accumulate: bool = False) -> list[Tensor]:
        """Gradients of the trained parameters, float32, in the order of the parameters."""
        if self.grads is None:
            self.grads = torch.zeros(self.layout.total, device=self.device)
        self._follow()
        x = self._cast(x)
        plan = self._plan(x.shape[0])
        partial = plan.partial
        if partial is None:
            plan.partial = workspace(self.layout, plan.m, self.dtype, self.device, direct=False)
        self._forward_backward(plan, x, y, None)
        unscale = self.inverse_scale if self.scaled else None
        self._weights_step(
            plan,
            x,
            None,
            Hyper("none"),
            self._current_row(),
            out,
            grads=self.grads,
            unscale=unscale,
            accumulate=accumulate,
        )
        plan.partial = partial
        return self.layout.views(self.grads)

    def update(self) -> None:
        """Apply the optimizer to the gradients of the last ``gradients``."""
        row = self._current_row()
        self.steps += 1
        self._apply(row)

    def _cast(self, x: Tensor) -> Tensor:
        x = x if x.dtype in (self.dtype, torch.uint8) else x.to(self.dtype)
        return x if x.stride(-1) == 1 else x.contiguous()

    def parameter_state(self) -> dict[str, list[Tensor]]:
        """What belongs to each trained parameter, live and float32: optimizer state, and masters of 16 bits."""
        state: dict[str, list[Tensor]] = {}
        if self.m_state is not None:
            state["exp_avg" if self.v_state is not None else "momentum_buffer"] = self.layout.views(self.m_state)
        if self.v_state is not None:
            state["exp_avg_sq"] = self.layout.views(self.v_state)
        if any(layer.weight.dtype != torch.float32 for layer in self.layers):
            state["master"] = list(self.layout.params)
        return state

    def counters(self) -> dict[str, float]:
        """AdamW's number of updates; float16's loss scale and the good steps since it last moved."""
        counters = {"step": float(self.steps)} if self.hyper.optimizer == "adamw" else {}
        if self.scaled:
            counters |= {"loss_scale": self.scale.item(), "loss_scale_good_steps": self.good_steps.item()}
        return counters

    def set_counters(self, counters: dict[str, float]) -> None:
        """What ``counters`` returned; call it after ``parameter_state`` was written to."""
        self.steps = int(counters.get("step", 0))
        if self.scaled:
            self.scale.fill_(counters["loss_scale"])
            self.good_steps.fill_(counters["loss_scale_good_steps"])
            torch.reciprocal(self.scale, out=self.inverse_scale)
        for param, copy in self._copied:
            if copy.dtype == torch.float32:
                param.copy_(copy)
            else:
                copy.copy_(param)
        self._versions = self._current_versions()
