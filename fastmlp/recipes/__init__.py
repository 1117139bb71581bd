"""The recipes: systems that four source documents describe, run through fastmlp, and how their results compare.

``fastmlp reproduce`` prints what `run_recipe` gives. docs/derivations.md leads from each document's formulas to the
kernel that computes them. Results name a document by its number:

    000  the backpropagation blog post: linear regression by outer products, softmax with squared error
    001  the formulas of the blog post
    002  "Introduction to Neural Networks", a notebook: PyTorch's quickstart, then networks by hand
    003  "Explanatory Notes for 6.390", chapter 7: the general algorithm, matrix derivatives
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass

from ..base.names import unknown
from .base import BLOG, DOCUMENTS, FORMULAS, NOTEBOOK, NOTES, Outcome, Recorder, Result, Settings
from .sgd_neural_net import SGDResult, sgd_neural_net

__all__ = [
    "DOCUMENTS",
    "RECIPES",
    "Outcome",
    "Recipe",
    "Result",
    "SGDResult",
    "Settings",
    "run_recipe",
    "sgd_neural_net",
]


@dataclass(frozen=True)
class Recipe:
    """One system: its name, the numbers of its documents, what the system is, and the module with its ``run``."""

    name: str
    documents: tuple[str, ...]
    summary: str
    module: str


RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("outer-product", (BLOG, FORMULAS), "linear regression by outer products, ten steps", "outer_product"),
        Recipe("softmax-squared", (BLOG, FORMULAS), "squared error on softmax(Wx), on images", "softmax_squared"),
        Recipe("quickstart", (NOTEBOOK,), "PyTorch's quickstart: ReLU, batch 64, six epochs, five seeds", "quickstart"),
        Recipe("basic", (NOTEBOOK,), "three matrices, no bias, no activation, one image at a time", "basic"),
        Recipe("better", (NOTEBOOK,), "biases and sigmoids, one image at a time", "basic"),
        Recipe("sgd-neural-net", (NOTES,), "SGD-NEURAL-NET: any layers, activations and loss", "sgd_checks"),
        Recipe("derivatives", tuple(DOCUMENTS), "the catalogue of derivatives, numerically", "derivatives"),
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
        raise ValueError(unknown("recipe", name, RECIPES))
    recorder = Recorder(name)
    module = importlib.import_module(f"{__name__}.{RECIPES[name].module}")
    module.run(settings or Settings(), recorder)
    return recorder.outcome()
