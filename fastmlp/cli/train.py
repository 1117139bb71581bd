"""``fastmlp train``: train an MLP on FashionMNIST or other data, evaluate it, keep checkpoint and curves.

``--engine`` is the argument ``engine`` of `fastmlp.train.fit`: what runs the training steps.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fastmlp.activations import ACTIVATIONS
from fastmlp.base.losses import STEP_LOSSES
from fastmlp.train.scores import FIT_LOSSES, takes_values

from . import common
from .inputs import DEFAULT_SHARE, FASHION_MNIST, Format, check_sizes, divided
from .report import Reporter, device_name, scores
from .run_folder import CONFIG, CURVES, SUMMARY, WEIGHTS, Run, check_run_folder

if TYPE_CHECKING:
    from fastmlp.train import EpochResult

DTYPES = ("float32", "float16", "bfloat16", "float64")
# fastmlp.train.schedules and fastmlp.train.engines have the same names, but importing them imports torch.
SCHEDULES = ("constant", "linear", "cosine")
ENGINES = ("step", "autograd")

SCHEDULE_HELP = "Learning rate over the steps; linear and cosine warm up, then fall to 0."
LOSS_HELP = "cross_entropy and softmax_squared_error are of classes, the others of values: y of an .npz file."
VALIDATION_HELP = (
    "Share of the training rows to hold out. The epoch with the least loss on them is kept, and the test set is looked "
    f"at once, at the end.  [default: 0, or {DEFAULT_SHARE} where the data have no test set]"
)
ENGINE_HELP = (
    "What runs the steps: TrainStep, each step as one operation, or modules, autograd and torch.optim.  "
    "[default: step, or autograd for a loss that TrainStep does not have]"
)
#: The largest default learning rate for values. The curvature of such a loss grows with the width of the last hidden
#: layer, so the default is 1 / width.
VALUES_LR = 0.05
Command = TypeVar("Command", bound=Callable[..., Any])

EPILOG = f"""\b
The run folder gets
  {WEIGHTS} and {CONFIG}: the checkpoint, replaced after every epoch
  (with --validation, after every epoch that is the best so far)
  {CURVES}: loss and accuracy over the epochs
  {SUMMARY}: what --json prints; no path outside of the run folder
Without --out, the run folder is runs/SIZES-ACTIVATION-seedSEED, or that with -2, -3 and so on.
A folder of --out that has a run already is refused without --overwrite. Other files in it stay.

\b
--data takes
  fashion-mnist (default) or bundled, its subset of 6,000
  torchvision:NAME: FashionMNIST, MNIST, KMNIST, EMNIST, EMNIST:SPLIT, QMNIST, CIFAR10, CIFAR100;
    torchvision's files in ./data or the cache, or downloaded into the cache;
    torchvision:NAME@FOLDER for files in another folder
  FOLDER: train-images-idx3-ubyte and so on, plain or .gz; or one subfolder of images per class,
    perhaps in train/ and test/ (images of one size up to 64 x 64 stay, others become 28 x 28)
  FILE.npz: x [N, ...], uint8 pixels or floating point (which is standardized), and y;
    perhaps x_test, y_test, and classes, the names of the classes"""


def _option(name: str, type: Any, default: object, help: str) -> Callable[[Command], Command]:
    return click.option(name, type=type, default=default, show_default=True, help=help)


@click.command("train", short_help="Train an MLP on FashionMNIST, or on your data.", epilog=EPILOG)
@click.option(
    "--sizes",
    type=common.Sizes(),
    help=f"Layer sizes.  [default: {'-'.join(map(str, FASHION_MNIST.sizes))}, with the data's own first and last size]",
)
@_option("--activation", common.Choice(tuple(ACTIVATIONS)), "sigmoid", "Activation of the hidden layers.")
@_option("--epochs", click.IntRange(1, 1_000_000), 10, "Passes over the data.")
@_option("--batch-size", click.IntRange(1, 2**31 - 1), 128, "Images per step.")
@click.option(
    "--lr",
    type=common.Number(0, least_is_open=True),
    help="Peak learning rate.  [default: by activation: sigmoid 0.5, relu 0.1; for values 1 / last hidden size, at "
    f"most {VALUES_LR}]",
)
@_option("--loss", common.Choice(tuple(FIT_LOSSES)), "cross_entropy", LOSS_HELP)
@_option("--schedule", common.Choice(SCHEDULES), "linear", SCHEDULE_HELP)
@_option("--warmup", common.Number(0, 1), 0.05, "Share of the steps to warm up in.")
@_option("--momentum", common.Number(0, 1), 0.9, "SGD's momentum.")
@_option("--nesterov/--no-nesterov", None, True, "Nesterov's or plain momentum.")
@_option("--weight-decay", common.Number(0), 0.0, "SGD's weight decay.")
@_option("--seed", click.IntRange(0, 2**63 - 1), 0, "Seed of the starting weights and of the order of the images.")
@_option("--dtype", common.Choice(DTYPES), "float32", "Dtype of the parameters.")
@common.machine_options
@click.option("--engine", type=common.Choice(ENGINES), help=ENGINE_HELP)
@common.data_option
@click.option("--validation", type=common.Number(0, 1), help=VALIDATION_HELP)
@click.option("--out", type=common.Folder(), metavar="FOLDER", help="Run folder.  [default: a new one in runs/]")
@click.option("--overwrite", is_flag=True, help="Replace the run that --out has.")
@common.json_option
def command(
    sizes: tuple[int, ...] | None,
    activation: str,
    lr: float | None,
    loss: str,
    dtype: str,
    device: str,
    backend: str,
    engine: str | None,
    data: str | None,
    validation: float | None,
    out: str | None,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> int:
    """Train an MLP on FashionMNIST, or on data of your own, and keep checkpoint and curves."""
    if out is not None:
        check_run_folder(Path(out), overwrite)

    import torch

    import fastmlp
    from fastmlp.data.load import BUNDLED, DEFAULT, TORCHVISION
    from fastmlp.train import DivergenceError, History, fit
    from fastmlp.train.initial import LEARNING_RATES, initialize_
    from fastmlp.train.scores import checked, metric_of

    if sizes is not None and data in (None, DEFAULT, BUNDLED):
        check_sizes(sizes, "--sizes", FASHION_MNIST)
    if engine == "step" and loss not in STEP_LOSSES:
        raise common.UserError(f"--engine step does not have the loss {loss}; use --engine autograd, or leave it out")
    used_device = common.select_device(device)
    used_backend = common.select_backend(backend, used_device, getattr(torch, dtype))
    engine = engine or ("step" if loss in STEP_LOSSES else "autograd")
    train, test = common.load_data(data, used_device, loss)
    train, held_out = divided(train, test, validation, settings["seed"])
    form = Format.of(train, loss)
    sizes = form.sizes if sizes is None else sizes
    check_sizes(sizes, "--sizes", form)
    default_lr = min(VALUES_LR, 1 / sizes[-2]) if takes_values(loss) else LEARNING_RATES[activation]
    settings = {"lr": default_lr if lr is None else lr, "loss": loss, "engine": engine, **settings}
    train = form.fitted(train, getattr(torch, dtype))
    held_out, test = (None if part is None else form.fitted(part, getattr(torch, dtype)) for part in (held_out, test))
    parts = [part for part in (train, held_out, test) if part is not None]
    with common.user_errors():
        try:
            model = fastmlp.MLP(sizes, activation, device=used_device, dtype=getattr(torch, dtype))
        except (RuntimeError, MemoryError) as error:
            if not common.is_out_of_memory(error):
                raise
            raise common.UserError(f"{used_device} has no memory for such a network; use smaller --sizes") from error
        for part in parts:
            checked(model, part, loss)
    initialize_(model, settings["seed"])

    model_config = {"sizes": list(sizes), "activation": activation, "bias": True, "dtype": dtype}
    about: dict[str, Any] = {
        "device": str(used_device),
        "device_name": device_name(used_device),
        "backend": used_backend,
        "dataset": train.published,
        "test_dataset": None if test is None else test.published,
        "versions": common.versions(),
    }
    if held_out is not None:
        about["validation_dataset"] = held_out.published
    entries = {**model_config, **form.as_config(), "training": {**settings, **about}}
    if data is not None and data.startswith(TORCHVISION) and "@" not in data:
        entries["data"] = data
    start = time.perf_counter()
    name = f"{'-'.join(map(str, sizes))}-{activation}-seed{settings['seed']}"
    with Reporter(settings["epochs"], to_stderr=as_json) as reporter, Run(out, name, overwrite) as run:
        reporter.line(f"{'-'.join(map(str, sizes))} {activation}, {dtype}, {settings['engine']} engine")
        reporter.line(f"data: {', '.join(part.source for part in parts)}")
        reporter.line(f"device: {about['device']} ({about['device_name']}), backend {used_backend}")
        seen = History(loss=loss)

        def on_epoch(result: EpochResult) -> None:
            reporter.epoch(result)
            seen.epochs.append(result)
            if seen.best is result or held_out is None:
                run.save(model, entries, result)

        try:
            history = fit(
                model, train, test, validation=held_out, on_epoch=on_epoch, on_progress=reporter.progress, **settings
            )
            best = history.best
            kinds = (metric_of(loss), "loss")
            judged = {f"test_{kind}": vars(best)[f"test_{kind}"] for kind in kinds}
            if held_out is not None:
                run.save(model, entries, best)  # now with its results on the test data
                judged |= {f"validation_{kind}": vars(best)[f"validation_{kind}"] for kind in kinds}
                judged["best_epoch"] = best.epoch
            summary: dict[str, Any] = {
                **judged,
                "train_loss": best.train_loss,
                "epochs": len(history.epochs),
                "seconds": history.seconds,
                "total_seconds": time.perf_counter() - start,
                "images_per_second": history.images_per_second,
                **about,
                "seed": settings["seed"],
                "config": {**model_config, **settings},
                "history": history.as_dicts(),
                "checkpoint": run.published(WEIGHTS),
                "curves": run.published(CURVES),
            }
            run.finish(history, summary)
        except DivergenceError as error:
            raise common.Failure(f"{error} (--lr). {run.state()}") from error
        except (RuntimeError, MemoryError) as error:
            if not common.is_out_of_memory(error):
                raise
            text = f"out of memory on {used_device}: use a smaller --batch-size or --sizes"
            raise common.Failure(f"{text}{'' if used_device.type == 'cpu' else ', or --device cpu'}") from error
        except KeyboardInterrupt:
            reporter.line(run.state())
            raise

    results = [] if held_out is None else [f"best epoch {best.epoch}", *reversed(scores(best, "validation"))]
    results += [*reversed(scores(best, "test"))]
    speed = f"{summary['epochs']} epochs in {summary['seconds']:.1f} s, {summary['images_per_second']:,.0f} images/s"
    reporter.line(", ".join([*results, speed]))
    reporter.line(f"checkpoint: {run.folder / WEIGHTS}")
    if summary["curves"] is not None:
        reporter.line(f"curves: {run.folder / CURVES}")
    if as_json:
        click.echo(json.dumps(summary))
    return 0
