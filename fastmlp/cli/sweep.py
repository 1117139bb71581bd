"""``fastmlp sweep``: train many MLPs that differ in settings, seed and fold, and rank the settings.

This file has the options, and `sweeping.py` does the work.
"""

from __future__ import annotations

from typing import Any

import click

from fastmlp.activations import ACTIVATIONS
from fastmlp.base.losses import STEP_LOSSES
from fastmlp.step.optimizers import OPTIMIZERS

from . import common
from .inputs import DEFAULT_SHARE, FASHION_MNIST
from .lists import Seeds, Several
from .options import kernel_options, loss_options, optimizer_options
from .run_folder import CONFIG, WEIGHTS
from .sweep_folder import GROUPS, PICTURE, PLAN, RESULTS, TABLE
from .train import DTYPES, LOSS_HELP, LR_DEFAULTS, SCHEDULE_HELP, SCHEDULES, _option

EPILOG = f"""\b
A member is one network: a setting, a seed and perhaps a fold. Every combination is a member.
Members of one shape and activation are trained together, as one ensemble, and each as
fastmlp train would train it alone. A member that diverges stops, and the table says so.
Settings are ranked by the mean of their members: of the accuracy, or for values of the loss, on
the held-out rows, at each member's best epoch. The test set is looked at once, by the best member.

\b
The folder gets
  {RESULTS} and {TABLE}: the settings by rank, and a row per member
  {PICTURE}: the scores against the learning rate, or a bar per setting
  {WEIGHTS} and {CONFIG}: the best member, for fastmlp eval and predict
  {PLAN} and {GROUPS}/: what --resume needs; they have the path of --data, and may be deleted
Without --out, the folder is runs/sweep, or runs/sweep-2 and so on.

\b
Several processes, also on several machines with one file system, divide the groups:
  torchrun --nproc-per-node 4 --no-python fastmlp sweep ...
--data takes what fastmlp train takes."""


@click.command("sweep", short_help="Train many networks at once, and rank their settings.", epilog=EPILOG)
@click.option(
    "--sizes",
    type=common.Sizes(),
    multiple=True,
    help="Layer sizes; may be given several times.  "
    f"[default: {'-'.join(map(str, FASHION_MNIST.sizes))}, with the data's own first and last size]",
)
@_option(
    "--activation",
    Several(common.Choice(tuple(ACTIVATIONS)), "relu,tanh"),
    "sigmoid",
    f"Activations of the hidden layers: {', '.join(ACTIVATIONS)}.",
)
@click.option(
    "--lr",
    type=Several(common.Number(0, least_is_open=True), "0.1,0.01"),
    help=f"Peak learning rates.  {LR_DEFAULTS}",
)
@click.option(
    "--momentum", type=Several(common.Number(0, 1), "0,0.9"), help="Momenta of sgd and rmsprop.  [default: 0.9 or 0]"
)
@click.option("--weight-decay", type=Several(common.Number(0), "0,1e-4"), help="Weight decays.  [default: 0]")
@click.option(
    "--dropout",
    type=Several(common.Number(0, 1), "0,0.2"),
    help="Shares of the hidden layers' outputs that each step drops.  [default: 0]",
)
@_option("--seeds", Seeds(), "1", "How many seeds, from 0 on, or a list of seeds such as 3,7.")
@click.option("--folds", type=click.IntRange(2), help="Folds: a member for each, trained on the others.")
@click.option(
    "--validation",
    type=common.Number(0, 1, least_is_open=True),
    help=f"Share of the training rows to hold out, without --folds.  [default: {DEFAULT_SHARE}]",
)
@_option("--epochs", click.IntRange(1, 1_000_000), 10, "Passes over the data.")
@_option("--batch-size", click.IntRange(1, 2**31 - 1), 128, "Rows per step of each member.")
@_option("--optimizer", common.Choice(tuple(OPTIMIZERS)), "sgd", "Update rule.")
@optimizer_options(but=("momentum", "weight_decay"))
@_option("--loss", common.Choice(tuple(STEP_LOSSES)), "cross_entropy", LOSS_HELP)
@loss_options
@kernel_options
@_option("--schedule", common.Choice(SCHEDULES), "linear", SCHEDULE_HELP)
@_option("--warmup", common.Number(0, 1), 0.05, "Share of the steps to warm up in.")
@_option("--dtype", common.Choice(DTYPES), "float32", "Dtype of the parameters.")
@common.machine_options
@common.data_option
@click.option(
    "--group",
    type=click.IntRange(1),
    help="Members that are trained together at most.  [default: as many as half of the free memory takes]",
)
@click.option("--out", type=common.Folder(), metavar="FOLDER", help="Its folder.  [default: a new one in runs/]")
@click.option("--overwrite", is_flag=True, help="Replace the results that --out has.")
@click.option(
    "--resume",
    type=common.Folder(),
    metavar="FOLDER",
    help="Go on with the sweep of this folder, with its own options: only what is not finished is trained.",
)
@common.json_option
@click.pass_context
def command(ctx: click.Context, resume: str | None, as_json: bool, **options: Any) -> int:
    """Train many MLPs at once, which differ in settings, seed and fold, and rank the settings."""
    from .ranks import Ranks
    from .sweeping import sweep

    if resume is not None:
        source = click.core.ParameterSource.COMMANDLINE
        given = [name for name in options if ctx.get_parameter_source(name) == source]
        if given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise common.UserError(f"--resume takes the options of the sweep that it goes on with; leave out {names}")
    with Ranks() as ranks:
        return sweep(options, resume, as_json, ranks)
