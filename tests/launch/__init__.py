"""The launch lane: which kernels the whole library launches. tests/README.md describes it."""
