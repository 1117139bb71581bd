"""Data as tensors: where it is found, integrity checks, the cache and the bundled subset of FashionMNIST."""

from .dataset import (
    SOURCES,
    DataIntegrityError,
    ImageDataset,
    SubsetWarning,
    cache_folder,
    find_fashion_mnist,
    load_fashion_mnist,
)
from .load import load_data
from .table import Standardization, Table

__all__ = [
    "SOURCES",
    "DataIntegrityError",
    "ImageDataset",
    "Standardization",
    "SubsetWarning",
    "Table",
    "cache_folder",
    "find_fashion_mnist",
    "load_data",
    "load_fashion_mnist",
]
