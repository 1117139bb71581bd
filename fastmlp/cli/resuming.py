"""``fastmlp train --resume RUN``: the run's own options, and which options may be given beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import common
from .options import STEP, loss_settings, option_of, settings
from .run_folder import LAST

if TYPE_CHECKING:
    from fastmlp.train.state import RunState

#: Options of one call, which a resumed run may have otherwise. Other data are found by their fingerprint.
FREE = ("as_json", "log", "data", "cuda_graph")
#: Options that the state does not keep.
OF_THE_FOLDER = ("as_json", "out", "overwrite")


def load_run(folder: Path) -> tuple[os.stat_result, RunState]:
    """(which file it is, the state) of a run folder; UserError where there is none."""
    from fastmlp.train.state import load_state

    with common.user_errors((OSError, RuntimeError)):
        if not folder.is_dir():
            raise common.UserError(f"--resume {folder} is no folder; expected a run folder with {LAST}")
        try:
            which = os.stat(folder / LAST)
            state = load_state(folder / LAST)
        except FileNotFoundError:
            raise common.UserError(
                f"--resume {folder} has no {LAST}, which a run has from its first epoch on; train with --out instead"
            ) from None
    if not isinstance(state.extra.get("options"), dict):
        raise common.UserError(f"{folder / LAST} was written by fastmlp.fit, not by 'fastmlp train'; resume with fit")
    return which, state


def options_of(
    options: Mapping[str, Any], used: Mapping[str, Any], device: str, backend: str, share: float
) -> dict[str, Any]:
    """What the state keeps of a run's options, with the values that were used for those that were not given."""
    from fastmlp.data.load import BUNDLED, DEFAULT

    kept = {name: used.get(name, value) for name, value in options.items() if name not in OF_THE_FOLDER}
    kept |= {"device": device, "backend": backend, "validation": share}
    data = kept["data"]
    if data not in (None, DEFAULT, BUNDLED) and os.path.exists(data):
        kept["data"] = os.path.abspath(data)  # the resumed run may start in another folder
    return kept


def resumed(folder: Path, state: RunState, options: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The run's own options; UserError where a given one differs and does not extend the run."""
    from fastmlp.train.state import extends

    before = state.extra["options"]
    result = {**options, **before}
    for name, value in given.items():
        if name in FREE:
            result[name] = value
        elif name == "overwrite" and value:
            raise common.UserError("--overwrite and --resume exclude each other; leave one of them out")
        elif name == "out":
            if os.path.abspath(value) != os.path.abspath(folder):
                raise common.UserError(f"--out and --resume exclude each other; a run goes on in its folder, {folder}")
        elif extends(name, value, before.get(name)):
            result[name] = value
        elif not _same(name, value, before.get(name)):
            raise common.UserError(_differs(name, value, before.get(name)))
    for name in (*settings(), *loss_settings()):
        if name not in before:
            result[name] = None
    for name, default in STEP.items():
        if name not in before and name not in FREE:
            result[name] = default
    for name in ("sizes", "param_group"):  # JSON's lists
        result[name] = tuple(result[name])
    return result


def _same(name: str, value: Any, before: Any) -> bool:
    """Whether an option says what the run has."""
    if name in ("device", "backend") and value == "auto":
        return True
    if name == "device":
        return str(value).partition(":")[0] == before
    return list(value) == before if isinstance(value, tuple) else bool(value == before)


def _differs(name: str, value: Any, before: Any) -> str:
    its = option_of(name, before) if before is not None else f"no {option_of(name)}"
    return (
        f"{option_of(name, value)} differs from the run to resume, which has {its}; leave the option out, or start a "
        "new run"
    )


@contextmanager
def resume_errors(is_resumed: bool) -> Iterator[None]:
    """What `fit` says of a state that does not fit the data, as a user error."""
    try:
        yield
    except ValueError as error:
        if not is_resumed or "run to resume" not in str(error):
            raise
        raise common.UserError(f"--resume: {common.in_options(str(error))}") from error


def place(state: RunState) -> str:
    """Where the run goes on."""
    where = f"after epoch {state.epoch} of {state.settings['epochs']}"
    return f"{where} and {state.step} steps" if state.step else where
