"""The fused operations without autograd, on plain torch or on the Triton kernels: ``ops.on(backend)``."""

from .choose import BackwardOperations, Operations, on

__all__ = ["BackwardOperations", "Operations", "on"]
