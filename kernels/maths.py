"""Device functions that Triton does not have, or has with too large an error."""

import triton
import triton.language as tl


@triton.jit
def tanh(z):
    """tanh(z) within 2 ulp in float32.

    1 - 2 / (1 + e^2|z|) cancels near 0, so |z| < 0.5 takes the odd polynomial |z| (1 + u p(u)), u = z^2,
    whose coefficients are the minimax fit of (tanh(z)/z - 1)/u there (0.52 ulp).
    """
    u = z * z
    p = -0.0066535575315356255 * u + 0.021301694214344025
    p = p * u - 0.05389996990561485
    p = p * u + 0.13332970440387726
    p = p * u - 0.333333283662796
    near = z + z * (u * p)
    magnitude = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * tl.abs(z)))
    far = tl.where(z < 0.0, -magnitude, magnitude)
    return tl.where(tl.abs(z) < 0.5, near, far)


@triton.jit
def log1p_small(x):
    """log(1 + x) within 2 ulp for -1/2 <= x <= 1: 2 artanh(s) with s = x / (2 + x), |s| <= 1/3, as its series."""
    s = x / (2.0 + x)
    u = s * s
    series = u * (1.0 / 15.0) + 1.0 / 13.0
    series = series * u + 1.0 / 11.0
    series = series * u + 1.0 / 9.0
    series = series * u + 1.0 / 7.0
    series = series * u + 1.0 / 5.0
    series = series * u + 1.0 / 3.0
    return 2.0 * s + 2.0 * s * (u * series)
