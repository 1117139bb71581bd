"""The processes that divide a sweep or a training: this one alone, or those that ``torchrun`` started.

They talk over gloo. The gradients of a training on GPUs go over nccl.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import click

from . import common

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")
#: How long a process of a sweep may wait for the groups of another process.
TIMEOUT = timedelta(days=30)


class Ranks:
    """A context manager, inside of which the processes talk.

    Attributes:
        rank: the number of this process, from 0; process 0 prints and writes the tables.
        count: of the processes.
        local, local_count: the same of this machine.

    Raises:
        UserError: torchrun's variables are no numbers, or the processes do not find each other.
    """

    def __init__(self) -> None:
        self.rank, self.count = _number("RANK", 0), _number("WORLD_SIZE", 1)
        self.local, self.local_count = _number("LOCAL_RANK", self.rank), _number("LOCAL_WORLD_SIZE", self.count)

    def __enter__(self) -> Ranks:
        if self.count > 1:
            from torch import distributed

            try:
                distributed.init_process_group(_backends(), timeout=TIMEOUT)
            except (RuntimeError, ValueError) as error:
                raise common.UserError(
                    f"process {self.rank} of {self.count} does not find the others ({error}); start the processes with "
                    "torchrun"
                ) from error
        return self

    def __exit__(self, *error: object) -> None:
        if self.count > 1:
            from torch import distributed

            with contextlib.suppress(RuntimeError):
                distributed.destroy_process_group()

    @property
    def group(self) -> Any:
        """The process group of all processes."""
        from torch import distributed

        return distributed.group.WORLD

    def device_of(self, device: torch.device) -> torch.device:
        """The device of this process. If no GPU is named, each process of a machine takes the next GPU."""
        import torch

        if device.type == "cuda" and device.index is None and self.count > 1:
            return torch.device("cuda", self.local % torch.cuda.device_count())
        return device

    def is_lost(self, error: BaseException) -> bool:
        """Whether an error says that another process no longer answers."""
        if self.count == 1 or not isinstance(error, RuntimeError):
            return False
        from torch import distributed

        return isinstance(error, distributed.DistError) or "gloo" in str(error)

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, in their order; Failure if one of them has ended."""
        if self.count == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.count
        try:
            distributed.all_gather_object(values, value)
        except RuntimeError as error:
            raise common.Failure(f"another process has ended ({error})") from error
        return values

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """The processes leave the context together. If one fails, all end as it does, and process 0 says why."""
        error: click.ClickException | None = None
        try:
            yield
        except click.ClickException as raised:
            error = raised
        errors = self.gather(None if error is None else (error.exit_code, error.format_message()))
        if error is not None and self.rank == 0:
            raise error
        for rank, found in enumerate(errors):
            if found is not None:
                code, message = found
                if self.rank:
                    raise click.exceptions.Exit(code)
                kind = common.UserError if code == 2 else common.Failure
                raise kind(f"process {rank}: {message}")


def _backends() -> str:
    import torch
    from torch import distributed

    has_nccl = torch.cuda.is_available() and distributed.is_nccl_available()
    return "cpu:gloo,cuda:nccl" if has_nccl else "gloo"


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise common.UserError(f"the variable {name} is {text!r}; torchrun sets it to a whole number") from None
