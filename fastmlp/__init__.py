"""fastmlp: multilayer perceptrons trained and run as fast as the machine allows, from ordinary PyTorch code."""

from . import functional, reference
from .backend import get_backend, set_backend, use_backend
from .nn import MLP, Linear

__all__ = [
    "MLP",
    "Linear",
    "__version__",
    "functional",
    "get_backend",
    "reference",
    "set_backend",
    "use_backend",
]

__version__ = "0.1.0"
