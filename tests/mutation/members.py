"""Bugs planted in the member axis of the kernels, each with the tests that find it."""

from __future__ import annotations

from tests.mutation.harness import Mutant

__all__ = ["MUTANTS"]

MEMBERS = "tests/kernels/test_members.py"
LARGE = "tests/kernels/test_large_offsets.py"


def _ignored(kernel: str, pointer: str, stride: str, tests: str) -> Mutant:
    """All members take what the first member has."""
    moved = f"{pointer} += member * {stride}"
    return Mutant(kernel, "member stride ignored", f"{moved}\n", f"{pointer} += member * 0\n", (MEMBERS, tests))


MUTANTS = (
    Mutant(
        "members",
        "active ignored",
        "return tl.load(active_ptr + member) == 0",
        "return tl.load(active_ptr + member) == 2",
        (MEMBERS, "inactive_members"),
    ),
    Mutant(
        "members",
        "the flag of the first member for all",
        "tl.load(active_ptr + member)",
        "tl.load(active_ptr)",
        (MEMBERS, "test_wgrad_update and direct"),
    ),
    _ignored("linear_fwd", "x_ptr", "members.x", "test_linear_fwd and float32-False"),
    _ignored("linear_fwd", "rows_ptr", "members.rows", "test_gathered_pixels"),
    _ignored("linear_dgrad", "dz_ptr", "members.dz", "test_linear_dgrad and float32"),
    _ignored("linear_dgrad", "sums_ptr", "members.sums", "test_linear_dgrad and float32"),
    _ignored("linear_wgrad", "dw_ptr", "members.dw", "test_linear_wgrad and one"),
    _ignored("linear_wgrad", "partial_ptr", "member_sums", "test_linear_wgrad and split"),
    _ignored("activation_bwd", "da_ptr", "members.da", "test_activation_bwd"),
    _ignored("head", "target_ptr", "members.target", "test_head and own"),
    _ignored("head", "prev_sums_ptr", "members.prev_sums", "test_head and own"),
    _ignored("cross_entropy", "rows_ptr", "members.rows", "test_losses and own"),
    _ignored("cross_entropy", "sample_ptr", "members.sample", "test_options_of_cross_entropy and own and smoothing"),
    Mutant(
        "cross_entropy",
        "member stride ignored",
        "target_ptr += tl.multiple_of(member * members.target, ALIGN)",
        "target_ptr += tl.multiple_of(member * 0, ALIGN)",
        (MEMBERS, "test_options_of_cross_entropy and own and probabilities"),
    ),
    Mutant(
        "cross_entropy",
        "the weight of the batch of the first member for all",
        "            divisor_ptr += member\n",
        "            divisor_ptr += 0\n",
        (MEMBERS, "test_options_of_cross_entropy and own and labels"),
    ),
    _ignored("elementwise_loss", "y_ptr", "members.y", "test_losses and own"),
    _ignored("softmax_squared_error", "dz_ptr", "members.dz", "test_losses and own"),
    _ignored("before_update", "squares_ptr", "members.squares", "test_late_update and float32"),
    Mutant(
        "linear_fwd",
        "missing int64",
        "member = tl.program_id(2).to(tl.int64)",
        "member = tl.program_id(2)",
        (LARGE, "test_members and fwd"),
    ),
    Mutant(
        "wgrad_update",
        "settings of the first member for all",
        "        if hyper_ptr is not None:\n            hyper_ptr += member * members.hyper",
        "        if hyper_ptr is not None:\n            hyper_ptr += member * 0",
        (MEMBERS, "test_wgrad_update and direct"),
    ),
    Mutant(
        "wgrad_update",
        "the states of the first member for all",
        "segment += first_flat",
        "segment += 0",
        (MEMBERS, "test_wgrad_update and direct"),
    ),
    Mutant(
        "reduce_update",
        "parameters of the first member for all",
        "        w_ptr += member * parameter.numel",
        "        w_ptr += member * 0",
        (MEMBERS, "test_late_update and float32"),
    ),
    Mutant(
        "wgrad_update",
        "the number of updates of a member that is not active",
        "        if inactive(active_ptr, member):\n            if loss_ptr is not None:",
        "        if inactive(active_ptr, member):\n"
        "            tl.store(updates_ptr + member, 0)\n"
        "            if loss_ptr is not None:",
        (MEMBERS, "test_wgrad_update and direct"),
    ),
)
