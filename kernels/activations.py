"""Elementwise activations as Triton device functions, inlined into the epilogue of every GEMM.

    a  = f(z)                          ``activate``
    dz = da * f'(z)                    ``activation_grad``

f' is written in terms of what the forward pass keeps. sigmoid, relu, tanh, step and leaky_relu give it from
the output a, so z is never stored; gelu and silu are not invertible, so their forward keeps z:

    sigmoid      a = 1 / (1 + e^-z)                    f' = a (1 - a)
    tanh         a = tanh z                            f' = 1 - a^2
    relu         a = max(z, 0)                         f' = [a > 0]
    leaky_relu   a = z or 0.01 z                       f' = 1 or 0.01 by the sign of a, which is the sign of z
    step         a = [z >= 0]                          f' = 0
    gelu         a = z Phi(z), Phi the normal CDF      f' = Phi(z) + z phi(z)
    silu         a = z s(z),   s = sigmoid             f' = s(z) (1 + z (1 - s(z)))

At the kinks f' takes torch's value (0 at relu's, 0.01 at leaky_relu's), and NaN passes through relu as in torch.
All arithmetic is float32. Each function is checked against ``fastmlp.reference`` in every kernel's test.
"""

import triton
import triton.language as tl

from .maths import tanh

LEAKY_SLOPE: tl.constexpr = tl.constexpr(0.01)
_INV_SQRT_2: tl.constexpr = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI: tl.constexpr = tl.constexpr(0.3989422804014327)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """a = f(z) for a float32 block z."""
    if ACTIVATION == "identity":
        a = z
    elif ACTIVATION == "sigmoid":
        a = tl.sigmoid(z)
    elif ACTIVATION == "relu":
        a = tl.where(z <= 0.0, 0.0, z)
    elif ACTIVATION == "tanh":
        a = tanh(z)
    elif ACTIVATION == "step":
        a = tl.where(z >= 0.0, 1.0, 0.0)
    elif ACTIVATION == "leaky_relu":
        a = tl.where(z > 0.0, z, LEAKY_SLOPE * z)
    elif ACTIVATION == "gelu":
        a = z * (0.5 + 0.5 * tl.erf(z * _INV_SQRT_2))
    else:
        tl.static_assert(ACTIVATION == "silu", "unknown activation")
        a = z * tl.sigmoid(z)
    return a


@triton.jit
def activation_grad(da, saved, ACTIVATION: tl.constexpr):
    """dz = da * f' for float32 blocks; ``saved`` is z for gelu and silu, else the output a (unused by identity)."""
    if ACTIVATION == "identity":
        dz = da
    elif ACTIVATION == "sigmoid":
        dz = da * (saved * (1.0 - saved))
    elif ACTIVATION == "relu":
        dz = tl.where(saved <= 0.0, 0.0, da)
    elif ACTIVATION == "tanh":
        dz = da * (1.0 - saved * saved)
    elif ACTIVATION == "step":
        dz = da * 0.0
    elif ACTIVATION == "leaky_relu":
        dz = tl.where(saved > 0.0, da, LEAKY_SLOPE * da)
    elif ACTIVATION == "gelu":
        cdf = 0.5 + 0.5 * tl.erf(saved * _INV_SQRT_2)
        pdf = _INV_SQRT_2PI * tl.exp(-0.5 * saved * saved)
        dz = da * (cdf + saved * pdf)
    else:
        tl.static_assert(ACTIVATION == "silu", "unknown activation")
        s = tl.sigmoid(saved)
        dz = da * (s * (1.0 + saved * (1.0 - s)))
    return dz


@triton.jit
def unscaled(saved, factor, ACTIVATION: tl.constexpr):
    """``saved`` times ``factor`` where f' depends on the value of the output a, and not only on its sign."""
    if ACTIVATION == "sigmoid" or ACTIVATION == "tanh":
        saved = saved * factor
    return saved
