"""Training an MLP: `fit`, `evaluate`, and what they report."""

from .loop import CHECK_EVERY, fit
from .results import DivergenceError, EpochResult, History, Progress
from .scores import LabeledImages, evaluate
from .split import held_out

__all__ = [
    "CHECK_EVERY",
    "DivergenceError",
    "EpochResult",
    "History",
    "LabeledImages",
    "Progress",
    "evaluate",
    "fit",
    "held_out",
]
