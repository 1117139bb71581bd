"""The model's results as rows of the report: per GPU, mode and batch a step with its kernels, its floor, its rivals."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from tests.ptxsim import Launch

from ..numbers import significant
from .constants import CHIPS, CONSTANTS, Chip
from .eager import eager_us, library_us, products_us
from .model import Estimate, Kernel
from .steps import BATCHES, LATENCY_MODES, recorded, step_estimate

__all__ = ["LATENCY_TARGETS", "constant_rows", "latency_rows", "short_name"]

#: The targets of the GPUs that the model has constants for.
LATENCY_TARGETS = tuple(dict.fromkeys(chip.target for chip in CHIPS.values()))


def latency_rows(target: str) -> list[dict[str, Any]]:
    """One row per GPU of the target, mode and batch. Every time in it is an estimate, never measured."""
    rows = []
    for mode in LATENCY_MODES:
        for batch in BATCHES:
            launches = recorded(target, mode, batch)
            for chip in CHIPS.values():
                if chip.target == target:
                    step = step_estimate(launches, chip, mode)
                    rows.append(
                        {
                            "gpu": chip.name,
                            "mode": mode,
                            "batch": batch,
                            "step_us": significant(step.microseconds),
                            "floor_us": significant(step.floor),
                            "eager_us": significant(eager_us(mode, batch, chip)),
                            "products_us": significant(products_us(mode, batch, chip)),
                            "kernels": [
                                _kernel(*found, _library(launch, mode, chip))
                                for found, launch in zip(step.kernels, launches, strict=True)
                            ],
                        }
                    )
    return rows


def short_name(kernel: str) -> str:
    """linear_fwd of _linear_fwd_kernel."""
    return kernel.strip("_").removesuffix("_kernel")


def _kernel(kernel: Kernel, estimate: Estimate, library: float | None) -> dict[str, Any]:
    return {
        "kernel": short_name(kernel.name),
        "us": significant(estimate.microseconds),
        "library_us": None if library is None else significant(library),
        "bound": estimate.bound,
        "programs": kernel.programs,
        "resident": kernel.resident,
        "waves": significant(estimate.waves),
        "terms_us": {name: significant(us) for name, us in estimate.terms.items()},
        **({"note": kernel.note} if kernel.note else {}),
    }


def _library(launch: Launch, mode: str, chip: Chip) -> float | None:
    """Microseconds of the bare products of a launch by a library, one after the other; None where it has none."""
    a = launch.arguments
    shapes = {
        "_linear_fwd_kernel": lambda: [(a["M"], a["N"], a["K"])],
        "_linear_dgrad_kernel": lambda: [(a["M"], a["K"], a["N"])],
        "_head_kernel": lambda: [(a["M"], a["C"], a["K"]), (a["M"], a["K"], a["C"])],
        "_wgrad_update_kernel": lambda: [(layer.N, layer.K, a["M"]) for layer in a["layers"]],
    }.get(launch.name)
    return None if shapes is None else sum(library_us(*shape, mode, chip) for shape in shapes())


def constant_rows() -> list[dict[str, Any]]:
    """The constants with their sources."""
    return [asdict(constant) for constant in CONSTANTS]
