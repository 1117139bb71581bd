"""``python -m bench.static``: write the static performance report."""

from __future__ import annotations

import os
import time
from pathlib import Path

import click

from .latency.command import latency

RESULTS = Path(__file__).parent.parent / "results" / "static"


@click.group(invoke_without_command=True)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    show_default="bench/results/static",
    help="Folder for static.json and STATIC.md.",
)
@click.option("--jobs", type=click.IntRange(min=1), default=os.cpu_count() or 1, show_default=True, help="Processes.")
@click.pass_context
def main(context: click.Context, output: Path, jobs: int) -> None:
    """Compile every kernel for every target, execute a part of them, and report what they cost.

    It needs no GPU. The first run takes half an hour or more on two cores. Triton's cache keeps the compiled
    kernels.
    """
    if context.invoked_subcommand is not None:
        return
    from .report import collect, write

    begin = time.perf_counter()
    report = collect(jobs, lambda line: click.echo(f"{time.perf_counter() - begin:6.1f} s  {line}", err=True))
    for path in write(report, output):
        click.echo(f"wrote {path}")


main.add_command(latency)

if __name__ == "__main__":
    main()
