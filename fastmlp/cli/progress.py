"""What a training run shows: a progress bar and lines above it on a terminal, plain lines anywhere else."""

from __future__ import annotations

import contextlib
import sys
from types import TracebackType
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import torch

    from fastmlp.train import EpochResult, Progress


class Reporter:
    """Shows the progress of ``epochs`` epochs; a context manager.

    Args:
        epochs: of the run.
        to_stderr: write to stderr instead of stdout.
        hidden: show nothing.
    """

    def __init__(self, epochs: int, to_stderr: bool, *, hidden: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.epochs = epochs
        self.to_stderr, self.hidden = to_stderr, hidden
        stream = sys.stderr if to_stderr else sys.stdout
        self.bar: Bar | None = None
        # rich's own test for a terminal obeys FORCE_COLOR, and a bar does not belong into a log file.
        if stream.isatty() and not hidden:
            columns = (
                TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TimeRemainingColumn(),
            )
            self.bar = Bar(*columns, console=Console(file=stream, highlight=False), transient=True)
            self.task = self.bar.add_task("", total=epochs, epoch=1, epochs=epochs, loss="-")

    def __enter__(self) -> Reporter:
        """Show the bar, if there is one."""
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def line(self, text: str) -> None:
        """One line of its own."""
        if self.hidden:
            return
        with contextlib.suppress(OSError):  # a log on a full disk, or a pipe without a reader, ends no training
            if self.bar is not None:
                self.bar.console.print(text, markup=False, soft_wrap=True)
            else:
                click.echo(text, err=self.to_stderr)

    def progress(self, progress: Progress) -> None:
        """Move the bar."""
        if self.bar is not None:
            done = progress.epoch - 1 + progress.step / progress.steps
            self.bar.update(self.task, completed=done, epoch=progress.epoch, loss=f"{progress.loss:.4f}")

    def epoch(self, result: EpochResult) -> None:
        """The line of an epoch."""
        judged = "  ".join([*scores(result, "validation"), *scores(result, "test")])
        self.line(
            f"epoch {result.epoch:>{len(str(self.epochs))}}/{self.epochs}  train loss {result.train_loss:.4f}  "
            f"{judged}{'  ' if judged else ''}{result.seconds:.2f} s  {result.images_per_second:,.0f} images/s"
        )


def scores(result: EpochResult, split: str) -> list[str]:
    """Loss and metric of the results on one split, as far as there are any."""
    loss, accuracy, r2 = (vars(result)[f"{split}_{name}"] for name in ("loss", "accuracy", "r2"))
    texts = [] if loss is None else [f"{split} loss {loss:.4f}"]
    texts += [] if accuracy is None else [f"{split} accuracy {100 * accuracy:.2f} %"]
    return texts + ([] if r2 is None else [f"{split} R2 {r2:.4f}"])


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name()


def cpu_name() -> str:
    """The processor's name from the operating system, its vector instructions, and torch's number of threads."""
    import torch

    from fastmlp.cpu import instruction_set, processor_name

    threads = torch.get_num_threads()
    return f"{processor_name()} ({instruction_set()}), {threads} thread{'s' if threads != 1 else ''}"
