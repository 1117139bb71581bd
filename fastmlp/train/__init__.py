"""Training an MLP: `fit`, `evaluate`, and what they report."""

from .loop import CHECK_EVERY, DivergenceError, EpochResult, History, LabeledImages, Progress, evaluate, fit

__all__ = ["CHECK_EVERY", "DivergenceError", "EpochResult", "History", "LabeledImages", "Progress", "evaluate", "fit"]
