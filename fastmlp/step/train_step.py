"""TrainStep: gather, forward, loss, backward and optimizer update as one operation, without the autograd tape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backend import resolve
from ..base.arguments import check_batch, check_classes, check_rows, check_same_device, check_tensor, readable_rows
from ..base.losses import STEP_LOSSES, takes_classes
from ..nn import MLP, _only_computes, is_parallel
from .cpu_step import TorchStep
from .optimizers import optimizer_of

if TYPE_CHECKING:
    from .triton_step import TritonStep

_RING = 1024


class TrainStep:
    """The whole training step of an MLP: ``loss = step(x, y)`` updates the model's own parameters in place.

    On a GPU (backend "triton") a step of an L-layer network is at most 2L - 1 kernel launches, captured in a CUDA
    graph; on a CPU it is in-place BLAS on buffers allocated once. Results agree with autograd and torch.optim to
    rounding.

    A step belongs to one thread and, on a GPU, to one stream at a time. All its calls share its buffers, so
    simultaneous calls from two threads or two streams race on them.

    Args:
        model: the MLP. Parameters with ``requires_grad=False`` stay as they are, and nothing is computed for them.
        optimizer: a name of ``fastmlp.step.optimizers.OPTIMIZERS``: "sgd" (default), "adamw", ...; with torch.optim's
            update rules and argument names.
        lr: learning rate; the attribute ``lr`` changes it between steps.
        momentum, weight_decay, nesterov: default 0, 0, False. (torch's AdamW decays by 0.01 by default.)
        betas, eps: default (0.9, 0.999), 1e-8. A setting that the optimizer does not have must keep its default.
        max_grad_norm: scale the gradients so that their global 2-norm is at most this; default None, no clipping.
        loss: "cross_entropy" or "softmax_squared_error" (logits against class numbers int64 [B]), "mse", "l1" or "bce"
            (values [B, C]). "bce" is ``functional.bce_with_logits``, of logits. Each loss is a mean as with torch's
            default reduction.
        dtype: of the products: default the parameters' own; float32 parameters with float16 or bfloat16 products are
            mixed precision with float32 masters.
        cuda_graph: capture steps in CUDA graphs at their second use (default True; only with backend "triton").

    Attributes:
        lr: the learning rate of the next step.
        losses: [steps] on the device, float32 (float64 for float64): the loss of every step of the last ``epoch``.
        backend: "triton" or "torch", whichever runs the steps.

    Raises:
        TypeError: model is not an MLP, a setting that is no number, or a dtype that nothing computes in.
        ValueError: unknown optimizer or loss, settings out of range, nothing to train, a layer with hooks or of another
            class (a step would not call them), one parameter in two layers.
        RuntimeError: parameters of different dtypes or devices, or not contiguous.
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
            advice = (
                "a step would not communicate; train such a module with autograd"
                if is_parallel(model)
                else "convert a torch module with fastmlp.MLP.from_torch(module), which shares its parameters"
            )
            raise TypeError(f"TrainStep trains a fastmlp.MLP, got {type(model).__name__}; {advice}")
        if loss not in STEP_LOSSES:
            raise ValueError(f"unknown loss {loss!r}; expected one of {', '.join(STEP_LOSSES)}")
        settings: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        settings |= {"betas": betas, "eps": eps, "max_grad_norm": max_grad_norm}
        self.rule = optimizer_of(optimizer, settings)
        _check_layers(model)
        named = list(model.named_parameters())
        self._names = [name for name, parameter in named if parameter.requires_grad]
        if not self._names:
            raise ValueError("no parameter of the model requires a gradient; there is nothing to train")
        first = named[0][1]
        check_same_device(named)
        dtype = first.dtype if dtype is None else dtype
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"expected dtype to be a torch.dtype such as torch.bfloat16, got {dtype!r}")
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise TypeError(f"expected dtype float32, float64, float16 or bfloat16, got {dtype}")
        self.model, self.loss = model, loss
        self.device, self.dtype = first.device, dtype
        self.backend = resolve(first, dtype)
        wide = torch.promote_types(dtype, torch.float32)
        self.losses = torch.zeros(0, dtype=wide, device=self.device)
        # Losses are handed out as elements of a ring, so that a step neither allocates nor copies; one stays valid
        # for the next _RING - 1 steps.
        self._ring = list(torch.zeros(_RING, dtype=wide, device=self.device).unbind())
        self._count = 0
        self._inputs = {dtype, first.dtype, torch.uint8}
        if dtype.itemsize == 2:
            self._inputs |= {torch.float16, torch.bfloat16, torch.float32, torch.float64}
        #: True on the Triton path, where no other code checks the class numbers.
        self._checks_classes = self.backend == "triton"
        self._has_gradients = False
        layers = model._linears()
        #: Where each parameter is kept, under which name, and where its memory was.
        self._bound = [
            (layer._parameters, name, parameter, parameter.data_ptr())
            for layer in layers
            for name, parameter in layer._parameters.items()
            if parameter is not None
        ]
        #: Kernels go to the current device; the model's need not be that.
        self._on_device: AbstractContextManager[object] = nullcontext()
        if self.device.type == "cuda":
            self._on_device = torch.cuda.device(self.device)
        self._engine: TorchStep | TritonStep
        with self._on_device:
            if self.backend == "triton":
                from .triton_step import TritonStep

                self._engine = TritonStep(layers, self.rule, STEP_LOSSES[loss], dtype, cuda_graph=cuda_graph)
            else:
                self._engine = TorchStep(layers, self.rule, STEP_LOSSES[loss], dtype)

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self.rule.lr

    @lr.setter
    def lr(self, value: float) -> None:
        if not value >= 0:
            raise ValueError(f"expected a learning rate of at least 0, got lr={value}")
        self.rule.lr = value

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """One optimizer step on a batch.

        Args:
            x: [B, sizes[0]] or [B, ...], of the products' or the parameters' dtype, or uint8 pixels.
            y: int64 [B] class numbers in [0, C), or [B, C] values, as the loss takes.

        Returns:
            The loss before the step: 0-d, on the device, without waiting for it; valid for the next 1,023 steps (clone
            it to keep it longer). On a CPU an out-of-range class number raises IndexError before anything changes. On a
            GPU it makes the loss NaN; without the kernels (backend "torch") it is a device-side assertion of torch's.
        """
        x, y = self._check_batch(x, y, in_range=self._checks_classes)
        loss = self._next_loss()
        with self._on_device:
            if x.shape[0] == 0:
                loss.fill_(float("nan"))
            else:
                self._engine.step(x, y, loss)
        self._has_gradients = False
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
            order: int64 [n], the rows in the order of use; default all rows in order. On a CPU a row out of range is
                an IndexError. On a GPU it makes its step's loss NaN, and the nearest row takes its place.
            lr_factors: one factor of ``lr`` for each step; default all 1.

        Returns:
            The mean loss of the n rows, each at the parameters of its step: 0-d float32 on the device. ``losses`` has
            the loss of each step.
        """
        images, labels = self._check_batch(images, labels, in_range=True)
        if not (isinstance(batch_size, int) and batch_size > 0):
            raise ValueError(f"expected a batch_size of at least 1, a whole number, got {batch_size!r}")
        if order is None:
            order = torch.arange(images.shape[0], device=self.device)
        check_tensor(order, "order")
        if order.dtype != torch.int64 or order.dim() != 1:
            raise RuntimeError(f"expected order to be int64 [n], got {order.dtype} {list(order.shape)}")
        check_same_device((("the images", images), ("order", order)))
        n = order.shape[0]
        steps = -(-n // batch_size)
        if lr_factors is None:
            lrs = torch.full((steps,), self.lr, dtype=torch.float64, device="cpu")
        else:
            lrs = torch.tensor(lr_factors, dtype=torch.float64, device="cpu") * self.lr
        if lrs.shape != (steps,):
            raise ValueError(f"expected {steps} lr_factors, one for each step, got {len(lrs)}")
        self._has_gradients = False
        self.losses = losses = torch.full((steps,), float("nan"), dtype=self._ring[0].dtype, device=self.device)
        if not steps:
            return torch.full((), float("nan"), dtype=torch.float32, device=self.device)
        with self._on_device:
            outside = None
            if self.device.type == "cpu" or images.shape[0] == 0:
                check_rows(order, images.shape[0])
            else:
                order, outside = readable_rows(order, images.shape[0], batch_size)
            self._engine.epoch(images, labels, batch_size, order, lrs, losses)
            if outside is not None:
                losses.masked_fill_(outside, float("nan"))
            last = n - (steps - 1) * batch_size
            return ((losses[:-1].sum() * batch_size + losses[-1] * last) / n).float()

    def gradients(self, x: Tensor, y: Tensor, *, accumulate: bool = False) -> dict[str, Tensor]:
        """Gradients of the mean loss by parameter name, in float32 or wider; the parameters stay as they are.

        The tensors are the step's own buffers, valid until the next call of the step. ``accumulate=True`` adds to the
        gradients that were computed since the last update; ``update`` then applies the optimizer to them:

            step.gradients(x1, y1)
            step.gradients(x2, y2, accumulate=True)
            step.update()

        Raises:
            ValueError: an empty batch, whose mean loss has no gradient; and what a step raises.
        """
        x, y = self._check_batch(x, y, in_range=self._checks_classes)
        if x.shape[0] == 0:
            raise ValueError("expected at least one row; the mean loss of an empty batch has no gradient")
        with self._on_device:
            grads = self._engine.gradients(x, y, self._next_loss(), accumulate=accumulate and self._has_gradients)
        self._has_gradients = True
        return dict(zip(self._names, grads, strict=True))

    def update(self) -> None:
        """Apply the optimizer (and clipping, if asked for) to the gradients that ``gradients`` computed.

        Raises:
            RuntimeError: there are none since the last step or update.
        """
        self._check_parameters()
        if not self._has_gradients:
            raise RuntimeError("there are no gradients to apply; call gradients(x, y) before update()")
        self._has_gradients = False
        with self._on_device:
            self._engine.update()

    def state_dict(self) -> dict[str, Tensor]:
        """What a run needs besides the model's own state_dict to go on exactly as if it had not stopped.

        Copies, by name. For each trained parameter NAME: the optimizer's states ("NAME.momentum_buffer" with momentum,
        "NAME.exp_avg" and "NAME.exp_avg_sq" with AdamW), and "NAME.master" in float32 where the parameter has 16 bits.
        Also "step" (updates so far) where the update depends on it, as AdamW's does, and for float16 products
        "loss_scale" and "loss_scale_good_steps". Only tensors, so that safetensors can store them; the same for both
        backends.
        """
        counters = self._engine.counters().items()
        state = {name: torch.tensor(value, dtype=torch.float64, device="cpu") for name, value in counters}
        return state | {name: tensor.clone() for name, tensor in self._parameter_state().items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take up a state that ``state_dict`` returned; load the model's own first.

        Raises:
            ValueError: names or shapes are not those of this step (another optimizer, another model); nothing has
                changed then.
        """
        own, counters = self._parameter_state(), self._engine.counters()
        expected = own.keys() | counters.keys()
        if state_dict.keys() != expected:
            missing, unknown = sorted(expected - state_dict.keys()), sorted(state_dict.keys() - expected)
            raise ValueError(
                f"the state does not fit this TrainStep ({self.rule.name}, {self.dtype}): missing "
                f"{', '.join(missing) or 'nothing'}; unexpected {', '.join(unknown) or 'nothing'}"
            )
        for name, tensor in own.items():
            if state_dict[name].shape != tensor.shape:
                raise ValueError(f"expected {name} of shape {list(tensor.shape)}, got {list(state_dict[name].shape)}")
        for name, tensor in own.items():
            tensor.copy_(state_dict[name])
        self._engine.set_counters({name: float(state_dict[name]) for name in counters})
        self._has_gradients = False

    def _parameter_state(self) -> dict[str, Tensor]:
        """The engine's tensors by name, live."""
        return {
            f"{name}.{kind}": tensor
            for kind, tensors in self._engine.parameter_state().items()
            for name, tensor in zip(self._names, tensors, strict=True)
        }

    def _next_loss(self) -> Tensor:
        self._count = (self._count + 1) % _RING
        return self._ring[self._count]

    def _check_parameters(self) -> None:
        """RuntimeError if the parameters are no longer those of the model, or not where they were."""
        for parameters, name, parameter, address in self._bound:
            if parameters[name] is not parameter or parameter.data_ptr() != address:
                raise RuntimeError(
                    f"a {name} of the model was replaced or moved after the TrainStep was made (by model.to(...), or "
                    "by assigning a parameter or its .data), so a step would train what the model no longer has; make "
                    "a new TrainStep"
                )

    def _check_batch(self, x: Tensor, y: Tensor, *, in_range: bool) -> tuple[Tensor, Tensor]:
        """X flattened to [B, K] and Y, both off the tape; raises what torch would for arguments that do not fit.

        With ``in_range``, for class numbers on a CPU too.
        """
        check_batch(x, self.model.sizes[0])
        check_tensor(y, "the target")
        if torch.is_inference_mode_enabled():
            raise RuntimeError("a step cannot train inside torch.inference_mode(); leave it, or use torch.no_grad()")
        self._check_parameters()
        x = x.detach() if x.requires_grad else x
        y = y.detach() if y.requires_grad else y
        x = x.flatten(1) if x.dim() > 2 else x
        if x.shape[1] != self.model.sizes[0]:
            raise RuntimeError(
                f"expected an input with {self.model.sizes[0]} features, got {x.shape[1]}; reshape the input or build "
                f"the model with sizes[0]={x.shape[1]}"
            )
        if x.dtype not in self._inputs:
            raise RuntimeError(
                f"expected an input of dtype {self.dtype} or uint8 pixels, got {x.dtype}; convert it with "
                f".to({self.dtype})"
            )
        if y.dim() == 0 or x.shape[0] != y.shape[0]:
            raise ValueError(
                f"expected as many targets as inputs, got inputs {list(x.shape)} and targets {list(y.shape)}"
            )
        if not x.device == y.device == self.device:
            check_same_device((("the parameters", self._ring[0]), ("the input", x), ("the target", y)))
        self._check_targets(y, x.shape[0], in_range=in_range)
        return x, y

    def _check_targets(self, y: Tensor, rows: int, *, in_range: bool) -> None:
        classes = self.model.sizes[-1]
        if not takes_classes(STEP_LOSSES[self.loss]):
            if y.shape != (rows, classes):
                raise RuntimeError(
                    f"expected targets of shape [{rows}, {classes}] for {self.loss}, got {list(y.shape)}"
                )
            if not y.is_floating_point():
                raise RuntimeError(
                    f"expected floating-point targets for {self.loss}, got {y.dtype}; convert them with .float()"
                )
            return
        if y.dim() != 1:
            raise RuntimeError(f"expected class numbers of shape [{rows}], got {list(y.shape)}")
        if y.dtype != torch.int64:
            raise RuntimeError(f"expected class numbers of dtype int64, got {y.dtype}; convert them with .long()")
        if rows and in_range and self.device.type == "cpu":
            check_classes(y, classes)


def _check_layers(model: MLP) -> None:
    """ValueError or RuntimeError for a model that computes something else than its layers' parameters say."""
    seen: dict[int, str] = {}
    for i, layer in enumerate(model._linears()):
        if not _only_computes(layer):
            raise ValueError(
                f"layers.{i} has hooks, another class than fastmlp.Linear or a forward of its own, which a TrainStep "
                "would not call; remove them, or train with autograd"
            )
        if layer.activation == "softmax":
            raise ValueError(
                f"layers.{i} has softmax as its activation, which a TrainStep does not compute; use the loss "
                "'cross_entropy' or 'softmax_squared_error' on logits, or train with autograd"
            )
        for name, parameter in layer.named_parameters():
            name = f"layers.{i}.{name}"
            if id(parameter) in seen:
                raise ValueError(
                    f"{name} and {seen[id(parameter)]} are one parameter, which a TrainStep would update twice; train "
                    "shared parameters with autograd"
                )
            seen[id(parameter)] = name
            if not parameter.is_contiguous():
                raise RuntimeError(
                    f"TrainStep updates parameters in place and needs them contiguous, got strides "
                    f"{parameter.stride()}; assign param.data = param.data.contiguous()"
                )
            if parameter.dtype != model.layers[0].weight.dtype:
                raise RuntimeError(
                    f"expected parameters of one dtype, got {name} in {parameter.dtype} and layers.0.weight in "
                    f"{model.layers[0].weight.dtype}; convert the model with model.to(dtype)"
                )
