"""The activations: one record each, which is all that fastmlp knows of them outside the kernels and the reference.

``fastmlp.kernels.activations`` has the same functions as device code, and ``fastmlp.reference`` has them as formulas.
Tests compare the three. The activation named "step" is the step function, and has nothing to do with a training step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ACTIVATIONS", "LAYER_ACTIVATIONS", "LEAKY_SLOPE", "Activation", "saved_for_grad"]

#: Slope of leaky_relu below zero (torch's default).
LEAKY_SLOPE = 0.01
_aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Activation:
    """An elementwise function f of Z, with A = f(Z).

    Attributes:
        saved: what f' is computed from: "a", "z", or None where f' is constant.
        new: Z -> A in new memory, differentiable.
        overwrite: Z -> A, which may use Z's memory.
        into: (Z, out) -> A in ``out``. A call of torch's function with ``out``, if there is one, costs half as much as
            a call of an operator of torch.ops.
        derivative: aten's operator (dA, saved, ...) -> dA f', or f' itself where f' is constant.
        derivative_settings: further arguments of the operator.
        operations: arithmetic operations per element of f, and of dA f'.
        lr: base learning rate for 784-512-512-10 with this activation in the hidden layers: Nesterov momentum 0.9,
            batch 128, starting weights of ``fastmlp.train.initial``.
        gain: starting weights are uniform in +-gain sqrt(6 / (inputs + outputs)) (Glorot and Bengio 2010); None: in
            +-sqrt(6 / inputs) (He et al. 2015), for activations that are near 0 for half of their inputs.
        module: torch's module, and the attributes that distinguish its variants.
        epilogue: oneDNN's name of f after a product, where oneDNN computes f.
        kink: f' below 0 where f' steps at 0.
        twice: whether aten's operator has a derivative itself.
    """

    saved: Literal["a", "z"] | None
    new: Callable[[Tensor], Tensor]
    overwrite: Callable[[Tensor], Tensor]
    into: Callable[[Tensor, Tensor], Tensor]
    derivative: Any
    operations: tuple[int, int]
    lr: float
    derivative_settings: tuple[object, ...] = ()
    gain: float | None = None
    module: tuple[type[nn.Module], dict[str, object]] | None = None
    epilogue: str | None = None
    kink: float | None = None
    twice: bool = True

    def backward(self, da: Tensor, saved: Tensor | None, *, inplace: bool = False) -> Tensor:
        """DZ = dA f'; ``inplace`` may overwrite dA."""
        if self.saved is None:
            if self.derivative == 1:
                return da
            return da.zero_() if inplace else torch.zeros_like(da, memory_format=torch.contiguous_format)
        # torch.autograd.graph.allow_mutation_on_saved_tensors knows no output but ``out``.
        if inplace and not torch._C._len_torch_dispatch_stack():
            return self.derivative.grad_input(da, saved, *self.derivative_settings, grad_input=da)
        return self.derivative.default(da, saved, *self.derivative_settings)

    def backward_into(self, da: Tensor, saved: Tensor, dz: Tensor) -> object:
        """DA f' into ``dz``, which is not dA, for f' that is not 1."""
        if self.saved is None:
            return dz.zero_()
        return self.derivative.grad_input(da, saved, *self.derivative_settings, grad_input=dz)


#: Every elementwise activation by name, in the order of the documentation.
ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(
        saved=None,
        new=lambda z: z,
        overwrite=lambda z: z,
        into=lambda z, out: out.copy_(z),
        derivative=1,
        operations=(0, 0),
        lr=0.02,
        gain=1.0,
        module=(nn.Identity, {}),
        epilogue="none",
    ),
    "sigmoid": Activation(
        saved="a",
        new=torch.sigmoid,
        overwrite=torch.sigmoid_,
        into=lambda z, out: torch.sigmoid(z, out=out),
        derivative=_aten.sigmoid_backward,
        operations=(4, 3),
        lr=0.5,
        gain=4.0,  # sigmoid's slope at 0 is 1/4
        module=(nn.Sigmoid, {}),
        epilogue="sigmoid",
    ),
    "relu": Activation(
        saved="a",
        new=torch.relu,
        overwrite=torch.relu_,
        into=lambda z, out: torch.clamp_min(z, 0, out=out),
        derivative=_aten.threshold_backward,
        derivative_settings=(0,),
        operations=(1, 1),
        lr=0.1,
        module=(nn.ReLU, {}),
        epilogue="relu",
        kink=0.0,
    ),
    "tanh": Activation(
        saved="a",
        new=torch.tanh,
        overwrite=torch.tanh_,
        into=lambda z, out: torch.tanh(z, out=out),
        derivative=_aten.tanh_backward,
        operations=(5, 3),
        lr=0.05,
        gain=5 / 3,  # LeCun et al. 1998
        module=(nn.Tanh, {}),
        epilogue="tanh",
    ),
    "step": Activation(
        saved=None,
        new=lambda z: (z >= 0).to(z.dtype) + 0 * z.sign(),  # on the tape, with the derivative 0 of sign
        overwrite=lambda z: (z >= 0).to(z.dtype),
        into=lambda z, out: torch.ge(z, out.zero_(), out=out),  # torch.ge(z, 0) would make a tensor of the number
        derivative=0,
        operations=(1, 1),
        lr=0.1,
        gain=1.0,
    ),
    "leaky_relu": Activation(
        saved="a",
        new=partial(F.leaky_relu, negative_slope=LEAKY_SLOPE),
        overwrite=partial(F.leaky_relu, negative_slope=LEAKY_SLOPE, inplace=True),
        into=lambda z, out: _aten.leaky_relu.out(z, LEAKY_SLOPE, out=out),
        derivative=_aten.leaky_relu_backward,
        derivative_settings=(LEAKY_SLOPE, True),  # True: ``saved`` is A
        operations=(2, 2),
        lr=0.1,
        module=(nn.LeakyReLU, {"negative_slope": LEAKY_SLOPE}),
        kink=LEAKY_SLOPE,
    ),
    "gelu": Activation(
        saved="z",
        new=F.gelu,
        overwrite=F.gelu,
        into=lambda z, out: _aten.gelu.out(z, out=out),
        derivative=_aten.gelu_backward,
        operations=(5, 8),
        lr=0.1,
        module=(nn.GELU, {"approximate": "none"}),
    ),
    "silu": Activation(
        saved="z",
        new=F.silu,
        overwrite=partial(F.silu, inplace=True),
        into=lambda z, out: _aten.silu.out(z, out=out),
        derivative=_aten.silu_backward,
        operations=(5, 8),
        lr=0.1,
        module=(nn.SiLU, {}),
        twice=False,
    ),
}
#: What a layer of an MLP may have: an elementwise activation, or softmax over its features.
LAYER_ACTIVATIONS = (*ACTIVATIONS, "softmax")


def saved_for_grad(activation: str) -> Literal["a", "z"] | None:
    """What the derivative of ``activation`` is computed from: "z", "a" or None (nothing)."""
    return ACTIVATIONS[activation].saved
