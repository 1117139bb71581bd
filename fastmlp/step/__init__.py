"""The training step: forward, loss, backward and update as one operation, without the tape."""

from .ensemble_step import EnsembleStep
from .train_step import TrainStep

__all__ = ["EnsembleStep", "TrainStep"]
