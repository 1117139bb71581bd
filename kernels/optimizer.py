"""The optimizers' update of one block of parameters, as a device function inlined into the weight-gradient kernels.

    sgd        g += wd w                          w -= lr g
    momentum   g += wd w      m = mu m + g        w -= lr m
    nesterov   as momentum, but                   w -= lr (g + mu m)
    adamw      w *= 1 - lr wd m += (1 - b1)(g - m), v = b2 v + (1 - b2) g^2
                                                  w -= step m / (sqrt(v) inv_sqrt_bc2 + eps)
               step = lr / (1 - b1^t), inv_sqrt_bc2 = 1 / sqrt(1 - b2^t)

These are torch.optim.SGD's and AdamW's rules, term by term. Every setting comes as one row of ``HYPER_COLUMNS`` float32
per step, in the device's memory. A changed setting therefore needs no new CUDA graph. The host computes the row in
float64 and rounds it once: 1 - b2 computed in float32 would be wrong in its fifth digit.

    rule                states    columns 0 to 6 of the row
    sgd                           lr, wd
    momentum, nesterov  m         lr, wd, mu
    adamw               m, v      1 - lr wd, step, inv_sqrt_bc2, 1 - b1, b2, 1 - b2, eps

Column ``MAX_NORM`` is the most that the norm of all gradients may be, for any rule.
"""

import triton
import triton.language as tl

#: Columns of the table of per-step values: 32 bytes, which one request reads.
HYPER_COLUMNS = 8
MAX_NORM = tl.constexpr(7)


@triton.jit
def update_block(
    g, w_ptr, low_ptr, states, offs, state_offs, mask, hyper_ptr, OPTIMIZER: tl.constexpr, LOW_IS_PARAM: tl.constexpr,
):  # fmt: skip
    """Apply the float32 gradient block g to the parameters at w_ptr + offs and to their states at offset state_offs.

    Unless ``low_ptr`` is None, also write the parameters, rounded, to low_ptr + offs. With ``LOW_IS_PARAM`` these are
    the parameters themselves and w_ptr their masters. A parameter that is not the rounded master was assigned since the
    last update, and takes the master's place.
    """
    w = tl.load(w_ptr + offs, mask=mask, other=0.0)
    if low_ptr is not None:
        # Four values per thread, as many as of the float32 parameters. Otherwise the compiler gives a thread 16 bytes,
        # eight values, of these, and reads the parameters half a sector at a time.
        low_ptrs = low_ptr + offs
        if len(offs.shape) == 2:
            low_ptrs = tl.max_contiguous(low_ptrs, [1, 4])
        else:
            low_ptrs = tl.max_contiguous(low_ptrs, [4])
        if LOW_IS_PARAM:
            low = tl.load(low_ptrs, mask=mask, other=0.0)
            w = tl.where(w.to(low.dtype) == low, w, low.to(tl.float32))
    # Weight decay is an explicit fma, because g may be a product: the compiler could fuse that one instead.
    if OPTIMIZER == "sgd":
        w -= tl.load(hyper_ptr) * tl.fma(w, tl.load(hyper_ptr + 1), g)
    elif OPTIMIZER == "momentum" or OPTIMIZER == "nesterov":
        lr = tl.load(hyper_ptr)
        g = tl.fma(w, tl.load(hyper_ptr + 1), g)
        momentum = tl.load(hyper_ptr + 2)
        m = momentum * tl.load(states[0] + state_offs, mask=mask, other=0.0) + g
        tl.store(states[0] + state_offs, m, mask=mask)
        if OPTIMIZER == "nesterov":
            w -= lr * (g + momentum * m)
        else:
            w -= lr * m
    else:
        tl.static_assert(OPTIMIZER == "adamw", "unknown optimizer")
        # In this order ptxas needs the fewest registers, and both states are still loaded before the first store.
        m = tl.load(states[0] + state_offs, mask=mask, other=0.0)
        m += (g - m) * tl.load(hyper_ptr + 3)
        v = tl.load(states[1] + state_offs, mask=mask, other=0.0)
        tl.store(states[0] + state_offs, m, mask=mask)
        v = tl.load(hyper_ptr + 4) * v + tl.load(hyper_ptr + 5) * g * g
        tl.store(states[1] + state_offs, v, mask=mask)
        w *= tl.load(hyper_ptr)
        w -= tl.load(hyper_ptr + 1) * m / (tl.sqrt(v) * tl.load(hyper_ptr + 2) + tl.load(hyper_ptr + 6))
    tl.store(w_ptr + offs, w, mask=mask)
    if low_ptr is not None:
        tl.store(low_ptrs, w.to(low_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _power(base, exponent):
    """base^exponent in float64, exponent >= 0, by squaring: within some 2 log2(exponent) roundings."""
    result = base * 0.0 + 1.0
    while exponent > 0:
        result = tl.where((exponent & 1) == 1, result * base, result)
        base *= base
        exponent >>= 1
    return result


@triton.jit
def corrected_row(hyper_ptr, decays_ptr, count, OPTIMIZER: tl.constexpr, COLUMNS: tl.constexpr):
    """A row that was made without the number of updates, for update number ``count``; computed in float64."""
    tl.static_assert(OPTIMIZER == "adamw", "the other rules do not count")
    offs = tl.arange(0, COLUMNS)
    row = tl.load(hyper_ptr + offs)
    step = tl.load(hyper_ptr + 1).to(tl.float64) / (1.0 - _power(tl.load(decays_ptr), count))
    inv_sqrt_bc2 = 1.0 / tl.sqrt(1.0 - _power(tl.load(decays_ptr + 1), count))
    row = tl.where(offs == 1, step.to(tl.float32), row)
    return tl.where(offs == 2, inv_sqrt_bc2.to(tl.float32), row)
