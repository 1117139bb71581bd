"""What ``fastmlp sweep`` writes and prints at the end: the tables, the picture, and the best member's checkpoint."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmlp.train.scores import takes_values

from . import common
from .options import STEP, loss_settings
from .progress import device_name
from .run_folder import WEIGHTS
from .sweep_folder import PICTURE, RESULTS, TABLE, SweepFolder, group_file

if TYPE_CHECKING:
    import torch

    from fastmlp.nn import MLP
    from fastmlp.train.sweep.group import Result
    from fastmlp.train.sweep.plan import Member
    from fastmlp.train.sweep.results import Standing

    from .sweep_setup import Sweep

#: Settings that are printed.
MOST = 20


def finish(ready: Sweep, files: SweepFolder, groups: list[list[int]]) -> tuple[dict[str, Any], list[Standing]]:
    """Write the tables, the picture and the best member's checkpoint, from the files of the groups."""
    from fastmlp.train.checkpoint import CheckpointError, save_checkpoint
    from fastmlp.train.sweep.results import as_csv, as_row, bests, load_group, ranked, score_name

    config, loss, members = ready.config, ready.config["loss"], ready.members
    found: dict[int, Result] = {}
    seconds = 0.0
    try:
        for number, group in enumerate(groups):
            results, _, taken = load_group(group_file(files.folder, number), [members[place] for place in group])
            found |= dict(zip(group, results, strict=True))
            seconds += taken
        results = [found[member.number] for member in members]
        standings = ranked(members, results, loss)
        rows = [as_row(member, result, loss) for member, result in zip(members, results, strict=True)]
        about: dict[str, Any] = {
            "device": str(ready.device),
            "device_name": device_name(ready.device),
            "backend": ready.backend,
            "dataset": ready.train.published,
            "test_dataset": None if ready.test is None else ready.test.published,
            "versions": common.versions(),
        }
        best: dict[str, Any] | None = None
        places = bests(members, results, loss)
        if places and standings[0].mean is not None:
            first = {**standings[0].setting, "sizes": tuple(standings[0].setting["sizes"])}
            place = places[tuple(first.values())]
            number = next(number for number, group in enumerate(groups) if place in group)
            _, parameters, _ = load_group(group_file(files.folder, number), [members[i] for i in groups[number]])
            model, entries, scores = _best(ready, members[place], parameters[place], about)
            best = {**rows[place], **scores}
            save_checkpoint(files.folder / WEIGHTS, model, entries, best)
        summary: dict[str, Any] = {
            "score": score_name(loss),
            "best": best,
            "settings": [{"rank": rank, **standing.as_dict()} for rank, standing in enumerate(standings, 1)],
            "members": rows,
            "config": {**config, "data": _published(config["data"])},
            "groups": [len(group) for group in groups],
            "seconds": seconds,
            **about,
            "checkpoint": None if best is None else files.published(WEIGHTS),
            "table": files.published(TABLE),
            "picture": None,
        }
        files.write(TABLE, as_csv(rows))
        if best is not None and _drawn(files, standings, ready):
            summary["picture"] = files.published(PICTURE)
        files.write(RESULTS, summary)
    except FileNotFoundError as error:
        raise common.Failure(f"{error}; all processes of a sweep need the same folder, on one file system") from error
    except (OSError, CheckpointError) as error:
        go_on = f"fastmlp sweep --resume {shlex.quote(str(files.folder))}"
        raise common.Failure(f"{error}. To go on: {go_on}") from error
    return summary, standings


def _published(data: str | None) -> str | None:
    """What ``--data`` names, without a path."""
    if data is None or not os.path.isabs(data):
        return None if data is None else data.partition("@")[0]
    return Path(data).name


def _drawn(files: SweepFolder, standings: list[Standing], ready: Sweep) -> bool:
    """Draw the picture; a picture that fails is a warning."""
    from fastmlp.train.sweep.picture import draw

    try:
        epochs = ready.config["epochs"]
        caption = f"{ready.train.published}\n{len(ready.members):,} networks, {epochs} epoch{'s' if epochs > 1 else ''}"
        draw(standings, files.folder / PICTURE, ready.config["loss"], caption)
    except Exception as error:
        common.say("warning", f"the scores were not drawn ({type(error).__name__}: {error})")
        return False
    return True


def _best(
    ready: Sweep, member: Member, parameters: dict[str, torch.Tensor], about: dict[str, Any]
) -> tuple[MLP, dict[str, Any], dict[str, Any]]:
    """The best member as an MLP, the entries of its checkpoint, and its scores on the test data."""
    import fastmlp
    from fastmlp.data import Standardization
    from fastmlp.data.load import TORCHVISION
    from fastmlp.train.initial import initialize_
    from fastmlp.train.scores import evaluate, metric_of

    config, loss = ready.config, ready.config["loss"]
    form = ready.form
    if form.standardization is not None:
        kept, _ = ready.data.divided(*member.division)
        own = Standardization.of(ready.data.x[kept.to(ready.device)])
        form = dataclasses.replace(form, standardization=own)
    rest: dict[str, Any] = {"device": ready.device, "dtype": ready.training.dtype, "dropout": member.dropout}
    model = initialize_(fastmlp.MLP(member.sizes, member.activation, **rest), member.seed)
    model.load_state_dict({**model.state_dict(), **parameters})
    scores: dict[str, Any] = {}
    if ready.test is not None:
        test = form.fitted(ready.test, ready.training.dtype)
        found, metric = evaluate(model, test, loss=loss, ignore_index=ready.training.options.get("ignore_index"))
        scores = {f"test_{metric_of(loss)}": metric, "test_loss": found}
    rule = ready.training.rule(member)
    arguments = {name: config[name] for name in ("loss", "optimizer", "epochs", "batch_size", "schedule", "warmup")}
    arguments |= {name: getattr(rule, name) for name in rule.settings}
    said = {name: config.get(name) for name in (*loss_settings(), *STEP)}
    arguments |= {name: value for name, value in said.items() if value not in (None, [], STEP.get(name))}
    arguments |= {"seed": member.seed, "fold": member.fold, "folds": config["folds"], "validation": ready.data.share}
    entries: dict[str, Any] = {
        "sizes": list(member.sizes),
        "activation": member.activation,
        "bias": True,
        "dtype": config["dtype"],
        **({"dropout": member.dropout} if member.dropout else {}),
        **form.as_config(),
        "training": {**arguments, **about},
    }
    if config["data"] is not None and config["data"].startswith(TORCHVISION) and "@" not in config["data"]:
        entries["data"] = config["data"]
    return model, entries, scores


def best_line(summary: dict[str, Any], loss: str) -> str:
    """The best member in one line."""
    from fastmlp.train.scores import metric_of

    best, texts = summary["best"], []
    for split in ("validation", "test"):
        metric, value = best.get(f"{split}_{metric_of(loss)}"), best.get(f"{split}_loss")
        if metric is not None:
            accurate = metric_of(loss) == "accuracy"
            texts.append(f"{split} accuracy {100 * metric:.2f} %" if accurate else f"{split} R2 {metric:.4f}")
        texts += [] if value is None else [f"{split} loss {value:.4f}"]
    fold = "" if best["fold"] is None else f", fold {best['fold']}"
    return f"best member: seed {best['seed']}{fold}, epoch {best['best_epoch']}, {', '.join(texts)}"


def lines(standings: Sequence[Standing], loss: str) -> list[str]:
    """The table: the settings that vary, the mean score and its spread, and the number of members."""
    from fastmlp.train.sweep.picture import shown, varied

    names = varied(standings)
    percent, score = (1, "loss") if takes_values(loss) else (100, "accuracy %")
    digits = 4 if percent == 1 else 2
    diverged = any(standing.diverged for standing in standings)
    head = ["rank", *(name.replace("_", " ") for name in names), f"mean {score}", "±", "worst", "best", "members"]
    rows = [head + ["diverged"] * diverged]
    for rank, standing in enumerate(standings[:MOST], 1):
        numbers = [standing.mean, standing.deviation, standing.worst, standing.best]
        row = [str(rank), *(shown(name, standing.setting[name]) for name in names)]
        row += ["-" if number is None else f"{percent * number:.{digits}f}" for number in numbers]
        rows.append([*row, str(standing.members), *[str(standing.diverged)] * diverged])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    texts = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    if len(standings) > MOST:
        texts.append(f"and {len(standings) - MOST} more, in the table")
    return texts
