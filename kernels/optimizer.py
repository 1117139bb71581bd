"""The optimizers' update of one block of parameters, as a device function inlined into the weight-gradient kernels.

    sgd        g += wd w                          w -= lr g
    momentum   g += wd w      m = mu m + g        w -= lr m
    nesterov   as momentum, but                   w -= lr (g + mu m)
    adam       g += wd w      m += (1 - b1)(g - m), v = b2 v + (1 - b2) g^2
                                                  w -= step m / (sqrt(v) inv_sqrt_bc2 + eps)
               step = lr / (1 - b1^t), inv_sqrt_bc2 = 1 / sqrt(1 - b2^t)
    adamw      w *= 1 - lr wd, and the rest as adam without g += wd w
    rmsprop    g += wd w      v = a v + (1 - a) g^2
                                                  w -= lr g / (sqrt(v) + eps)
    lion       c = m + (1 - b1)(g - m), m += (1 - b2)(g - m)
                                                  w -= lr (sign(c) + wd w), and NaN where g is not finite

A rule's name may be followed by options, each after a space:

    maximize   g = -g before all else
    amsgrad    adam, adamw: x = max(x, v), which takes the place of v in the update of w
    centered   rmsprop: n += (1 - a)(g - n), and v - n^2 in the place of v in the update of w
    momentum   rmsprop: m = mu m + g / (sqrt(v) + eps), w -= lr m
    ema        after all else e += weight (w - e), a mean of the parameters over the steps; e is the last state

These are the rules of torch.optim, term by term; torch has no lion, whose source is arXiv 2302.06675. Every setting
comes as one row of ``HYPER_COLUMNS`` float32 per step, in the device's memory. A changed setting therefore needs no new
CUDA graph. The host computes the row in float64 and rounds it once: 1 - b2 computed in float32 would be wrong in its
fifth digit.

    rule                states              columns 0 to 6 of the row
    sgd                                     lr, wd
    momentum, nesterov  m                   lr, wd, mu
    adam                m, v [, x]          wd, step, inv_sqrt_bc2, 1 - b1, b2, 1 - b2, eps
    adamw               m, v [, x]          1 - lr wd, step, inv_sqrt_bc2, 1 - b1, b2, 1 - b2, eps
    rmsprop             v [, n] [, m]       lr, wd, a, 1 - a, eps, mu
    lion                m                   lr, wd, 1 - b1, 1 - b2

Rows of a rule with ``ema`` have ``EMA_COLUMNS``. Column 8 is the weight, and column 9 the numerator of the warm-up that
a weight without the number of updates still lacks: the weight of update t is at least numerator / (10 + t).

Column ``MAX_NORM`` is the most that the norm of all gradients may be, for any rule.
"""

import triton
import triton.language as tl

#: Columns of the table of per-step values: 32 bytes, which one request reads.
HYPER_COLUMNS = 8
#: The same of a rule with ``ema``.
EMA_COLUMNS = 16
MAX_NORM = tl.constexpr(7)
EMA_WEIGHT, EMA_NUMERATOR = tl.constexpr(8), tl.constexpr(9)


@triton.constexpr_function
def is_rule(optimizer, *names):
    """Whether the rule is one of these, whatever its options."""
    return optimizer.split()[0] in names


@triton.constexpr_function
def has(optimizer, option):
    """Whether the option is among those behind the rule's name."""
    return option in optimizer.split()[1:]


@triton.jit
def _rmsprop(g, w, states, offs, mask, hyper_ptr, CENTERED: tl.constexpr, MOMENTUM: tl.constexpr):
    """The parameters after RMSprop's update; updates the states. All states are loaded before the first store."""
    g = tl.fma(w, tl.load(hyper_ptr + 1), g)
    weight = tl.load(hyper_ptr + 3)
    if MOMENTUM:
        m_ptr = states[2] if CENTERED else states[1]
        m = tl.load(m_ptr + offs, mask=mask, other=0.0)
    if CENTERED:
        n = tl.load(states[1] + offs, mask=mask, other=0.0)
        n += (g - n) * weight
    v = tl.load(states[0] + offs, mask=mask, other=0.0)
    if CENTERED:
        tl.store(states[1] + offs, n, mask=mask)
    v = tl.load(hyper_ptr + 2) * v + weight * g * g
    tl.store(states[0] + offs, v, mask=mask)
    if CENTERED:
        v -= n * n
    change = g / (tl.sqrt(v) + tl.load(hyper_ptr + 4))
    if MOMENTUM:
        change += tl.load(hyper_ptr + 5) * m
        tl.store(m_ptr + offs, change, mask=mask)
    return w - tl.load(hyper_ptr) * change


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
    if has(OPTIMIZER, "ema"):
        average_ptr = states[len(states) - 1]
        average = tl.load(average_ptr + state_offs, mask=mask, other=0.0)
    if has(OPTIMIZER, "maximize"):
        g = -g
    # Weight decay is an explicit fma, because g may be a product: the compiler could fuse that one instead.
    if is_rule(OPTIMIZER, "sgd"):
        w -= tl.load(hyper_ptr) * tl.fma(w, tl.load(hyper_ptr + 1), g)
    elif is_rule(OPTIMIZER, "momentum", "nesterov"):
        lr = tl.load(hyper_ptr)
        g = tl.fma(w, tl.load(hyper_ptr + 1), g)
        momentum = tl.load(hyper_ptr + 2)
        m = momentum * tl.load(states[0] + state_offs, mask=mask, other=0.0) + g
        tl.store(states[0] + state_offs, m, mask=mask)
        if is_rule(OPTIMIZER, "nesterov"):
            w -= lr * (g + momentum * m)
        else:
            w -= lr * m
    elif is_rule(OPTIMIZER, "rmsprop"):
        w = _rmsprop(g, w, states, state_offs, mask, hyper_ptr, has(OPTIMIZER, "centered"), has(OPTIMIZER, "momentum"))
    elif is_rule(OPTIMIZER, "lion"):
        m = tl.load(states[0] + state_offs, mask=mask, other=0.0)
        change = g - m
        direction = m + change * tl.load(hyper_ptr + 2)
        tl.store(states[0] + state_offs, m + change * tl.load(hyper_ptr + 3), mask=mask)
        # NaN has no sign, and would leave the parameter as it is.
        sign = tl.fma(g, 0.0, tl.where(direction > 0, 1.0, tl.where(direction < 0, -1.0, 0.0)))
        # One sum, because a sum with a bare sign would round to the same side at every step.
        w -= tl.load(hyper_ptr) * tl.fma(w, tl.load(hyper_ptr + 1), sign)
    else:
        tl.static_assert(is_rule(OPTIMIZER, "adam", "adamw"), "unknown optimizer")
        # In this order ptxas needs the fewest registers, and both states are still loaded before the first store.
        if is_rule(OPTIMIZER, "adam"):
            g = tl.fma(w, tl.load(hyper_ptr), g)
        m = tl.load(states[0] + state_offs, mask=mask, other=0.0)
        m += (g - m) * tl.load(hyper_ptr + 3)
        v = tl.load(states[1] + state_offs, mask=mask, other=0.0)
        if has(OPTIMIZER, "amsgrad"):
            largest = tl.load(states[2] + state_offs, mask=mask, other=0.0)
        tl.store(states[0] + state_offs, m, mask=mask)
        v = tl.load(hyper_ptr + 4) * v + tl.load(hyper_ptr + 5) * g * g
        tl.store(states[1] + state_offs, v, mask=mask)
        if has(OPTIMIZER, "amsgrad"):
            v = tl.maximum(largest, v, propagate_nan=tl.PropagateNan.ALL)
            tl.store(states[2] + state_offs, v, mask=mask)
        if is_rule(OPTIMIZER, "adamw"):
            w *= tl.load(hyper_ptr)
        w -= tl.load(hyper_ptr + 1) * m / (tl.sqrt(v) * tl.load(hyper_ptr + 2) + tl.load(hyper_ptr + 6))
    tl.store(w_ptr + offs, w, mask=mask)
    if has(OPTIMIZER, "ema"):
        average += (w - average) * tl.load(hyper_ptr + EMA_WEIGHT)
        tl.store(average_ptr + state_offs, average, mask=mask)
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
def correct_rows(
    hyper_ptr, row_ptr, decays_ptr, count, OPTIMIZER: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Write ROWS rows that were made without the number of updates, for update number ``count``; float64 inside."""
    ADAM: tl.constexpr = is_rule(OPTIMIZER, "adam", "adamw")
    tl.static_assert(ADAM or has(OPTIMIZER, "ema"), "the other rules do not count")
    offs = tl.arange(0, COLUMNS)
    for i in tl.static_range(ROWS):
        row = tl.load(hyper_ptr + i * COLUMNS + offs)
        if ADAM:
            rate = tl.load(hyper_ptr + i * COLUMNS + 1).to(tl.float64)
            if i == 0:
                bias1 = 1.0 - _power(tl.load(decays_ptr), count)
            step = rate / bias1
            if i == 0:
                inv_sqrt_bc2 = 1.0 / tl.sqrt(1.0 - _power(tl.load(decays_ptr + 1), count))
            row = tl.where(offs == 1, step.to(tl.float32), row)
            row = tl.where(offs == 2, inv_sqrt_bc2.to(tl.float32), row)
        if has(OPTIMIZER, "ema"):
            weight = tl.load(hyper_ptr + i * COLUMNS + EMA_NUMERATOR).to(tl.float64) / (10.0 + count)
            weight = tl.maximum(weight.to(tl.float32), tl.load(hyper_ptr + i * COLUMNS + EMA_WEIGHT))
            row = tl.where(offs == EMA_WEIGHT, weight, row)
        tl.store(row_ptr + i * COLUMNS + offs, row)
