"""``fastmlp bench``: the command of bench/ beside the package in a checkout; an installed wheel does not have it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import click

from .common import UserError


def checkout() -> Path | None:
    """The root of the checkout that has this package and the benchmarks; None in an installation."""
    root = Path(__file__).resolve().parent.parent.parent
    return root if all((root / name).is_file() for name in ("pyproject.toml", "bench/cli.py")) else None


def _absent() -> click.Command:
    """The command where there are no benchmarks: an error for any arguments."""

    @click.command(
        "bench",
        short_help="Benchmarks beside what else trains small MLPs (in a checkout).",
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
    def command() -> None:
        """Benchmarks beside what else trains small MLPs; they are in fastmlp's repository, not in its wheel."""
        raise UserError(
            "the benchmarks are not part of the installed package; clone fastmlp's repository, and run "
            "'pip install -e .[bench]' and 'fastmlp bench' there"
        )

    return command


def _present(root: Path) -> click.Command:
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module("bench.cli").cli


_root = checkout()
command = _absent() if _root is None else _present(_root)
