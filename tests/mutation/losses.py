"""Bugs planted in the kernels of losses, of the head and of the optimizers, each with the tests that find it."""

from __future__ import annotations

from tests.mutation.harness import Mutant

__all__ = ["MUTANTS"]

CE = "tests/kernels/test_cross_entropy.py"
HEAD = "tests/kernels/test_head.py"
ELEMENTWISE = "tests/kernels/test_elementwise_loss.py"
SQUARED = "tests/kernels/test_softmax_squared_error.py"
UPDATE = "tests/kernels/test_wgrad_update.py"
BEFORE_UPDATE = "tests/kernels/test_before_update.py"
LARGE = "tests/kernels/test_large_offsets.py"
WEIGHTS = "tests/kernels/test_row_weights.py"
STEP = "tests/whole/test_step.py"

_PARTIAL = "partial = New(2, programs) if"

_CROSS_ENTROPY = (
    Mutant(
        "cross_entropy",
        "mask dropped in a load",
        """        offs_c = tl.arange(0, BLOCK_C)
        mask = mask_m[:, None] & (offs_c < C)[None, :]
""",
        """        offs_c = tl.arange(0, BLOCK_C)
        mask = mask_m[:, None] & (offs_c >= 0)[None, :]
""",
        (CE, "one_pass_shapes and 63"),
    ),
    Mutant(
        "cross_entropy_bwd",
        "mask dropped in a store",
        "tl.store(dz_ptr + offs_d, (dz * g[:, None]).to(dz_ptr.dtype.element_ty), mask=mask)",
        "tl.store(dz_ptr + offs_d, (dz * g[:, None]).to(dz_ptr.dtype.element_ty), mask=mask_m[:, None])",
        (CE, "test_two_passes and plain"),
    ),
    Mutant(
        "cross_entropy",
        "mask dropped in the reduction tail",
        "loss_sums += tl.load(partial_ptr + offs, mask=offs < count, other=0.0)",
        "loss_sums += tl.load(partial_ptr + offs, mask=offs < 2 * count, other=0.0)",
        (CE, "one_or_many_programs and 600 and float32"),
    ),
    Mutant(
        "cross_entropy_bwd",
        "wrong stride",
        "offs_p.to(tl.int64) * stride_gp",
        "offs_p.to(tl.int64)",
        (CE, "test_upstream_strides"),
    ),
    Mutant(
        "cross_entropy",
        "wrong stride",
        "y, w_y, ignored = load_labels(target_ptr, offs_t, mask_m, w_ptr, stride_w, C, ignore_index)",
        "y, w_y, ignored = load_labels(target_ptr, offs_t, mask_m, w_ptr, 1, C, ignore_index)",
        (LARGE, "cross_entropy_inputs and weight"),
    ),
    Mutant(
        "softmax",
        "missing int64",
        "b.to(tl.int64) * stride_b + offs_p.to(tl.int64) * stride_p",
        "b.to(tl.int64) * stride_b + offs_p * stride_p",
        (LARGE, "cross_entropy_inputs and rows"),
    ),
    Mutant(
        "cross_entropy",
        "partials buffer one short",
        _PARTIAL,
        _PARTIAL.replace("programs)", "programs - 1)"),
        (CE, "one_or_many_programs and 600 and float32"),
    ),
    Mutant(
        "cross_entropy",
        "partials buffer one short",
        _PARTIAL,
        _PARTIAL.replace("programs)", "programs - 1)"),
        (CE, "one_or_many_programs and 600 and float32 and sm_80"),
        lane="execute",
    ),
    Mutant(
        "cross_entropy",
        "reduce before the partials are written",
        "Launches([whole, reduce], [partial])",
        "Launches([reduce, whole], [partial])",
        (CE, "one_or_many_programs and 600 and float32"),
    ),
    Mutant(
        "cross_entropy",
        "gather index ignored",
        "offs_t = tl.load(rows_ptr + offs_p, mask=mask_m, other=0).to(tl.int64) * stride_tp",
        "offs_t = offs_p.to(tl.int64) * stride_tp",
        (CE, "training_step_arguments"),
    ),
    Mutant(
        "cross_entropy",
        "ignored rows counted in the mean",
        "weight_sum = tl.sum(w_y, 0)",
        "weight_sum = tl.sum(tl.where(mask_m, 1.0, 0.0), 0)",
        (CE, "one_or_many_programs and 600 and float32"),
    ),
    Mutant(
        "cross_entropy",
        "running maximum without rescaling",
        "lane_total = lane_total * tl.exp(seen_top - ref) +",
        "lane_total = lane_total +",
        (CE, "longer_than_a_block and plain"),
    ),
    Mutant(
        "cross_entropy_bwd",
        "label smoothing dropped",
        "            dz -= target_block(t_ptrs, mask, w_ptr, stride_w, offs_c, C, smoothing, PROBS, SMOOTH)",
        "            dz -= target_block(t_ptrs, mask, w_ptr, stride_w, offs_c, C, 0.0, PROBS, SMOOTH)",
        (CE, "test_two_passes and smoothing and mean"),
    ),
    Mutant(
        "softmax_tiles",
        "wider loads than the alignment allows",
        "return math.gcd(16, shape.classes,",
        "return math.gcd(16, 16,",
        (CE, "one_pass_shapes and sm_80 and 63"),
        lane="execute",
    ),
)

_SOFTMAX = (
    Mutant(
        "softmax",
        "label smoothing dropped",
        "loss += tl.sum(tl.where(mask, q * (log_sum[:, None] - shift), 0.0), 1)",
        "loss += 0.0 * tl.sum(q, 1)",
        (CE, "one_pass_options and smoothing"),
    ),
    Mutant(
        "softmax",
        "label smoothing dropped",
        "dz -= tl.where(ignored[:, None], 0.0, q * g)",
        "dz -= 0.0 * q",
        (CE, "one_pass_options and smoothing"),
    ),
    Mutant(
        "softmax",
        "ignore_index ignored",
        "ignored = label == ignore_index",
        "ignored = label == -(2**62)",
        (CE, "one_pass_options and ignore"),
    ),
    Mutant(
        "softmax",
        "mask dropped in a load",
        "tl.where(usable, label, 0) * stride_w, mask=usable, other=0.0)",
        "label * stride_w)",
        (CE, "one_pass_options and weight"),
    ),
    Mutant(
        "softmax",
        "class weight dropped",
        "q *= tl.load(w_ptr + offs_c.to(tl.int64) * stride_w, mask=offs_c < C, other=0.0).to(tl.float32)[None, :]",
        "q *= 1.0",
        (CE, "test_probabilities and all"),
    ),
    Mutant(
        "softmax",
        "missing int64",
        "offs_c.to(tl.int64) * stride_w",
        "offs_c * stride_w",
        (LARGE, "cross_entropy_inputs and weight"),
    ),
    Mutant(
        "softmax",
        "digits lost at large logits",
        "    shift = z - top[:, None]\n    e = tl.exp(shift)\n    return top, shift, e, tl.sum(e, 1)",
        "    e = tl.exp(z)\n    return top, z - top[:, None], e, tl.sum(e, 1)",
        (CE, "large_offset"),
    ),
    Mutant(
        "softmax",
        "gradient of ignored rows",
        "tl.where(ignored, 0.0, mass) * g / total",
        "(mass + 1.0 * ignored) * g / total",
        (CE, "one_pass_shapes and 63"),
    ),
)

_OTHER_LOSSES = (
    Mutant(
        "elementwise_loss",
        "mask dropped in a store",
        "tl.store(da_ptr + offs, (g * _loss_grad(a, y, delta, LOSS)).to(da_ptr.dtype.element_ty), mask=mask)",
        "tl.store(da_ptr + offs, (g * _loss_grad(a, y, delta, LOSS)).to(da_ptr.dtype.element_ty))",
        (ELEMENTWISE, "test_strides"),
    ),
    Mutant(
        "elementwise_loss",
        "mask dropped in the reduction tail",
        "loss = tl.where(mask, _loss(a, y, delta, LOSS), 0.0)",
        "loss = _loss(a, y, delta, LOSS)",
        (ELEMENTWISE, "test_shapes and mse"),
    ),
    Mutant(
        "elementwise_loss",
        "wrong stride",
        "y_ptr + row_y * stride_ym + c * stride_yc",
        "y_ptr + row_y * stride_am + c * stride_ac",
        (ELEMENTWISE, "test_strides"),
    ),
    Mutant(
        "elementwise_loss",
        "wrong derivative",
        "da = tl.sigmoid(a) - y",
        "da = tl.sigmoid(a) + y",
        (ELEMENTWISE, "test_shapes and logits"),
    ),
    Mutant(
        "elementwise_loss",
        "border of Huber on one side only",
        "tl.where(d < -delta, -delta, d))",
        "d)",
        (ELEMENTWISE, "test_delta"),
    ),
    Mutant(
        "elementwise_loss",
        "delta lost in the sum",
        "_launch(a, y, loss_name, partial=partial, delta=delta)",
        "_launch(a, y, loss_name, partial=partial)",
        (ELEMENTWISE, "test_delta"),
    ),
    Mutant(
        "elementwise_loss",
        "partials buffer one short",
        "partial = torch.empty(cdiv(a.numel(), BLOCK), dtype=torch.float32, device=a.device)",
        "partial = torch.empty(a.numel() // BLOCK, dtype=torch.float32, device=a.device)",
        (ELEMENTWISE, "test_shapes and mse"),
    ),
    Mutant(
        "reduce_sum",
        "mask dropped in the reduction tail",
        "tail += tl.load(partial_ptr + offs, mask=offs < count, other=0.0)",
        "tail += tl.load(partial_ptr + offs)",
        (ELEMENTWISE, "test_shapes and mse"),
    ),
    Mutant(
        "reduce_sum",
        "scale dropped",
        "((tl.sum(acc, 0) + tl.sum(tail, 0)) * scale)",
        "(tl.sum(acc, 0) + tl.sum(tail, 0))",
        (ELEMENTWISE, "test_shapes and mse"),
    ),
    Mutant(
        "softmax_squared_error",
        "mask dropped in a store",
        """            dz = (2.0 * g + poison)[:, None] * p * (d - tl.sum(p * d, 1)[:, None])
            tl.store(dz_ptr + offs_d, dz.to(dz_ptr.dtype.element_ty), mask=mask)
""",
        """            dz = (2.0 * g + poison)[:, None] * p * (d - tl.sum(p * d, 1)[:, None])
            tl.store(dz_ptr + offs_d, dz.to(dz_ptr.dtype.element_ty), mask=mask_m[:, None])
""",
        (SQUARED, "test_strides"),
    ),
    Mutant(
        "softmax_squared_error",
        "wrong derivative",
        "* (d - tl.sum(p * d, 1)[:, None])",
        "* d",
        (SQUARED, "test_strides"),
    ),
    Mutant(
        "softmax_squared_error",
        "wrong stride",
        "y_rows = y_ptr + row_y[:, None] * stride_ym",
        "y_rows = y_ptr + row_y[:, None] * stride_zm",
        (SQUARED, "test_strides or test_rows_longer"),
    ),
    Mutant(
        "softmax_squared_error",
        "missing int64",
        "row = tl.program_id(0).to(tl.int64) * BLOCK_M",
        "row = tl.program_id(0) * BLOCK_M",
        (LARGE, "softmax_squared_error_inputs and rows"),
    ),
)

_HEAD = (
    Mutant(
        "head",
        "uint8 scale dropped",
        "z = z * (1.0 / 255.0)",
        "z = z * 1.0",
        (HEAD, "single_layer_on_pixels and float32"),
    ),
    Mutant("head", "bias added twice", "z += tl.load(b_ptr", "z += 2.0 * tl.load(b_ptr", (HEAD, "test_strides")),
    Mutant(
        "head",
        "gather index ignored",
        "row_t = tl.load(rows_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)",
        "row_t = offs_m.to(tl.int64)",
        (HEAD, "rows_gathered"),
    ),
    Mutant(
        "head",
        "derivative from the wrong tensor",
        "saved = tl.load(saved_ptrs, mask=mask_p, other=0.0).to(tl.float32)",
        "saved = da",
        (HEAD, "activations_below and (tanh or gelu)"),
    ),
    Mutant(
        "head",
        "padded classes in the softmax",
        'z = tl.where(mask_c[None, :], z, float("-inf"))',
        "z = tl.where(mask_c[None, :], z, 0.0)",
        (HEAD, "test_strides"),
    ),
)

_UPDATE = (
    Mutant(
        "wgrad_update",
        "bias added twice",
        "    _finish(\n        db, layer.b_ptr",
        "    _finish(\n        db + db, layer.b_ptr",
        (UPDATE, "every_optimizer and direct and sgd"),
    ),
    Mutant(
        "wgrad_update",
        "wrong layer",
        "factors, layer, rows_ptr, states, partial_ptr, slice_start, overflow_ptr, hyper_ptr,\n"
        "                members, member, first_flat, pid - factors.first_tile, split,",
        "factors, layer, rows_ptr, states, partial_ptr, slice_start, overflow_ptr, hyper_ptr,\n"
        "                members, member, first_flat, pid, split,",
        (UPDATE, "depths_and_no_bias"),
    ),
    Mutant(
        "wgrad_update",
        "wrong layer",
        "                    members, member, first_flat, pid - factors.first_tile, split,",
        "                    members, member, first_flat, pid - operands[1].first_tile, split,",
        (UPDATE, "mean_loss"),
    ),
    Mutant(
        "wgrad_update",
        "last partial left out",
        "(made, 0) if of is None else (of.values, of.blocks)",
        "(made, 0) if of is None else (of.values, of.blocks - 1)",
        (UPDATE, "sums_of_the_producers and 33-16"),
    ),
    Mutant(
        "wgrad_update",
        "the halves of a block at one place",
        "first_k + left.shape[1]",
        "first_k",
        (UPDATE, "every_optimizer and direct and sgd"),
    ),
    Mutant(
        "wgrad_update",
        "mask dropped in the reduction tail",
        "total += tl.load(loss_rows_ptr + i + offs, mask=i + offs < count, other=0.0)",
        "total += tl.load(loss_rows_ptr + i + offs)",
        (UPDATE, "mean_loss"),
    ),
    Mutant(
        "wgrad_update",
        "partials buffer one short",
        "partial = torch.empty((n_splits, *layout.flat_shape), dtype=torch.float32, device=dzs[0].device)",
        "partial = torch.empty((n_splits - 1, *layout.flat_shape), dtype=torch.float32, device=dzs[0].device)",
        (UPDATE, "every_optimizer and split and sgd"),
    ),
    Mutant(
        "before_update",
        "NaN is no overflow",
        'mask & ~(tl.abs(g) < float("inf"))',
        'mask & (tl.abs(g) == float("inf"))',
        (BEFORE_UPDATE, "TestGradients and slices and weight"),
    ),
    Mutant(
        "before_update",
        "an overflow is never forgotten",
        "tl.store(loss_scale.overflow + member, 0)",
        "tl.store(loss_scale.overflow + member, 1)",
        (BEFORE_UPDATE, "moves_as_torchs"),
    ),
    Mutant(
        "optimizer",
        "weight decay dropped",
        "w -= tl.load(hyper_ptr) * tl.fma(w, tl.load(hyper_ptr + 1), g)",
        "w -= tl.load(hyper_ptr) * g",
        (UPDATE, "every_optimizer and direct and sgd"),
    ),
    Mutant(
        "optimizer",
        "state of the wrong element",
        '        tl.store(states[0] + state_offs, m, mask=mask)\n        if is_rule(OPTIMIZER, "nesterov")',
        '        tl.store(states[0] + offs, m, mask=mask)\n        if is_rule(OPTIMIZER, "nesterov")',
        (UPDATE, "every_optimizer and direct and momentum"),
    ),
    Mutant(
        "optimizer",
        "16-bit copy not written",
        "tl.store(low_ptrs, w.to(low_ptr.dtype.element_ty), mask=mask)",
        "tl.store(low_ptrs, g.to(low_ptr.dtype.element_ty), mask=mask)",
        (UPDATE, "16_bit and direct and float16"),
    ),
    Mutant(
        "optimizer",
        "an assigned parameter is overwritten",
        "w = tl.where(w.to(low.dtype) == low, w, low.to(tl.float32))",
        "w += 0.0",
        (UPDATE, "assigned and direct and bfloat16"),
    ),
)

_ROW_WEIGHTS = (
    Mutant(
        "row_weights",
        "mask dropped in a load",
        "return tl.load(sample_ptr + offs, mask=mask, other=0.0).to(tl.float32)",
        "return tl.load(sample_ptr + offs).to(tl.float32)",
        (WEIGHTS, "test_head and labels and one"),
    ),
    Mutant(
        "row_weights",
        "gather index ignored",
        "row = tl.load(rows_ptr + offs, mask=mask, other=0).to(tl.int64)",
        "row += 0",
        (WEIGHTS, "gathered_like_targets and smoothing and blocks"),
    ),
    Mutant(
        "row_weights",
        "wrong stride",
        "weight *= load_sample_weights(sample_ptr, row * stride_s, mask)",
        "weight *= load_sample_weights(sample_ptr, row, mask)",
        (WEIGHTS, "gathered_like_targets and smoothing and blocks"),
    ),
    Mutant(
        "row_weights",
        "only the last block of weights",
        "        total += weight\n",
        "        total = weight\n",
        (WEIGHTS, "test_head and class and blocks"),
    ),
    Mutant(
        "row_weights",
        "another launch forgets a factor",
        "    tl.store(divisor_ptr, total * scale)\n",
        "    tl.store(divisor_ptr, total)\n",
        (WEIGHTS, "elementwise and mse and launch"),
    ),
    Mutant(
        "row_weights",
        "member stride ignored",
        "            sample_ptr += member * members.sample\n",
        "            sample_ptr += 0\n",
        (WEIGHTS, "test_members_have and own"),
    ),
    Mutant(
        "row_weights",
        "no program writes the weight of the batch",
        "tl.store(divisor_ptr, divisor, mask=tl.program_id(0) == 0)",
        "tl.store(divisor_ptr, divisor, mask=tl.program_id(0) < 0)",
        (WEIGHTS, "test_head and labels and one"),
    ),
    Mutant(
        "head",
        "sample weight dropped",
        "            w_y *= sample\n",
        "            w_y *= 1.0\n",
        (WEIGHTS, "test_head and labels and one"),
    ),
    Mutant(
        "head",
        "sample weight dropped",
        "            q *= sample[:, None]\n",
        "            q *= 1.0\n",
        (WEIGHTS, "test_head and probabilities and one"),
    ),
    Mutant(
        "head",
        "wrong stride",
        "target_ptr + (row_t * stride_t)[:, None]",
        "target_ptr + (row_m * stride_t)[:, None]",
        (WEIGHTS, "gathered_like_targets and probabilities and head and blocks"),
    ),
    Mutant(
        "cross_entropy",
        "gather index ignored",
        "t_rows = target_ptr + tl.multiple_of(row_t * stride_tp, ALIGN)[:, None]",
        "t_rows = target_ptr + (row * stride_tp)[:, None]",
        (WEIGHTS, "gathered_like_targets and probabilities and cross and blocks"),
    ),
    Mutant(
        "cross_entropy",
        "sample weight dropped",
        "            row_s = tl.load(rows_ptr + offs_p, mask=mask_m, other=0).to(tl.int64)",
        "            row_s += 0",
        (WEIGHTS, "gathered_like_targets and smoothing and cross and blocks"),
    ),
    Mutant(
        "softmax",
        "gradient of ignored rows",
        "tl.where(ignored, 0.0, mass * g) / total",
        "mass * g / total",
        (WEIGHTS, "all_are_ignored and head"),
    ),
    Mutant(
        "elementwise_loss",
        "wrong derivative",
        "return (1.0 - y + p * y) * tl.sigmoid(a) - p * y",
        "return (1.0 - y + p * y) * tl.sigmoid(a) - y",
        (WEIGHTS, "elementwise and pos_weight and one"),
    ),
    Mutant(
        "elementwise_loss",
        "sample weight dropped",
        "        g = g * sample\n",
        "        g = g * 1.0\n",
        (WEIGHTS, "elementwise and mse and one"),
    ),
    Mutant(
        "elementwise_loss",
        "sample weight of the wrong row",
        "            row_y = offs // C\n",
        "            row_y = offs % C\n",
        (WEIGHTS, "elementwise and mse and one"),
    ),
    Mutant(
        "softmax_squared_error",
        "sample weight dropped",
        "        g *= sample\n",
        "        g *= 1.0\n",
        (WEIGHTS, "softmax_squared_error and 10 and blocks"),
    ),
    Mutant(
        "wgrad_update",
        "the mean of weighted losses over the rows",
        "tl.store(loss_ptr, tl.sum(total, axis=0) / tl.load(divisor_ptr))",
        "tl.store(loss_ptr, tl.sum(total, axis=0) / count)",
        (STEP, "options_of_losses and class and not 16"),
    ),
)

MUTANTS = (*_ROW_WEIGHTS, *_CROSS_ENTROPY, *_SOFTMAX, *_OTHER_LOSSES, *_HEAD, *_UPDATE)
