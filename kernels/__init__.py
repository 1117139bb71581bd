"""The Triton kernels of fastmlp, one file each; README.md beside this file leads from the maths to each kernel.

Launchers take tensors that were validated (``fastmlp.checks``), allocate the outputs and launch; they know
nothing of autograd. Import them from here (or through ``fastmlp.functional``, which is the public way).
"""

from .activation_bwd import activation_bwd
from .cross_entropy import cross_entropy, cross_entropy_bwd, cross_entropy_fwd
from .linear_dgrad import linear_dgrad
from .linear_fwd import linear_fwd
from .linear_wgrad import linear_wgrad

__all__ = [
    "activation_bwd",
    "cross_entropy",
    "cross_entropy_bwd",
    "cross_entropy_fwd",
    "linear_dgrad",
    "linear_fwd",
    "linear_wgrad",
]
