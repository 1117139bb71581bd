"""The broken limits in the rows of the report, and the exceptions with their reasons."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .gpus import MODES

__all__ = ["EXCEPTIONS", "LIMITS", "Finding", "LimitException", "findings"]

Row = dict[str, Any]

#: Limits by name, and the rule of each.
LIMITS = {
    "spill": "no register is spilled to memory",
    "shared memory": "a program asks for no more shared memory than its target gives it",
    "tensor core": "a matrix product uses the target's matrix units",
    "sectors": "global accesses touch no more than 1.1 times the sectors that they need",
    "bank conflicts": "bank conflicts cause no more than 10 % of the shared-memory wavefronts of a matrix product",
    "repeated products": "the matrix units compute no more than 1.5 times the products that are needed",
    "error budget": "no error is larger than its budget",
}
_SECTORS, _CONFLICTS, _PRODUCTS = 1.1, 0.1, 1.5


@dataclass(frozen=True)
class LimitException:
    """A kernel of a workload that may break a limit.

    Attributes:
        most: the largest value, in the unit of ``LIMITS``.
        reason: why the exception is right, or the least bad.
    """

    limit: str
    workload: str
    kernel: str
    most: float
    reason: str


EXCEPTIONS: tuple[LimitException, ...] = (
    *(
        LimitException(
            "repeated products",
            workload,
            "_head_kernel",
            7.5,
            "10 classes are padded to the 16 of a matrix instruction; and where rows make too few blocks, up to 8 "
            "programs share one, each on a multiprocessor that would be idle, and each computes Z anew rather than "
            "wait for another",
        )
        for workload in ("head", "head with dropout", "head of weighted rows")
    ),
    *(
        LimitException(
            "sectors",
            f"{workload} of weighted rows",
            kernel,
            most,
            "the number of rows is no compile-time fact, so a thread loads its neighbouring weights one by one; the "
            "later loads find their sectors in the L1 cache",
        )
        for workload, kernel, most in (
            ("head", "_total_weight_kernel", 3.7),
            ("cross_entropy", "_total_weight_kernel", 3.7),
            ("cross_entropy", "_cross_entropy_kernel", 1.9),
            ("elementwise_loss", "_total_weight_kernel", 4.0),
        )
    ),
    LimitException(
        "sectors",
        "wgrad_update",
        "_wgrad_update_kernel",
        1.3,
        "a thread updates 8 neighbouring weights, 16 bytes in bfloat16 and twice 16 bytes of the float32 master: the "
        "second load finds the other half of its sectors in the L1 cache",
    ),
    LimitException(
        "sectors",
        "linear_fwd of pixels",
        "_linear_fwd_kernel",
        1.2,
        "a block is 16 pixels deep, half a sector of each row: the next round of the loop finds the other half in the "
        "L1 cache",
    ),
    LimitException(
        "bank conflicts",
        "linear_fwd of pixels",
        "_linear_fwd_kernel",
        0.4,
        "where the reduction is cut into slices, pixels that become float32 in registers are stored to shared memory "
        "in the order in which bytes are loaded; a batch so small is bound by the chain of its products",
    ),
)


@dataclass(frozen=True)
class Finding:
    """One kernel of one workload that breaks one limit.

    Attributes:
        places: target, mode and batch of each case.
        worst: the largest value, in the unit of ``LIMITS``.
        reason: the reason of its exception; "" if there is none, or if the value is over the exception's.
    """

    limit: str
    workload: str
    kernel: str
    places: tuple[str, ...]
    worst: float
    reason: str = ""


def findings(machine: list[Row], execution: list[Row], numerics: list[Row]) -> list[Finding]:
    """Every broken limit, in the order of ``LIMITS``."""
    found: dict[tuple[str, str, str], list[tuple[str, float]]] = {}
    for limit, row, value in (*_machine(machine), *_execution(execution), *_numerics(numerics)):
        place = " ".join(str(row[key]) for key in ("target", "mode", "batch", "output") if key in row)
        workload = row.get("workload", row.get("shape"))
        found.setdefault((limit, str(workload), row["kernel"]), []).append((place, value))
    order = list(LIMITS)
    return sorted(
        (_finding(key, cases) for key, cases in found.items()),
        key=lambda finding: (order.index(finding.limit), -finding.worst, finding.workload),
    )


def _finding(key: tuple[str, str, str], cases: list[tuple[str, float]]) -> Finding:
    worst = max(value for _, value in cases)
    allowed = [e for e in EXCEPTIONS if (e.limit, e.workload, e.kernel) == key and worst <= e.most]
    return Finding(*key, tuple(place for place, _ in cases), worst, allowed[0].reason if allowed else "")


def _machine(rows: list[Row]) -> Iterator[tuple[str, Row, float]]:
    for row in rows:
        if row["spilled"]:
            yield "spill", row, row["spilled"]
        if row["shared"] > row["shared_limit"]:
            yield "shared memory", row, row["shared"]
        if row["expects_tensor_core"] and not row["instructions"]["tensor core"]:
            yield "tensor core", row, 0


def _execution(rows: list[Row]) -> Iterator[tuple[str, Row, float]]:
    for row in rows:
        if (row["sectors_over_minimum"] or 0) > _SECTORS:
            yield "sectors", row, row["sectors_over_minimum"]
        if row["gemm"] and row["conflict_share"] > _CONFLICTS:
            yield "bank conflicts", row, row["conflict_share"]
        if row["gemm"] and not row["on_matrix_units"] and not row.get("on_fma"):
            yield "tensor core", row, 0
        repeated = (row["matrix_flops_over_needed"] or 0) / MODES[row["mode"]].products
        if repeated > _PRODUCTS:
            yield "repeated products", row, repeated


def _numerics(rows: list[Row]) -> Iterator[tuple[str, Row, float]]:
    for row in rows:
        # A NaN is over every budget.
        if not row["budget_share"] <= 1:
            yield "error budget", row, row["budget_share"]
