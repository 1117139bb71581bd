"""The command line: ``fastmlp train | sweep | eval | predict | report | bench | reproduce | doctor``, one module each.

A command is a module of this package that `COMMANDS` names and that has a ``click.Command`` called ``command``. Modules
import torch inside their functions only, so that ``--help`` does not wait for torch.

Exit codes: 0 done; 1 the input was right and the work failed (a check failed, training diverged, the disk is full);
2 the input was wrong; 130 Ctrl-C; 143 SIGTERM. Every error is one line on stderr.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence

import click

from .common import Suggesting, Terminated, say, termination

__all__ = ["COMMANDS", "main"]

COMMANDS = ("train", "sweep", "eval", "predict", "report", "bench", "reproduce", "doctor")
"""Every command, in the order of the help."""


class Commands(Suggesting):
    """Imports a command's module when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, or None."""
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"{__name__}.{cmd_name}").command


def _show_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from fastmlp import __version__

        click.echo(f"fastmlp {__version__}")
        ctx.exit()


@click.group(
    "fastmlp",
    cls=Commands,
    invoke_without_command=True,
    help="Train and run multilayer perceptrons fast. FashionMNIST is the reference workload.",
    epilog="'fastmlp COMMAND --help' lists the options of a command; 'fastmlp doctor' checks this machine.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_show_version, help="Print the version."
)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """``fastmlp``, which without a command prints its help."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line on ``args`` (default: sys.argv); returns the exit code."""
    with termination(), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            result = cli.main(args=None if args is None else list(args), prog_name="fastmlp", standalone_mode=False)
        except click.ClickException as error:
            say("error", _describe(error))
            return error.exit_code
        except (click.Abort, KeyboardInterrupt) as error:
            if isinstance(error.__cause__ or error, Terminated):
                click.echo("fastmlp: terminated", err=True)
                return 143
            click.echo("fastmlp: interrupted", err=True)
            return 130
    return result if isinstance(result, int) else 0


def _describe(error: click.ClickException) -> str:
    """The message in one line; an error about the options also names the help that lists them."""
    message = " ".join(error.format_message().split())
    if isinstance(error, click.UsageError) and error.ctx is not None:
        stop = "" if message.endswith((".", "?", "!")) else "."
        return f"{message}{stop} See '{error.ctx.command_path} --help'."
    return message


def _show_warning(message: Warning | str, *place: object, **options: object) -> None:
    """A warning in one line, without its place in the source."""
    say("warning", str(message))
