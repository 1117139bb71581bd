"""The optimizers' update of one block of parameters, as device functions inlined into the weight-gradient kernels.

    sgd        g += wd w                          w -= lr g
    momentum   g += wd w      m = mu m + g        w -= lr m,  or with Nesterov  w -= lr (g + mu m)
    adamw      w *= 1 - lr wd m += (1 - b1)(g - m), v = b2 v + (1 - b2) g^2
                                                  w -= step m / (sqrt(v) inv_sqrt_bc2 + eps)
               step = lr / (1 - b1^t), inv_sqrt_bc2 = 1 / sqrt(1 - b2^t)

These are torch.optim.SGD's and AdamW's rules, term by term. What depends on the step number t is computed on the host
in float64 and handed over as a row of four float32 a step: (lr, 1 - lr wd, step, inv_sqrt_bc2). So is 1 - b2, which
in float32 would be wrong in its fifth digit.
"""

import triton
import triton.language as tl

#: Columns of the table of per-step values.
HYPER_COLUMNS = 4


@triton.jit
def update_block(
    g, w_ptr, low_ptr, m_ptr, v_ptr, offs, state_offs, mask, hyper_ptr,
    momentum, weight_decay, one_minus_beta1, beta2, one_minus_beta2, eps,
    OPTIMIZER: tl.constexpr, NESTEROV: tl.constexpr, HAS_LOW: tl.constexpr,
):  # fmt: skip
    """Apply the float32 gradient block g to the parameters at w_ptr + offs and their state at m_ptr, v_ptr +
    state_offs; with HAS_LOW also write them, rounded, to low_ptr + offs.
    """
    lr = tl.load(hyper_ptr)
    w = tl.load(w_ptr + offs, mask=mask, other=0.0)
    if OPTIMIZER == "sgd":
        w -= lr * (g + weight_decay * w)
    elif OPTIMIZER == "momentum":
        g += weight_decay * w
        m = momentum * tl.load(m_ptr + state_offs, mask=mask, other=0.0) + g
        tl.store(m_ptr + state_offs, m, mask=mask)
        if NESTEROV:
            w -= lr * (g + momentum * m)
        else:
            w -= lr * m
    else:
        tl.static_assert(OPTIMIZER == "adamw", "unknown optimizer")
        m = tl.load(m_ptr + state_offs, mask=mask, other=0.0)
        v = tl.load(v_ptr + state_offs, mask=mask, other=0.0)
        m += (g - m) * one_minus_beta1
        v = beta2 * v + one_minus_beta2 * g * g
        tl.store(m_ptr + state_offs, m, mask=mask)
        tl.store(v_ptr + state_offs, v, mask=mask)
        w *= tl.load(hyper_ptr + 1)
        w -= tl.load(hyper_ptr + 2) * m / (tl.sqrt(v) * tl.load(hyper_ptr + 3) + eps)
    tl.store(w_ptr + offs, w, mask=mask)
    if HAS_LOW:
        # Four values a thread, as of the float32 parameters beside them. The compiler would give a thread 16 bytes of
        # these, eight values, and then half a sector at a time of those.
        low_ptrs = low_ptr + offs
        if len(offs.shape) == 2:
            low_ptrs = tl.max_contiguous(low_ptrs, [1, 4])
        else:
            low_ptrs = tl.max_contiguous(low_ptrs, [4])
        tl.store(low_ptrs, w.to(low_ptr.dtype.element_ty), mask=mask)
