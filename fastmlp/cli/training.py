"""What ``fastmlp train`` does with its options: data, model, `fastmlp.train.fit`, and the run folder."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastmlp.step.optimizers import OPTIMIZERS
from fastmlp.train.scores import takes_values

from . import common
from .inputs import FASHION_MNIST, Format, check_sizes, divided, share_of
from .options import checked_loss_settings, checked_settings, loss_settings, named_as_options, option_of, settings
from .progress import Reporter, device_name, scores
from .resuming import load_run, options_of, place, resume_errors, resumed
from .run_folder import TENSORBOARD, WEIGHTS, Run, check_run_folder

if TYPE_CHECKING:
    from fastmlp.train import EpochResult, Progress
    from fastmlp.train.state import RunState

#: The largest default learning rate for values. The curvature of such a loss grows with the width of the last hidden
#: layer, so the default is 1 / width.
VALUES_LR = 0.05


def train(options: dict[str, Any], resume: str | None, given: Mapping[str, Any]) -> int:
    """Run the command.

    Args:
        options: the values of all options of the run.
        resume: the folder of ``--resume``.
        given: the options among them that the command line or a file gives.

    Returns:
        The exit code.
    """
    state: RunState | None = None
    read_at: os.stat_result | None = None
    if resume is not None:
        read_at, state = load_run(Path(resume))
        options = resumed(Path(resume), state, options, given)
    elif options["out"] is not None:
        check_run_folder(Path(options["out"]), options["overwrite"])

    import torch

    import fastmlp
    from fastmlp.data.load import BUNDLED, DEFAULT, TORCHVISION
    from fastmlp.train import DivergenceError, fit
    from fastmlp.train.engines import torch_optimizer_class
    from fastmlp.train.initial import LEARNING_RATES, initialize_
    from fastmlp.train.judged import judge
    from fastmlp.train.logs import TensorBoardLog, check_tensorboard
    from fastmlp.train.scores import checked, metric_of

    sizes, loss, optimizer, data = (options[name] for name in ("sizes", "loss", "optimizer", "data"))
    activation, engine = options["activation"], options["engine"]
    if sizes is not None and data in (None, DEFAULT, BUNDLED):
        check_sizes(sizes, "--sizes", FASHION_MNIST)
    rule = checked_settings(optimizer, {name: options[name] for name in settings()})
    of_loss = checked_loss_settings(loss, {name: options[name] for name in loss_settings()})
    engine = engine or "step"
    if engine == "autograd" and torch_optimizer_class(optimizer) is None:
        raise common.UserError(f"--optimizer {optimizer} needs --engine step")
    if options["log"] == "tensorboard":
        with common.user_errors((ModuleNotFoundError,)):
            check_tensorboard()
    device = common.select_device(options["device"])
    dtype: torch.dtype = getattr(torch, options["dtype"])
    backend = common.select_backend(options["backend"], device, dtype)
    train, test = common.load_data(data, device, loss)
    share = share_of(test, options["validation"])
    if options["patience"] is not None and not share:
        raise common.UserError(
            "--patience needs held-out rows to judge the epochs by; add --validation 0.1, or another share"
        )
    train, held_out = divided(train, share, options["seed"])
    form = Format.of(train, loss)
    sizes = form.sizes if sizes is None else tuple(sizes)
    check_sizes(sizes, "--sizes", form)
    lr = options["lr"]
    if lr is None:
        values_lr = min(VALUES_LR, 1 / sizes[-2])
        lr = OPTIMIZERS[optimizer].usual.get("lr", values_lr if takes_values(loss) else LEARNING_RATES[activation])
    arguments = {"lr": lr, "loss": loss, "engine": engine, "optimizer": optimizer}
    arguments |= {name: options[name] for name in ("epochs", "batch_size", "schedule", "warmup")}
    arguments |= {**rule, **of_loss, "patience": options["patience"], "seed": options["seed"]}
    train = form.fitted(train, dtype)
    held_out, test = (None if part is None else form.fitted(part, dtype) for part in (held_out, test))
    parts = [part for part in (train, held_out, test) if part is not None]
    with common.user_errors():
        try:
            model = fastmlp.MLP(sizes, activation, device=device, dtype=dtype)
        except (RuntimeError, MemoryError) as error:
            if not common.is_out_of_memory(error):
                raise
            raise common.UserError(f"{device} has no memory for such a network; use smaller --sizes") from error
        for part in parts:
            checked(model, part, loss)
        tensors = {name: torch.tensor(of_loss[name], dtype=dtype, device=device) for name in _vectors(of_loss)}
        if of_loss:
            if engine != "step":
                raise common.UserError(f"{option_of(next(iter(of_loss)))} needs --engine step")
            try:
                fastmlp.TrainStep(model, loss=loss, **{**of_loss, **tensors})
            except common.INPUT_ERRORS as error:
                raise common.UserError(named_as_options(str(error), of_loss)) from error
    initialize_(model, options["seed"])

    model_config = {"sizes": list(sizes), "activation": activation, "bias": True, "dtype": options["dtype"]}
    about: dict[str, Any] = {
        "device": str(device),
        "device_name": device_name(device),
        "backend": backend,
        "dataset": train.published,
        "test_dataset": None if test is None else test.published,
        "versions": common.versions(),
    }
    if held_out is not None:
        about["validation_dataset"] = held_out.published
    entries = {**model_config, **form.as_config(), "training": {**arguments, **about}}
    if data is not None and data.startswith(TORCHVISION) and "@" not in data:
        entries["data"] = data
    kept = options_of(options, {**model_config, **arguments}, device.type, backend, share)
    start = time.perf_counter()
    name = f"{'-'.join(map(str, sizes))}-{activation}-seed{options['seed']}"
    out = options["out"] if resume is None else resume
    with (
        Reporter(arguments["epochs"], to_stderr=options["as_json"]) as reporter,
        Run(out, name, options["overwrite"], resume=resume is not None) as run,
        common.Stopping() as stopping,
    ):
        reporter.line(f"{'-'.join(map(str, sizes))} {activation}, {options['dtype']}, {engine} engine")
        reporter.line(f"data: {', '.join(part.source for part in parts)}")
        reporter.line(f"device: {device} ({about['device_name']}), backend {backend}")
        if state is not None and read_at is not None:
            run.check_unchanged(read_at)
            reporter.line(f"resumed: {run.folder}, {place(state)}")
        events = None
        if options["log"] == "tensorboard":
            events = TensorBoardLog(run.folder / TENSORBOARD, 1 if state is None else state.epoch + 1)

        def on_epoch(result: EpochResult) -> None:
            if events is not None:
                events(result)
            reporter.epoch(result)
            stopping.interrupt()

        def on_progress(progress: Progress) -> bool:
            reporter.progress(progress)
            return stopping.asked

        def checkpoint(now: RunState) -> None:
            now.extra = {"options": kept}
            run.keep(now, model, entries)

        try:
            with resume_errors(state is not None):
                history = fit(
                    model, train, test, validation=held_out, on_epoch=on_epoch, on_progress=on_progress,
                    checkpoint=checkpoint, resume=state, **{**arguments, **tensors},
                )  # fmt: skip
            stopping.interrupt()
            best = history.best
            kinds = (metric_of(loss), "loss")
            judged_by = {f"test_{kind}": vars(best)[f"test_{kind}"] for kind in kinds}
            if held_out is not None:
                run.save(model, entries, history)  # now with its results on the test data
                judged_by |= {f"validation_{kind}": vars(best)[f"validation_{kind}"] for kind in kinds}
                judged_by["best_epoch"] = best.epoch
            summary: dict[str, Any] = {
                **judged_by,
                "train_loss": best.train_loss,
                "epochs": len(history.epochs),
                "seconds": history.seconds,
                "total_seconds": time.perf_counter() - start,
                "images_per_second": history.images_per_second,
                **about,
                "seed": options["seed"],
                "config": {**model_config, **arguments},
                "history": history.as_dicts(),
                "checkpoint": run.published(WEIGHTS),
                "curves": None,
                "pictures": {},
            }
            looked_at, split = (held_out, "validation") if test is None else (test, "test")
            judged = None if looked_at is None else judge(model, looked_at, split, loss)
            run.finish(model, form, history, summary, judged)
        except DivergenceError as error:
            raise common.Failure(f"{error} (--lr). {run.state()}") from error
        except (RuntimeError, MemoryError) as error:
            if not common.is_out_of_memory(error):
                raise
            text = f"out of memory on {device}: use a smaller --batch-size or --sizes"
            raise common.Failure(f"{text}{'' if device.type == 'cpu' else ', or --device cpu'}") from error
        except KeyboardInterrupt:
            reporter.line(run.state())
            if go_on := run.how_to_go_on():
                reporter.line(go_on)
            raise
        finally:
            if events is not None:
                events.close()

    results = [] if held_out is None else [f"best epoch {best.epoch}", *reversed(scores(best, "validation"))]
    results += [*reversed(scores(best, "test"))]
    speed = f"{summary['epochs']} epochs in {summary['seconds']:.1f} s, {summary['images_per_second']:,.0f} images/s"
    reporter.line(", ".join([*results, speed]))
    reporter.line(f"checkpoint: {run.folder / WEIGHTS}")
    if summary["pictures"]:
        paths = (str(run.folder / Path(path).name) for path in summary["pictures"].values())
        reporter.line(f"pictures: {', '.join(paths)}")
    if options["as_json"]:
        click.echo(json.dumps(summary))
    return 0


def _vectors(values: Mapping[str, Any]) -> list[str]:
    """The names of values that are tensors in Python."""
    return [name for name, value in values.items() if isinstance(value, (tuple, list))]
