"""The systems that four source documents describe, run through fastmlp, and how their results compare.

``fastmlp reproduce`` prints what `run_recipe` gives. docs/derivations.md leads from each document's formulas to the
kernel that computes them.

    000  notes on back-propagation: linear regression by outer products, softmax with squared error
    001  the formulas of 000
    002  introduction to neural networks: PyTorch's quickstart, then by hand with and without biases and activations
    003  lecture notes on error back-propagation: the general algorithm, matrix derivatives
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass

from .base import Outcome, Recorder, Result, Settings
from .sgd_neural_net import SGDResult, sgd_neural_net

__all__ = ["RECIPES", "Outcome", "Recipe", "Result", "SGDResult", "Settings", "run_recipe", "sgd_neural_net"]


@dataclass(frozen=True)
class Recipe:
    """One system: its name, the documents that describe it, what it is, and the module with its ``run``."""

    name: str
    documents: tuple[str, ...]
    summary: str
    module: str


RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("outer-product", ("000", "001"), "linear regression by outer products, ten steps", "outer_product"),
        Recipe("softmax-squared", ("000", "001"), "squared error on softmax(Wx), on images", "softmax_squared"),
        Recipe("quickstart", ("002",), "PyTorch's quickstart: ReLU, batch 64, six epochs, five seeds", "quickstart"),
        Recipe("basic", ("002",), "three matrices, no bias, no activation, one image at a time", "basic"),
        Recipe("better", ("002",), "biases and sigmoids, one image at a time", "better"),
        Recipe("sgd-neural-net", ("003",), "SGD-NEURAL-NET: any layers, activations and loss", "sgd_checks"),
        Recipe("derivatives", ("000", "001", "002", "003"), "the catalogue of derivatives, numerically", "derivatives"),
    )
}
"""Every recipe by name, in the order of the documents."""


def run_recipe(name: str, settings: Settings | None = None) -> Outcome:
    """Run one recipe.

    Args:
        name: a key of `RECIPES`.
        settings: quick or full, and where the data is; default: full, the usual places.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: the data is not there.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; expected one of {', '.join(RECIPES)}")
    recorder = Recorder(name)
    module = importlib.import_module(f"{__name__}.{RECIPES[name].module}")
    module.run(settings or Settings(), recorder)
    return recorder.outcome()
