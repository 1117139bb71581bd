"""The optimizer of the CPU training step: torch's fused SGD and AdamW on tensors, in memory allocated once."""

from __future__ import annotations

import torch
from torch import Tensor

from .step_config import OptimizerConfig

__all__ = ["CpuOptimizer"]

#: The gradient of a mean over one row, times this, is still below float16's largest number.
_SCALE_START, _SCALE_GROWTH_STEPS = 2.0**15, 2000


class CpuOptimizer:
    """Clips gradients and applies them to ``params``, with the update rules of torch.optim.SGD and AdamW.

    Args:
        params: float32 or float64 tensors, updated in place.
        config: the settings; ``config.lr`` is read at every update.
        scaled: the gradients of a training step come multiplied by ``scale`` (for float16). A step whose gradients
            overflow is skipped and halves the scale; 2,000 good steps in a row double it.
    """

    def __init__(self, params: list[Tensor], config: OptimizerConfig, *, scaled: bool) -> None:
        self.params, self.config = params, config
        first = params[0]
        self.scale = torch.full((), _SCALE_START if scaled else 1.0, dtype=torch.float32)
        self.scaled = scaled
        self._inverse_scale, self._one = torch.ones_like(self.scale), torch.ones_like(self.scale)
        self._overflow = torch.zeros_like(self.scale)
        self._good_steps = torch.zeros((), dtype=torch.int32)
        self._grads: list[Tensor] | None = None
        adamw = config.name == "adamw"
        self._momenta = [torch.zeros_like(t) for t in params] if config.momentum else []
        self._first = [torch.zeros_like(t) for t in params] if adamw else []
        self._second = [torch.zeros_like(t) for t in params] if adamw else []
        self._step = torch.zeros_like(self.scale)
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
        if self.scaled:
            counters |= {"loss_scale": self.scale.item(), "loss_scale_good_steps": float(self._good_steps.item())}
        return counters

    def set_counters(self, counters: dict[str, float]) -> None:
        """What ``counters`` returned."""
        self._step.fill_(counters.get("step", 0.0))
        if self.scaled:
            self.scale.fill_(counters["loss_scale"])
            self._good_steps.fill_(int(counters["loss_scale_good_steps"]))

    def update(self, *, scaled: bool) -> None:
        """Apply ``grads``; ``scaled`` says whether they are multiplied by ``scale``. May overwrite them."""
        grads, config = self.grads, self.config
        if self.scaled and self._overflows(grads, scaled):
            return
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
            )
        else:
            self._step.add_(self._one)
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
            )

    def _overflows(self, grads: list[Tensor], scaled: bool) -> bool:
        """Divide by the scale; True when a gradient is infinite or NaN. Moves the scale."""
        torch.reciprocal(self.scale, out=self._inverse_scale)
        self._overflow.zero_()
        torch._amp_foreach_non_finite_check_and_unscale_(
            grads, self._overflow, self._inverse_scale if scaled else self._one
        )
        torch._amp_update_scale_(self.scale, self._good_steps, self._overflow, 2.0, 0.5, _SCALE_GROWTH_STEPS)
        self.scale.clamp_(min=1.0)
        return bool(self._overflow.item())

    def _clip(self, grads: list[Tensor]) -> None:
        """Multiply by min(1, max_grad_norm / (|g| + 1e-6)), |g| the 2-norm of all gradients together."""
        for grad, norm in zip(grads, self._norm_of, strict=True):
            torch.linalg.vector_norm(grad, out=norm)
        torch.linalg.vector_norm(self._norms, out=self._norm)
        torch.div(self._max_norm, self._norm.add_(self._epsilon), out=self._coefficient).clamp_(max=1.0)
        torch._foreach_mul_(grads, self._coefficient)
