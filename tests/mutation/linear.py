"""Bugs planted in the kernels of linear layers and activations, each with the tests that find it."""

from __future__ import annotations

from tests.mutation.harness import Mutant

__all__ = ["MUTANTS"]

FWD = "tests/kernels/test_linear_fwd.py"
DGRAD = "tests/kernels/test_linear_dgrad.py"
WGRAD = "tests/kernels/test_linear_wgrad.py"
ACTIVATION = "tests/kernels/test_activation_bwd.py"
LARGE = "tests/kernels/test_large_offsets.py"
NAN = "tests/kernels/test_nan.py"
ORDER = "tests/kernels/test_program_order.py"
TILES = "tests/execute/test_traffic.py"

_LINEAR_FWD = (
    Mutant(
        "linear_fwd",
        "the halves of a block at one place",
        "first_n + left.shape[1]",
        "first_n",
        (TILES, "sm_80-fwd-float32-128x128"),
        lane="execute",
    ),
    Mutant(
        "linear_fwd",
        "mask dropped in a load",
        "x = tl.load(x_ptrs, mask=as_column(mask_m, SLICES) & mask_k, other=0.0)",
        "x = tl.load(x_ptrs, mask=as_column(mask_m, SLICES), other=0.0)",
        (FWD, "test_strides"),
    ),
    Mutant(
        "linear_fwd",
        "mask dropped in a store",
        "tl.store(a_ptrs, a.to(a_ptr.dtype.element_ty), mask=mask_a)",
        "tl.store(a_ptrs, a.to(a_ptr.dtype.element_ty))",
        (FWD, "test_no_bias_and_given_outputs"),
    ),
    Mutant(
        "linear_fwd",
        "mask dropped in a store",
        "tl.store(a_ptrs, a.to(a_ptr.dtype.element_ty), mask=mask_a)",
        "tl.store(a_ptrs, a.to(a_ptr.dtype.element_ty))",
        (FWD, "test_no_bias_and_given_outputs and sm_80 and float32"),
        lane="execute",
    ),
    Mutant(
        "linear_fwd",
        "reduction tail taken for even",
        "EVEN_K=K % tile.depth == 0",
        "EVEN_K=True",
        (FWD, "test_strides"),
    ),
    Mutant(
        "linear_fwd",
        "wrong stride",
        "as_column(offs_n.to(tl.int64), SLICES) * stride_wn",
        "as_column(offs_n.to(tl.int64), SLICES) * K",
        (FWD, "test_strides"),
    ),
    Mutant(
        "linear_fwd", "wrong stride", "b_ptr + offs_n.to(tl.int64) * stride_b", "b_ptr + offs_n", (LARGE, "fwd_bias")
    ),
    Mutant(
        "linear_fwd",
        "bias added twice",
        "    if HAS_BIAS:\n        acc +=",
        "    if HAS_BIAS:\n        acc += 2.0 *",
        (FWD, "test_gathered_rows"),
    ),
    Mutant(
        "linear_fwd",
        "transposed store",
        "offs_a = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]",
        "offs_a = offs_n.to(tl.int64)[None, :] * M + offs_m[:, None]",
        (FWD, "test_gathered_rows"),
    ),
    Mutant(
        "linear_fwd",
        "missing int64",
        "offs_a = offs_m.to(tl.int64)[:, None] * N",
        "offs_a = offs_m[:, None] * N",
        (LARGE, "test_linear_fwd_outputs"),
    ),
    Mutant(
        "linear_fwd", "missing int64", "row_m = offs_m.to(tl.int64)", "row_m = offs_m", (LARGE, "fwd_inputs and rows")
    ),
    Mutant(
        "linear_fwd",
        "missing int64",
        "cols_k = offs_k.to(tl.int64)",
        "cols_k = offs_k",
        (LARGE, "fwd_inputs and columns"),
    ),
    Mutant(
        "linear_fwd",
        "gather index ignored",
        "row_m = tl.load(rows_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)",
        "row_m = offs_m.to(tl.int64)",
        (FWD, "test_gathered_rows"),
    ),
    Mutant(
        "linear_fwd",
        "uint8 scale dropped",
        "acc = acc * (1.0 / 255.0)",
        "acc = acc * 1.0",
        (LARGE, "fwd_inputs and pixels"),
    ),
    Mutant(
        "linear_fwd",
        "the wrong tensor saved",
        "tl.store(z_ptr + offs_a, z.to(",
        "tl.store(z_ptr + offs_a, activate(z, ACTIVATION).to(",
        (FWD, "test_no_bias_and_given_outputs"),
    ),
)

_LINEAR_DGRAD = (
    Mutant(
        "linear_dgrad",
        "the halves of a block at one place",
        "first_k += left.shape[1]",
        "first_k += 0",
        (TILES, "sm_80-dgrad-float32-128x128"),
        lane="execute",
    ),
    Mutant(
        "linear_dgrad",
        "mask dropped in a load",
        "dz = tl.load(dz_ptrs, mask=as_column(mask_m, SLICES) & (offs_n < N - n), other=0.0)",
        "dz = tl.load(dz_ptrs, mask=mask_m[:, None], other=0.0)",
        (DGRAD, "test_strides"),
    ),
    Mutant(
        "linear_dgrad",
        "mask dropped in a store",
        "tl.store(dx_ptr + offs_x, dx, mask=mask_x)",
        "tl.store(dx_ptr + offs_x, dx, mask=(offs_m < M)[:, None])",
        (DGRAD, "test_strides"),
    ),
    Mutant(
        "linear_dgrad",
        "wrong stride",
        "step_w = tl.cast(BLOCK_N, tl.int64) * stride_wn",
        "step_w = tl.cast(BLOCK_N, tl.int64) * stride_wk",
        (DGRAD, "layer_below and tanh"),
    ),
    Mutant(
        "linear_dgrad",
        "transposed store",
        "offs_x = offs_m.to(tl.int64)[:, None] * K + offs_k[None, :]",
        "offs_x = offs_k.to(tl.int64)[None, :] * M + offs_m[:, None]",
        (DGRAD, "test_strides"),
    ),
    Mutant(
        "linear_dgrad",
        "missing int64",
        "offs_x = offs_m.to(tl.int64)[:, None] * K",
        "offs_x = offs_m[:, None] * K",
        (LARGE, "test_linear_dgrad_outputs"),
    ),
    Mutant(
        "linear_dgrad",
        "missing int64",
        ("offs_n.to(tl.int64) * stride_zn", "rows_n.to(tl.int64) * stride_wn"),
        ("offs_n * stride_zn", "rows_n * stride_wn"),
        (LARGE, "dgrad_inputs"),
    ),
    Mutant(
        "linear_dgrad",
        "derivative from the wrong tensor",
        "saved = tl.load(saved_ptr + offs_x, mask=mask_x, other=0.0).to(tl.float32)",
        "saved = acc",
        (DGRAD, "layer_below and float32 and (tanh or gelu)"),
    ),
    Mutant(
        "linear_dgrad",
        "activation of the wrong layer",
        "dx = activation_grad(acc, saved, ACTIVATION)",
        "dx = acc",
        (DGRAD, "layer_below and float32 and (tanh or gelu)"),
    ),
)

_PARTIAL = "partial = torch.empty((n_splits, *leading, stride_split), dtype=torch.float32, device=dz.device)"
_REDUCE = """    if n_splits > 1:
        _launch_reduce((partial, dw, db))
"""
_FIRST_LAUNCH = "    _launch((dz, x, rows, out_w, out_b),"

_LINEAR_WGRAD = (
    Mutant(
        "linear_wgrad",
        "mask dropped in a load",
        "dz = tl.load(dz_ptrs, mask=mask_n[:, None] & mask_m[None, :], other=0.0)",
        "dz = tl.load(dz_ptrs, mask=mask_n[:, None], other=0.0)",
        (WGRAD, "test_strides"),
    ),
    Mutant(
        "linear_wgrad",
        "mask dropped in a store",
        "tl.store(dw_ptr + offs, grad.to(dw_ptr.dtype.element_ty), mask=offs < weights)",
        "tl.store(dw_ptr + offs, grad.to(dw_ptr.dtype.element_ty), mask=offs < total)",
        (WGRAD, "split_over_the_batch and float32"),
    ),
    Mutant(
        "column_sums",
        "mask dropped in the reduction tail",
        "present = (tl.arange(0, ROWS) < end - r)[:, None]",
        "present = (tl.arange(0, ROWS) >= 0)[:, None]",
        (WGRAD, "test_strides"),
    ),
    Mutant(
        "column_sums",
        "mask dropped in the reduction tail",
        "tl.where(mask_rows[:, None], block.to(tl.float32), 0.0)",
        "block.to(tl.float32)",
        (DGRAD, "sums_leave_out"),
    ),
    Mutant(
        "column_sums",
        "last partial left out",
        "for r in range(first, end, ROWS):",
        "for r in range(first, end - ROWS, ROWS):",
        (WGRAD, "test_strides"),
    ),
    Mutant(
        "linear_wgrad",
        "mask dropped in the reduction tail",
        "m_end = tl.minimum(m_begin + m_per_split, M)",
        "m_end = m_begin + m_per_split",
        (WGRAD, "test_strides"),
    ),
    Mutant(
        "linear_wgrad",
        "wrong stride",
        "x_ptrs = cols_k + row_m[:, None] * stride_xm",
        "x_ptrs = cols_k + row_m[:, None] * K",
        (WGRAD, "test_strides"),
    ),
    Mutant(
        "linear_wgrad",
        "partials buffer one short",
        _PARTIAL,
        _PARTIAL.replace("n_splits,", "n_splits - 1,"),
        (WGRAD, "split_over_the_batch and float32"),
    ),
    Mutant(
        "linear_wgrad",
        "partials buffer one short",
        _PARTIAL,
        _PARTIAL.replace("n_splits,", "n_splits - 1,"),
        (WGRAD, "split_over_the_batch and float32 and sm_80"),
        lane="execute",
    ),
    Mutant(
        "linear_wgrad",
        "reduce before the partials are written",
        (_REDUCE, _FIRST_LAUNCH),
        ("", _REDUCE + _FIRST_LAUNCH),
        (WGRAD, "split_over_the_batch and float32"),
    ),
    Mutant(
        "linear_wgrad",
        "reduce before the partials are written",
        (_REDUCE, _FIRST_LAUNCH),
        ("", _REDUCE + _FIRST_LAUNCH),
        (WGRAD, "split_over_the_batch and float32 and sm_80"),
        lane="execute",
    ),
    Mutant(
        "linear_wgrad",
        "last partial left out",
        "for _ in range(1, n_splits):",
        "for _ in range(1, n_splits - 1):",
        (WGRAD, "split_over_the_batch and float32"),
    ),
    Mutant(
        "linear_wgrad",
        "programs that write the same place",
        "mask=(offs_n < N)[:, None] & (offs_k < K)[None, :]",
        "mask=(offs_n < N)[:, None]",
        (ORDER, "linear_wgrad"),
    ),
    Mutant(
        "linear_wgrad",
        "gather index ignored",
        "row_x = tl.load(rows_ptr + m + offs_m, mask=mask_m, other=0).to(tl.int64)",
        "row_x = (m + offs_m).to(tl.int64) * mask_m",
        (WGRAD, "uint8_pixels_gathered and float32"),
    ),
    Mutant(
        "linear_wgrad", "uint8 scale dropped", "dw = dw * (1.0 / 255.0)", "dw = dw * 1.0", (WGRAD, "uint8 and float32")
    ),
    Mutant(
        "linear_wgrad",
        "missing int64",
        "row_m = (m_begin + offs_m).to(tl.int64)",
        "row_m = m_begin + offs_m",
        (LARGE, "wgrad_inputs and rows"),
    ),
    Mutant(
        "linear_wgrad",
        "missing int64",
        "dw_ptr + offs_n.to(tl.int64)[:, None] * K",
        "dw_ptr + offs_n[:, None] * K",
        (LARGE, "wgrad_outputs"),
    ),
    Mutant(
        "linear_wgrad",
        "transposed store",
        "offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]",
        "offs_n.to(tl.int64)[:, None] + offs_k[None, :] * N",
        (WGRAD, "test_strides"),
    ),
)

_ACTIVATIONS = (
    Mutant(
        "activation_bwd",
        "mask dropped in a store",
        ", mask=mask)\n\n\ndef _plan",
        ")\n\n\ndef _plan",
        (ACTIVATION, "sigmoid and float32"),
    ),
    Mutant(
        "activation_bwd",
        "wrong stride",
        "(offs // N) * stride_am",
        "(offs // N) * N",
        (ACTIVATION, "sigmoid and float32 and (rows or expanded)"),
    ),
    Mutant(
        "activation_bwd",
        "missing int64",
        "tl.program_id(0).to(tl.int64) * BLOCK",
        "tl.program_id(0) * BLOCK",
        (LARGE, "activation_bwd_of_many"),
    ),
    Mutant(
        "activation_bwd",
        "derivative from the wrong tensor",
        "dz = activation_grad(da, saved, ACTIVATION)",
        "dz = activation_grad(da, da, ACTIVATION)",
        (ACTIVATION, "tanh and float32 and dense"),
    ),
    Mutant(
        "activations",
        "wrong derivative",
        "dz = da * (1.0 - saved * saved)",
        "dz = da * (1.0 - saved)",
        (ACTIVATION, "tanh and float32 and dense"),
    ),
    Mutant(
        "activations",
        "wrong derivative",
        "dz = da * (cdf + saved * pdf)",
        "dz = da * cdf",
        (ACTIVATION, "gelu and float32 and dense"),
    ),
    Mutant(
        "activations",
        "wrong derivative",
        "dz = tl.where(saved <= 0.0, 0.0, da)",
        "dz = tl.where(saved < 0.0, 0.0, da)",
        (ACTIVATION, "kinks"),
    ),
    Mutant(
        "activations",
        "wrong function",
        "a = tl.where(z >= 0.0, 1.0, 0.0)",
        "a = tl.where(z > 0.5, 1.0, 0.0)",
        (FWD, "step and float32"),
    ),
    Mutant(
        "maths",
        "digits lost near zero",
        "return tl.where(tl.abs(z) < 0.5, near, far)",
        "return far",
        (FWD, "test_tanh_near_zero"),
    ),
    # The GPU's product; the interpreter has its own.
    Mutant(
        "tiling",
        "a term of the product dropped",
        'high_low = tl.dot(a_high, b_low, acc[1] if APART else low_high, input_precision="tf32")',
        "high_low = acc[1] if APART else low_high",
        (FWD, "test_shapes and sm_80 and float32 and 130"),
        lane="execute",
    ),
    Mutant(
        "tiling",
        "the slices of a reduction overlap",
        "tl.arange(0, SLICES)[:, None, None] * DEPTH",
        "tl.arange(0, SLICES)[:, None, None]",
        ("tests/kernels/test_tiles.py", "test_every_tile and fwd and float32 and wide"),
    ),
    Mutant(
        "tiling",
        "the NaN of a GPU becomes -0.0",
        "tl.where(x == x, bits + 0x1000, bits)",
        "bits + 0x1000",
        (NAN, "test_rounding_to_tf32"),
    ),
    Mutant(
        "tiling",
        "programs that compute the same tile",
        "return first_m + within % group_m, within // group_m",
        "return first_m + within % group_m, within // (group_m + 1)",
        (FWD, "test_shapes and float32"),
    ),
)

_DEPENDENT = (
    Mutant(
        "dependent",
        "no wait for the kernel before",
        '"griddepcontrol.wait; griddepcontrol.launch_dependents; // dummy $0"',
        '"griddepcontrol.launch_dependents; // dummy $0"',
        ("tests/execute/test_dependent.py", "test_a_step_of_dependent_launches"),
        lane="execute",
    ),
)

MUTANTS = (*_LINEAR_FWD, *_LINEAR_DGRAD, *_LINEAR_WGRAD, *_ACTIVATIONS, *_DEPENDENT)
