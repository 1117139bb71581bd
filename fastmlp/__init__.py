"""fastmlp: multilayer perceptrons trained and run as fast as the machine allows, from ordinary PyTorch code."""

__version__ = "0.1.0"
