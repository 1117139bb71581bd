"""MyBetterNetwork (document 002): as ``basic`` with biases and sigmoid hidden layers; about 83 %."""

from __future__ import annotations

from .base import Recorder, Settings
from .basic import compare

__all__ = ["run"]

ACCURACY, QUICK_LEAST = 0.83, 0.35


def run(settings: Settings, recorder: Recorder) -> None:
    """The network with biases and sigmoids."""
    compare(settings, recorder, "sigmoid", True, ACCURACY, QUICK_LEAST)
