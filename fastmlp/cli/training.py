"""What ``fastmlp train`` does with its options: data, model, `fastmlp.train.fit`, and the run folder.

Under torchrun, the processes divide each batch, and the first one prints and writes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from . import common
from .progress import Reporter, scores
from .ranks import Ranks
from .resuming import place, resume_errors
from .run_folder import TENSORBOARD, WEIGHTS, Run
from .train_setup import Ready, prepared

if TYPE_CHECKING:
    from fastmlp.train import EpochResult, History, Progress
    from fastmlp.train.state import RunState


def train(options: dict[str, Any], resume: str | None, given: Mapping[str, Any], ranks: Ranks) -> int:
    """Run the command; the arguments are those of `prepared`. Returns the exit code."""
    with ranks.agreed():
        ready = prepared(options, resume, given, ranks)
    options, arguments = ready.options, ready.arguments
    start = time.perf_counter()
    with ExitStack() as stack:
        reporter = stack.enter_context(
            Reporter(arguments["epochs"], to_stderr=options["as_json"], hidden=ranks.rank > 0)
        )
        run: Run | None = None
        with ranks.agreed():
            if ranks.rank == 0:
                out = options["out"] if resume is None else resume
                run = stack.enter_context(Run(out, ready.name, options["overwrite"], resume=resume is not None))
                if ready.read_at is not None:
                    run.check_unchanged(ready.read_at)
        stopping = stack.enter_context(common.Stopping())
        for line in _about(ready, ranks):
            reporter.line(line)
        if run is not None and ready.state is not None:
            reporter.line(f"resumed: {run.folder}, {place(ready.state)}")
        history = _fit(ready, run, ranks, reporter, stopping)
        if run is None:
            return 0
        summary = _finish(ready, run, history, start)
        for line in _results(run, history, summary):
            reporter.line(line)
    if options["as_json"]:
        click.echo(json.dumps(summary))
    return 0


def _about(ready: Ready, ranks: Ranks) -> list[str]:
    """What is said before the first epoch."""
    sizes, activation, dtype = (ready.config[name] for name in ("sizes", "activation", "dtype"))
    processes = f", {ranks.count} processes" if ranks.count > 1 else ""
    return [
        f"{'-'.join(map(str, sizes))} {activation}, {dtype}, {ready.arguments['engine']} engine{processes}",
        f"data: {', '.join(part.source for part in ready.parts)}",
        f"device: {ready.device} ({ready.about['device_name']}), backend {ready.backend}",
    ]


def _fit(ready: Ready, run: Run | None, ranks: Ranks, reporter: Reporter, stopping: common.Stopping) -> History:
    """`fit`, with a run folder that keeps what it gives, and its errors as the command's."""
    from fastmlp.train import DivergenceError, fit
    from fastmlp.train.logs import TensorBoardLog

    state = ready.state
    events = None
    if run is not None and ready.options["log"] == "tensorboard":
        events = TensorBoardLog(run.folder / TENSORBOARD, () if state is None else state.history.epochs)

    def on_epoch(result: EpochResult) -> None:
        if events is not None:
            events(result)
        reporter.epoch(result)
        stopping.interrupt()

    def on_progress(progress: Progress) -> bool:
        reporter.progress(progress)
        stopping.signal = max(ranks.gather(stopping.signal))
        return stopping.asked

    def checkpoint(now: RunState) -> None:
        now.extra = {"options": ready.kept}
        if run is not None:
            run.keep(now, ready.model, ready.entries)

    of_processes = {} if ranks.count == 1 else {"process_group": ranks.group}
    try:
        with resume_errors(state is not None):
            history = fit(
                ready.model, ready.train, ready.test, validation=ready.held_out, on_epoch=on_epoch,
                on_progress=on_progress, checkpoint=checkpoint, resume=state,
                **{**ready.arguments, **ready.objects, **of_processes},
            )  # fmt: skip
        stopping.interrupt()
        if events is not None:
            events(history.best)  # now with its results on the test data
    except DivergenceError as error:
        if run is None:
            raise click.exceptions.Exit(common.Failure.exit_code) from error
        raise common.Failure(f"{error} (--lr). {run.state()}") from error
    except (RuntimeError, MemoryError) as error:
        if ranks.is_lost(error):
            kept = "" if run is None else f". {run.state()}. {run.how_to_go_on()}"
            raise common.Failure(f"another process of the training has ended ({error}){kept}") from error
        if not common.is_out_of_memory(error):
            raise
        text = f"out of memory on {ready.device}: use a smaller --batch-size or --sizes"
        raise common.Failure(f"{text}{'' if ready.device.type == 'cpu' else ', or --device cpu'}") from error
    except KeyboardInterrupt:
        if run is not None:
            reporter.line(run.state())
            if go_on := run.how_to_go_on():
                reporter.line(go_on)
        raise
    finally:
        if events is not None:
            events.close()
    return history


def _finish(ready: Ready, run: Run, history: History, start: float) -> dict[str, Any]:
    """Write the results at the end; returns the summary."""
    from fastmlp.train.judged import judge
    from fastmlp.train.scores import metric_of

    best, loss = history.best, ready.arguments["loss"]
    kinds = (metric_of(loss), "loss")
    judged_by = {f"test_{kind}": vars(best)[f"test_{kind}"] for kind in kinds}
    # A process that died may have left the last state without its checkpoint. With validation data, the best epoch has
    # its results on the test data only now.
    run.save(ready.model, ready.entries, history)
    if ready.held_out is not None:
        judged_by |= {f"validation_{kind}": vars(best)[f"validation_{kind}"] for kind in kinds}
        judged_by["best_epoch"] = best.epoch
    summary: dict[str, Any] = {
        **judged_by,
        "train_loss": best.train_loss,
        "epochs": len(history.epochs),
        "seconds": history.seconds,
        "total_seconds": time.perf_counter() - start,
        "images_per_second": history.images_per_second,
        **ready.about,
        "seed": ready.options["seed"],
        "config": ready.config,
        "history": history.as_dicts(),
        "checkpoint": run.published(WEIGHTS),
        "curves": None,
        "pictures": {},
    }
    looked_at, split = (ready.held_out, "validation") if ready.test is None else (ready.test, "test")
    judged = (
        None
        if looked_at is None
        else judge(ready.model, looked_at, split, loss, ignore_index=ready.arguments.get("ignore_index"))
    )
    run.finish(ready.model, ready.form, history, summary, judged)
    return summary


def _results(run: Run, history: History, summary: Mapping[str, Any]) -> list[str]:
    """What is said at the end."""
    best = history.best
    validation = scores(best, "validation")
    results = [f"best epoch {best.epoch}", *reversed(validation)] if validation else []
    results += [*reversed(scores(best, "test"))]
    speed = f"{summary['epochs']} epochs in {summary['seconds']:.1f} s, {summary['images_per_second']:,.0f} images/s"
    lines = [", ".join([*results, speed]), f"checkpoint: {run.folder / WEIGHTS}"]
    if summary["pictures"]:
        paths = (str(run.folder / path.rpartition("/")[2]) for path in summary["pictures"].values())
        lines.append(f"pictures: {', '.join(paths)}")
    return lines
