"""What torch calls our activations and optimizers, and how they are set in tests: the tests' one table of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastmlp import reference

__all__ = ["OPTIMIZERS", "TORCH_ACTIVATIONS", "TORCH_OPTIMIZERS", "UPDATES", "torch_optimizer"]


class Step(nn.Module):
    """[z >= 0] with the derivative zero, as fastmlp has it."""

    def forward(self, z: Tensor) -> Tensor:
        return reference.activate(z, "step") + 0 * z


class Expected(NamedTuple):
    """What is true of an activation."""

    module: type[nn.Module]
    saved: Literal["a", "z"] | None
    gain: float | None = 1.0  #: of the starting weights; None: He's
    smooth: bool = True


TORCH_ACTIVATIONS = {
    "identity": Expected(nn.Identity, None),
    "sigmoid": Expected(nn.Sigmoid, "a", 4.0),
    "relu": Expected(nn.ReLU, "a", None, smooth=False),
    "tanh": Expected(nn.Tanh, "a", 5 / 3),
    "step": Expected(Step, None, smooth=False),
    "leaky_relu": Expected(nn.LeakyReLU, "a", None, smooth=False),
    "gelu": Expected(nn.GELU, "z", None),
    "silu": Expected(nn.SiLU, "z", None),
}

#: Every setting of the optimizers, by a name for the test.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.3},
    "weight decay": {"lr": 0.3, "weight_decay": 0.02},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "nesterov": {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01},
    "clipping": {"lr": 0.5, "max_grad_norm": 0.05},
    "clipping, momentum": {"lr": 0.1, "momentum": 0.9, "max_grad_norm": 0.05},
    "clipping that never acts": {"lr": 0.3, "max_grad_norm": 1e3},
    "adamw": {"optimizer": "adamw", "lr": 0.01},
    "adamw, all settings": {
        "optimizer": "adamw",
        "lr": 0.01,
        "betas": (0.8, 0.95),
        "eps": 1e-6,
        "weight_decay": 0.1,
        "max_grad_norm": 0.1,
    },
    "adam": {"optimizer": "adam", "lr": 0.01, "weight_decay": 0.02},
    "adam, amsgrad": {"optimizer": "adam", "lr": 0.01, "betas": (0.7, 0.9), "amsgrad": True, "max_grad_norm": 0.1},
    "rmsprop": {"optimizer": "rmsprop", "lr": 0.003, "weight_decay": 0.02},
    "rmsprop, all settings": {
        "optimizer": "rmsprop",
        "lr": 0.003,
        "alpha": 0.9,
        "eps": 1e-6,
        "weight_decay": 0.01,
        "momentum": 0.8,
        "centered": True,
        "max_grad_norm": 0.1,
    },
    "lion": {"optimizer": "lion", "lr": 0.003, "weight_decay": 0.1},
    "lion, all settings": {"optimizer": "lion", "lr": 0.003, "betas": (0.8, 0.7), "max_grad_norm": 0.1},
    "maximize": {"lr": 0.03, "momentum": 0.5, "weight_decay": 0.5, "maximize": True},
}
#: Settings of every update that the kernel has.
UPDATES: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1, "weight_decay": 0.02},
    "momentum": {"lr": 0.1, "weight_decay": 0.02, "momentum": 0.9},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "adamw": {"optimizer": "adamw", "lr": 0.1, "weight_decay": 0.02},
    "adamw amsgrad": {"optimizer": "adamw", "lr": 0.1, "betas": (0.5, 0.5), "amsgrad": True, "maximize": True},
    "adam": {"optimizer": "adam", "lr": 0.1, "weight_decay": 0.2},
    "rmsprop": {"optimizer": "rmsprop", "lr": 0.1, "weight_decay": 0.2, "maximize": True},
    "rmsprop momentum": {"optimizer": "rmsprop", "lr": 0.1, "momentum": 0.9},
    "rmsprop centered": {"optimizer": "rmsprop", "lr": 0.1, "alpha": 0.9, "centered": True},
    "rmsprop centered momentum": {"optimizer": "rmsprop", "lr": 0.1, "momentum": 0.5, "centered": True},
    "lion": {"optimizer": "lion", "lr": 0.1, "betas": (0.9, 0.6), "weight_decay": 0.2},
}


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of arXiv 2302.06675."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is not None:
                    g = -p.grad if group["maximize"] else p.grad
                    m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    p.sub_(group["lr"] * ((beta1 * m + (1 - beta1) * g).sign() + group["weight_decay"] * p))
                    self.state[p]["exp_avg"] = beta2 * m + (1 - beta2) * g


TORCH_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "lion": Lion,
}


#: Settings of a ``TrainStep`` that are not settings of torch's optimizers.
NOT_TORCHS = ("optimizer", "max_grad_norm", "param_groups", "ema_decay", "ema_warmup")


def torch_optimizer(
    params: Iterable[Tensor] | Iterable[dict[str, Any]], settings: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """torch's optimizer with the settings of a ``TrainStep``, whose weight decay is 0 unless it is set."""
    own = {name: value for name, value in settings.items() if name not in NOT_TORCHS}
    return TORCH_OPTIMIZERS[settings.get("optimizer", "sgd")](params, **{"weight_decay": 0.0, **own})
