"""``python -m bench`` and ``fastmlp bench``: run a preset, compare two runs, write the report, tune the tiles."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

__all__ = ["cli"]


#: The key of the arguments in click's context.
_ARGUMENTS = "bench.arguments"


class _Error(click.ClickException):
    """One line on stderr, exit code 2."""

    exit_code = 2


class _Place(click.Path):
    """A path that is not empty: an empty one would be the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path; a usage error if there is none."""
        if value == "":
            self.fail("expected a path, got an empty text; '.' is the current folder", param, ctx)
        return super().convert(value, param, ctx)


def _log(text: str) -> None:
    click.echo(text, err=True)


def _options(command: Any) -> Any:
    for option in (
        click.option(
            "--report/--no-report", default=True, show_default=True, help="Write RESULTS.md and the plots afterwards."
        ),
        click.option("--out", type=_Place(path_type=Path, file_okay=False), help="Instead of bench/results."),
        click.option("--threads", type=click.IntRange(1), help="Threads of the CPU.  [default: one per core]"),
        click.option("--device", default="auto", show_default=True, metavar="DEVICE", help="cpu, cuda or cuda:N."),
    ):
        command = option(command)
    return command


def _device(name: str, threads: int | None) -> str:
    """The device of that name; sets the CPU's threads."""
    import torch

    from bench.measure.machine import pin_threads
    from fastmlp.cli.common import select_device

    device = select_device(name)
    pin_threads(threads)
    if device.type != "cuda":
        return str(device)
    index = device.index or 0
    torch.cuda.set_device(index)  # where events are recorded and graphs captured
    return f"cuda:{index}"


#: Options that name places of files, which differ on the machine of whoever repeats a command.
_PLACES = ("--out", "--data")


def _command_line(ctx: click.Context, part: str | None = None) -> str:
    """The command as given, without the places of files, for captions.

    ``part`` is a command that ``full`` runs. Its results name the command that repeats them alone.
    """
    name, *arguments = ctx.meta[_ARGUMENTS]
    left_out: tuple[str, ...] = _PLACES
    if part is not None and part != name:
        left_out = (*_PLACES, "--rounds" if part == "accuracy" else "--seeds")
        name = part
    words, given = [name], iter(arguments)
    for word in given:
        if word in left_out:
            next(given)
        elif not word.startswith(tuple(f"{option}=" for option in left_out)):
            words.append(word)
    group = ctx.parent
    assert group is not None
    return f"{group.command_path} {shlex.join(words)}"


def _finish(document: dict[str, Any], out: Path | None, report: bool) -> None:
    from bench.measure.results import FOLDER, save

    folder = FOLDER if out is None else out
    _log(f"results: {save(document, folder)}")
    if report:
        _report(folder, None if out is None else out / "RESULTS.md")


def _report(folder: Path, target: Path | None) -> None:
    from bench.measure.machine import ROOT
    from bench.measure.results import FOLDER, load_all
    from bench.report.markdown import write_report
    from bench.report.readme import update_readme

    try:
        paths = write_report(folder, target or ROOT / "bench" / "RESULTS.md")
        if folder == FOLDER and target is None:
            update_readme(load_all(folder))
    except (OSError, ValueError) as error:
        raise _Error(str(error)) from error
    _log(f"report: {paths[0]}, {len(paths) - 1} plots")


class _Group(click.Group):
    """Keeps the arguments for results and captions; the default command is ``quick``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in ("-h", "--help")):
            args = ["quick", *args]
        ctx.meta[_ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)


@click.group("bench", cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def cli() -> None:
    """Benchmarks of fastmlp beside what else trains small MLPs. The default command is quick.

    Times are medians over rounds in which all contenders take turns. A contender whose result is wrong is not timed.
    Results go to bench/results/DEVICE/, the report to bench/RESULTS.md.
    """


def _run(name: str, ctx: click.Context, device: str, rounds: int | None, out: Path | None, report: bool) -> None:
    from bench.measure.runner import run_preset
    from bench.report.tables import print_run

    from .presets import preset

    document = run_preset(preset(name, device), device, _command_line(ctx, name), _log, rounds=rounds)
    print_run(document)
    _finish(document, out, report)


def _preset_command(name: str, text: str) -> None:
    @cli.command(name, help=text)
    @click.option("--rounds", type=click.IntRange(1), help="Turns of each contender.  [default: the preset's]")
    @_options
    @click.pass_context
    def command(
        ctx: click.Context, device: str, threads: int | None, rounds: int | None, out: Path | None, report: bool
    ) -> None:
        _run(name, ctx, _device(device, threads), rounds, out, report)


_preset_command("quick", "The reference network at four batch sizes and one of each operation; under 2 minutes.")
_preset_command("scaling", "A training step against batch size, width and depth: the curves of the report.")
_preset_command("online", "60,000 samples one by one, in five stretches.")
_preset_command("members", "One step of 1 to 1,000 networks, one after the other and all together.")
_preset_command("shapes", "Steps of networks that people train on a CPU, with SGD and AdamW.")


@cli.command("full")
@click.option("--rounds", type=click.IntRange(1), help="Turns of each contender.  [default: the presets']")
@click.option(
    "--seeds", type=click.IntRange(1), default=5, show_default=True, help="Runs of each contender to an accuracy."
)
@click.option("--data", metavar="FOLDER", help="Folder of the full FashionMNIST.  [default: the usual places]")
@_options
@click.pass_context
def full(
    ctx: click.Context,
    device: str,
    threads: int | None,
    rounds: int | None,
    seeds: int,
    data: str | None,
    out: Path | None,
    report: bool,
) -> None:
    """Everything: all operations and steps, the curves of scaling and members, and the time to accuracy."""
    used = _device(device, threads)
    for name in ("full", "scaling", "online", "members"):
        _run(name, ctx, used, rounds, out, False)
    _run_accuracy(ctx, used, data, seeds, (), None, out, report)


@cli.command("accuracy")
@click.option("--seeds", type=click.IntRange(1), default=5, show_default=True, help="Runs of each contender.")
@click.option(
    "--target", "targets", type=float, multiple=True, help="Test accuracy, 0 to 1; may be given several times."
)
@click.option(
    "--epochs",
    type=click.IntRange(1),
    help="Epochs at most; a falling learning rate ends earlier.  [default: the contender's]",
)
@click.option(
    "--data", metavar="FOLDER", help="Folder of the full FashionMNIST, or 'bundled'.  [default: the usual places]"
)
@_options
@click.pass_context
def accuracy(
    ctx: click.Context,
    device: str,
    threads: int | None,
    seeds: int,
    targets: tuple[float, ...],
    epochs: int | None,
    data: str | None,
    out: Path | None,
    report: bool,
) -> None:
    """Seconds of training on FashionMNIST to 88.33, 89 and 90 % test accuracy."""
    _run_accuracy(ctx, _device(device, threads), data, seeds, targets, epochs, out, report)


def _run_accuracy(
    ctx: click.Context,
    device: str,
    data: str | None,
    seeds: int,
    targets: tuple[float, ...],
    epochs: int | None,
    out: Path | None,
    report: bool,
) -> None:
    from bench.accuracy.run import TARGETS, load_data, run_accuracy
    from bench.report.tables import print_accuracy

    try:
        loaded = load_data(data, device)
    except (OSError, RuntimeError, ValueError) as error:
        raise _Error(str(error)) from error
    command = _command_line(ctx, "accuracy")
    document = run_accuracy(loaded, command, _log, seeds=seeds, targets=targets or TARGETS, epochs=epochs)
    print_accuracy(document)
    _finish(document, out, report)


@cli.command("compare")
@click.argument("before", type=_Place(path_type=Path, dir_okay=False))
@click.argument("after", type=_Place(path_type=Path, dir_okay=False))
@click.option("--check", is_flag=True, help="Exit with 1 if anything became slower.")
def compare_command(before: Path, after: Path, check: bool) -> int:
    """What became slower or faster between two JSON files, by more than the spread of both."""
    from bench.measure.results import load
    from bench.report.compare import compare, print_changes

    try:
        documents = load(before), load(after)
        changes = compare(*documents)
    except (OSError, ValueError) as error:
        raise _Error(str(error)) from error
    print_changes(*documents, changes)
    return int(check and any(change.verdict == "slower" for change in changes))


@cli.command("report")
@click.option("--results", type=_Place(path_type=Path, file_okay=False), help="Instead of bench/results.")
@click.option("--out", type=_Place(path_type=Path, dir_okay=False), help="Instead of bench/RESULTS.md.")
def report_command(results: Path | None, out: Path | None) -> None:
    """Write RESULTS.md, the plots and the speed figures of README.md anew, from the JSON files alone."""
    from bench.measure.results import FOLDER

    _report(FOLDER if results is None else results, out)


@cli.command("host")
@click.option("--rounds", type=click.IntRange(1), default=11, show_default=True, help="Turns of each kind of step.")
@click.option("--json", "as_json", is_flag=True, help="Print the JSON.")
@click.pass_context
def host_command(ctx: click.Context, rounds: int, as_json: bool) -> None:
    """Microseconds per training step that the host works, on a stand-in for a GPU that does nothing."""
    try:
        from .host import measure, print_host

        document = measure(rounds, _command_line(ctx))
    except (ImportError, RuntimeError) as error:
        raise _Error(str(error)) from error
    if as_json:
        click.echo(json.dumps(document, indent=1))
    else:
        print_host(document)


@cli.command("tune")
@click.option("--device", default="cuda", show_default=True, metavar="DEVICE", help="cuda or cuda:N.")
@click.option(
    "--dtype",
    "dtypes",
    type=click.Choice(("float32", "float16", "bfloat16")),
    multiple=True,
    default=("float32", "bfloat16"),
    show_default=True,
)
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, default=(64, 512, 4096), show_default=True)
def tune_command(device: str, dtypes: tuple[str, ...], batches: tuple[int, ...]) -> None:
    """Find the fastest tiles of the kernels on this GPU and keep them in the user's cache."""
    import torch

    if not torch.cuda.is_available():
        raise _Error("tuning measures kernels on a real GPU, and torch finds none here; run it on a machine with one")
    from .tune import save_table, tune

    _log(f"tiles: {save_table(tune(_device(device, None), dtypes, batches, _log))}")


def main() -> int:
    """Run the command line; returns the exit code."""
    from fastmlp.cli.common import termination

    try:
        with termination():
            result = cli.main(standalone_mode=False, prog_name="python -m bench")
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())
