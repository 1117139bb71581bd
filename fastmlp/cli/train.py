"""``fastmlp train``: train an MLP on FashionMNIST, evaluate it after every epoch, keep checkpoint and curves.

``--engine`` is the argument ``engine`` of `fastmlp.train.fit`: what runs the training steps.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fastmlp.activations import ACTIVATIONS

from . import common
from .report import Reporter, device_name

if TYPE_CHECKING:
    from fastmlp.train import EpochResult, History
    from fastmlp.train.checkpoint import Checkpoint

WEIGHTS, CONFIG, CURVES, SUMMARY = "model.safetensors", "model.json", "curves.png", "summary.json"
#: The file that says which process is writing to the folder.
CLAIM = ".training"
DTYPES = ("float32", "float16", "bfloat16", "float64")
# fastmlp.train.schedules and fastmlp.train.engines have the same names, but importing them imports torch.
SCHEDULES = ("constant", "linear", "cosine")
ENGINES = ("step", "autograd")

SCHEDULE_HELP = "Learning rate over the steps; linear and cosine warm up, then fall to 0."
ENGINE_HELP = "What runs the steps: TrainStep, each step as one operation, or modules, autograd and torch.optim."
Command = TypeVar("Command", bound=Callable[..., Any])

EPILOG = f"""\b
The run folder gets
  {WEIGHTS} and {CONFIG}: the checkpoint, replaced after every epoch
  {CURVES}: loss and accuracy over the epochs
  {SUMMARY}: what --json prints; no path outside of the run folder
Without --out, the run folder is runs/SIZES-ACTIVATION-seedSEED, or that with -2, -3 and so on.
A folder of --out that has a run already is refused without --overwrite. Other files in it stay."""


def _option(name: str, type: Any, default: object, help: str) -> Callable[[Command], Command]:
    return click.option(name, type=type, default=default, show_default=True, help=help)


@click.command("train", short_help="Train an MLP on FashionMNIST.", epilog=EPILOG)
@_option("--sizes", common.Sizes(), "784-512-512-10", "Layer sizes.")
@_option("--activation", common.Choice(tuple(ACTIVATIONS)), "sigmoid", "Activation of the hidden layers.")
@_option("--epochs", click.IntRange(1, 1_000_000), 10, "Passes over the data.")
@_option("--batch-size", click.IntRange(1, 2**31 - 1), 128, "Images per step.")
@click.option(
    "--lr",
    type=common.Number(0, least_is_open=True),
    help="Peak learning rate.  [default: by activation: sigmoid 0.5, relu 0.1]",
)
@_option("--schedule", common.Choice(SCHEDULES), "linear", SCHEDULE_HELP)
@_option("--warmup", common.Number(0, 1), 0.05, "Share of the steps to warm up in.")
@_option("--momentum", common.Number(0, 1), 0.9, "SGD's momentum.")
@_option("--nesterov/--no-nesterov", None, True, "Nesterov's or plain momentum.")
@_option("--weight-decay", common.Number(0), 0.0, "SGD's weight decay.")
@_option("--seed", click.IntRange(0, 2**63 - 1), 0, "Seed of the starting weights and of the order of the images.")
@_option("--dtype", common.Choice(DTYPES), "float32", "Dtype of the parameters.")
@common.machine_options
@_option("--engine", common.Choice(ENGINES), "step", ENGINE_HELP)
@common.data_option
@click.option("--out", type=common.Folder(), metavar="FOLDER", help="Run folder.  [default: a new one in runs/]")
@click.option("--overwrite", is_flag=True, help="Replace the run that --out has.")
@common.json_option
def command(
    sizes: tuple[int, ...],
    activation: str,
    lr: float | None,
    dtype: str,
    device: str,
    backend: str,
    data: str | None,
    out: str | None,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> int:
    """Train an MLP on FashionMNIST and keep checkpoint and curves."""
    if out is not None:
        check_run_folder(Path(out), overwrite)

    import torch

    import fastmlp
    from fastmlp.train import DivergenceError, fit
    from fastmlp.train.initial import LEARNING_RATES, initialize_

    common.check_sizes(sizes, "--sizes")
    used_device = common.select_device(device)
    used_backend = common.select_backend(backend, used_device, getattr(torch, dtype))
    settings = {"lr": LEARNING_RATES[activation] if lr is None else lr, **settings}
    train, test = common.load_data(data, used_device)
    with common.user_errors():
        try:
            model = fastmlp.MLP(sizes, activation, device=used_device, dtype=getattr(torch, dtype))
        except (RuntimeError, MemoryError) as error:
            if not common.is_out_of_memory(error):
                raise
            raise common.UserError(f"{used_device} has no memory for such a network; use smaller --sizes") from error
    initialize_(model, settings["seed"])

    model_config = {"sizes": list(sizes), "activation": activation, "bias": True, "dtype": dtype}
    about = {
        "device": str(used_device),
        "device_name": device_name(used_device),
        "backend": used_backend,
        "dataset": train.published,
        "test_dataset": test.published,
        "versions": common.versions(),
    }
    start = time.perf_counter()
    name = f"{'-'.join(map(str, sizes))}-{activation}-seed{settings['seed']}"
    with Reporter(settings["epochs"], to_stderr=as_json) as reporter, Run(out, name, overwrite) as run:
        reporter.line(f"{'-'.join(map(str, sizes))} {activation}, {dtype}, {settings['engine']} engine")
        reporter.line(f"data: {train.source}, {test.source}")
        reporter.line(f"device: {about['device']} ({about['device_name']}), backend {used_backend}")

        def on_epoch(result: EpochResult) -> None:
            reporter.epoch(result)
            config = {**model_config, "classes": list(train.classes), "training": {**settings, **about}}
            run.save(model, config, result)

        try:
            history = fit(model, train, test, on_epoch=on_epoch, on_progress=reporter.progress, **settings)
            last = history.last
            summary = {
                "test_accuracy": last.test_accuracy,
                "test_loss": last.test_loss,
                "train_loss": last.train_loss,
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

    reporter.line(
        f"test accuracy {100 * summary['test_accuracy']:.2f} %, test loss {summary['test_loss']:.4f}, "
        f"{summary['epochs']} epochs in {summary['seconds']:.1f} s, {summary['images_per_second']:,.0f} images/s"
    )
    reporter.line(f"checkpoint: {run.folder / WEIGHTS}")
    if summary["curves"] is not None:
        reporter.line(f"curves: {run.folder / CURVES}")
    if as_json:
        click.echo(json.dumps(summary))
    return 0


def check_run_folder(folder: Path, overwrite: bool) -> None:
    """UserError if ``folder`` cannot become a run folder, or has a run and ``overwrite`` is not set."""
    with common.user_errors((OSError,)):
        is_file = folder.exists() and not folder.is_dir()
        there = [name for name in (WEIGHTS, CONFIG, CURVES, SUMMARY) if (folder / name).exists()]
    if is_file:
        raise common.UserError(f"--out {folder} is a file; expected a folder, or a name that is free for one")
    if there and not overwrite:
        raise common.UserError(
            f"--out {folder} has a run already ({', '.join(there)}); give another folder, or --overwrite to replace it"
        )


class Run:
    """The run folder, which keeps the results of a run; the command's help describes it.

    A context manager: the folder is this run's alone meanwhile, and a new folder without results is removed.
    """

    def __init__(self, out: str | None, name: str, overwrite: bool = False) -> None:
        from fastmlp.base.atomic import Claim

        with common.user_errors((OSError,)):
            self.is_new = out is None or not Path(out).exists()
            self.folder = _new_folder(Path("runs"), name) if out is None else Path(out)
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self.claim = Claim(self.folder, CLAIM)
            except BlockingIOError as error:
                raise common.UserError(
                    f"another training writes to {self.folder} ({error.strerror}); wait for its end, or give another "
                    "folder with --out"
                ) from error
        try:
            check_run_folder(self.folder, overwrite)  # the claim's last owner may have finished a run just now
        except BaseException:
            self.claim.release()
            raise
        self.epoch = 0
        self.before = self._checkpoint()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.claim.release()
        with contextlib.suppress(OSError):
            if self.is_new:
                self.folder.rmdir()  # which an empty folder only can be

    def save(self, model: Any, config: dict[str, Any], result: EpochResult) -> None:
        """Replace the checkpoint after an epoch; the first epoch also removes the results of the run before."""
        from fastmlp.train.checkpoint import save_checkpoint

        with self._failures():
            save_checkpoint(self.folder / WEIGHTS, model, config, vars(result))
            if self.epoch == 0:
                for leftover in (CURVES, SUMMARY):
                    (self.folder / leftover).unlink(missing_ok=True)
        self.epoch = result.epoch

    def state(self) -> str:
        """What the folder has of an unfinished run."""
        kept = self._checkpoint()
        if kept is None:
            return "No checkpoint was written"
        if self.epoch == 0 and kept == self.before:
            return f"No checkpoint was written; that of the run before is still in {self.folder}"
        return f"The checkpoint of epoch {kept.metrics.get('epoch')} is in {self.folder}"

    def published(self, name: str) -> str:
        """The path of a result, as files have it that leave this machine."""
        return str(Path(self.folder.name, name) if self.folder.is_absolute() else self.folder / name)

    def finish(self, history: History, summary: dict[str, Any]) -> None:
        """Write summary and curves. A picture that fails is a warning, and None in the summary."""
        with self._failures():
            self._write_summary(summary)
            try:
                self._draw(history, summary)
            except Exception as error:
                common.say("warning", f"the curves were not drawn ({type(error).__name__}: {error})")
                summary["curves"] = None
                self._write_summary(summary)

    def _checkpoint(self) -> Checkpoint | None:
        """The checkpoint in the folder; None where there is none, or a damaged one."""
        from fastmlp.train.checkpoint import CheckpointError, read_checkpoint

        try:
            return read_checkpoint(self.folder / WEIGHTS)
        except (OSError, CheckpointError):
            return None

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Report that a file could not be written, and what the folder has."""
        try:
            yield
        except OSError as error:
            raise common.Failure(f"{error}. {self.state()}") from error

    def _write_summary(self, summary: dict[str, Any]) -> None:
        from fastmlp.base.atomic import atomic_write

        atomic_write(self.folder / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())

    def _draw(self, history: History, summary: dict[str, Any]) -> None:
        from fastmlp.train.plots import plot_history

        config = summary["config"]
        momentum = f"{'Nesterov ' if config['nesterov'] else ''}momentum {config['momentum']:g}"
        plot_history(
            history,
            self.folder / CURVES,
            title=f"{'-'.join(map(str, config['sizes']))}, {config['activation']}",
            subtitle=f"SGD, learning rate {config['lr']:g} ({config['schedule']}), {momentum}, "
            f"batch {config['batch_size']}, {config['dtype']}, seed {config['seed']}",
            caption=f"{summary['dataset']}\n{summary['device_name']}, {summary['backend']} backend, "
            f"{summary['images_per_second']:,.0f} images/s, torch {summary['versions']['torch']}",
        )


def _new_folder(parent: Path, name: str) -> Path:
    """Make ``parent/name``, or the first of name-2, name-3, ... that is free."""
    folder, number = parent / name, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
            folder = parent / f"{name}-{number}"
