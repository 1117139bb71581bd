"""The training step: forward, loss, backward and update as one operation, without the tape."""

from .train_step import TrainStep

__all__ = ["TrainStep"]
