"""Every fused operation in plain differentiable torch: what tests and ``fastmlp doctor`` compare with."""

from .dropout import keep_mask
from .linear import (
    activate,
    activation_grad,
    activation_grad_from_output,
    cross_entropy,
    cross_entropy_backward,
    head,
    linear_act,
    linear_act_backward,
    linear_dgrad,
    linear_wgrad,
    mlp,
    mlp_backward,
    pixels,
)
from .losses import (
    ELEMENTWISE_LOSSES,
    elementwise_loss,
    elementwise_loss_grad,
    elementwise_loss_target_grad,
    softmax_backward,
    softmax_squared_error,
    softmax_squared_error_backward,
)

__all__ = [
    "ELEMENTWISE_LOSSES",
    "activate",
    "activation_grad",
    "activation_grad_from_output",
    "cross_entropy",
    "cross_entropy_backward",
    "elementwise_loss",
    "elementwise_loss_grad",
    "elementwise_loss_target_grad",
    "head",
    "keep_mask",
    "linear_act",
    "linear_act_backward",
    "linear_dgrad",
    "linear_wgrad",
    "mlp",
    "mlp_backward",
    "pixels",
    "softmax_backward",
    "softmax_squared_error",
    "softmax_squared_error_backward",
]
