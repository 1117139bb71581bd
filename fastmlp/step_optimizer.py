"""The optimizer of the training step on plain torch: fused SGD and AdamW on tensors, in memory allocated once."""

from __future__ import annotations

import torch
from torch import Tensor

from .loss_scale import LossScale
from .step_config import OptimizerConfig

__all__ = ["TorchOptimizer"]


class TorchOptimizer:
    """Clips gradients and applies them to ``params``, with the update rules of torch.optim.SGD and AdamW.

    Args:
        params: float32 or float64 tensors, updated in place.
        config: the settings; ``config.lr`` is read at every update.
        loss_scale: float16's; a step whose gradients overflow is skipped.
    """

    def __init__(self, params: list[Tensor], config: OptimizerConfig, loss_scale: LossScale | None) -> None:
        self.params, self.config, self.loss_scale = params, config, loss_scale
        first = params[0]
        self._grads: list[Tensor] | None = None
        adamw = config.name == "adamw"
        self._momenta = [torch.zeros_like(t) for t in params] if config.momentum else []
        self._first = [torch.zeros_like(t) for t in params] if adamw else []
        self._second = [torch.zeros_like(t) for t in params] if adamw else []
        self._step = torch.zeros((), dtype=torch.float32, device=first.device)
        self._one = torch.ones_like(self._step)
        if config.max_grad_norm is not None:
            self._norms = first.new_zeros(len(params))
            self._norm_of = list(self._norms.unbind())
            self._norm, self._coefficient = first.new_zeros(()), first.new_zeros(())
            self._max_norm, self._epsilon = first.new_full((), config.max_grad_norm), first.new_full((), 1e-6)

    @property
    def grads(self) -> list[Tensor]:
        """The gradients that ``update`` applies, one for each parameter; zeros at first, allocated when asked for."""
        if self._grads is None:
            self._grads = [torch.zeros_like(t) for t in self.params]
        return self._grads

    def parameter_state(self) -> dict[str, list[Tensor]]:
        """What belongs to each parameter, live."""
        lists = {"momentum_buffer": self._momenta, "exp_avg": self._first, "exp_avg_sq": self._second}
        return {name: tensors for name, tensors in lists.items() if tensors}

    def counters(self) -> dict[str, float]:
        """AdamW's number of updates; float16's loss scale and the good steps since it last moved."""
        counters = {"step": float(self._step.item())} if self.config.name == "adamw" else {}
        return counters | (self.loss_scale.counters() if self.loss_scale is not None else {})

    def set_counters(self, counters: dict[str, float]) -> None:
        """What ``counters`` returned."""
        self._step.fill_(counters.get("step", 0.0))
        if self.loss_scale is not None:
            self.loss_scale.set_counters(counters)

    def update(self, *, scaled: bool) -> None:
        """Apply ``grads``; ``scaled`` says whether they are multiplied by the loss scale. May overwrite them."""
        grads, config, skip = self.grads, self.config, None
        if self.loss_scale is not None:
            self.loss_scale.check(grads, scaled=scaled)
            skip = self.loss_scale.overflow
        if config.max_grad_norm is not None:
            self._clip(grads)
        if config.name == "sgd":
            torch._fused_sgd_(
                self.params,
                grads,
                self._momenta,
                weight_decay=config.weight_decay,
                momentum=config.momentum,
                lr=config.lr,
                dampening=0.0,
                nesterov=config.nesterov,
                maximize=False,
                is_first_step=False,
                found_inf=skip,
            )
        else:
            self._step.add_(self._one if skip is None else self._one - skip)
            torch._fused_adamw_(
                self.params,
                grads,
                self._first,
                self._second,
                [],
                [self._step] * len(grads),
                lr=config.lr,
                beta1=config.betas[0],
                beta2=config.betas[1],
                weight_decay=config.weight_decay,
                eps=config.eps,
                amsgrad=False,
                maximize=False,
                found_inf=skip,
            )
        if self.loss_scale is not None:
            self.loss_scale.adjust()

    def _clip(self, grads: list[Tensor]) -> None:
        """Multiply by min(1, max_grad_norm / (|g| + 1e-6)), |g| the 2-norm of all gradients together."""
        for grad, norm in zip(grads, self._norm_of, strict=True):
            torch.linalg.vector_norm(grad, out=norm)
        torch.linalg.vector_norm(self._norms, out=self._norm)
        torch.div(self._max_norm, self._norm.add_(self._epsilon), out=self._coefficient).clamp_(max=1.0)
        torch._foreach_mul_(grads, self._coefficient)
