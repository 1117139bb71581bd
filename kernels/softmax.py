"""Device functions of softmax cross-entropy: labels, the target term of a block, softmax of whole and split rows.

Notation, for a row of logits z [C] with class weights w (1 if absent) and label smoothing e:

    shift_c = z_c - max z,  log_sum = log sum_c exp(shift_c),  p_c = exp(shift_c - log_sum)
    label y:        q_c = (e/C) w_c,                         hot = (1-e) w_y
    probabilities:  q_c = ((1-e) t_c + e/C) w_c,             hot = 0
    mass = hot + sum_c q_c
    loss = hot (log_sum - shift_y) + sum_c q_c (log_sum - shift_c)
    dloss/dz_c = mass p_c - q_c - [c = y] hot

The maximum and log_sum are kept apart instead of lse = max + log_sum: for logits near 1e4 the sum would lose the
digits that p is made of. Padding beyond C is z = -inf, whose exponential is 0, and q = 0.
"""

import triton
import triton.language as tl


@triton.jit
def row_offsets(b, offs_p, stride_b, stride_p, ALIGN: tl.constexpr):
    """int64 offset of each row; ALIGN is a power of two that divides every one of them (for vector loads)."""
    return tl.multiple_of(b.to(tl.int64) * stride_b + offs_p.to(tl.int64) * stride_p, ALIGN)


@triton.jit
def load_labels(target_ptr, offs, mask, w_ptr, stride_w, C, ignore_index):
    """(y, w_y, ignored): the label, or -1 where there is none to select; its weight; whether the row is ignored.

    w_y is 0 for an ignored row and outside ``mask``; NaN for a label outside [0, C), which makes the row NaN
    without an address ever being computed from that label.
    """
    label = tl.load(target_ptr + offs, mask=mask, other=0).to(tl.int64)
    ignored = label == ignore_index
    usable = mask & (label >= 0) & (label < C) & (ignored == 0)
    w_y = tl.where(usable, 1.0, 0.0)
    if w_ptr is not None:
        w_y = tl.load(w_ptr + tl.where(usable, label, 0) * stride_w, mask=usable, other=0.0).to(tl.float32)
    w_y = tl.where(usable | ignored | (mask == 0), w_y, float("nan"))
    return tl.where(usable, label, -1).to(tl.int32), w_y, ignored


@triton.jit
def target_block(t_ptrs, mask, w_ptr, stride_w, offs_c, C, smoothing, PROBS: tl.constexpr, SMOOTH: tl.constexpr):
    """q for a block [BLOCK_M, BLOCK_C]; q is 0 outside ``mask``, which is [1, BLOCK_C] at least."""
    q = tl.where(mask, smoothing / C, 0.0)
    if PROBS:
        t = tl.load(t_ptrs, mask=mask, other=0.0).to(tl.float32)
        if SMOOTH:
            q += (1.0 - smoothing) * t
        else:
            q = t
    if w_ptr is not None:
        q *= tl.load(w_ptr + offs_c.to(tl.int64) * stride_w, mask=offs_c < C, other=0.0).to(tl.float32)[None, :]
    return q


@triton.jit
def softmax_block(z):
    """(max, shift, exp(shift), its sum over the row) of a float32 block that holds whole rows."""
    top = tl.max(z, 1)
    shift = z - top[:, None]
    e = tl.exp(shift)
    return top, shift, e, tl.sum(e, 1)


@triton.jit
def whole_rows_loss(z, q, hot, picked, mask, HAS_Q: tl.constexpr, PROBS: tl.constexpr):
    """(loss, mass, max z, shift, exp(shift), sum of exp(shift)) of a float32 block that holds whole rows.

    ``picked`` is [c = y]. q is used only with HAS_Q, hot and picked only without PROBS.
    """
    top, shift, e, total = softmax_block(z)
    log_sum = tl.log(total)
    mass = hot
    loss = tl.zeros_like(total)
    if HAS_Q:
        mass += tl.sum(q, 1)
        loss += tl.sum(tl.where(mask, q * (log_sum[:, None] - shift), 0.0), 1)
    if not PROBS:
        loss += hot * (log_sum - tl.sum(tl.where(picked, shift, 0.0), 1))
    return loss, mass, top, shift, e, total


@triton.jit
def rows_grad(
    e, total, mass, q, hot, picked, ignored, g, HAS_Q: tl.constexpr, PROBS: tl.constexpr,
    DIVIDED: tl.constexpr = False,
):  # fmt: skip
    """G (mass p - q - [c = y] hot) for a block of e = exp(shift); 0 in ignored rows (NaN if p is).

    With DIVIDED, g may be infinite, where all rows are ignored.
    """
    if DIVIDED:
        dz = e * (tl.where(ignored, 0.0, mass * g) / total)[:, None]
    else:
        dz = e * (tl.where(ignored, 0.0, mass) * g / total)[:, None]
    if HAS_Q:
        dz -= tl.where(ignored[:, None], 0.0, q * g)
    if not PROBS:
        dz = tl.where(picked, dz - (hot * g)[:, None], dz)
    return dz
