"""What a training step does, apart from how: the optimizer's settings and the loss, validated."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

__all__ = ["LOSSES", "OPTIMIZERS", "OptimizerConfig"]

OPTIMIZERS = ("sgd", "adamw")
LOSSES = ("cross_entropy", "mse", "l1", "bce", "softmax_squared_error")


@dataclass
class OptimizerConfig:
    """Settings of torch.optim.SGD or torch.optim.AdamW under their names there; ``lr`` may be changed any time.

    Raises:
        ValueError: an unknown optimizer or a setting outside its range, as the torch optimizer.
        TypeError: a setting that is no number.
    """

    name: str
    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {self.name!r}; expected one of {', '.join(OPTIMIZERS)}")
        if len(self.betas) != 2:
            raise ValueError(f"expected betas=(beta1, beta2), got {len(self.betas)} values: {self.betas}")
        named = {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay, "eps": self.eps}
        named |= {"beta1": self.betas[0], "beta2": self.betas[1]}
        if self.max_grad_norm is not None:
            named["max_grad_norm"] = self.max_grad_norm
        for name, value in named.items():
            if not isinstance(value, Real):
                raise TypeError(f"expected {name} to be a number, got {value!r} of type {type(value).__name__}")
        if not self.lr >= 0:
            raise ValueError(f"expected a learning rate of at least 0, got lr={self.lr}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"expected a momentum in [0, 1), got {self.momentum}")
        if not self.weight_decay >= 0:
            raise ValueError(f"expected a weight_decay of at least 0, got {self.weight_decay}")
        if self.nesterov and not (self.name == "sgd" and self.momentum > 0):
            raise ValueError("nesterov=True needs optimizer='sgd' and a momentum above 0")
        if self.name == "adamw" and self.momentum:
            raise ValueError("momentum is SGD's setting; AdamW has betas=(beta1, beta2)")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"expected betas in [0, 1), got {self.betas}")
        if not self.eps >= 0:
            raise ValueError(f"expected an eps of at least 0, got {self.eps}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"expected a max_grad_norm above 0 or None, got {self.max_grad_norm}")

    @property
    def is_plain_sgd(self) -> bool:
        """W -= lr dW and nothing else, so that gradient and update can be one GEMM."""
        return self.name == "sgd" and not self.momentum and not self.weight_decay and self.max_grad_norm is None
