"""FashionMNIST as tensors: where it is found, integrity checks, the cache and the bundled subset."""

from .dataset import (
    SOURCES,
    DataIntegrityError,
    ImageDataset,
    SubsetWarning,
    cache_folder,
    find_fashion_mnist,
    load_fashion_mnist,
)

__all__ = [
    "SOURCES",
    "DataIntegrityError",
    "ImageDataset",
    "SubsetWarning",
    "cache_folder",
    "find_fashion_mnist",
    "load_fashion_mnist",
]
