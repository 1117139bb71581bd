"""What ``fastmlp sweep`` does: the groups are trained, here or by several processes, and the results are written."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import common
from .progress import Reporter, device_name
from .ranks import Ranks
from .run_folder import WEIGHTS
from .sweep_finish import best_line, finish, lines
from .sweep_folder import PICTURE, TABLE, SweepFolder, check_sweep_folder, group_file, read_plan
from .sweep_setup import Sweep, config_of, groups_of, prepared

if TYPE_CHECKING:
    from fastmlp.train import Progress
    from fastmlp.train.sweep.group import EpochOfGroup
    from fastmlp.train.sweep.plan import Member

Show = Callable[[str], None]


def sweep(options: dict[str, Any], resume: str | None, as_json: bool, ranks: Ranks) -> int:
    """Run the command; the arguments are its options. Returns the exit code."""
    plan: dict[str, Any] = {}
    with ranks.agreed():
        if resume is not None:
            plan = read_plan(Path(resume))
        elif options["out"] is not None:
            check_sweep_folder(Path(options["out"]), options["overwrite"])
        config = plan["config"] if plan else config_of(options)
        ready = prepared(config, ranks)
        if plan and plan["data"] != ready.fingerprint:
            raise common.UserError(
                f"the training data are not those of the sweep in {resume}: other rows, or rows in another order"
            )
    files: SweepFolder | None = None
    try:
        with ranks.agreed():
            if ranks.rank == 0:
                if not plan:
                    groups = groups_of(ready, options["group"], ranks)
                    plan = {"config": config, "data": ready.fingerprint, "groups": groups}
                    files = SweepFolder(options["out"], plan, options["overwrite"])
                else:
                    files = SweepFolder(resume, None)
        kept = ranks.gather((str(files.folder), plan) if files is not None else None)[0]
        assert kept is not None
        folder, plan = Path(kept[0]), kept[1]
        with Reporter(config["epochs"] * len(plan["groups"]), to_stderr=as_json) as reporter:
            show = reporter.line if ranks.rank == 0 else _nothing
            try:
                _train_groups(ready, folder, plan["groups"], ranks, reporter, show)
            except KeyboardInterrupt:
                done = sum(group_file(folder, number).exists() for number in range(len(plan["groups"])))
                show(f"{done} of {len(plan['groups'])} groups are finished.")
                show(f"To go on: fastmlp sweep --resume {shlex.quote(str(folder))}")
                raise
            if files is None:
                return 0
            summary, standings = finish(ready, files, plan["groups"])
            for text in lines(standings, config["loss"]):
                show(text)
            show(f"table: {folder / TABLE}")
            if summary["best"] is None:
                diverged = f"all {len(ready.members)} members diverged"
                raise common.Failure(f"{diverged}; try learning rates (--lr) of a tenth. The table is in {folder}")
            show(best_line(summary, config["loss"]))
            show(f"checkpoint of the best member: {folder / WEIGHTS}")
            if summary["picture"] is not None:
                show(f"picture: {folder / PICTURE}")
    finally:
        if files is not None:
            files.release()
    if as_json:
        click.echo(json.dumps(summary))
    return 0


def _nothing(text: str) -> None:
    """What other processes than the first one show."""


def _train_groups(
    ready: Sweep, folder: Path, groups: list[list[int]], ranks: Ranks, reporter: Reporter, show: Show
) -> None:
    """Train this process's share of the groups that are not finished; returns when every process is done."""
    config, members = ready.config, ready.members
    with ranks.agreed():
        every = range(len(groups)) if ranks.rank == 0 else ()
        missing = [number for number in every if not _finished(folder, number, groups, members)]
    missing = ranks.gather(missing)[0]
    show(
        f"{len(members)} members in {len(groups)} group{'s' if len(groups) != 1 else ''}, {config['dtype']}"
        + (f", {ranks.count} processes" if ranks.count > 1 else "")
    )
    parts = [part for part in (ready.train, ready.test) if part is not None]
    show(f"data: {', '.join(part.source for part in parts)}")
    show(f"device: {ready.device} ({device_name(ready.device)}), backend {ready.backend}")
    if len(missing) < len(groups):
        show(f"resumed: {folder}, {len(groups) - len(missing)} of {len(groups)} groups are finished")
    with ranks.agreed():
        for number in missing[ranks.rank :: ranks.count]:
            try:
                _train_group(ready, folder, number, groups, reporter, show)
            except OSError as error:
                go_on = f"fastmlp sweep --resume {shlex.quote(str(folder))}"
                raise common.Failure(f"{error}. To go on: {go_on}") from error
            except (RuntimeError, MemoryError) as error:
                if not common.is_out_of_memory(error):
                    raise
                text = f"out of memory on {ready.device}: use a smaller --group, --batch-size or --sizes"
                raise common.Failure(text) from error


def _finished(folder: Path, number: int, groups: list[list[int]], members: Sequence[Member]) -> bool:
    """Whether the folder has the group's results; a damaged file is a warning, and its group is trained again."""
    from fastmlp.train.checkpoint import CheckpointError
    from fastmlp.train.sweep.results import load_group

    try:
        load_group(group_file(folder, number), [members[place] for place in groups[number]])
    except FileNotFoundError:
        return False
    except OSError as error:
        raise common.UserError(f"--resume: {error}") from error
    except CheckpointError as error:
        common.say("warning", f"{error}; its group is trained again")
        return False
    return True


def _train_group(
    ready: Sweep, folder: Path, number: int, groups: list[list[int]], reporter: Reporter, show: Show
) -> None:
    """Train a group and write its file."""
    from fastmlp.train.results import Progress
    from fastmlp.train.sweep.group import train_group
    from fastmlp.train.sweep.results import save_group

    members = [ready.members[place] for place in groups[number]]
    epochs, seconds = ready.config["epochs"], 0.0
    first = members[0]
    shape = f"{'-'.join(map(str, first.sizes))} {first.activation}"
    show(f"group {number + 1}/{len(groups)}: {len(members)} members of {shape}")

    def on_epoch(result: EpochOfGroup) -> None:
        nonlocal seconds
        seconds += result.seconds
        diverged = len(members) - result.active
        show(
            f"epoch {result.epoch:>{len(str(epochs))}}/{epochs}  median train loss {result.train_loss:.4f}  "
            f"median validation loss {result.validation_loss:.4f} (least {result.best_loss:.4f})  "
            f"{result.seconds:.2f} s  {result.images_per_second:,.0f} images/s"
            + (f"  {diverged} diverged" if diverged else "")
        )

    def on_progress(progress: Progress) -> None:
        done = number * epochs + progress.epoch
        reporter.progress(Progress(done, reporter.epochs, progress.step, progress.steps, progress.loss))

    results, parameters = train_group(members, ready.data, ready.training, on_epoch, on_progress)
    save_group(group_file(folder, number), members, results, parameters, ready.config["loss"], seconds)
