"""quick_gelu and its slope, for the kernels that they ride in.

Values of dtype ``to`` bfloat16 take the sigmoid from the GPU's own tanh: one special instruction a number in place of
an exponential and a division. Its relative error of up to 2^-11 is at most |u| 2^-12 in quick_gelu(u), an eighth of
bfloat16's rounding of a positive u. Other dtypes and the slope take the exact form.
"""

import triton
import triton.language as tl

from ..dispatch import INTERPRETED

INLINE = tl.constexpr(not INTERPRETED)  # the interpreter runs no inline assembly


@triton.jit
def _tanh(x):
    if INLINE:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def quick_gelu_value(u, to: tl.constexpr = tl.float32):
    """u sigmoid(1.702 u), float32 in and out, to be rounded to the dtype ``to``."""
    if to == tl.bfloat16:
        # sigmoid(x) = (1 + tanh(x / 2)) / 2
        half = 0.5 * u
        return half + half * _tanh(0.851 * u)
    return u * tl.sigmoid(1.702 * u)


@triton.jit
def quick_gelu_slope(u):
    """d quick_gelu / du = s + 1.702 u s (1 - s) with s = sigmoid(1.702 u), float32 in and out."""
    s = tl.sigmoid(1.702 * u)
    return s + 1.702 * u * s * (1.0 - s)
