"""Options that take several values: ``0.1,0.01`` or ``relu,tanh``, and seeds."""

from __future__ import annotations

from typing import Any

import click

#: Most seeds of a sweep.
MOST_SEEDS = 1_000_000


class Several(click.ParamType):
    """One or more values of another type, separated by commas, each given once."""

    def __init__(self, of: click.ParamType, example: str) -> None:
        self.of, self.example, self.name = of, example, of.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        """The values; a usage error for an empty list, an empty place, a value given twice, or a wrong value."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in value.split(",")]
        if "" in parts:
            what = f"{value!r} has an empty place" if value.strip() else "the list is empty"
            self.fail(f"{what}; expected values separated by commas, such as {self.example}", param, ctx)
        values = tuple(self.of.convert(part, param, ctx) for part in parts)
        for number, one in enumerate(values):
            if one in values[:number]:
                self.fail(f"{value!r} has {parts[number]} twice; expected different values", param, ctx)
        return values

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """What the help shows for the values."""
        return "LIST"


class Seeds(click.ParamType):
    """A number N of seeds, which means 0 to N - 1, or two or more seeds separated by commas; ``7,`` is seed 7."""

    name = "seeds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """The seeds; a usage error for anything else."""
        if isinstance(value, tuple):
            return value
        expected = "expected how many, such as 5, or a list, such as 3,7 (or 3, for one)"
        parts = [part.strip() for part in value.split(",")]
        if len(parts) > 1 and not parts[-1]:
            del parts[-1]
        try:
            numbers = tuple(map(int, parts))
        except ValueError:
            self.fail(f"{value!r} is no whole number and no list of whole numbers; {expected}", param, ctx)
        if "," not in value:
            if not 1 <= numbers[0] <= MOST_SEEDS:
                self.fail(f"{value!r} is no number of seeds from 1 to {MOST_SEEDS:,}; {expected}", param, ctx)
            return tuple(range(numbers[0]))
        if min(numbers) < 0 or max(numbers) >= 2**63:
            self.fail(f"{value!r} has a seed below 0 or above 2^63 - 1; {expected}", param, ctx)
        if len(set(numbers)) < len(numbers):
            self.fail(f"{value!r} has a seed twice; expected different seeds", param, ctx)
        return numbers

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """What the help shows for the seeds."""
        return "N|LIST"
