"""What the recipes share: the source documents, results, the data, numerical derivatives and the look of plots."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..data import ImageDataset, load_fashion_mnist
from ..data.make_subset import PER_CLASS, select
from ..train.plots import BLUE, look

BLOG, FORMULAS, NOTEBOOK, NOTES = "000", "001", "002", "003"
DOCUMENTS = {BLOG: "blog post", FORMULAS: "its formulas", NOTEBOOK: "notebook", NOTES: "6.390 notes"}
"""A short name of each source document by its number; ``fastmlp.recipes`` has the titles."""

Value = Tensor | float
FULL_TRAIN = 60_000

Plot = Callable[[Any], None]
"""Draws on an empty figure of matplotlib."""


@dataclass(frozen=True)
class Result:
    """One line of the table: what a document says, and what fastmlp gives.

    Attributes:
        document: the source document's number in `DOCUMENTS`.
        claim: what the document says, or what must hold for its formulas to be right.
        obtained: the number or error that was found.
        tolerance: what is allowed, as text.
        good: the verdict.
        seconds: time since the recipe's previous line.
    """

    document: str
    claim: str
    obtained: str
    tolerance: str
    good: bool
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """All lines of a recipe, its plots by file name without ending, and its time in seconds."""

    name: str
    results: tuple[Result, ...]
    plots: dict[str, Plot]
    seconds: float

    @property
    def good(self) -> bool:
        """Whether every verdict is good."""
        return all(result.good for result in self.results)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        results = [dataclasses.asdict(result) for result in self.results]
        return {"name": self.name, "good": self.good, "seconds": self.seconds, "results": results}


class Recorder:
    """Collects the results of one recipe, and its plots by name, which are drawn only if they are asked for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.results: list[Result] = []
        self.plots: dict[str, Plot] = {}
        self._began = self._last = time.perf_counter()

    def add(self, document: str, claim: str, obtained: str, tolerance: str, good: bool) -> None:
        """One line; its time is the time since the previous line."""
        now = time.perf_counter()
        self.results.append(Result(document, claim, obtained, tolerance, bool(good), now - self._last))
        self._last = now

    def close(
        self, document: str, claim: str, actual: Value, expected: Value, tolerance: float, *, relative: bool = False
    ) -> None:
        """A line whose verdict is that ``actual`` is within ``tolerance`` of ``expected`` everywhere.

        ``relative`` divides each difference by the expected value's magnitude. NaN and other shapes are bad.
        """
        actual, expected = (
            v.detach().double().cpu() if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64)
            for v in (actual, expected)
        )
        if actual.shape != expected.shape:
            text = f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
            self.add(document, claim, text, "the same shape", False)
            return
        difference = (actual - expected).abs()
        if relative:
            difference = torch.where(difference == 0, 0.0, difference / expected.abs())
        error = difference.max().item() if difference.numel() else 0.0
        text = f"{'relative ' if relative else ''}error {error:.1e}"
        self.add(document, claim, text, f"{tolerance:.0e}", error <= tolerance)

    def at_least(self, document: str, claim: str, share: float, least: float) -> None:
        """A line whose verdict is that ``share``, a part of 1, reaches ``least``."""
        self.add(document, claim, percent(share), f"at least {percent(least)}", share >= least)

    def outcome(self) -> Outcome:
        """What was collected."""
        return Outcome(self.name, tuple(self.results), dict(self.plots), time.perf_counter() - self._began)


@dataclass
class Settings:
    """How to run the recipes.

    Attributes:
        quick: run each recipe's quick form, which takes seconds on the images of the bundled subset, wherever they are
            read from. The documents' accuracies belong to the full data, so the quick form compares with the
            documents' own loops.
        data: folder of FashionMNIST's files; "bundled" for the bundled subset; None for the usual places, or for the
            bundled subset in the quick form.
        progress: called with the name of what runs now.
    """

    quick: bool = False
    data: str | None = None
    progress: Callable[[str], None] = field(default=lambda text: None, repr=False)
    _images: tuple[ImageDataset, ImageDataset] | None = field(default=None, init=False, repr=False)

    def images(self) -> tuple[ImageDataset, ImageDataset]:
        """(train, test) on the CPU, read once.

        Raises:
            FileNotFoundError: the full form was asked for and the full data is not there.
        """
        if self._images is None:
            source = "bundled" if self.data == "bundled" else None
            if self.quick and self.data is None:
                source = "bundled"
            train, test = load_fashion_mnist(None if source else self.data, source=source)
            if self.quick and source is None:
                train, test = _subset(train), _subset(test)
            elif not self.quick and len(train) != FULL_TRAIN:
                raise FileNotFoundError(
                    f"the documents' accuracies belong to the full data, and this is {train.source}; get the full "
                    "data, name its folder, or ask for the quick form"
                )
            self._images = train, test
        return self._images


def _subset(dataset: ImageDataset) -> ImageDataset:
    """The rows of the full data that the bundled subset has."""
    rows = torch.from_numpy(select(dataset.labels.numpy(), PER_CLASS[dataset.split]))
    return dataclasses.replace(dataset, images=dataset.images[rows], labels=dataset.labels[rows])


def derivative(f: Callable[[Tensor], Tensor], x: Tensor, h: float = 1e-3) -> Tensor:
    """The derivative of f at x by differences of fourth order, in the layout of the 6.390 notes.

    df/dx ~ (8 (f(x+h) - f(x-h)) - (f(x+2h) - f(x-2h))) / (12 h) for each element of x: error h^4 f''''' / 30 and
    rounding of about 1e-13 in float64.

    Returns:
        [*x.shape, *f(x).shape]: first the indices of the input, then those of the output. For vectors that is the
        notes' matrix with a row for each input and a column for each output.
    """
    rows = []
    for i in range(x.numel()):
        dx = torch.zeros(x.numel(), dtype=x.dtype)
        dx[i] = h
        dx = dx.view(x.shape)
        near, far = f(x + dx) - f(x - dx), f(x + 2 * dx) - f(x - 2 * dx)
        rows.append((8 * near - far) / (12 * h))
    return torch.stack(rows).view((*x.shape, *rows[0].shape))


def axes(ax: Any, title: str, xlabel: str, ylabel: str) -> None:
    """The look that all plots have."""
    ax.set_title(title, loc="left", fontsize=10)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    look(ax)


def curve(ax: Any, losses: Tensor, per_step: int = 1) -> int:
    """Plot losses against ``per_step`` times their number, as about 100 means; returns how many losses a mean has."""
    count = max(1, len(losses) // 100)
    means = losses[: len(losses) // count * count].view(-1, count).mean(1)
    ax.plot([(i + 1) * count * per_step for i in range(len(means))], means.tolist(), color=BLUE)
    return count


def percent(share: float) -> str:
    """0.731 as "73.1 %"."""
    return "NaN" if math.isnan(share) else f"{100 * share:.1f} %"
