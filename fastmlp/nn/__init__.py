"""Modules: MLP with its layers, and many MLPs of one shape as one module."""

from .ensemble import MLPEnsemble
from .layers import Linear
from .mlp import MLP

__all__ = ["MLP", "Linear", "MLPEnsemble"]
