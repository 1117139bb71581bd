"""The layers that an update trains, and where each parameter lies in the flat buffers beside them.

Optimizer state, gradients and partial sums of all parameters are flat float32 buffers of one layout: a segment per
parameter, W_0, b_0, W_1, ..., each padded to a multiple of ``SEGMENT`` elements. With members, W_l is [E, N_l, K_l], a
buffer is [E, total], and a segment belongs to one member's parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .configs import cdiv
from .members import count_of

__all__ = ["SEGMENT", "Layer", "Layout"]

SEGMENT = 1024


@dataclass(frozen=True)
class Layer:
    """One trained layer: float32 masters and, where products read 16 bits, the copies or parameters that they read."""

    weight: Tensor  #: [N, K], contiguous; [E, N, K] with members
    bias: Tensor | None  #: [N], or None where there is none to train; [E, N] with members
    low_weight: Tensor | None = None
    low_bias: Tensor | None = None


class LayerArguments(NamedTuple):
    """What kernels take of a layer."""

    w_ptr: Tensor
    b_ptr: Tensor
    low_w_ptr: Tensor | None
    low_b_ptr: Tensor | None
    N: int
    K: int
    w_segment: int
    b_segment: int  #: -1: no bias
    #: Where the parameters' settings begin in those of all param groups; None: there is one group.
    w_settings: int | None
    b_settings: int | None


class ParameterArguments(NamedTuple):
    """What kernels take of a weight or a bias."""

    w_ptr: Tensor
    low_ptr: Tensor | None
    first_block: int
    numel: int
    settings: int | None  #: as ``w_settings``


class Layout:
    """Where each parameter of some layers lies in flat buffers of ``total`` elements, and what kernels take of it.

    ``low_is_param`` says whether the 16-bit tensors of the layers are the parameters, not copies of them. ``settings``
    says for each parameter where its group's row begins in an array of the rows of all groups; None: there is one row.
    ``members`` is the number of members, or None for a single model.
    """

    def __init__(
        self, layers: Sequence[Layer], *, low_is_param: bool = False, settings: Sequence[int] | None = None
    ) -> None:
        self.layers, self.low_is_param = tuple(layers), low_is_param
        self.members = count_of(self.layers[0].weight)
        self.params: list[Tensor] = []
        self.starts: list[int] = []
        self.total = 0
        of_layers, of_parameters = [], []

        def add(param: Tensor, low: Tensor | None) -> int:
            start = self.total
            row = None if settings is None else settings[len(self.params)]
            self.params.append(param)
            self.starts.append(start)
            numel = param.numel() // (self.members or 1)
            self.total += cdiv(numel, SEGMENT) * SEGMENT
            of_parameters.append(ParameterArguments(param, low, start // SEGMENT, numel, row))
            return start

        for layer in self.layers:
            weight, bias, low_weight, low_bias = layer.weight, layer.bias, layer.low_weight, layer.low_bias
            w_segment = add(weight, low_weight)
            b_segment = add(bias, low_bias) if bias is not None else -1
            w_settings = of_parameters[-1 if bias is None else -2].settings
            # Layers share code: a bias that is not there is a pointer of the right type which nothing reads.
            of_layers.append(
                LayerArguments(
                    weight, weight if bias is None else bias, low_weight, low_weight if bias is None else low_bias,
                    *weight.shape[-2:], w_segment, b_segment, w_settings, of_parameters[-1].settings,
                )
            )  # fmt: skip
        self.of_layers, self.of_parameters = tuple(of_layers), tuple(of_parameters)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parameters' shapes as views into a flat buffer, [total] or [E, total]."""
        numels = [arguments.numel for arguments in self.of_parameters]
        return [
            flat[..., s : s + numel].view(p.shape)
            for s, numel, p in zip(self.starts, numels, self.params, strict=True)
        ]  # fmt: skip

    @property
    def flat_shape(self) -> tuple[int, ...]:
        """The shape of a flat buffer: [total], or [E, total] with members."""
        return (self.total,) if self.members is None else (self.members, self.total)
