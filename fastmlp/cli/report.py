"""``fastmlp report``: the pictures of a run folder, drawn anew from its files."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import common
from .drawing import PICTURES, draw
from .inputs import Format
from .run_folder import EVALUATION, HISTORY, SUMMARY
from .sweep_folder import PLAN

if TYPE_CHECKING:
    from fastmlp.train import History
    from fastmlp.train.judged import Judged

#: The largest summary that is read.
MOST = 1 << 30


@click.command("report", short_help="Draw the pictures of a run folder anew.")
@click.argument("run", type=common.Folder(), metavar="RUN")
@common.json_option
def command(run: str, as_json: bool) -> int:
    """Draw the pictures of RUN, a run folder, anew from its files.

    The data are not needed. A run that has not ended has curves and weights, but no confusion matrix and no mistakes.
    """
    import torch

    from fastmlp.train.checkpoint import read_checkpoint

    folder = Path(run)
    if not folder.is_dir():
        raise common.UserError(f"{run} is no folder; expected a run folder of 'fastmlp train'")
    if (folder / PLAN).exists():
        raise common.UserError(
            f"{run} is the folder of a sweep; 'fastmlp sweep --resume {shlex.quote(run)}' writes its tables and its "
            "picture anew"
        )
    model, config = common.load_model(run, torch.device("cpu"))
    form = Format.of_checkpoint(config, model.sizes, run)
    with common.user_errors():
        about, history = _summary(folder, config, form.loss)
        judged = _judged(folder)
        best = read_checkpoint(folder).metrics.get("epoch")
    drawn, failed = draw(folder, model, form, history, about, judged)
    for name, reason in failed.items():
        common.say("warning", f"{name} not drawn ({reason})")
    if as_json:
        pictures = {name: str(path) for name, path in drawn.items()}
        click.echo(json.dumps({"run": run, "epochs": len(history.epochs), "best_epoch": best, "pictures": pictures}))
    else:
        for name in PICTURES:
            click.echo(f"{name}: {drawn.get(name, 'nothing to draw')}")
    return common.Failure.exit_code if failed else 0


def _summary(folder: Path, config: dict[str, Any], loss: str) -> tuple[dict[str, Any], History]:
    """(what the summary says of the run, the history); from the checkpoint and the log where a run has not ended."""
    from fastmlp.base.atomic import read_file
    from fastmlp.train import EpochResult, History
    from fastmlp.train.logs import read_csv

    try:
        summary = json.loads(read_file(folder / SUMMARY, MOST))
    except FileNotFoundError:
        training = config.get("training")
        if not isinstance(training, dict):
            raise common.UserError(
                f"{folder} has no {SUMMARY}, and its checkpoint does not say how it was made"
            ) from None
        return {**training, "config": {**training, **config}}, read_csv(folder / HISTORY, loss)
    try:
        return summary, History([EpochResult(**result) for result in summary["history"]], loss)
    except (TypeError, KeyError) as error:
        raise common.UserError(f"{folder / SUMMARY} is damaged: {type(error).__name__}: {error}") from error


def _judged(folder: Path) -> Judged | None:
    from fastmlp.train.judged import load_judged

    try:
        return load_judged(folder / EVALUATION)
    except FileNotFoundError:
        return None
