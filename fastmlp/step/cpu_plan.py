"""What a step on plain torch works on: the tensors of a network, and a plan per batch size.

A plan holds the buffers of a batch size and, per layer, the products that ``fastmlp.cpu`` chose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import cpu
from ..activations import ACTIVATIONS
from ..base.losses import takes_classes
from ..nn import Linear
from .cpu_dropout import Mask, StepDropout, masks
from .cpu_losses import loss_function, weighted_loss_function
from .cpu_optimizer import TorchOptimizer
from .cpu_row_weights import WeightedLoss
from .groups import Groups
from .loss_options import PLAIN, LossOptions
from .loss_scale import LossScale
from .optimizers import Optimizer
from .parameters import Copies

if TYPE_CHECKING:
    from .data_parallel import DataParallel


class Layer:
    """One layer's tensors, and the places of its gradients among those of all trained parameters."""

    def __init__(self, module: Linear, dtype: torch.dtype, index: int, plain: bool, rules: Sequence[Optimizer]) -> None:
        weight = Copies(module.weight, dtype)
        bias = None if module.bias is None else Copies(module.bias, dtype)
        self.copies = [c for c in (weight, bias) if c is not None]
        self.activation: str = module.activation
        self.f = ACTIVATIONS[module.activation]
        self.saves_z = self.f.saved == "z"
        self.weight, self.master_w, self.train_w = weight.used, weight.master, weight.trained
        self.bias = None if bias is None else bias.used
        self.train_b = bias is not None and bias.trained
        self.row_b = None if bias is None else bias.master.unsqueeze(0)
        self.db = torch.empty_like(self.row_b) if plain and self.train_b and self.row_b is not None else None
        self.narrow = self.train_w and self.weight.dtype != self.master_w.dtype
        #: Where dW is computed before it is widened to the master's dtype.
        self.dw: Tensor | None = None
        if self.narrow:
            self.dw = torch.empty_like(self.weight, dtype=cpu.product_dtype(dtype, self.weight.device))
        self.grad_w, self.grad_b = index, index + self.train_w
        #: The rules of the weight and the bias, or anything where they are not trained.
        self.rule_w, self.rule_b = ((*rules[i:], rules[0])[0] for i in (self.grad_w, self.grad_b))


class Network:
    """The tensors of an MLP and of its optimizer, which the plans of all batch sizes share."""

    def __init__(
        self,
        modules: Sequence[Linear],
        rule: Optimizer,
        loss: str,
        dtype: torch.dtype,
        groups: Groups | None = None,
        options: LossOptions = PLAIN,
        parallel: DataParallel | None = None,
        *,
        late: bool = False,
    ) -> None:
        self.groups, self.rules = groups, [rule] if groups is None else groups.rules
        self.modules, self.rule, self.loss, self.dtype = modules, rule, loss, dtype
        self.options, self.parallel = options, parallel
        #: What a pass drops; it may change between steps.
        self.dropout: StepDropout | None = None
        self.device = modules[0].weight.device
        #: Whether something comes between the gradients and the update.
        self.late = late or parallel is not None
        loss_scale = LossScale(self.device) if dtype == torch.float16 else None
        self.scale = None if loss_scale is None else loss_scale.scale
        #: Gradients and optimizer state exist only where the optimizer needs them all at once.
        self.plain = all(r.is_plain_sgd for r in self.rules) and loss_scale is None and not self.late
        self.averages = rule.ema_decay is not None
        #: How often settings have changed.
        self.changes = 0
        trained = [p for module in modules for p in module.parameters() if p.requires_grad]
        rules = [rule] * len(trained) if groups is None else [groups.rules[i] for i in groups.numbers]
        self.layers: list[Layer] = []
        masters: list[Tensor] = []
        for module in modules:
            layer = Layer(module, dtype, len(masters), self.plain, rules)
            masters += [c.master for c in layer.copies if c.trained]
            self.layers.append(layer)
        self.lowest = next(i for i, layer in enumerate(self.layers) if layer.train_w or layer.train_b)
        self.optimizer = TorchOptimizer(masters, rule, loss_scale, groups, parallel)
        #: Parameters that are not their own master, or not what the products read.
        self.copies = [c for layer in self.layers for c in layer.copies if not c.is_one]
        self.trained_copies = [c for c in self.copies if c.trained]
        #: A tensor, because torch would make one of a Python number at every step.
        self.pixel = self.layers[0].weight.new_full((), 1 / 255)

    def follow(self) -> None:
        """Bring the parameters as they are now into the masters and into what the products read."""
        for copies in self.copies:
            copies.follow()

    def publish(self) -> None:
        """Round the updated masters into the parameters."""
        for copies in self.trained_copies:
            copies.publish()

    def kind(self) -> str:
        """What the time of a step depends on, besides the batch size, the dtype and the threads."""
        sizes = [str(module.out_features) for module in self.modules]
        names = sorted({module.activation for module in self.modules})
        optimizer = f"{self.rule.name}{' momentum' if 'momentum_buffer' in self.rule.states else ''}"
        optimizer += " late" * self.late
        return f"step to {'-'.join(sizes)} {' '.join(names)} {self.loss} {optimizer}"

    def scratch(self) -> Network:
        """A network like this with parameters of its own, all of about 1/K; no random number is drawn."""
        modules = []
        for module in self.modules:
            k, n, bias = module.in_features, module.out_features, module.bias is not None
            copy = Linear(k, n, bias, module.activation, "meta", module.weight.dtype).to_empty(device="cpu")
            for own, param in ((copy.weight, module.weight), (copy.bias, module.bias)):
                if param is not None:
                    torch.nn.init.constant_(own, 1 / k)
                    own.requires_grad_(param.requires_grad)
            modules.append(copy)
        rule = next((rule for rule in self.rules if not rule.is_plain_sgd), self.rule)
        return Network(modules, replace(rule, lr=1e-3), self.loss, self.dtype, options=self.options, late=self.late)

    def batch(self, m: int) -> tuple[Tensor, Tensor, Tensor]:
        """X of ones, a target for the loss, and where the loss goes."""
        y = torch.zeros(m, dtype=torch.int64, device="cpu")
        if not takes_classes(self.loss):
            y = y.new_zeros((m, self.modules[-1].out_features), dtype=self.dtype)
        out = y.new_empty((), dtype=torch.promote_types(self.dtype, torch.float32))
        return y.new_ones((m, self.modules[0].in_features), dtype=self.dtype), y, out


class Plan:
    """Buffers and chosen products for batches of ``m`` rows."""

    def __init__(self, net: Network, m: int) -> None:
        new, (n, k) = net.pixel.new_empty, (net.modules[-1].out_features, net.modules[0].in_features)
        self._of_loss = (net.loss, m, n, net.dtype, net.device, net.scale, net.options)
        self.loss = loss_function(*self._of_loss)
        self._weighted_loss: WeightedLoss | None = None
        self._outputs = [module.out_features for module in net.modules]
        self._dropout: StepDropout | None = None
        self._masks: list[Mask | None] = [None] * len(net.modules)
        #: The sample weights of gathered rows.
        self.weight: Tensor | None = None
        self.x = new((m, k))
        self.pixels: Tensor | None = None
        self.y = torch.empty(m, dtype=torch.int64, device=net.device) if takes_classes(net.loss) else None
        self.products: list[cpu.Products] = []
        self.kept_a: list[Tensor | None] = []
        for i, layer in enumerate(net.layers):
            n, k = layer.weight.shape
            out, dx = new((m, n)), new((m, k)) if i > net.lowest else None
            dw, wide = layer.dw, layer.master_w if layer.narrow else None
            if layer.train_w and not net.plain:  # into the gradient itself, where the dtypes agree
                grad = net.optimizer.grads[layer.grad_w]
                dw, wide = (dw, grad) if dw is not None and dw.dtype != grad.dtype else (grad, None)
            fused = layer.activation if layer.f.epilogue else "identity"
            update = layer.train_w and net.plain
            products = cpu.layer_products(m, layer.weight, layer.bias, fused, out, dx, update=update, dw=dw, wide=wide)
            self.products.append(products)
            self.kept_a.append(None if layer.f.epilogue else new((m, n)))

    def masks(self, dropout: StepDropout | None) -> list[Mask | None]:
        """Of each layer that drops."""
        if self._dropout is not dropout:
            m, self._dropout = self.x.shape[0], dropout
            self._masks = [None] * len(self._outputs)
            if dropout is not None:
                self._masks = masks(dropout, [(m, n) for n in self._outputs], self.x, [(0, m)], m)
        return self._masks

    @property
    def weighted_loss(self) -> WeightedLoss:
        """The loss with sample weights."""
        if self._weighted_loss is None:
            self._weighted_loss = weighted_loss_function(*self._of_loss)
        return self._weighted_loss
