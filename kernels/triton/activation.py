"""quick_gelu and its slope, for the kernels that they ride in."""

import triton
import triton.language as tl


@triton.jit
def quick_gelu_value(u):
    """u sigmoid(1.702 u), float32 in and out."""
    return u * tl.sigmoid(1.702 * u)


@triton.jit
def quick_gelu_slope(u):
    """d quick_gelu / du = s + 1.702 u s (1 - s) with s = sigmoid(1.702 u), float32 in and out."""
    s = tl.sigmoid(1.702 * u)
    return s + 1.702 * u * s * (1.0 - s)
