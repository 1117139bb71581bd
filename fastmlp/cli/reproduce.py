"""``fastmlp reproduce``: run the systems of the source documents (``fastmlp.recipes``) and compare the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fastmlp.base.names import unknown

from . import common

if TYPE_CHECKING:
    from fastmlp.recipes import Outcome

EPILOG = """\b
The exit code is 1 if a verdict is bad. The full form needs the full FashionMNIST and takes some
minutes. --quick takes seconds on the subset of 6,000 images that comes with fastmlp. It compares
with the documents' own algorithms instead of their accuracies."""


@click.command("reproduce", short_help="Run the systems of the source documents.", epilog=EPILOG)
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--all", "every", is_flag=True, help="Every system.")
@click.option("--list", "listing", is_flag=True, help="List the systems and leave.")
@click.option("--quick", is_flag=True, help="The form that takes seconds.")
@common.fashion_mnist_option
@click.option(
    "--plot", "folder", type=common.Folder(), metavar="FOLDER", help="Write a plot of each system, where it has one."
)
@common.json_option
def command(
    names: tuple[str, ...], every: bool, listing: bool, quick: bool, data: str | None, folder: str | None, as_json: bool
) -> int:
    """Run the systems that four source documents describe, and say how their results compare.

    The documents are the backpropagation blog post, its formulas, the notebook "Introduction to Neural Networks" and
    chapter 7 of "Explanatory Notes for 6.390".
    """
    from fastmlp.recipes import RECIPES, Settings, run_recipe

    if listing:
        _list(as_json)
        return 0
    wrong = [name for name in names if name not in RECIPES]
    if wrong:
        raise click.UsageError(unknown("system", wrong[0], RECIPES))
    if every == bool(names):
        raise click.UsageError(f"give the names of systems, or --all; there are {', '.join(RECIPES)}")
    if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
        raise common.UserError(f"--plot {folder} is a file; expected a folder, or a name that is free for one")

    chosen = [name for name in RECIPES if every or name in names]
    outcomes: list[Outcome] = []
    dataset = None
    with _Status(as_json) as status:
        settings = Settings(quick=quick, data=data)
        if any(name not in ("outer-product", "derivatives") for name in chosen):
            status.show("reading the data")
            with common.user_errors():
                train, test = settings.images()
            dataset = f"{train.published}, {test.published}"
            click.echo(f"data: {train.source}, {test.source}", err=as_json)
        for name in chosen:
            settings.progress = lambda text, name=name: status.show(f"{name}: {text}")  # type: ignore[misc]
            status.show(name)
            outcome = run_recipe(name, settings)
            outcomes.append(outcome)
            status.table(outcome)
    plots = _write_plots(outcomes, Path(folder)) if folder is not None else []
    good = all(outcome.good for outcome in outcomes)
    seconds = sum(outcome.seconds for outcome in outcomes)
    bad = sum(not result.good for outcome in outcomes for result in outcome.results)
    count = sum(len(outcome.results) for outcome in outcomes)
    for path in plots:
        click.echo(f"plot: {path}", err=as_json)
    verdict = "all good" if good else f"{bad} bad"
    click.echo(f"{count} results of {len(outcomes)} systems in {seconds:.1f} s: {verdict}", err=as_json)
    if as_json:
        summary = {
            "good": good,
            "quick": quick,
            "seconds": seconds,
            "dataset": dataset,
            "systems": [outcome.as_dict() for outcome in outcomes],
            "plots": plots,
            "versions": common.versions(),
        }
        click.echo(json.dumps(summary))
    return 0 if good else 1


class _Status:
    """Shows what runs now, on a terminal only, and the tables, on stdout or (with --json) stderr."""

    def __init__(self, to_stderr: bool) -> None:
        import sys

        from rich.console import Console

        stream = sys.stderr if to_stderr else sys.stdout
        # In a file, lines have the length of the longest line, so that none is broken or cut.
        self.console = Console(file=stream, highlight=False, width=None if stream.isatty() else 200)
        self.status = self.console.status("") if stream.isatty() else None

    def __enter__(self) -> _Status:
        if self.status is not None:
            self.status.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.status is not None:
            self.status.stop()

    def show(self, text: str) -> None:
        """Replace the line that says what is being done."""
        if self.status is not None:
            self.status.update(text)

    def table(self, outcome: Outcome) -> None:
        """The results of one system."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        from fastmlp.recipes import DOCUMENTS

        table = Table(title=outcome.name, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for header in ("document", "what it says", "obtained", "tolerance", "verdict"):
            table.add_column(header)
        table.add_column("seconds", justify="right")
        for result in outcome.results:
            verdict = "[green]good[/]" if result.good else "[bold red]BAD[/]"
            texts = DOCUMENTS[result.document], result.claim, result.obtained, result.tolerance
            table.add_row(*map(escape, texts), verdict, f"{result.seconds:.1f}")
        self.console.print(table)


def _list(as_json: bool) -> None:
    from fastmlp.recipes import DOCUMENTS, RECIPES

    if as_json:
        fields = ("name", "documents", "summary")
        click.echo(json.dumps([{field: getattr(recipe, field) for field in fields} for recipe in RECIPES.values()]))
        return
    width = max(map(len, RECIPES))
    for recipe in RECIPES.values():
        documents = ", ".join(DOCUMENTS[number] for number in recipe.documents)
        click.echo(f"{recipe.name:<{width}}  {recipe.summary} ({documents})")


def _write_plots(outcomes: list[Outcome], folder: Path) -> list[str]:
    """Draw every plot of the outcomes into ``folder``; returns the files."""
    from matplotlib.figure import Figure

    from fastmlp.train.plots import save

    paths = []
    for outcome in outcomes:
        for name, draw in outcome.plots.items():
            figure = Figure(figsize=(9.6, 4.2), dpi=150, layout="constrained")
            draw(figure)
            path = folder / f"{name}.png"
            with common.user_errors((OSError,)):
                save(figure, path)
            paths.append(str(path))
    return paths
