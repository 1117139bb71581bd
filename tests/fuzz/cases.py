"""Strategies for sizes, layouts, dtypes and tensors described by a few numbers, and the decorator of every fuzz test.

A tensor is drawn as a ``Spec``, whose seed determines the values. A Spec shrinks to a small shape, a dense layout and
seed 0, and prints on one line. Arrays drawn element by element (hypothesis.extra.numpy) would take all of Hypothesis's
entropy at sizes beyond one tile, print as walls of numbers, and have no bfloat16.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmlp.activations import ACTIVATIONS
from tests.conftest import HAS_GPU, INTERPRETING
from tests.support.harness import poisoned

__all__ = [
    "FLOATS",
    "Labels",
    "Spec",
    "activations",
    "dims",
    "dtypes",
    "fuzz",
    "labels",
    "root",
    "specs",
]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("dense", "rows", "columns", "spread")

# One, small primes, and the powers of two that tiles are made of, with one less and one more.
_SMALL = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33)
_LARGE = (47, 61, 63, 64, 65, 67, 97, 127, 128, 129, *((130, 255, 256, 257, 513) if HAS_GPU else ()))


def fuzz(share: int, strategy: st.SearchStrategy, *, launches: bool = False) -> Callable[[Callable], Callable]:
    """Run the test with ``share`` cases of ``strategy`` (ten times as many at night) as its argument ``case``.

    ``launches``: whether the test launches kernels through the fixture ``lane``. Where there is neither a GPU nor the
    interpreter, every case is then compiled for the simulated GPU, so only the night run executes a few cases.
    """

    def decorate(test: Callable[..., None]) -> Callable:
        simulated = launches and not INTERPRETING and not HAS_GPU
        percent = settings.default.max_examples
        cases = share * percent // (2000 if simulated else 100)
        ended = 0

        @functools.wraps(test)
        def counted(**arguments: Any) -> None:
            nonlocal ended
            test(**arguments)
            ended += 1

        def cases_run() -> int:
            """How many cases passed since the last call."""
            nonlocal ended
            count, ended = ended, 0
            return count

        if simulated and percent <= 100:
            return pytest.mark.skip(reason="on the simulated GPU only at night")(test)
        fuzzed = settings(max_examples=max(1, cases))(given(case=strategy)(counted))
        fuzzed.cases_run = cases_run
        return fuzzed

    return decorate


def dims(count: int) -> st.SearchStrategy[tuple[int, ...]]:
    """``count`` sizes, of which one at most is longer than a tile or two."""
    small = st.tuples(*[st.sampled_from(_SMALL)] * count)
    with_large = st.tuples(small, st.integers(0, count - 1), st.sampled_from(_LARGE)).map(
        lambda drawn: (*drawn[0][: drawn[1]], drawn[2], *drawn[0][drawn[1] + 1 :])
    )
    return small | with_large


dtypes = st.sampled_from(FLOATS)
activations = st.sampled_from(tuple(ACTIVATIONS))


@dataclass(frozen=True)
class Spec:
    """A tensor: ``scale`` times standard normal values (uniform integers for integer dtypes) in a poisoned layout."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str = "dense"
    pad: int = 1
    scale: float = 1.0
    seed: int = 0

    def values(self) -> Tensor:
        """Contiguous, without poison."""
        g = torch.Generator().manual_seed(self.seed)
        if not self.dtype.is_floating_point:
            return torch.randint(0, torch.iinfo(self.dtype).max + 1, self.shape, generator=g, dtype=self.dtype)
        return (torch.randn(self.shape, generator=g) * self.scale).to(self.dtype)

    def build(self) -> Tensor:
        """The view into poisoned storage; an expanded layout repeats one row or one column."""
        values = self.values()
        if self.layout == "expanded rows":
            return poisoned(values[:1], pad=self.pad).expand(self.shape)
        if self.layout == "expanded columns":
            return poisoned(values[:, :1], pad=self.pad).expand(self.shape)
        if values.dim() == 2 or self.layout == "dense":
            return poisoned(values, pad=self.pad, layout=self.layout)
        flat = poisoned(values.reshape(-1, values.shape[-1]), pad=self.pad, layout=self.layout)
        return flat.unflatten(0, values.shape[:-1]) if values.dim() > 1 else flat[0]


def specs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    expanded: bool = False,
    dense: bool = False,
    scale: float = 1.0,
    scales: tuple[float, ...] = (1.0, 1e-3, 30.0),
) -> st.SearchStrategy[Spec]:
    """Specs of one shape and dtype with any layout, offset, scale and seed.

    ``expanded`` adds expanded layouts; ``dense`` allows dense layouts only.
    """
    layouts = ("dense",) if dense else LAYOUTS + (("expanded rows", "expanded columns") if expanded else ())
    return st.builds(
        Spec,
        shape=st.just(shape),
        dtype=st.just(dtype),
        layout=st.sampled_from(layouts),
        pad=st.integers(1, 9),
        scale=st.sampled_from([s * scale for s in scales]),
        seed=st.integers(0, 2**16),
    )


@dataclass(frozen=True)
class Labels:
    """Class labels in poisoned storage; a share ``ignored`` of them are ``ignore_index``."""

    shape: tuple[int, ...]
    classes: int
    dtype: torch.dtype
    ignore_index: int
    ignored: float
    layout: str
    seed: int

    def build(self) -> Tensor:
        g = torch.Generator().manual_seed(self.seed)
        y = torch.randint(0, self.classes, self.shape, generator=g)
        chosen = torch.rand(self.shape, generator=g) < self.ignored
        y = torch.where(chosen, self.ignore_index, y).to(self.dtype)
        return poisoned(y, layout=self.layout)


@st.composite
def labels(draw: st.DrawFn, shape: tuple[int, ...], classes: int, *, ignoring: bool = True) -> Labels:
    """int64 or uint8 labels; ignore_index may be torch's -100, a class, or another number."""
    dtype = draw(st.sampled_from([torch.int64, torch.uint8])) if classes <= 256 else torch.int64
    others = [-100, -1] if dtype == torch.int64 else [255]
    ignore_index = draw(st.sampled_from([*others, 0, classes - 1]))
    return Labels(
        shape,
        classes,
        dtype,
        ignore_index,
        draw(st.sampled_from([0.0, 0.3])) if ignoring else 0.0,
        draw(st.sampled_from(LAYOUTS)),
        draw(st.integers(0, 2**16)),
    )


def root(n: int) -> float:
    """1 / sqrt(n): the scale that keeps a sum of n products near 1."""
    return 1.0 / math.sqrt(max(1, n))
