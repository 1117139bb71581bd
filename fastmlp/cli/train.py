"""``fastmlp train``: train an MLP on FashionMNIST or other data, evaluate it, keep checkpoint, logs and pictures.

This file has the options, and `training.py` trains. ``--engine`` is the argument ``engine`` of `fastmlp.train.fit`:
what runs the training steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from fastmlp.activations import ACTIVATIONS
from fastmlp.base.losses import STEP_LOSSES
from fastmlp.step.optimizers import OPTIMIZERS

from . import common
from .config_file import config_option, config_text, given
from .drawing import PICTURES
from .inputs import DEFAULT_SHARE, FASHION_MNIST
from .options import kernel_options, loss_options, optimizer_options
from .ranks import Ranks
from .run_folder import CONFIG, EVALUATION, HISTORY, LAST, SUMMARY, TENSORBOARD, WEIGHTS
from .train_setup import VALUES_LR
from .training import train

DTYPES = ("float32", "float16", "bfloat16", "float64")
# fastmlp.train.schedules and fastmlp.train.engines have the same names, but importing them imports torch.
SCHEDULES = ("constant", "linear", "cosine")
ENGINES = ("step", "autograd")
LOGS = ("csv", "tensorboard")

SCHEDULE_HELP = "Learning rate over the steps; linear and cosine warm up, then fall to 0."
LOSS_HELP = "cross_entropy and softmax_squared_error are of classes, the others of values: y of an .npz file."
VALIDATION_HELP = (
    "Share of the training rows to hold out. The epoch with the least loss on them is kept, and the test set is looked "
    f"at once, at the end.  [default: 0, or {DEFAULT_SHARE} where the data have no test set]"
)
PATIENCE_HELP = (
    "Stop after so many epochs in a row without a lower loss on the held-out rows; needs --validation.  "
    "[default: never]"
)
ENGINE_HELP = (
    "What runs the steps: TrainStep, each step as one operation, or modules, autograd and torch.optim, which have no "
    "options of the loss.  [default: step]"
)
LOG_HELP = f"{HISTORY} alone, or also events for TensorBoard, in the run folder's {TENSORBOARD}/."
RESUME_HELP = (
    "Go on with the run of this folder after its last finished epoch, with the run's own options. --epochs and "
    "--patience may be larger."
)
CONFIG_HELP = "TOML file of options by these names, such as weight-decay = 0.1; the command line counts before it."
_RATES = [f"{name}: {rule.usual['lr']:g}" for name, rule in OPTIMIZERS.items() if "lr" in rule.usual]
LR_DEFAULTS = (
    "[default for sgd by activation: sigmoid 0.5, relu 0.1; for values 1 / last hidden size, "
    f"at most {VALUES_LR}; {', '.join(_RATES)}]"
)
Command = TypeVar("Command", bound=Callable[..., Any])

EPILOG = f"""\b
The run folder gets
  {WEIGHTS} and {CONFIG}: the checkpoint, replaced after every epoch
  (with --validation, after every epoch that is the best so far)
  {LAST}: what --resume needs, replaced after every epoch; it has the path of --data
  {HISTORY}: a line per epoch
  {SUMMARY}: what --json prints; no path outside of the run folder
  {EVALUATION} and {", ".join(PICTURES.values())}:
    what the model gets wrong, and pictures, which fastmlp report draws anew
Without --out, the run folder is runs/SIZES-ACTIVATION-seedSEED, or that with -2, -3 and so on.
A folder of --out that has a run already is refused without --overwrite. Other files in it stay.
Ctrl-C and SIGTERM end the run after some steps at most, and --resume loses none of them. A second
Ctrl-C ends it at once. A run that was killed loses its unfinished epoch.

\b
--data takes
  fashion-mnist (default) or bundled, its subset of 6,000
  torchvision:NAME: FashionMNIST, MNIST, KMNIST, EMNIST, EMNIST:SPLIT, QMNIST, CIFAR10, CIFAR100;
    torchvision's files in ./data or the cache, or downloaded into the cache;
    torchvision:NAME@FOLDER for files in another folder
  FOLDER: train-images-idx3-ubyte and so on, plain or .gz; or one subfolder of images per class,
    perhaps in train/ and test/ (images of one size up to 64 x 64 stay, others become 28 x 28)
  FILE.npz: x [N, ...], uint8 pixels or floating point (which is standardized), and y;
    perhaps x_test, y_test, classes (the names of the classes) and sample_weight (of the rows of x)"""


def _option(name: str, type: Any, default: object, help: str) -> Callable[[Command], Command]:
    return click.option(name, type=type, default=default, show_default=True, help=help)


@click.command("train", short_help="Train an MLP on FashionMNIST, or on your data.", epilog=EPILOG)
@click.option(
    "--sizes",
    type=common.Sizes(),
    help=f"Layer sizes.  [default: {'-'.join(map(str, FASHION_MNIST.sizes))}, with the data's own first and last size]",
)
@_option("--activation", common.Choice(tuple(ACTIVATIONS)), "sigmoid", "Activation of the hidden layers.")
@_option("--dropout", common.Number(0, 1), 0.0, "Share of the hidden layers' outputs that each step drops.")
@_option("--epochs", click.IntRange(1, 1_000_000), 10, "Passes over the data.")
@_option("--batch-size", click.IntRange(1, 2**31 - 1), 128, "Images per step.")
@_option("--optimizer", common.Choice(tuple(OPTIMIZERS)), "sgd", "Update rule.")
@click.option(
    "--lr",
    type=common.Number(0, least_is_open=True),
    help=f"Peak learning rate.  {LR_DEFAULTS}",
)
@optimizer_options()
@_option("--loss", common.Choice(tuple(STEP_LOSSES)), "cross_entropy", LOSS_HELP)
@loss_options
@kernel_options
@_option("--schedule", common.Choice(SCHEDULES), "linear", SCHEDULE_HELP)
@_option("--warmup", common.Number(0, 1), 0.05, "Share of the steps to warm up in.")
@_option("--seed", click.IntRange(0, 2**63 - 1), 0, "Seed of the starting weights and of the order of the images.")
@_option("--dtype", common.Choice(DTYPES), "float32", "Dtype of the parameters.")
@common.machine_options
@click.option("--engine", type=common.Choice(ENGINES), help=ENGINE_HELP)
@common.data_option
@click.option("--validation", type=common.Number(0, 1), help=VALIDATION_HELP)
@click.option("--patience", type=click.IntRange(1), help=PATIENCE_HELP)
@_option("--log", common.Choice(LOGS), "csv", LOG_HELP)
@click.option("--out", type=common.Folder(), metavar="FOLDER", help="Run folder.  [default: a new one in runs/]")
@click.option("--overwrite", is_flag=True, help="Replace the run that --out has.")
@click.option("--resume", type=common.Folder(), metavar="RUN", help=RESUME_HELP)
@click.option("--config", type=common.Folder(), metavar="FILE", is_eager=True, callback=config_option, help=CONFIG_HELP)
@click.option("--print-config", is_flag=True, help="Print the options as a file for --config, and do nothing else.")
@common.json_option
@click.pass_context
def command(ctx: click.Context, resume: str | None, config: str | None, print_config: bool, **options: Any) -> int:
    """Train an MLP on FashionMNIST, or on data of your own, and keep checkpoint, logs and pictures."""
    if print_config:
        click.echo(config_text(ctx))
        return 0
    with Ranks() as ranks:
        return train(options, resume, given(ctx), ranks)
