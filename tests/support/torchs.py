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
}
#: Settings of every update that the kernel has.
UPDATES: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1, "weight_decay": 0.02},
    "momentum": {"lr": 0.1, "weight_decay": 0.02, "momentum": 0.9},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "adamw": {"optimizer": "adamw", "lr": 0.1, "weight_decay": 0.02},
}
TORCH_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


def torch_optimizer(params: Iterable[Tensor], settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    """torch's optimizer with the settings of a ``TrainStep``, whose weight decay is 0 unless it is set."""
    own = {name: value for name, value in settings.items() if name not in ("optimizer", "max_grad_norm")}
    return TORCH_OPTIMIZERS[settings.get("optimizer", "sgd")](params, **{"weight_decay": 0.0, **own})
