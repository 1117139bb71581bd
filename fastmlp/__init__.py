"""fastmlp: multilayer perceptrons trained and run as fast as the machine allows, from ordinary PyTorch code."""

from . import functional, reference
from .backend import get_backend, set_backend, use_backend
from .base import checkout  # noqa: F401
from .base.version import __version__
from .cpu import get_cpu_gemm, set_cpu_gemm
from .data import ImageDataset, find_fashion_mnist, load_data, load_fashion_mnist
from .losses import BCEWithLogitsLoss, CrossEntropyLoss, HuberLoss, L1Loss, MSELoss
from .nn import MLP, Linear, MLPEnsemble
from .step import TrainStep
from .train import fit
from .train.checkpoint import load_checkpoint, save_checkpoint

__all__ = [
    "MLP",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "HuberLoss",
    "ImageDataset",
    "L1Loss",
    "Linear",
    "MLPEnsemble",
    "MSELoss",
    "TrainStep",
    "__version__",
    "find_fashion_mnist",
    "fit",
    "functional",
    "get_backend",
    "get_cpu_gemm",
    "load_checkpoint",
    "load_data",
    "load_fashion_mnist",
    "reference",
    "save_checkpoint",
    "set_backend",
    "set_cpu_gemm",
    "use_backend",
]
