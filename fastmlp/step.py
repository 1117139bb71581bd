"""TrainStep: gather, forward, loss, backward and optimizer update as one operation, without the autograd tape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .backend import resolve
from .checks import check_same_device
from .nn import MLP
from .step_config import LOSSES, OptimizerConfig
from .step_losses import takes_classes

__all__ = ["TrainStep"]

_RING = 1024


class _Engine(Protocol):
    """What runs the step: ``fastmlp.step_torch.TorchStep`` or ``fastmlp.step_triton.TritonStep``."""

    def step(self, x: Tensor, y: Tensor, out: Tensor) -> None: ...

    def epoch(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        order: Tensor,
        lrs: Sequence[float],
        losses: Tensor,
    ) -> None: ...

    def gradients(self, x: Tensor, y: Tensor, out: Tensor, *, accumulate: bool = False) -> list[Tensor]: ...

    def update(self) -> None: ...


class TrainStep:
    """The whole training step of an MLP: ``loss = step(x, y)`` updates the model's own parameters in place.

    On a GPU (backend "triton") a step of an L-layer network is at most 2L - 1 kernel launches, captured in a CUDA
    graph; on a CPU it is in-place BLAS on buffers allocated once. Results agree with autograd and torch.optim to
    rounding.

    Args:
        model: the MLP. Parameters with ``requires_grad=False`` stay as they are, and nothing is computed for them.
        optimizer: "sgd" or "adamw", with the update rules and the argument names of torch.optim.SGD and AdamW.
        lr: learning rate; the attribute ``lr`` changes it between steps.
        momentum, weight_decay, nesterov: default 0, 0, False. (torch's AdamW decays by 0.01 unless told otherwise;
            here the default is 0 for both.)
        betas, eps: AdamW's; default (0.9, 0.999), 1e-8.
        max_grad_norm: scale the gradients so that their global 2-norm is at most this; default None, no clipping.
        loss: "cross_entropy" (class numbers int64 [B] against logits), "mse", "l1", "bce" (values [B, C]; bce takes
            logits) or "softmax_squared_error" (class numbers); each a mean as torch's default reduction.
        dtype: of the products: default the parameters' own; float32 parameters with float16 or bfloat16 products are
            mixed precision with float32 masters.
        cuda_graph: capture steps in CUDA graphs (default True; without effect on a CPU).

    Attributes:
        lr: the learning rate of the next step.
        losses: float32 [steps] on the device: the loss of every step of the last ``epoch``.
        backend: "triton" or "torch", whichever runs the steps.

    Raises:
        TypeError: model is not an MLP, or a dtype that nothing computes in.
        ValueError: unknown optimizer or loss, settings out of range, nothing to train.
    """

    def __init__(
        self,
        model: MLP,
        optimizer: str = "sgd",
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_grad_norm: float | None = None,
        loss: str = "cross_entropy",
        dtype: torch.dtype | None = None,
        cuda_graph: bool = True,
    ) -> None:
        if not isinstance(model, MLP):
            raise TypeError(
                f"TrainStep trains a fastmlp.MLP, got {type(model).__name__}; convert a torch module with "
                "fastmlp.MLP.from_torch(module), which shares its parameters"
            )
        if loss not in LOSSES:
            raise ValueError(f"unknown loss {loss!r}; expected one of {', '.join(LOSSES)}")
        self.config = OptimizerConfig(
            optimizer, lr, momentum, weight_decay, nesterov, (betas[0], betas[1]), eps, max_grad_norm
        )
        named = list(model.named_parameters())
        self._names = [name for name, parameter in named if parameter.requires_grad]
        if not self._names:
            raise ValueError("no parameter of the model requires a gradient; there is nothing to train")
        first = named[0][1]
        check_same_device([(name, parameter) for name, parameter in named])
        dtype = first.dtype if dtype is None else dtype
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise TypeError(f"expected dtype float32, float64, float16 or bfloat16, got {dtype}")
        self.model, self.loss = model, loss
        self.device, self.dtype = first.device, dtype
        self.backend = resolve(first, dtype)
        self.losses = torch.zeros(0, device=self.device)
        wide = torch.promote_types(dtype, torch.float32)
        # Losses are handed out as elements of a ring, so that a step neither allocates nor copies; one stays valid
        # for the next _RING - 1 steps.
        self._ring = list(torch.zeros(_RING, dtype=wide, device=self.device).unbind())
        self._count = 0
        layers = model._linears()
        self._engine: _Engine
        if self.backend == "triton":
            from .step_triton import TritonStep

            self._engine = TritonStep(layers, self.config, loss, dtype, cuda_graph=cuda_graph)
        else:
            from .step_torch import TorchStep

            self._engine = TorchStep(layers, self.config, loss, dtype)

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self.config.lr

    @lr.setter
    def lr(self, value: float) -> None:
        if not value >= 0:
            raise ValueError(f"expected a learning rate of at least 0, got {value}")
        self.config.lr = value

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """One optimizer step on a batch.

        Args:
            x: [B, sizes[0]] or [B, ...], of the products' or the parameters' dtype, or uint8 pixels.
            y: int64 [B] class numbers in [0, C), or [B, C] values for mse, l1 and bce.

        Returns:
            The loss before the step: 0-d, on the device, without waiting for it; valid for the next 1,023 steps (clone
            it to keep it longer). On a GPU an out-of-range class number makes it NaN, on a CPU it raises IndexError
            before anything changes.
        """
        x = self._check_batch(x, y)
        loss = self._next_loss()
        if x.shape[0] == 0:
            return loss.fill_(float("nan"))
        self._engine.step(x, y, loss)
        return loss

    def epoch(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        order: Tensor | None = None,
        lr_factors: Sequence[float] | None = None,
    ) -> Tensor:
        """One pass over device-resident data, one step for each ``batch_size`` rows.

        Args:
            images: [N, sizes[0]] or [N, ...], uint8 or floating point, on the model's device.
            labels: int64 [N] (or values [N, C]), on the same device.
            batch_size: rows of a step; the last step takes what is left.
            order: int64 [n], the rows in the order of use; default all rows in order.
            lr_factors: one factor of ``lr`` for each step; default all 1.

        Returns:
            The mean loss of the n rows, each at the parameters of its step: 0-d float32 on the device. ``losses`` has
            the loss of each step.
        """
        images = self._check_batch(images, labels)
        if not (isinstance(batch_size, int) and batch_size > 0):
            raise ValueError(f"expected a batch_size of at least 1, got {batch_size!r}")
        if order is None:
            order = torch.arange(images.shape[0], device=self.device)
        elif order.dtype != torch.int64 or order.dim() != 1:
            raise RuntimeError(f"expected order to be int64 [n], got {order.dtype} {list(order.shape)}")
        check_same_device((("the images", images), ("order", order)))
        n = order.shape[0]
        steps = -(-n // batch_size)
        factors = [1.0] * steps if lr_factors is None else [float(f) for f in lr_factors]
        if len(factors) != steps:
            raise ValueError(f"expected {steps} lr_factors, one for each step, got {len(factors)}")
        if self.device.type == "cpu" and n and not (int(order.min()) >= 0 and int(order.max()) < images.shape[0]):
            raise IndexError(
                f"order has rows from {int(order.min())} to {int(order.max())}, but the data has rows 0 to "
                f"{images.shape[0] - 1}"
            )
        losses = torch.full((steps,), float("nan"), dtype=self._ring[0].dtype, device=self.device)
        self._engine.epoch(images, labels, batch_size, order, [self.lr * f for f in factors], losses)
        self.losses = losses
        if not steps:
            return torch.full((), float("nan"), device=self.device)
        last = n - (steps - 1) * batch_size
        return ((losses[:-1].sum() * batch_size + losses[-1] * last) / n).float()

    def gradients(self, x: Tensor, y: Tensor, *, accumulate: bool = False) -> dict[str, Tensor]:
        """Gradients of the mean loss by parameter name, in float32 or wider; the parameters stay as they are.

        The tensors are the step's own buffers, valid until the next call of the step. ``accumulate=True`` adds to what
        the previous call left there; ``update`` then applies the optimizer to them:

            step.gradients(x1, y1)
            step.gradients(x2, y2, accumulate=True)
            step.update()
        """
        x = self._check_batch(x, y)
        grads = self._engine.gradients(x, y, self._next_loss(), accumulate=accumulate)
        return dict(zip(self._names, grads, strict=True))

    def update(self) -> None:
        """Apply the optimizer (and clipping, if asked for) to the gradients of the last ``gradients`` call."""
        self._engine.update()

    def _next_loss(self) -> Tensor:
        self._count = (self._count + 1) % _RING
        return self._ring[self._count]

    def _check_batch(self, x: Tensor, y: Tensor) -> Tensor:
        """X flattened to [B, K]; raises what torch would for arguments that do not fit."""
        if x.dim() < 2:
            raise RuntimeError(
                f"expected an input of shape [batch, {self.model.sizes[0]}] or [batch, ...], got {list(x.shape)}; "
                "add a batch dimension with x.unsqueeze(0)"
            )
        x = x.flatten(1) if x.dim() > 2 else x
        if x.shape[1] != self.model.sizes[0]:
            raise RuntimeError(
                f"expected an input with {self.model.sizes[0]} features, got {x.shape[1]}; reshape the input or build "
                f"the model with sizes[0]={x.shape[1]}"
            )
        if x.dtype not in (self.dtype, torch.uint8) and not (x.is_floating_point() and self.dtype.itemsize == 2):
            raise RuntimeError(
                f"expected an input of dtype {self.dtype} or uint8 pixels, got {x.dtype}; convert it with "
                f".to({self.dtype})"
            )
        if x.shape[0] != y.shape[0]:
            raise ValueError(f"expected as many targets as inputs, got {x.shape[0]} inputs and {y.shape[0]} targets")
        classes = self.model.sizes[-1]
        if takes_classes(self.loss):
            if y.dim() != 1:
                raise RuntimeError(f"expected class numbers of shape [{x.shape[0]}], got {list(y.shape)}")
            if y.dtype != torch.int64:
                raise RuntimeError(f"expected class numbers of dtype int64, got {y.dtype}; convert them with .long()")
            if y.device.type == "cpu" and y.numel() and not (int(y.min()) >= 0 and int(y.max()) < classes):
                bad = y[(y < 0) | (y >= classes)][0].item()
                raise IndexError(f"class number {bad} is out of range; the model has classes 0 to {classes - 1}")
        elif y.shape != (x.shape[0], classes):
            raise RuntimeError(f"expected targets of shape [{x.shape[0]}, {classes}], got {list(y.shape)}")
        check_same_device((("the parameters", self.model._linears()[0].weight), ("the input", x), ("the target", y)))
        return x
