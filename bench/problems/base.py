"""What is timed: problems with fixed inputs, counted arithmetic and traffic, and an oracle in plain torch.

A problem is a frozen description. ``inputs(i)`` are the inputs of call i on the CPU in float32. Several sets take
turns, so that no contender finds its last batch in the cache. ``oracle(dtype)`` is what a contender's ``results()``
must be after ``GATE_CALLS`` calls, computed by autograd in that dtype. M is the batch, K and N are inputs and outputs
of a layer.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = ["GATE_CALLS", "Problem", "Results", "generator", "randn"]

#: Input sets of a problem at most, and the bytes that they may take together; there are two sets at least.
MOST_SETS, SETS_BYTES = 8, 64 << 20
#: Calls before results are compared: enough for momentum and second moments to show.
GATE_CALLS = 3

#: The named tensors that the gate compares, float64 on the CPU.
Results = dict[str, Tensor]


def generator(seed: int) -> torch.Generator:
    """A new generator on the CPU."""
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Problem:
    """Base of all problems; ``kind`` is also the stem of the bench file."""

    kind: ClassVar[str]
    dtype: str = field(default="float32", kw_only=True)
    device: str = field(default="cpu", kw_only=True)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the products."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def input_dtype(self) -> torch.dtype:
        """The dtype of floating-point inputs."""
        return self.torch_dtype

    @property
    def timing(self) -> str:
        """How calls are timed (``bench.measure.timing``): on a GPU each with a cold cache, elsewhere as a chain."""
        return "flushed" if self.device.startswith("cuda") else "chain"

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.torch_dtype.itemsize

    def make_inputs(self, index: int) -> tuple[Tensor, ...]:
        """Input set ``index``: float32 values that every dtype represents exactly, and int64 labels."""
        raise NotImplementedError

    @functools.cached_property
    def input_sets(self) -> int:
        """The number of input sets."""
        one = sum(t.nbytes for t in self.make_inputs(0))
        return max(2, min(MOST_SETS, SETS_BYTES // one))

    def inputs(self, call: int) -> tuple[Tensor, ...]:
        """The inputs of a call, on the CPU."""
        return self.make_inputs(call % self.input_sets)

    def on_device(self) -> list[tuple[Tensor, ...]]:
        """Every input set on the device, floating-point tensors in ``input_dtype``; all contenders share them."""
        return _on_device(self)

    @property
    def without_chance(self) -> Problem:
        """The problem whose results the gate compares: this one, without what contenders draw by chance."""
        return self

    def judged(self, results: Results) -> Results:
        """What the gate compares: the results, or the changes that the calls made."""
        return results

    def oracle(self, dtype: torch.dtype) -> Results:
        """The results after ``GATE_CALLS`` calls on input sets 0, 1, ... from the start, computed in ``dtype``."""
        raise NotImplementedError

    @property
    def flops(self) -> int:
        """Multiplications and additions in the matrix products of one call."""
        raise NotImplementedError

    @property
    def bytes(self) -> int:
        """The least traffic of one call: every operand and result of every product once."""
        raise NotImplementedError

    @property
    def memory(self) -> int:
        """About the bytes that a contender keeps: what a call reads and writes."""
        return self.bytes

    @property
    def rows(self) -> int:
        """Samples per call."""
        raise NotImplementedError

    @property
    def reduction(self) -> int:
        """The longest sum of products."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """A short name, unique within its kind and device."""
        raise NotImplementedError

    @property
    def roundings(self) -> int:
        """How often the calls before the comparison may round a result that they update in place."""
        return 0

    @property
    def conditioning(self) -> float:
        """The rounding by float32 of scalars that multiply a whole result; 0 where they are exact."""
        return 0.0

    def unsettled(self) -> Results:
        """Changes of the results, by name, that depend on the sign of a rounding error; an absent name has none."""
        return {}

    def describe(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return {"kind": self.kind, "name": self.name, **asdict(self)}


@functools.lru_cache(maxsize=1)
def _on_device(problem: Problem) -> list[tuple[Tensor, ...]]:
    return [
        tuple(
            t.to(problem.device, problem.input_dtype if t.is_floating_point() else None)
            for t in problem.make_inputs(index)
        )
        for index in range(problem.input_sets)
    ]


def randn(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=generator(seed)) * scale).bfloat16().float()
