"""The Triton kernels of fastmlp, one file each; README.md beside this file leads from the maths to each kernel.

Launchers take tensors that were validated (``fastmlp.base.arguments``), allocate the outputs and launch; they know
nothing of autograd. Import them from here (or through ``fastmlp.functional``, which is the public way).
"""

from .activation_bwd import activation_bwd
from .cross_entropy import cross_entropy, cross_entropy_fwd, cross_entropy_of_members
from .cross_entropy_bwd import cross_entropy_bwd
from .dropout import Dropout
from .elementwise_loss import elementwise_loss, elementwise_loss_bwd, elementwise_loss_fwd
from .head import head
from .linear_dgrad import linear_dgrad
from .linear_fwd import linear_fwd
from .linear_wgrad import linear_wgrad
from .network import network_bwd, network_fwd
from .softmax_squared_error import softmax_squared_error, softmax_squared_error_bwd, softmax_squared_error_fwd

__all__ = [
    "Dropout",
    "activation_bwd",
    "cross_entropy",
    "cross_entropy_bwd",
    "cross_entropy_fwd",
    "cross_entropy_of_members",
    "elementwise_loss",
    "elementwise_loss_bwd",
    "elementwise_loss_fwd",
    "head",
    "linear_dgrad",
    "linear_fwd",
    "linear_wgrad",
    "network_bwd",
    "network_fwd",
    "softmax_squared_error",
    "softmax_squared_error_bwd",
    "softmax_squared_error_fwd",
]
