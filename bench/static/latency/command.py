"""``python -m bench.static latency``: the estimate of a step, kernel by kernel, for whoever tunes tiles."""

from __future__ import annotations

import click

from .constants import SHORT_NAMES

MODE_NAMES = {"float32": "float32", "fp32": "float32", "tf32": "tf32", "bf16": "bfloat16", "bfloat16": "bfloat16"}


@click.command("latency")
@click.option("--gpu", type=click.Choice(list(SHORT_NAMES), case_sensitive=False), default="H100", show_default=True)
@click.option("--batch", type=click.IntRange(1), multiple=True, help="May be repeated.  [default: 64 to 65536]")
@click.option("--mode", type=click.Choice(list(MODE_NAMES)), multiple=True, help="May be repeated.  [default: all]")
@click.option("--detail", is_flag=True, help="Also the sections of each program.")
def latency(gpu: str, batch: tuple[int, ...], mode: tuple[str, ...], detail: bool) -> None:
    """Estimate a training step of 784-512-512-10 from counts. An estimate, never measured."""
    from .constants import CHIPS
    from .eager import eager_us
    from .steps import BATCHES, LATENCY_MODES, recorded, step_estimate

    chip = CHIPS[SHORT_NAMES[gpu]]
    click.echo(f"{chip.name}: microseconds inside a graph, estimate, never measured")
    for name in [MODE_NAMES[m] for m in mode] or LATENCY_MODES:
        for size in batch or BATCHES:
            step = step_estimate(recorded(chip.target, name, size), chip, name)
            eager = eager_us(name, size, chip)
            slower = "; eager is faster" if step.microseconds > eager else ""
            click.echo(
                f"\n{name}, batch {size:,}: {step.microseconds:.1f} us (floor {step.floor:.1f}, eager in a graph "
                f"{eager:.1f}{slower})"
            )
            click.echo(
                f"  {'kernel':22}{'us':>8}  {'programs':>8}{'fit':>4}{'waves':>7}{'waves us':>10}{'matrix':>8}"
                f"{'L2':>8}{'HBM':>8}  bound"
            )
            for kernel, e in step.kernels:
                short = kernel.name.strip("_").removesuffix("_kernel")
                click.echo(
                    f"  {short:22}{e.microseconds:8.2f}  {kernel.programs:8}{kernel.resident:4}{e.waves:7.2f}"
                    f"{e.terms['waves']:10.2f}{e.terms['matrix']:8.2f}{e.terms['L2']:8.2f}{e.terms['HBM']:8.2f}"
                    f"  {e.bound}{'  (' + kernel.note + ')' if kernel.note else ''}"
                )
                if detail:
                    for path in kernel.paths:
                        click.echo(f"      {path.programs} programs {path.name}")
                        for s in path.sections:
                            d = s.demand
                            click.echo(
                                f"        {s.name:14} x{s.passes:<8g} latency {s.latency:7.0f}  issue {d.issue:6.0f}  "
                                f"units {d.units:6.0f}  matrix {d.matrix:6.0f}  shared {d.shared:6.0f}  "
                                f"loaded {d.loaded:8.0f}"
                            )
