"""The FashionMNIST files: their checksums, where they are fetched from, and the small bundled subset.

The public entry points are ``fastmlp.load_fashion_mnist`` and ``fastmlp.find_fashion_mnist`` (in `fastmlp.data`).
"""
