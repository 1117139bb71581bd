"""What dropout is made of: the probabilities of a network, and what one layer's masks are computed from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

#: Columns of a layer's output that share one counter of the random numbers; ``fastmlp.reference.dropout`` says how.
GROUP = 16


class Dropout(NamedTuple):
    """The dropout of one layer in one pass: A_out = keep * A / (1 - p).

    Attributes:
        state: int64 [2], (seed, step), on the layer's device.
        layer: the layer's place in the network, from 0 on.
        p: the probability of an element to be dropped, above 0.
        stream: the process under data parallelism, else 0.
        keep: bool, of the shape of A, where the mask exists already; the kernels make the mask anew.
    """

    state: Tensor
    layer: int
    p: float
    stream: int = 0
    keep: Tensor | None = None


def threshold(p: float) -> int:
    """The least 16-bit number whose element is kept, for 0 < p < 1."""
    return min(max(round(p * 65536), 1), 65535)


def checked_rates(dropout: object, hidden: int) -> float | tuple[float, ...]:
    """A probability for all hidden layers, or one for each of them.

    Raises:
        TypeError: something else than numbers.
        ValueError: a probability below 0, or 1 and above; another number of them than of hidden layers.
    """
    if type(dropout) is float and 0 <= dropout < 1:  # what a model has checked before
        return dropout
    if isinstance(dropout, Iterable) and not isinstance(dropout, (str, bytes, Tensor)):
        rates = tuple(_checked_rate(p) for p in dropout)
        if len(rates) != hidden:
            raise ValueError(
                f"expected one dropout probability, or {hidden} of them, one for each hidden layer, got {len(rates)}: "
                f"{rates}"
            )
        return rates
    return _checked_rate(dropout)


def _checked_rate(p: object) -> float:
    if type(p) is float and 0 <= p < 1:
        return p
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(
            f"expected dropout to be a number of at least 0 and below 1, or one for each hidden layer, got {p!r} of "
            f"type {type(p).__name__}"
        )
    if not 0 <= p < 1:
        raise ValueError(
            f"dropout probability has to be between 0 and 1, but got {p}; give the share of elements to drop, at least "
            "0 and below 1 (1 would leave nothing)"
        )
    return float(p)
