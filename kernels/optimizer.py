"""The optimizers' update of one block of parameters, as a device function inlined into the weight-gradient kernels.

    sgd        g += wd w                          w -= lr g
    momentum   g += wd w      m = mu m + g        w -= lr m
    nesterov   as momentum, but                   w -= lr (g + mu m)
    adamw      w *= 1 - lr wd m += (1 - b1)(g - m), v = b2 v + (1 - b2) g^2
                                                  w -= step m / (sqrt(v) inv_sqrt_bc2 + eps)
               step = lr / (1 - b1^t), inv_sqrt_bc2 = 1 / sqrt(1 - b2^t)

These are torch.optim.SGD's and AdamW's rules, term by term. The host computes in float64 what depends on the step
number t, and hands it over as one row of four float32 per step: (lr, 1 - lr wd, step, inv_sqrt_bc2). The host also
computes 1 - b1 and 1 - b2, since 1 - b2 in float32 would be wrong in its fifth digit.

    rule                states    constants
    sgd                           wd
    momentum, nesterov  m         wd, mu
    adamw               m, v      1 - b1, b2, 1 - b2, eps
"""

import triton
import triton.language as tl

#: Columns of the table of per-step values.
HYPER_COLUMNS = 4


@triton.jit
def _updated_block(
    g, w_ptr, low_ptr, states, offs, state_offs, mask, hyper_ptr, constants, OPTIMIZER: tl.constexpr,
    LOW_IS_PARAM: tl.constexpr,
):  # fmt: skip
    """Apply the float32 gradient block g to the parameters at w_ptr + offs and to their states at offset state_offs.

    Unless ``low_ptr`` is None, also write the parameters, rounded, to low_ptr + offs. With ``LOW_IS_PARAM`` these are
    the parameters themselves and w_ptr their masters. A parameter that is not the rounded master was assigned since the
    last update, and takes the master's place.
    """
    lr = tl.load(hyper_ptr)
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
    if OPTIMIZER == "sgd":
        w -= lr * (g + constants[0] * w)
    elif OPTIMIZER == "momentum" or OPTIMIZER == "nesterov":
        g += constants[0] * w
        momentum = constants[1]
        m = momentum * tl.load(states[0] + state_offs, mask=mask, other=0.0) + g
        tl.store(states[0] + state_offs, m, mask=mask)
        if OPTIMIZER == "nesterov":
            w -= lr * (g + momentum * m)
        else:
            w -= lr * m
    else:
        tl.static_assert(OPTIMIZER == "adamw", "unknown optimizer")
        m = tl.load(states[0] + state_offs, mask=mask, other=0.0)
        v = tl.load(states[1] + state_offs, mask=mask, other=0.0)
        m += (g - m) * constants[0]
        v = constants[1] * v + constants[2] * g * g
        tl.store(states[0] + state_offs, m, mask=mask)
        tl.store(states[1] + state_offs, v, mask=mask)
        w *= tl.load(hyper_ptr + 1)
        w -= tl.load(hyper_ptr + 2) * m / (tl.sqrt(v) * tl.load(hyper_ptr + 3) + constants[3])
    tl.store(w_ptr + offs, w, mask=mask)
    if low_ptr is not None:
        tl.store(low_ptrs, w.to(low_ptr.dtype.element_ty), mask=mask)


@triton.jit
def update_block(
    g, w_ptr, low_ptr, states, offs, state_offs, mask, hyper_ptr, constants, OPTIMIZER: tl.constexpr,
    LOW_IS_PARAM: tl.constexpr,
):  # fmt: skip
    """The update of a block. Without an optimizer ("none") the gradient takes the place of the parameters."""
    if OPTIMIZER == "none":
        tl.store(w_ptr + offs, g.to(w_ptr.dtype.element_ty), mask=mask)
    else:
        _updated_block(
            g, w_ptr, low_ptr, states, offs, state_offs, mask, hyper_ptr, constants, OPTIMIZER, LOW_IS_PARAM
        )  # fmt: skip
