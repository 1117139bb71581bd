"""The folder of ``fastmlp sweep``: the plan, a file per finished group, and the tables; each file is written whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import common
from .results_folder import ResultsFolder, check_free
from .run_folder import CONFIG, WEIGHTS

PLAN, GROUPS, RESULTS, TABLE, PICTURE = "sweep.json", "groups", "results.json", "results.csv", "results.png"
CLAIM = ".sweeping"
FORMAT, FORMAT_VERSION = "fastmlp sweep", 1


def check_sweep_folder(folder: Path, overwrite: bool) -> None:
    """UserError if ``folder`` cannot become the folder of a sweep, or has one and ``overwrite`` is not set."""
    check_free(folder, overwrite, (PLAN, RESULTS, TABLE, PICTURE, WEIGHTS, CONFIG), PLAN, "results")


def group_file(folder: Path, number: int) -> Path:
    """The file of a finished group, whose number counts from 0."""
    return folder / GROUPS / f"{number + 1:04}.safetensors"


def read_plan(folder: Path) -> dict[str, Any]:
    """The plan of a sweep: its options, its groups, and the fingerprint of its data; UserError where there is none."""
    from fastmlp.base.atomic import read_file
    from fastmlp.train.checkpoint import MOST_JSON

    try:
        plan = json.loads(read_file(folder / PLAN, MOST_JSON))
    except FileNotFoundError:
        raise common.UserError(f"--resume {folder} has no sweep; expected a folder with {PLAN}") from None
    except OSError as error:
        raise common.UserError(f"--resume: {error}") from error
    except (ValueError, RecursionError) as error:
        raise common.UserError(f"{folder / PLAN} is damaged: it is not JSON ({error})") from error
    if not isinstance(plan, dict) or plan.get("format") != FORMAT:
        raise common.UserError(f"{folder / PLAN} is no plan of a sweep")
    if plan.get("format_version") != FORMAT_VERSION:
        raise common.UserError(
            f"{folder / PLAN} has format version {plan.get('format_version')!r}, this fastmlp reads {FORMAT_VERSION}; "
            "if a newer fastmlp wrote it, upgrade"
        )
    if not all(isinstance(plan.get(name), kind) for name, kind in (("config", dict), ("groups", list), ("data", str))):
        raise common.UserError(f"{folder / PLAN} is damaged: it lacks config, groups or data")
    return plan


class SweepFolder(ResultsFolder):
    """The folder, which is this sweep's alone until `release`.

    Args:
        out: a folder; None: a new one, runs/sweep or runs/sweep-2 and so on.
        plan: what `read_plan` returns, without its format; None: the folder has a sweep to go on with.
        overwrite: remove the results that the folder has.
    """

    def __init__(self, out: str | None, plan: dict[str, Any] | None, overwrite: bool = False) -> None:
        super().__init__(out, "sweep", claim=CLAIM, what="sweep")
        try:
            if plan is not None:
                check_sweep_folder(self.folder, overwrite)
                with common.user_errors((OSError,)):
                    self._begin(plan)
        except BaseException:
            self.release()
            raise

    def _begin(self, plan: dict[str, Any]) -> None:
        """Remove the results of the sweep before, and then write the plan."""
        for path in (self.folder / GROUPS).glob("*.safetensors"):
            path.unlink()
        for name in (RESULTS, TABLE, PICTURE, CONFIG, WEIGHTS):
            (self.folder / name).unlink(missing_ok=True)
        self.write(PLAN, {"format": FORMAT, "format_version": FORMAT_VERSION, **plan})

    def write(self, name: str, content: str | dict[str, Any]) -> None:
        """Replace a file by a text or by JSON; OSError where it cannot be written."""
        from fastmlp.base.atomic import atomic_write

        text = content if isinstance(content, str) else json.dumps(content, indent=1, allow_nan=False) + "\n"
        atomic_write(self.folder / name, text.encode())
