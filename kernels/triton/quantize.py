"""Rounding to e4m3 in one pass: LayerNorm with a scale for each row, and quick_gelu with a scale that is given.

What ``fp8.py`` computes with torch, for the products of ``torch._scaled_mm``. The conversion to e4m3 needs compute
capability 8.9.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import quick_gelu_value
from .gemm import rows_of
from .launching import cdiv, launch
from .layer_norm import normalize, saturate
from .quick_gelu import BLOCK


@triton.jit
def _quick_gelu_fp8_kernel(
    u_ptr,  # (size,)
    h_ptr,  # (size,) e4m3
    size,
    scale,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(u_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    h = saturate(quick_gelu_value(u) / scale)
    tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=at < size)


def layer_norm_fp8(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """LN(x) of x (M, D) in e4m3, contiguous, each row over its scale, and the scales (M,) float32."""
    x = rows_of(x)
    scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    _, y, *_ = normalize(x, weight.contiguous(), bias.contiguous(), eps, torch.float8_e4m3fn, scale=scale)
    assert y is not None
    return y, scale


def quick_gelu_fp8(u: Tensor, scale: float) -> Tensor:
    """quick_gelu(u) / scale in e4m3, saturated at 448: u contiguous, its shape out."""
    h = torch.empty_like(u, dtype=torch.float8_e4m3fn)
    launch(_quick_gelu_fp8_kernel, (cdiv(u.numel(), BLOCK),), u, h, u.numel(), float(scale), BLOCK=BLOCK)
    return h
