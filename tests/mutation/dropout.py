"""Bugs planted in the kernels' dropout, each with the tests that find it."""

from __future__ import annotations

from tests.mutation.harness import Mutant

__all__ = ["MUTANTS"]

DROPOUT = "tests/kernels/test_dropout.py"

MUTANTS = (
    Mutant(
        "dropout",
        "the mask of the first layer for all",
        "tl.cast(dropout.layer, tl.uint64)",
        "tl.cast(0, tl.uint64)",
        (DROPOUT, "every_number"),
    ),
    Mutant(
        "dropout",
        "the same mask at every step",
        "step = tl.load(dropout.state_ptr + 1).to(tl.uint64)",
        "step = tl.load(dropout.state_ptr).to(tl.uint64)",
        (DROPOUT, "every_number"),
    ),
    Mutant(
        "dropout",
        "half of the numbers used twice",
        "(word << 16) >= threshold",
        "word >= threshold",
        (DROPOUT, "test_forward and 130"),
    ),
    Mutant(
        "dropout",
        "a group across two rows",
        "group = row[:, None] * tl.cdiv(N, GROUP) + groups[None, :]",
        "group = row[:, None] * (N // GROUP) + groups[None, :]",
        (DROPOUT, "test_forward and 130"),
    ),
    Mutant(
        "dropout",
        "the mask of the first member for all",
        "row = tl.program_id(2).to(tl.int64) * M + offs_m",
        "row = offs_m.to(tl.int64)",
        (DROPOUT, "test_members"),
    ),
    Mutant("dropout", "scale dropped", "dropout.scale, 0.0", "1.0, 0.0", (DROPOUT, "test_forward and 130")),
    Mutant(
        "dropout",
        "the step raised by two",
        "step + 1, mask=first",
        "step + 2, mask=first",
        (DROPOUT, "raises_the_step"),
    ),
    Mutant(
        "dropout",
        "the step raised by every program",
        ("mask=first, other=0)", "step + 1, mask=first)"),
        ("mask=first | True, other=0)", "step + 1, mask=first | True)"),
        (DROPOUT, "raises_the_step"),
    ),
    Mutant(
        "activations",
        "derivative from the wrong tensor",
        "saved = saved * factor",
        "saved = saved * 1.0",
        (DROPOUT, "test_dgrad and float32 and (sigmoid or tanh)"),
    ),
    Mutant(
        "activations",
        "Z taken for an output of dropout",
        'if ACTIVATION == "sigmoid" or ACTIVATION == "tanh":\n        saved',
        'if ACTIVATION != "relu":\n        saved',
        (DROPOUT, "test_dgrad and float32 and gelu"),
    ),
    Mutant(
        "linear_fwd",
        "the wrong tensor saved",
        "        if SAVE_Z:\n            tl.store(z_ptr + offs_a, z.to(",
        "        if dropout is not None:\n"
        "            z = z * factor_of_block(dropout, key, offs_m, first_n, M, N, z.shape[1])\n"
        "        if SAVE_Z:\n            tl.store(z_ptr + offs_a, z.to(",
        (DROPOUT, "test_forward and 130"),
    ),
    Mutant(
        "linear_fwd",
        "the mask of the first columns for all",
        "factor_of_block(dropout, key, offs_m, first_n, M",
        "factor_of_block(dropout, key, offs_m, 0, M",
        (DROPOUT, "test_forward and 130"),
    ),
    Mutant(
        "linear_dgrad",
        "the mask of the first columns for all",
        "factor_of_block(dropout, key, offs_m, first_k, M",
        "factor_of_block(dropout, key, offs_m, 0, M",
        (DROPOUT, "test_dgrad and float32 and sigmoid"),
    ),
    Mutant(
        "head",
        "the mask of the first columns for all",
        "dropout_key(dropout), offs_m, k, M",
        "dropout_key(dropout), offs_m, 0, M",
        (DROPOUT, "test_head and sigmoid and float32"),
    ),
    Mutant(
        "activation_bwd",
        "the mask of the first member for all",
        "group += member * (total // N",
        "group += 0 * (total // N",
        (DROPOUT, "test_members"),
    ),
    Mutant(
        "activation_bwd",
        "mask dropped in a store",
        "mask = (col < N) & (offs < total)",
        "mask = col < N",
        (DROPOUT, "test_activation_bwd and relu"),
    ),
    Mutant(
        "wgrad_update",
        "the step is that of the first member",
        (
            "    if dropout_ptr is not None:\n"
            "        # Also where the member of the first program is not active.\n"
            "        next_step(dropout_ptr)\n",
            "        if rows_ptr is not None:\n            rows_ptr += member * members.rows\n",
        ),
        (
            "",
            "        if dropout_ptr is not None:\n            next_step(dropout_ptr)\n"
            "        if rows_ptr is not None:\n            rows_ptr += member * members.rows\n",
        ),
        (DROPOUT, "of_all_members"),
    ),
)
