"""The Triton kernels of fastmlp, one file each; README.md beside this file leads from the maths to each kernel.

Launchers take tensors that were validated (``fastmlp.checks``), allocate the outputs and launch; they know
nothing of autograd. Import them from here (or through ``fastmlp.functional``, which is the public way).
"""

from .linear_fwd import linear_fwd

__all__ = ["linear_fwd"]
